"""L0 to L3: where did an error enter?

Every rung is a function from a `Case` to a `Rung` and can be run alone; L1 is in `lowered`, parts of L3 in `drift` and
`answers`. The same functions serve the export, `python -m export validate` and the tests, whose deliberately wrong
lowerings must fail here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.chat.conversation import Contract
from export.model import state
from export.model.positions import splice
from export.quantize.quantizer import Quantizer
from export.quantize.recipe import Setting, general
from export.validate import costs, metrics, reference, rounding
from export.validate.answers import own_answers, task_accuracy, text_runner
from export.validate.case import Case, Rung, make_plan
from export.validate.drift import drift, stress
from export.validate.gates import DEPTH, FLOOR, GATES, Check, gated, recorded
from export.validate.lowered import l1
from export.validate.probe import picture_tokens
from export.validate.replay import canonical, image_embeddings, replay, state_errors, state_noise, worst
from export.validate.scores import Scores
from targets.base import Rows, Session

RUNGS = ("L0", "L1", "L2", "L3")
UNQUANTISED = ("fp32", "fp16")
"""Kinds of weights (`quality`) that nothing rounds but the dtype of the bundle's floats."""


def l0(case: Case) -> Rung:
    """Our modules in PyTorch fp32 against transformers: logits of every token and every state.

    transformers' side takes tying, positions, splicing and pictures from transformers too, ours from this project.
    Where the whole of transformers' model fits the memory, its one forward pass is held against its streamed layers.
    Both are held apart by what float32 loses in the same sums (`rounding`), on whatever checkpoint.
    No bundle takes part, so that several of one checkpoint, conditioned alike, need it once.
    """
    return case.once("L0", lambda: _l0(case), case.prefill_lengths, case.recipe.conditioning, case.scale)


def _l0(case: Case) -> Rung:
    truth, true_states = case.truth
    rows_needed = state.cache_rows(len(case.probe.ids), case.prefill_lengths)
    rows = case.to_stream(reference.embed(case.checkpoint, case.probe.ids))
    with case.pace.part("pictures", 2):
        seen = reference.own_vision(case.weights, [*case.probe.images, *case.pictures])
        images, ours = seen[: len(case.probe.images)], seen[len(case.probe.images) :]
        case.pace.advance()
        its_rounding = rounding.of_pictures(case.weights, case.pictures, ours)
    rows = splice(rows, case.probe.ids, case.config.image_token_id, images)
    passes = [reference.Pass(case.plan, rows_needed), *rounding.passes(len(rows))]
    with case.pace.part("ours", case.layers):
        (logits, states), *both = reference.own_sequences(
            case.weights, rows, case.probe.positions, passes, advance=case.pace.advance
        )
    errors = state_errors(case.config, true_states, states, len(case.probe.ids))
    layers = case.config.text.num_hidden_layers
    unit = rounding.between(case.config, len(rows), *both)
    worst_state, its_unit = unit.worst(errors, FLOOR)
    checks = [
        gated("L0.logits", metrics.relative(truth, logits), rounding=unit.logits),
        gated("L0.states", worst_state, rounding=its_unit),
    ]
    units = [unit.largest]
    if case.pictures:
        units.append(its_rounding)
        checks.append(gated("L0.vision", worst(case.true_pictures, ours), rounding=its_rounding))
        # Fewer than two where the context is too short for them: then no rung saw what a picture leaves behind.
        checks.append(recorded("L0.pictures_in_text", len(images)))
    if case.whole.logits is not None:
        checks.append(gated("L0.whole_model", metrics.relative(case.whole.logits, truth), layers=layers))
    checks.append(gated("L0.rounding", max(units)))
    return Rung("L0", checks, {"states": errors, "rounding": dict(unit.states)}, [case.whole.note])


def l2(case: Case) -> Rung:
    """Every weight of the artifact, dequantised, against the quantiser's reference, bit for bit; and how far that
    reference is from the checkpoint, tensor by tensor.
    """
    quantizer = Quantizer(case.weights, case.recipe, case.target.capabilities.smallest_scale)
    compared, wrong, names = 0, 0, []
    seen: dict[Any, int] = {}
    for name, (start, block) in _counted(case, quantizer):
        parameter, _, size = name.partition("@")
        if size:
            expected = _positions(quantizer, parameter, size)
        else:
            expected = quantizer.reference_rows(parameter, start, start + len(block), case.floats)
        # As bits: a NaN differs from itself, and -0 is another weight than 0 only in name.
        different = expected.numel()
        if expected.numel() == block.numel():
            different = int((expected.reshape(block.shape) != block).sum())
        compared += block.numel()
        wrong += different
        key = _content(quantizer, parameter), size
        seen[key] = seen.get(key, 0) + len(block)
        if different and name not in names:
            names.append(name)
    missing = sorted(set(_expected(case, quantizer, seen)))
    errors = dict(sorted(quantizer.relative_errors().items(), key=lambda item: _worse(item[1]), reverse=True))
    checks = [
        gated("L2.mismatches", wrong),
        gated("L2.missing", len(missing)),
        gated("L2.tensor_error", next(iter(errors.values()), 0.0)),
        recorded("L2.weights", compared),
    ]
    notes = [
        f"{name} was lost in storage: its error is {error:.0%} of its own size. Store its role with more bits, or "
        "scale the tensor up in the checkpoint, and down what reads it."
        for name, error in errors.items()
        if not GATES["L2.tensor_error"].passes(error)
    ]
    return Rung("L2", checks, {"wrong": names, "missing": missing, "tensor_errors": errors}, notes)


def _counted(case: Case, quantizer: Quantizer) -> Iterator[tuple[str, Rows]]:
    """The stored weights; how many are behind us is told."""
    with case.pace.part("weights", sum(math.prod(p.shape) for p in case.weights.parameters.values())):
        for name, rows in case.target.stored_weights(case.folder, case.manifest, quantizer):
            yield name, rows
            case.pace.advance(rows[1].numel())


def _worse(error: float) -> float:
    return math.inf if math.isnan(error) else error


def _content(quantizer: Quantizer, name: str) -> tuple[Any, ...]:
    """What a parameter's stored bytes depend on: a tied head and embedding have one content."""
    parameter = quantizer.weights.parameter(name)
    return parameter.segments, parameter.transform, quantizer.setting(name)


def _positions(quantizer: Quantizer, name: str, size: str) -> Any:
    """The learned vision positions at an image size HxW, which targets may store in place of the learned table."""
    from export.model.operators import resample_positions

    vision = quantizer.weights.config.vision
    if vision is None:
        raise ValueError(f"{name}: the model has no vision encoder")
    height, width = (int(side) // vision.patch_size for side in size.split("x"))
    return resample_positions(quantizer.weights.tensor(name), height, width, vision.spatial_merge_size)


def _expected(case: Case, quantizer: Quantizer, seen: Mapping[Any, int]) -> Iterator[str]:
    """Parameters of which the artifact holds no row, or not all rows."""
    for name, parameter in quantizer.weights.parameters.items():
        content = _content(quantizer, name)
        if seen.get((content, ""), 0) >= parameter.shape[0]:
            continue
        tables = [f"{h}x{w}" for h, w in case.image_sizes] if name.endswith("position_weight") else []
        if not tables:
            yield name
        yield from (f"{name}@{size}" for size in tables if (content, size) not in seen)


def l3(case: Case) -> Rung:
    """The shipped artifact on its runtime against transformers fp32."""
    if case.chats:
        _ = case.given  # before the session is opened: both would hold the weights
    with closing(case.target.open(case.folder, case.manifest, case.threads)) as session:
        rung, rows, logits = _l3(case, session)
    # After the session is closed: both would hold the weights.
    stressed = case.target.open_stressed(case.folder, case.manifest, case.threads)
    if stressed is not None:
        with closing(stressed):
            stress(case, stressed, rows, logits, rung)
    return rung


def _l3(case: Case, session: Session) -> tuple[Rung, NDArray[Any], NDArray[Any]]:
    """The rung, the rows [T, D] of the probe as the bundle embeds them, and the logits [calls, V] after its calls."""
    truth, true_states = case.truth
    contract = Contract.of(case.manifest)
    probe, config = case.probe, case.config
    rows = np.asarray(session.run("embed", {"input_ids": np.asarray([probe.ids], np.int64)})["embeddings"][0])
    images = image_embeddings(session, probe.images)
    rows = splice(rows, probe.ids, contract.image_token_id, images)
    ends = [first + valid - 1 for first, _, valid in reference.pieces(len(rows), case.plan)]
    with case.pace.part("probe", len(case.plan)):
        logits = np.stack(replay(session, rows, probe.positions, case.plan, junk=0.0, advance=case.pace.advance))
    found = canonical(config, session.states())
    errors = state_errors(config, true_states, found, len(rows))
    kind = quality(case)
    quality_check = _gate_of(case, kind, case.gate_quality)

    series: dict[str, Any] = {"states": errors}
    notes: list[str] = []
    at_text = [n for n, end in enumerate(ends) if probe.before_text(config, end)]
    at_pictures = sorted(set(range(len(ends))) - set(at_text))
    scored = {
        name: Scores.of(truth[[ends[n] for n in chosen]], logits[chosen], [probe.next(ends[n]) for n in chosen])
        for name, chosen in (("text", at_text), ("pictures", at_pictures))
    }
    series |= {"kl": [float(x) for x in scored["text"].kl], "rows": [ends[n] for n in at_text]}
    series |= {"picture_kl": [float(x) for x in scored["pictures"].kl], "picture_rows": [ends[n] for n in at_pictures]}
    worst_state = max(errors.values())
    if kind in UNQUANTISED:
        checks = [quality_check("states", worst_state)]
    else:
        noise = max(state_noise(true_states, found, len(rows)).values())
        checks = [quality_check("state_noise", noise), recorded("L3.states", worst_state)]
    text = scored["text"]
    read = drift(case, session, series, notes) if case.drift_steps else None
    if read is not None:
        text = Scores.joined([text, read.scores])
    known = case.text is None or case.familiar or not text.lost(config.text.vocab_size)
    text_check = _gate_of(case, kind, case.gate_quality and known)
    of_text = [*_text_checks(case, text, text_check, notes), text_check("chunking", _chunking(case, session, rows))]
    if read is not None:
        of_text += read.checks(text_check)
    if not known:
        notes.append(
            f"The checkpoint never learned the text of the probe: transformers' perplexity on it is "
            f"{text.perplexity_reference:,.0f} with a vocabulary of {config.text.vocab_size:,}. What is measured on it "
            "is recorded without a gate; the answers judge."
        )
    checks = [*of_text, *checks]
    if at_pictures:
        checks.append(recorded("L3.kl_pictures", float(scored["pictures"].kl.mean())))
    if case.pictures:
        seeing = quality(case, "vision")
        value = worst(case.true_pictures, image_embeddings(session, case.pictures))
        checks.append(gated("L3.vision", value, f"L3.{seeing}.vision", enforced=case.gate_quality))
    checks += text_runner(session, probe, picture_tokens(config))
    if case.chats:
        checks += own_answers(case, session, contract, quality_check, series, notes)
    if case.task is not None:
        checks += task_accuracy(case, case.task, session, contract, quality_check, series)
    return Rung("L3", checks, series, notes), rows, logits


def _gate_of(case: Case, kind: str, enforced: bool) -> Callable[[str, float], Check]:
    """Checks of L3 by the gates of a kind of weights, or by those for all quantised ones where it has none."""

    def check(name: str, value: float) -> Check:
        own = f"L3.{kind}.{name}"
        gate = own if own in GATES else f"L3.{name}"
        noise = case.noise if gate in GATES and GATES[gate].of_noise else None
        layers = case.config.text.num_hidden_layers if name == "state_noise" else DEPTH
        return gated(f"L3.{name}", value, gate, enforced=enforced, noise=noise, layers=layers)

    return check


def _text_checks(
    case: Case, text: Scores, text_check: Callable[[str, float], Check], notes: list[str]
) -> list[Check]:
    """Checks at positions whose next token is text, means weighted by the reference's certainty."""
    checks = [
        text_check("kl_mean", text.kl_mean),
        recorded("L3.kl_p99", float(np.quantile(text.kl, 0.99))),
        recorded("L3.kl_worst", float(text.kl.max())),
        text_check("sqnr_db", text.sqnr_db),
        text_check("top1", text.top1),
        text_check("top5", text.top5),
        recorded("L3.ambiguous", float(text.tie.mean())),
        recorded("L3.text_positions", len(text)),
        recorded("L3.certainty", text.certainty),
    ]
    if case.text is not None:
        checks += [
            recorded("L3.perplexity_reference", text.perplexity_reference),
            recorded("L3.perplexity", text.perplexity_bundle),
        ]
    notes.append(
        f"L3.kl_mean is over {len(text):,} positions whose next token is text; each weighs exp(-H), where H is the "
        f"entropy of the reference there in nats: {text.certainty:.2f} on average."
    )
    return checks


def _chunking(case: Case, session: Session, rows: NDArray[Any]) -> float:
    """KL of the first tokens of the probe in chunks and single steps from all in single steps, weighted by the
    certainty of the latter.
    """
    tokens = case.chunking_tokens
    plan = make_plan(tokens, case.prefill_lengths)
    steps: list[tuple[int | None, int]] = [(None, 1)] * tokens
    ends = [first + valid - 1 for first, _, valid in reference.pieces(tokens, plan)]
    with case.pace.part("chunking", len(plan) + len(steps)):
        chunked, stepwise = (
            np.stack(replay(session, rows[:tokens], case.probe.positions, each, junk=0.0, advance=case.pace.advance))
            for each in (plan, steps)
        )
    return Scores.of(stepwise[ends], chunked, [None] * len(ends)).kl_mean


def quality(case: Case, role: str | None = None) -> str:
    """Which row of the gates a bundle is held to by the weights that it really has, or those of one general role."""
    quantizer = Quantizer(case.weights, case.recipe)
    names = [name for name, p in case.weights.parameters.items() if role is None or general(p.role) == role]
    return row((quantizer.setting(name) for name in names), case.floats)


def row(settings: Iterable[Setting | None], floats: str) -> str:
    """Which row of the gates weights that are stored so are held to: that of the narrowest, or of the runtime's
    activations, of dtype `floats`, where none is quantised.
    """
    bits = min(32 if setting is None else setting.bits for setting in settings)
    return "int4" if bits <= 4 else "int8" if bits <= 8 else "fp32" if floats == "float32" else "fp16"


def climb(case: Case, rungs: tuple[str, ...] = RUNGS, on_rung: Callable[[str], None] = lambda r: None) -> list[Rung]:
    """Run the rungs in order; all of them, so that the report shows where an error entered."""
    steps: dict[str, Callable[[Case], Rung]] = {"L0": l0, "L1": l1, "L2": l2, "L3": l3}
    results = []
    for name in rungs:
        on_rung(name)
        case.pace.expect(costs.parts(case, name))
        results.append(steps[name](case))
    return results
