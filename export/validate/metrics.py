"""Numbers that compare a candidate with a reference. Logits are [T, V]; everything is computed in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

NEAR_TIE = 0.05
"""Logit distance below which the reference's two best tokens are a tie that rounding may decide."""


def relative(reference: Array, candidate: Array) -> float:
    """max|a - b| / max|a|; infinite when the candidate is not finite or the shapes differ."""
    if reference.shape != candidate.shape or not np.isfinite(candidate).all():
        return float("inf")
    if reference.size == 0:
        return 0.0
    a, b = reference.astype(np.float64), candidate.astype(np.float64)
    scale = np.abs(a).max()
    error = np.abs(a - b).max()
    return float(error / scale) if scale > 0 else float(error > 0) * float("inf") if error > 0 else 0.0


def sqnr_db(reference: Array, candidate: Array) -> float:
    """Signal to quantisation noise in dB: 10·log10(sum a² / sum (a-b)²), logits centred per row.

    A constant added to all logits of a token changes nothing downstream, so it is not counted as noise.
    """
    a, b = centred(reference), centred(candidate)
    noise = float(((a - b) ** 2).sum())
    return float("inf") if noise == 0 else float(10 * np.log10((a**2).sum() / noise))


def centred(logits: Array) -> NDArray[np.float64]:
    """Logits less their mean, row by row."""
    wide = logits.astype(np.float64)
    result: NDArray[np.float64] = wide - wide.mean(axis=-1, keepdims=True)
    return result


def log_softmax(logits: Array) -> NDArray[np.float64]:
    wide = logits.astype(np.float64)
    wide = wide - wide.max(axis=-1, keepdims=True)
    result: NDArray[np.float64] = wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    return result


def kl(reference: Array, candidate: Array) -> NDArray[np.float64]:
    """KL(reference ‖ candidate) in nats for each token: [T]."""
    p, q = log_softmax(reference), log_softmax(candidate)
    result: NDArray[np.float64] = (np.exp(p) * (p - q)).sum(axis=-1)
    return np.maximum(result, 0.0)


@dataclass(frozen=True)
class Agreement:
    """Shares of tokens: same best token, reference's best among the candidate's five, undecided ties."""

    top1: float
    top5: float
    ambiguous: float


def agreement(reference: Array, candidate: Array) -> Agreement:
    """Top-1 and top-5 agreement; a disagreement at a near tie of the reference counts as ambiguous.

    Ambiguous tokens are left out of `top1` (neither right nor wrong) and reported beside it.
    """
    best = reference.argmax(-1)
    same = best == candidate.argmax(-1)
    k = min(5, candidate.shape[-1])
    five = (np.argpartition(-candidate, k - 1, axis=-1)[:, :k] == best[:, None]).any(-1)
    ordered = np.sort(reference.astype(np.float64), axis=-1)
    tie = ~same & (ordered[:, -1] - ordered[:, -2] < NEAR_TIE)
    decided = ~tie
    top1 = float(same[decided].mean()) if decided.any() else 1.0
    return Agreement(top1, float(five.mean()), float(tie.mean()))
