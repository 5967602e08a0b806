"""Two questions of L3 about rounding: does the state wander off over many steps, and what if sums were in float16?"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.chat.conversation import chunks
from export.quantize.quantizer import Quantizer
from export.validate import metrics, reference, teacher
from export.validate.case import Case, Rung
from export.validate.gates import Check, recorded
from export.validate.lowered import shallow
from export.validate.probe import make_probe
from export.validate.reference import pieces
from export.validate.replay import replay
from export.validate.scores import Scores
from export.validate.teacher import Reading
from targets.base import UNBOUNDED, Job, Session

FULL_CACHE_TOKENS = 4096
STRESS_STEPS = 16
"""Decode steps of the run with float16 sums, behind the prompt of the probe."""


@dataclass(frozen=True)
class Drift:
    """What was read to the end of a full cache."""

    scores: Scores
    """Of every call on the bundle itself; the last `steps` are decode steps."""
    steps: int
    context: int
    by_layout: dict[str, Scores]
    """Of the decode steps of decoders with other layouts of states."""

    def checks(self, text_check: Callable[[str, float], Check]) -> list[Check]:
        """Weighted means over the last and the first quarter of the steps."""
        steps = self.scores[-self.steps :]
        part = quarter(self.steps)
        return [
            text_check("drift", steps[-part:].kl_mean),
            recorded("L3.drift_first", steps[:part].kl_mean),
            recorded("L3.drift_steps", self.steps),
            recorded("L3.drift_context", self.context),
            *(
                recorded(f"L3.drift_{name}", each[-quarter(len(each)) :].kl_mean, "L3.drift_layout")
                for name, each in self.by_layout.items()
            ),
        ]


def drift(case: Case, session: Session, series: dict[str, Any], notes: list[str]) -> Drift:
    """A text read to the end of a full cache, its last tokens one by one: does the recurrent state wander off?

    Up to contexts whose reference would take too long. A context without room for all steps behind a first token has
    fewer. Other layouts of states are lowered anew, so that theirs has room for all steps behind a chunk.
    """
    asked = case.drift_steps
    tokens = min(FULL_CACHE_TOKENS, int(case.manifest["context_length"]))
    steps = min(asked, tokens - 1)
    layouts = case.target.capabilities.state_layouts
    compared = bool(layouts) and shallow(case.config) is case.config  # else another lowering would take too long
    longest = max(tokens, asked + min(case.prefill_lengths, default=1)) if compared else tokens
    text = make_probe(case.config, longest, (), seed=1, text=case.text)
    rows = np.asarray(session.run("embed", {"input_ids": np.asarray([text.ids], np.int64)})["embeddings"][0])
    plans = {size: _plan(size, min(asked, size - 1), case.prefill_lengths) for size in (tokens, longest)}
    ends = {size: [first + valid - 1 for first, _, valid in pieces(size, plan)] for size, plan in plans.items()}
    wanted = sorted({end for places in ends.values() for end in places})

    def read_by_transformers() -> NDArray[np.float32]:
        reading = Reading(reference.embed(case.checkpoint, text.ids), text.positions, wanted)
        with case.pace.part("text", case.layers):
            return teacher.hf_logits(case.checkpoint, case.config, [reading], advance=case.pace.advance)[0]

    truth = case.once("text", read_by_transformers, tuple(text.ids), tuple(wanted))

    def scores(opened: Session, size: int) -> Scores:
        with case.pace.part("drift", len(plans[size])):
            found = replay(opened, rows[:size], text.positions, plans[size], junk=0.0, advance=case.pace.advance)
        logits = np.stack(found)
        places = [wanted.index(end) for end in ends[size]]
        came = [text.ids[end + 1] if end + 1 < longest else None for end in ends[size]]
        return Scores.of(truth[places], logits, came)

    read = scores(session, tokens)
    by_layout: dict[str, Scores] = {}
    series["drift_kl"] = [float(x) for x in read[-steps:].kl]
    notes.append(
        f"L3.drift is over {steps:,} decode steps"
        + (f", all that a context of {tokens:,} holds behind a first token." if steps < asked else ".")
    )
    for layout in layouts if compared else ():
        with _in_layout(case, layout, longest) as other:
            by_layout[layout] = scores(other, longest)[-asked:]
    series["drift_kl_by_layout"] = {name: [float(x) for x in found.kl] for name, found in by_layout.items()}
    if compared:
        notes.append(
            f"The drift of other layouts of the states is over {asked:,} decode steps, by decoders lowered "
            f"for it alone, with a context of {longest:,}."
        )
    elif layouts:
        notes.append(
            "The drift of other layouts of the states was not measured: lowering a model of this size once more for "
            "each would take too long."
        )
    return Drift(read, steps, tokens, by_layout)


def _plan(tokens: int, steps: int, lengths: tuple[int, ...]) -> list[tuple[int | None, int]]:
    return [*chunks(tokens - steps, lengths), *[(None, 1)] * steps]


def quarter(steps: int) -> int:
    """A quarter of them, at least one."""
    return max(1, steps // 4)


@contextmanager
def _in_layout(case: Case, layout: str, context_length: int) -> Iterator[Session]:
    """The bundle's decoder with its states kept in another way, and another context."""
    place = case.folder if case.folder.suffix == ".partial" else case.folder.parent
    with tempfile.TemporaryDirectory(prefix="drift-", dir=place) as scratch:
        job = Job(
            case.weights.config,
            Quantizer(case.weights, case.recipe, case.target.capabilities.smallest_scale),
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
    with case.pace.part("stress", len(plan)):
        found = replay(session, rows[:tokens], case.probe.positions, plan, junk=0.0, advance=case.pace.advance)
    stressed = np.stack(found)
    kl = metrics.kl(logits[: len(plan)], stressed)
    rung.series["stress_kl"] = [float(x) for x in kl]
    rung.checks.append(recorded("L3.stress_kl", float(kl.mean())))
    rung.notes.append(
        f"L3.stress_kl is the KL of the bundle from itself, emulated with sums rounded to float16 as they grow, after "
        f"{len(plan)} calls on the first {tokens} tokens: it shows sensitivity and is no model of any device."
    )
