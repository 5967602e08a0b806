"""L1: the lowered program without quantisation on its runtime against our modules."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from export.checkpoint.weights import Weights
from export.model import state
from export.model.config import FULL, ModelConfig
from export.pace import Pace
from export.quantize.conditioned import weights_for
from export.quantize.quantizer import Quantizer
from export.quantize.recipe import Recipe
from export.quantize.scale import scaled
from export.validate import metrics, reference, rounding
from export.validate.case import Case, Rung
from export.validate.gates import FLOOR, GATES, Check, gated, recorded
from export.validate.probe import Probe
from export.validate.replay import canonical, image_embeddings, replay, state_errors, worst
from targets.base import UNBOUNDED, Job, Session, Target


def l1(case: Case) -> Rung:
    """The lowered program without quantisation on its runtime against our modules."""
    weights = scaled(weights_for(case.checkpoint, shallow(case.config), case.recipe.conditioning), case.scale)
    config = weights.config
    quantizer = Quantizer(weights, Recipe.unquantised())
    probe, plan = case.probe, case.plan
    rows = case.to_stream(case.embedded)
    context = len(probe.ids)
    # Inside an unfinished bundle, so that nothing else is left by a crash; a finished one is never touched.
    place = case.folder if case.folder.suffix == ".partial" else case.folder.parent
    with tempfile.TemporaryDirectory(prefix="l1-", dir=place) as scratch:
        folder = Path(scratch)
        job = Job(
            config,
            quantizer,
            context,
            case.prefill_lengths,
            case.image_sizes,
            folder,
            max_file_layers=_cut(case.manifest, config),
            # No phone maps these files, and what fitted quantised may not as floats: a limit would refuse it.
            max_file_bytes=UNBOUNDED,
            profile=case.manifest["target"]["profile"],
            state_layout=case.manifest["target"].get("state_layout"),
            max_head_columns=_head_columns(case.manifest),
            advance=case.pace.advance,
        )
        with case.pace.part("lower", weights.count):
            lowered = case.target.lower(job)
        manifest = {
            **case.manifest,
            "signatures": lowered.signatures,
            "states": lowered.states,
            "context_length": context,
        }
        given = weights, probe, plan, rows, case.prefill_lengths, case.pictures
        rung = compare_files(case.target, folder, manifest, case.threads, *given, pace=case.pace)
        rung.checks.append(recorded("L1.layers", config.text.num_hidden_layers))
        return rung


def shallow(config: ModelConfig, parameters_limit: int = 150_000_000) -> ModelConfig:
    """The first layers holding one of each kind, unless the whole model is small enough."""
    text = config.text
    if text.vocab_size * text.hidden_size + text.num_hidden_layers * 12 * text.hidden_size**2 < parameters_limit:
        return config
    first_full = text.layer_types.index(FULL) + 1 if FULL in text.layer_types else 1
    return config.truncated(min(first_full, text.num_hidden_layers))


def file_layers(manifest: Mapping[str, Any]) -> int | None:
    """Decoder layers a file of the bundle holds at most, where it has several files."""
    stages = manifest["signatures"]["decode"]["stages"]
    layers = {state["name"]: np.atleast_1d(state["layer"]).tolist() for state in manifest["states"]}
    counts = [len({layer for name in stage.get("states", {}) for layer in layers[name]}) for stage in stages]
    return max(1, *counts) if len(counts) > 1 else None


def _cut(manifest: Mapping[str, Any], config: ModelConfig) -> int | None:
    """Layers of a file in L1: as in the bundle, but a bundle of several files is never lowered to one."""
    most = file_layers(manifest)
    return None if most is None else min(most, max(1, config.text.num_hidden_layers - 1))


def _head_columns(manifest: Mapping[str, Any]) -> int | None:
    """Columns of the largest piece of a split head."""
    outputs = manifest["signatures"]["decode"]["outputs"]
    return max(tensor["shape"][1] for tensor in outputs) if len(outputs) > 1 else None


def compare_files(
    target: Target,
    folder: Path,
    manifest: Mapping[str, Any],
    threads: int,
    weights: Weights,
    probe: Probe,
    plan: list[tuple[int | None, int]],
    rows: NDArray[np.float32],
    prefill_lengths: tuple[int, ...],
    pictures: list[NDArray[np.float32]],
    pace: Pace | None = None,
) -> Rung:
    """L1 of files lowered without quantisation.

    A target that stores floats in float16 is compared twice: with float32 in their place and weights that are
    rounded on both sides, where nothing but a wrong lowering makes a difference; and as it is.
    """
    floats = target.capabilities.floats
    stages = manifest["signatures"]["decode"]["stages"]
    kept = all(how == "internal" for stage in stages for how in stage.get("states", {}).values())

    def compare(session: Session, given: Weights, fed: NDArray[Any], prefix: str) -> Rung:
        with closing(session):
            place = probe, plan, fed, prefill_lengths, pictures
            return compare_lowered(session, given, *place, prefix, kept=kept, pace=pace)

    if floats == "float32":
        return compare(target.open(folder, manifest, threads), weights, rows, "L1")
    half = rows.astype(floats)
    exact = compare(target.open_exact(folder, manifest, threads), RoundedWeights(weights), half, "L1.exact")
    stored = compare(target.open(folder, manifest, threads), weights, half, f"L1.{floats}")
    series = {**stored.series, "exact_states": exact.series["states"]}
    notes = [f"Checks named L1.exact read {floats} as float32: no runtime does, they are emulated everywhere."]
    return Rung("L1", exact.checks + stored.checks, series, notes)


class RoundedWeights(Weights):
    """Weights as float16 holds them, in float32; learned positions stay, because they are stored resampled."""

    def __init__(self, weights: Weights) -> None:
        super().__init__(weights.checkpoint, weights.config)
        self._weights = weights

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        rows = self._weights.rows(name, start, stop)
        return rows if name == "vision.position_weight" else rows.half().float()


def compare_lowered(
    session: Session,
    weights: Weights,
    probe: Probe,
    plan: list[tuple[int | None, int]],
    rows: NDArray[Any],
    prefill_lengths: tuple[int, ...],
    pictures: list[NDArray[np.float32]],
    prefix: str = "L1",
    *,
    kept: bool = False,
    pace: Pace | None = None,
) -> Rung:
    """L1 on an open session: logits and states, padding, vision, embedding; in float32 within so many roundings of the
    same sums (`rounding`), where floats are stored in float16 within constants.

    Args:
        rows: in the dtype of the session's embeddings. prefix: of the checks; their gates are those of L1 where it
            has none of its own. kept: the runtime holds the states, and a call with `start` = 0 clears them.
        pace: is told how far the comparison is.
    """
    config = weights.config
    pace = pace or Pace()

    def gate(name: str) -> str:
        own = f"{prefix}.{name}"
        return own if own in GATES else f"L1.{name}"

    def check(name: str, value: float, rounding: float | None = None) -> Check:
        return gated(f"{prefix}.{name}", value, gate(name), rounding=rounding)

    wide = rows.astype(np.float32)
    counted = GATES[gate("logits")].in_roundings
    passes = [reference.Pass(plan, state.cache_rows(len(rows), prefill_lengths))]
    passes += rounding.passes(len(rows)) if counted else []
    with pace.part(f"{prefix} ours", config.text.num_hidden_layers):
        (expected, states), *both = reference.own_sequences(
            weights, wide, probe.positions, passes, advance=pace.advance
        )
    unit = rounding.between(config, len(rows), *both) if counted else None
    ends = [first + valid - 1 for first, _, valid in reference.pieces(len(rows), plan)]
    with pace.part(f"{prefix} calls", 2 * len(plan)):
        logits = np.stack(replay(session, rows, probe.positions, plan, junk=0.0, advance=pace.advance))
        errors = state_errors(config, states, canonical(config, session.states()), len(rows))
        clean = canonical(config, {name: array.copy() for name, array in session.states().items()})
        again = replay(
            session, rows, probe.positions, plan, junk=float("nan"), reset=not kept, advance=pace.advance
        )
    padded = np.stack(again)
    leaks = state_errors(config, clean, canonical(config, session.states()), len(rows))
    checks = [
        check("logits", metrics.relative(expected[ends], logits), unit.logits if unit else None),
        check("states", *(unit.worst(errors, FLOOR) if unit else (max(errors.values()),))),
        check("padding", max(metrics.relative(logits, padded), *leaks.values())),
    ]
    embedded = session.run("embed", {"input_ids": np.asarray([probe.ids], np.int64)})["embeddings"]
    plain = torch.cat([weights.rows("embedding.weight", i, i + 1) for i in probe.ids]).numpy()
    checks.append(check("embed", metrics.relative(plain, embedded[0])))
    if pictures:
        with pace.part(f"{prefix} pictures", 1):
            ours = reference.own_vision(weights, pictures)
            found = worst(ours, image_embeddings(session, pictures))
            its_rounding = rounding.of_pictures(weights, pictures, ours) if unit else None
        checks.append(check("vision", found, its_rounding))
    series = {"states": errors, "logits": _row_errors(expected[ends], logits), "rows": ends}
    return Rung("L1", checks, series)


def _row_errors(a: NDArray[Any], b: NDArray[Any]) -> list[float]:
    return [metrics.relative(x, y) for x, y in zip(a, b, strict=True)]
