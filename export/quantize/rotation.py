"""The orthogonal matrix Q that the text's residual stream is multiplied by, as sums and differences.

Q = diag(signs) · (Hadamard ⊗ DCT), orthonormal, for D = 2^k · m channels, m odd. Every entry of a result is made by
the same additions in the same order, however many rows come at once and whatever the machine, so that weights can be
compared bit for bit. Hadamard matrices before rounding: QuaRot (arXiv 2404.00456), QuIP# (arXiv 2402.04396).
"""

from __future__ import annotations

import hashlib
import math
from functools import cache

import torch
from torch import Tensor

from export.spec import UsageError

LARGEST_ODD = 31
"""Of m: the DCT is a dense matrix, which costs m multiplications for every entry."""
PIECE = 1 << 17
"""Elements worked on at a time, half a MiB of float32: they stay in the cache through all steps."""
SEED = b"qwen35-mobile residual stream"


def factors(channels: int) -> tuple[int, int]:
    """(2^k, m) with 2^k · m = channels and m odd.

    Raises:
        UsageError: m is too large for a dense matrix.
    """
    power = channels & -channels
    odd = channels // power
    if odd > LARGEST_ODD:
        raise UsageError(
            f"conditioning: hidden_size {channels} is {power} x {odd}; rotate needs an odd factor of at most "
            f"{LARGEST_ODD}: use a recipe whose conditioning has rotate = false"
        )
    return power, odd


def turn(rows: Tensor) -> Tensor:
    """rows [r, D] -> rows · Q [r, D], in the dtype of the rows (float32 or float64)."""
    result = torch.empty_like(rows)
    step = max(1, PIECE // rows.shape[1])
    for start in range(0, len(rows), step):
        result[start : start + step] = _turned(rows[start : start + step].T).T
    return result


def turn_outputs(matrix: Tensor) -> None:
    """matrix [D, K] -> Qᵀ · matrix, in place: what wrote into the stream writes into the turned one."""
    step = max(1, PIECE // len(matrix))
    for start in range(0, matrix.shape[1], step):
        matrix[:, start : start + step] = _turned(matrix[:, start : start + step])


def _turned(x: Tensor) -> Tensor:
    """Qᵀ · x for x [D, c]."""
    channels, count = x.shape
    power, odd = factors(channels)
    now, other = (torch.empty((channels, count), dtype=x.dtype) for _ in range(2))
    now.copy_(x).mul_((_signs(channels) / math.sqrt(power)).to(x.dtype).unsqueeze(1))
    if odd > 1:
        _cosine(now.view(power, odd, count), other.view(power, odd, count))
        now, other = other, now
    width = odd * count
    half = 1
    while half < power:
        pairs, sums = now.view(-1, 2, half * width), other.view(-1, 2, half * width)
        torch.add(pairs[:, 0], pairs[:, 1], out=sums[:, 0])
        torch.sub(pairs[:, 0], pairs[:, 1], out=sums[:, 1])
        now, other = other, now
        half *= 2
    return now


def _cosine(x: Tensor, out: Tensor) -> None:
    """out[:, i] = Σ_j C[i, j] · x[:, j] with the orthonormal DCT-II C [m, m]; product and sum are rounded apart,
    because a fused one is not the same on every machine.
    """
    odd = x.shape[1]
    for i in range(odd):
        length = math.sqrt((1 if i == 0 else 2) / odd)
        entries = [length * math.cos(math.pi * (2 * j + 1) * i / (2 * odd)) for j in range(odd)]
        row = out[:, i]
        torch.mul(x[:, 0], entries[0], out=row)
        for j in range(1, odd):
            row.add_(x[:, j] * entries[j])


@cache
def _signs(channels: int) -> Tensor:
    """float64 [D] of 1 and -1: the bits of SHAKE-128 over `SEED`, which no version of a library changes."""
    data = hashlib.shake_128(SEED).digest(-(-channels // 8))
    bits = [(byte >> place) & 1 for byte in data for place in range(8)]
    return 1 - 2 * torch.tensor(bits[:channels], dtype=torch.float64)
