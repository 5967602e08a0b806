"""L0 to L3: where did an error enter?

Every rung is a function from a `Case` to a `Rung` and can be run alone; L1 is in `lowered`, parts of L3 in `drift` and
`answers`. The same functions serve the export, `python -m export validate` and the tests, whose deliberately wrong
lowerings must fail here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.chat.conversation import Contract
from export.model import state
from export.model.positions import splice
from export.quantize.quantizer import Quantizer
from export.quantize.recipe import Recipe
from export.validate import metrics, reference
from export.validate.answers import greedy_tokens, task_accuracy, text_runner
from export.validate.case import Case, Rung
from export.validate.drift import drift, stress
from export.validate.gates import Check, gated, recorded
from export.validate.lowered import l1
from export.validate.replay import canonical, image_embeddings, replay, state_errors, worst
from targets.base import Session

RUNGS = ("L0", "L1", "L2", "L3")


def l0(case: Case) -> Rung:
    """Our modules in PyTorch fp32 against transformers: logits of every token and every state.

    transformers' side takes tying, positions, splicing and pictures from transformers too, ours from this project.
    Where the whole of transformers' model fits the memory, its one forward pass is held against its streamed layers.
    No bundle takes part, so that several of one checkpoint need it once.
    """
    return case.once("L0", lambda: _l0(case), case.prefill_lengths)


def _l0(case: Case) -> Rung:
    truth, true_states = case.truth
    rows_needed = state.cache_rows(len(case.probe.ids), case.prefill_lengths)
    rows = reference.embed(case.checkpoint, case.probe.ids)
    images = [reference.own_vision(case.weights, image) for image in case.probe.images]
    rows = splice(rows, case.probe.ids, case.config.image_token_id, images)
    logits, states = reference.own_sequence(
        case.weights, rows, case.probe.positions, case.plan, rows_needed
    )
    errors = state_errors(case.config, true_states, states, len(case.probe.ids))
    layers = case.config.text.num_hidden_layers
    checks = [
        gated("L0.logits", metrics.relative(truth, logits), layers=layers),
        gated("L0.states", max(errors.values()), layers=layers),
    ]
    if case.pictures:
        ours = [reference.own_vision(case.weights, each) for each in case.pictures]
        checks.append(gated("L0.vision", worst(case.true_pictures, ours)))
        # Fewer than two where the context is too short for them: then no rung saw what a picture leaves behind.
        checks.append(recorded("L0.pictures_in_text", len(images)))
    if case.whole.logits is not None:
        checks.append(gated("L0.whole_model", metrics.relative(case.whole.logits, truth), layers=layers))
    return Rung("L0", checks, {"states": errors}, [case.whole.note])


def l2(case: Case) -> Rung:
    """Every weight of the artifact, dequantised, against the quantiser's reference, bit for bit."""
    quantizer = Quantizer(case.weights, case.recipe)
    compared, wrong, names = 0, 0, []
    seen: dict[Any, int] = {}
    for name, (start, block) in case.target.stored_weights(case.folder, case.manifest, quantizer):
        parameter, _, size = name.partition("@")
        if size:
            expected = _positions(quantizer, parameter, size)
        else:
            expected = quantizer.reference_rows(parameter, start, start + len(block))
        if case.floats == "float16" and quantizer.setting(parameter) is None and not size:
            expected = expected.half().float()
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
    checks = [
        gated("L2.mismatches", wrong),
        gated("L2.missing", len(missing)),
        recorded("L2.weights", compared),
    ]
    return Rung("L2", checks, {"wrong": names, "missing": missing})


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
    probe = case.probe
    rows = np.asarray(session.run("embed", {"input_ids": np.asarray([probe.ids], np.int64)})["embeddings"][0])
    images = image_embeddings(session, probe.images)
    rows = splice(rows, probe.ids, contract.image_token_id, images)
    ends = [first + valid - 1 for first, _, valid in reference.pieces(len(rows), case.plan)]
    logits = np.stack(replay(session, rows, probe.positions, case.plan, junk=0.0))
    errors = state_errors(case.config, true_states, canonical(case.config, session.states()), len(rows))
    kind = quality(case.recipe, floats=case.floats)
    wanted = truth[ends]
    kl = metrics.kl(wanted, logits)
    agree = metrics.agreement(wanted, logits)
    worst_state = max(errors.values())

    def quality_check(name: str, value: float) -> Check:
        return gated(f"L3.{name}", value, f"L3.{kind}.{name}", enforced=case.gate_quality)

    checks = [
        quality_check("kl_mean", float(kl.mean())),
        recorded("L3.kl_p99", float(np.quantile(kl, 0.99))),
        recorded("L3.kl_worst", float(kl.max())),
        quality_check("sqnr_db", metrics.sqnr_db(wanted, logits)),
        quality_check("top1", agree.top1),
        quality_check("top5", agree.top5),
        recorded("L3.ambiguous", agree.ambiguous),
        quality_check("states", worst_state) if kind == "fp16" else recorded("L3.states", worst_state),
    ]
    again: list[tuple[int | None, int]] = [(None, 1)] * len(rows)
    stepwise = np.stack(replay(session, rows, probe.positions, again, junk=0.0))[ends]
    checks.append(quality_check("chunking", float(metrics.kl(stepwise, logits).mean())))
    if case.pictures:
        seeing = quality(case.recipe, ("vision",), case.floats)
        value = worst(case.true_pictures, image_embeddings(session, case.pictures))
        checks.append(gated("L3.vision", value, f"L3.{seeing}.vision", enforced=case.gate_quality))
    series: dict[str, Any] = {"kl": [float(x) for x in kl], "rows": ends, "states": errors}
    notes: list[str] = []
    config = case.config
    special = {config.image_token_id, config.vision_start_token_id, config.vision_end_token_id}
    checks += text_runner(session, probe, special)
    if case.drift_steps:
        checks += drift(case, session, quality_check, series, notes)
    if case.prompts:
        checks.append(greedy_tokens(case, session, contract, quality_check, series))
    if case.task is not None:
        checks += task_accuracy(case, case.task, session, contract, quality_check, series)
    return Rung("L3", checks, series, notes), rows, logits


def quality(recipe: Recipe, roles: tuple[str, ...] | None = None, floats: str = "float32") -> str:
    """Which row of the gates a recipe, or some of its roles, is held to: that of its narrowest weights, or of the
    runtime's activations where nothing is quantised.
    """
    bits = min(setting.bits for role, setting in recipe.roles.items() if roles is None or role in roles)
    return "int4" if bits <= 4 else "int8" if bits <= 8 else "fp32" if floats == "float32" else "fp16"


def climb(case: Case, rungs: tuple[str, ...] = RUNGS, on_rung: Callable[[str], None] = lambda r: None) -> list[Rung]:
    """Run the rungs in order; all of them, so that the report shows where an error entered."""
    steps: dict[str, Callable[[Case], Rung]] = {"L0": l0, "L1": l1, "L2": l2, "L3": l3}
    results = []
    for name in rungs:
        on_rung(name)
        results.append(steps[name](case))
    return results
