"""Two questions of L3 about rounding: does the state wander off over many steps, and what if sums were in float16?"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.chat.conversation import chunks
from export.quantize.quantizer import Quantizer
from export.validate import metrics, reference
from export.validate.case import Case, Rung
from export.validate.gates import Check, recorded
from export.validate.lowered import shallow
from export.validate.probe import make_probe
from export.validate.replay import replay
from targets.base import UNBOUNDED, Job, Session

FULL_CACHE_TOKENS = 4096
STRESS_STEPS = 16
"""Decode steps of the run with float16 sums, behind the prompt of the probe."""


def drift(
    case: Case,
    session: Session,
    quality_check: Callable[[str, float], Check],
    series: dict[str, Any],
    notes: list[str],
) -> list[Check]:
    """KL after many teacher-forced decode steps: does the recurrent state wander off?

    The steps are the last ones of a full cache, up to contexts whose reference would take too long. A context without
    room for all of them behind a first token has fewer. Other layouts of states are lowered anew, so that theirs has
    room for all steps behind a chunk.
    """
    tokens = min(FULL_CACHE_TOKENS, int(case.manifest["context_length"]))
    steps = min(case.drift_steps, tokens - 1)
    layouts = case.target.capabilities.state_layouts
    compared = bool(layouts) and shallow(case.config) is case.config  # else another lowering would take too long
    room = case.drift_steps + min(case.prefill_lengths, default=1)
    longest = max(tokens, room) if compared else tokens
    probe = make_probe(case.config, longest, (), seed=1, text=case.text)
    rows = reference.embed(case.checkpoint, probe.ids)
    truth, _ = reference.hf_sequence(case.checkpoint, case.config, rows, probe.positions, tokens - steps)

    def divergence(opened: Session, tokens: int, steps: int) -> NDArray[np.float64]:
        plan = [*chunks(tokens - steps, case.prefill_lengths), *[(None, 1)] * steps]
        given = rows[:tokens].astype(case.floats)
        logits = np.stack(replay(opened, given, probe.positions, plan, junk=0.0))[-steps:]
        return metrics.kl(truth[tokens - steps : tokens], logits)

    def quarter(kl: NDArray[np.float64]) -> int:
        return max(1, len(kl) // 4)

    kl = divergence(session, tokens, steps)
    series["drift_kl"] = [float(x) for x in kl]
    series["drift_kl_by_layout"] = {}
    checks = [
        quality_check("drift", float(kl[-quarter(kl) :].mean())),
        recorded("L3.drift_first", float(kl[: quarter(kl)].mean())),
        recorded("L3.drift_steps", steps),
        recorded("L3.drift_context", tokens),
    ]
    notes.append(
        f"L3.drift is over {steps:,} decode steps"
        + (f", all that a context of {tokens:,} holds behind a first token." if steps < case.drift_steps else ".")
    )
    for layout in layouts if compared else ():
        with _in_layout(case, layout, longest) as other:
            found = divergence(other, longest, case.drift_steps)
        series["drift_kl_by_layout"][layout] = [float(x) for x in found]
        checks.append(recorded(f"L3.drift_{layout}", float(found[-quarter(found) :].mean()), "L3.drift_layout"))
    if compared:
        notes.append(
            f"The drift of other layouts of the states is over {case.drift_steps:,} decode steps, by decoders lowered "
            f"for it alone, with a context of {longest:,}."
        )
    elif layouts:
        notes.append(
            "The drift of other layouts of the states was not measured: lowering a model of this size once more for "
            "each would take too long."
        )
    return checks


@contextmanager
def _in_layout(case: Case, layout: str, context_length: int) -> Iterator[Session]:
    """The bundle's decoder with its states kept in another way, and another context."""
    place = case.folder if case.folder.suffix == ".partial" else case.folder.parent
    with tempfile.TemporaryDirectory(prefix="drift-", dir=place) as scratch:
        job = Job(
            case.config,
            Quantizer(case.weights, case.recipe),
            context_length,
            case.prefill_lengths,
            (),
            Path(scratch),
            max_file_bytes=UNBOUNDED,  # no phone maps these files; the bundle may have had a limit of its own
            profile=case.manifest["target"]["profile"],
            state_layout=layout,
        )
        lowered = case.target.lower(job)
        manifest = {
            **case.manifest,
            "signatures": lowered.signatures,
            "states": lowered.states,
            "context_length": context_length,
        }
        with closing(case.target.open(Path(scratch), manifest, case.threads)) as session:
            yield session


def stress(case: Case, session: Session, rows: NDArray[Any], logits: NDArray[Any], rung: Rung) -> None:
    """Into `rung`: how far a session whose sums are rounded to float16 as they grow is from the same without.

    Args:
        rows: [T, D] of the probe, from the bundle without stress: only the decoder is stressed.
        logits: [calls, V] of the bundle without stress.
    """
    prompt = sum(length is not None for length, _ in case.plan)
    plan = case.plan[: prompt + STRESS_STEPS]
    tokens = sum(valid for _, valid in plan)
    stressed = np.stack(replay(session, rows[:tokens], case.probe.positions, plan, junk=0.0))
    kl = metrics.kl(logits[: len(plan)], stressed)
    rung.series["stress_kl"] = [float(x) for x in kl]
    rung.checks.append(recorded("L3.stress_kl", float(kl.mean())))
    rung.notes.append(
        f"L3.stress_kl is the KL of the bundle from itself, emulated with sums rounded to float16 as they grow, after "
        f"{len(plan)} calls on the first {tokens} tokens: it shows sensitivity and is no model of any device."
    )
