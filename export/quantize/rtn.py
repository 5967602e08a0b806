"""Round to nearest with a clipping search, or without.

For every group a few scales are tried and the one with the least squared error is kept: shrinking the range
rounds the bulk finer and clips the tails. With `scales = "absmax"` only the first is tried, which clips nothing.
All work runs on pieces that fit the cache, a handful of vectorised passes per candidate; the result of a row
depends on that row alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from export.quantize.recipe import Setting
from export.quantize.tensor import QuantizedBlock
from export.spec import ExportError

PIECE = 512 * 1024
"""Elements worked on at a time: small enough for the last-level cache with the scratch buffers (6 MiB), large
enough to hide the cost of calling an operator (smaller pieces ran at half the speed). No result depends on it."""

SMALLEST, LARGEST = 2.0**-24, 65280.0
"""Scales stay inside float16's range, on values that bfloat16 holds too: 8 significant bits, and fewer among the
subnormal numbers, multiples of 2^-24. Targets whose hardware may take those for zero have a larger smallest scale."""

LARGEST_WEIGHT = 7 * LARGEST
"""Beyond it no 4-bit scale reaches the weight, and saturating it would go unnoticed."""

STEPS: dict[int, tuple[float, ...]] = {
    4: (7.0, 7.3, 7.6, 8.0, 8.4, 8.8, 9.3, 10.0),
    8: (127.0, 134.0, 142.0),
}
"""Candidates for absmax / scale. 7 and 127 clip nothing; the last ones clip about 30 % and 10 %. With 7 and 8
both there, weights that were on a 4-bit grid before come back exactly, whichever code their largest has."""

SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8)
"""Candidates for the kept share of an asymmetric range."""


def round_scales(scales: Tensor, smallest: float = SMALLEST) -> Tensor:
    """To the nearest value with 8 significant bits, which float32, float16 and bfloat16 hold exactly."""
    return scales.clamp(smallest, LARGEST).to(torch.bfloat16).to(torch.float16).to(torch.float32)


def quantize_block(weight: Tensor, setting: Setting, smallest: float = SMALLEST) -> QuantizedBlock:
    """Quantise float32 rows [r, K] as `setting` says, with no scale below `smallest`.

    Raises:
        ValueError: the group size does not divide K (recipes are checked long before).
        ExportError: a weight larger than any scale can express, or NaN.
    """
    rows, columns = weight.shape
    group = setting.group_size or columns
    if columns % group:
        raise ValueError(f"group_size {group} does not divide {columns} input features")
    extremes = torch.aminmax(weight)
    largest = max(-float(extremes.min), float(extremes.max))
    if not largest <= LARGEST_WEIGHT:  # NaN compares false as well
        raise ExportError(
            f"a weight of magnitude {largest:g} cannot be quantised; at most {LARGEST_WEIGHT:g} can, because "
            "scales stay within float16: use recipe fp32, or repair the checkpoint"
        )
    groups = columns // group
    codes = torch.empty((rows, columns), dtype=torch.int8)
    scales = torch.empty((rows, groups))
    zeros = None if setting.symmetric else torch.empty((rows, groups), dtype=torch.uint8)
    tried = SHRINK if zeros is not None else STEPS[setting.bits]
    if setting.scales == "absmax":
        tried = tried[:1]  # which clips nothing
    step = max(1, PIECE // columns)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        piece = weight[start:stop].reshape(-1, group)
        target = codes[start:stop].view(-1, group)
        if zeros is None:
            _symmetric(piece, setting.bits, tried, smallest, target, scales[start:stop].view(-1))
        else:
            _asymmetric(piece, tried, smallest, target, scales[start:stop].view(-1), zeros[start:stop].view(-1))
    return QuantizedBlock(codes, scales, zeros)


def _symmetric(
    weight: Tensor, bits: int, tried: Sequence[float], smallest: float, codes: Tensor, scales: Tensor
) -> None:
    """weight [n, g] -> codes int8 [n, g] and scales [n], written in place; `tried`: candidates for absmax / scale."""
    high = (1 << (bits - 1)) - 1
    low = -high - 1 if bits == 4 else -high
    largest = weight.abs().amax(1)
    scaled, rounded = torch.empty_like(weight), torch.empty_like(weight)
    best = torch.full_like(largest, float("inf"))
    for steps in tried:
        scale = round_scales(largest / steps, smallest)
        torch.mul(weight, (1.0 / scale).unsqueeze(1), out=scaled)
        torch.round(scaled, out=rounded).clamp_(low, high)
        error = torch.linalg.vector_norm(scaled.sub_(rounded), dim=1).mul_(scale)
        better = error < best
        torch.where(better, error, best, out=best)
        scales.copy_(torch.where(better, scale, scales))
    torch.mul(weight, (1.0 / scales).unsqueeze(1), out=scaled)
    codes.copy_(scaled.round_().clamp_(low, high))


def _asymmetric(
    weight: Tensor, tried: Sequence[float], smallest: float, codes: Tensor, scales: Tensor, zeros: Tensor
) -> None:
    """4 bits with zero points; zero itself stays exact, since 0 lies inside every kept range. `tried`: shares of it."""
    low, high = weight.amin(1).clamp_(max=0), weight.amax(1).clamp_(min=0)
    scaled, rounded = torch.empty_like(weight), torch.empty_like(weight)
    best = torch.full_like(low, float("inf"))
    for keep in tried:
        scale = round_scales((high - low) * (keep / 15), smallest)
        zero = (-low * keep / scale).round_().clamp_(0, 15)
        torch.mul(weight, (1.0 / scale).unsqueeze(1), out=scaled).add_(zero.unsqueeze(1))
        torch.round(scaled, out=rounded).clamp_(0, 15)
        error = torch.linalg.vector_norm(scaled.sub_(rounded), dim=1).mul_(scale)
        better = error < best
        torch.where(better, error, best, out=best)
        scales.copy_(torch.where(better, scale, scales))
        zeros.copy_(torch.where(better, zero.to(torch.uint8), zeros))
    torch.mul(weight, (1.0 / scales).unsqueeze(1), out=scaled).add_(zeros.to(torch.float32).unsqueeze(1))
    codes.copy_(scaled.round_().clamp_(0, 15))
