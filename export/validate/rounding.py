"""How far float32 itself is from the truth: the ruler that two float32 implementations are held apart by.

The same sums, our modules', in float32 and in float64. The distance is rounding and nothing else, whether the modules
are right or wrong: both are wrong alike. So it may be the unit in which transformers, our modules and a runtime are
allowed to differ, on every checkpoint: constants that suit one refuse another, whose layers let rounding grow.

The noise that a recipe's rounding puts on the weights is likewise the unit of what answers may lose by it.

transformers hard-codes float32 inside its layers and cannot be its own truth. Tables of positions are float32 in
its modules and in ours, and stay so here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from export.checkpoint.weights import Weights
from export.model import state
from export.model.config import ModelConfig
from export.quantize.quantizer import Quantizer
from export.validate import metrics, reference
from export.validate.reference import Arrays, Pass
from export.validate.replay import state_errors

LAST = 64
"""Tokens at the end whose logits tell the rounding of all: most was summed for them. With all, the head of a small
model would cost more than its layers."""
ROWS = 64
"""Rows of each matrix that tell the noise of all."""
Passed = tuple[NDArray[np.float32], Arrays]
"""Logits and states."""


@dataclass(frozen=True)
class Rounding:
    """Relative distance of float32 from float64, of logits and of every state."""

    logits: float
    states: Mapping[str, float]

    def worst(self, errors: Mapping[str, float], floor: float) -> tuple[float, float]:
        """(error, rounding) of the state whose error is largest beside its rounding, which counts `floor` at least."""
        name = max(errors, key=lambda each: _share(errors[each], self.states[each], floor))
        return errors[name], self.states[name]

    @property
    def largest(self) -> float:
        return max(self.logits, *self.states.values())


def _share(error: float, rounding: float, floor: float) -> float:
    return float("inf") if np.isnan(error) else error / max(rounding, floor)


def passes(tokens: int) -> list[Pass]:
    """What `between` compares: a sequence of so many tokens in one chunk without padding, in float32 and in float64.
    What is asked is the rounding of sums, which cuts change little.
    """
    plan, rows = [(tokens, tokens)], state.cache_rows(tokens, (tokens,))
    return [Pass(plan, rows, dtype, LAST) for dtype in (torch.float32, torch.float64)]


def between(config: ModelConfig, tokens: int, plain: Passed, exact: Passed) -> Rounding:
    """Of the logits and states of those two passes."""
    return Rounding(metrics.relative(exact[0], plain[0]), state_errors(config, exact[1], plain[1], tokens))


def measure(weights: Weights, rows: NDArray[np.float32], position_ids: NDArray[np.int32]) -> Rounding:
    """Of a sequence of rows [T, D] at positions [3, T]."""
    found = reference.own_sequences(weights, rows, position_ids, passes(len(rows)))
    return between(weights.config, len(rows), *found)


def of_pictures(weights: Weights, pictures: Sequence[NDArray[Any]], embedded: Sequence[NDArray[Any]]) -> float:
    """Of the embeddings of pictures [3, H, W], `embedded` [N, D] in float32; the largest, and 0 without pictures."""
    exact = reference.own_vision(weights, pictures, torch.float64)
    return max((metrics.relative(true, found) for true, found in zip(exact, embedded, strict=True)), default=0.0)


def of_weights(quantizer: Quantizer) -> float:
    """Noise of a recipe: mean over the decoder's matrices of the squared relative error of rounding, 0 for one that
    keeps its floats. Those that no recipe rounds do not count; of the others each counts alike, because a large one is
    no more sensitive than a small one.
    """
    matrices = {n: p for n, p in quantizer.weights.parameters.items() if n.startswith("decoder.") and p.role != "kept"}
    squares = []
    for name, parameter in matrices.items():
        rows = min(ROWS, parameter.shape[0])
        exact = quantizer.weights.rows(name, 0, rows)
        error = (quantizer.reference_rows(name, 0, rows) - exact).square().sum()
        squares.append(float(error / exact.square().sum().clamp(min=torch.finfo(torch.float32).tiny)))
    return sum(squares) / max(1, len(squares))
