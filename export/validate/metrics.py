"""Numbers that compare a candidate with a reference. Logits are [T, V]; everything is computed in float64."""

from __future__ import annotations

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
