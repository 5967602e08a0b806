"""Numbers that compare a candidate with a reference. Logits are [T, V]; everything is computed in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

BLOCK_VALUES = 2**22
"""Compared at once."""
NEAR_TIE = 0.05
"""Logit distance below which the reference's two best tokens are a tie that rounding may decide."""


def relative(reference: Array, candidate: Array) -> float:
    """max|a - b| / max|a|; infinite when one of them is not finite or the shapes differ."""
    if reference.shape != candidate.shape:
        return float("inf")
    # In blocks: the logits of a probe in float64, and what is subtracted of them, would take gigabytes.
    a, b = reference.reshape(-1), candidate.reshape(-1)
    scale = error = 0.0
    for start in range(0, a.size, BLOCK_VALUES):
        wide, other = (each[start : start + BLOCK_VALUES].astype(np.float64) for each in (a, b))
        if not (np.isfinite(wide).all() and np.isfinite(other).all()):
            return float("inf")
        scale = max(scale, float(np.abs(wide).max()))
        error = max(error, float(np.abs(wide - other).max()))
    return error / scale if scale > 0 else float("inf") if error > 0 else 0.0


def noise(reference: Array, candidate: Array) -> float:
    """sum (a-b)² / sum a²; infinite when the candidate is not finite or the shapes differ."""
    if reference.shape != candidate.shape or not np.isfinite(candidate).all():
        return float("inf")
    a, b = reference.astype(np.float64), candidate.astype(np.float64)
    power, error = float((a**2).sum()), float(((a - b) ** 2).sum())
    return error / power if power > 0 else float("inf") if error > 0 else 0.0


def centred(logits: Array) -> NDArray[np.float64]:
    """Logits less their mean, row by row: a constant added to all logits of a token changes nothing downstream."""
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
