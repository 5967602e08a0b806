"""Norms, in float32 inside or in float16 that cannot overflow.

The Neural Engine has no float32. There a row is divided by its largest magnitude m first, so that its squares lie
in 0…1 and their sum in 1…D: x / sqrt(sum(x²) f + eps) = y / sqrt(sum(y²) f + eps/m²) with y = x/m. The mean of a layer
norm is that of y too: the sum of a residual stream's row may lie beyond float16 where the row does not.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from coremltools.converters.mil.mil import Builder as mb
from torch.fx import Node

from targets.to_coreml.lowering import Lowering, Value, operands, shape_of

SMALLEST = 1e-3
"""What m is held above in float16: eps/m² must stay finite. Rows that small have no influence on anything."""
UNITS = 2.0**-10
"""eps is given in squares of a unit between this and twice this, which is where m begins: a number far from both ends
of float16, whatever the eps of a scaled stream is."""


def half(x: Any) -> Any:
    """A variable in float16."""
    return mb.cast(x=x, dtype="fp16")


def single(x: Any) -> Any:
    """A variable in float32."""
    return mb.cast(x=x, dtype="fp32")


def _normalised(low: Lowering, x: Any, axis: int, factor: float, eps: float) -> Any:
    """x / sqrt(factor · sum(x²) + eps) along an axis, float16."""
    if low.profile.float32:
        wide = single(x)
        total = mb.reduce_sum_square(x=wide, axes=[axis], keep_dims=True)
        if factor != 1.0:
            total = mb.mul(x=total, y=np.float32(factor))
        return half(mb.mul(x=wide, y=mb.rsqrt(x=total, epsilon=np.float32(eps))))
    largest = _largest(x, axis)
    return _half_normalised(mb.real_div(x=x, y=largest), largest, axis, factor, eps)


def _largest(x: Any, axis: int) -> Any:
    """The largest magnitude of each row of float16 numbers, at least `SMALLEST`."""
    largest = mb.reduce_max(x=mb.abs(x=x), axes=[axis], keep_dims=True)
    return mb.maximum(x=largest, y=np.float16(SMALLEST))


def _half_normalised(scaled: Any, largest: Any, axis: int, factor: float, eps: float) -> Any:
    """`_normalised` of scaled · largest, all in float16."""
    square = mb.mul(x=scaled, y=scaled)
    # Whatever constant is left afterwards is 1 or a power of two for widths that are: float16 holds it exactly.
    reduce, divisor = (mb.reduce_sum, 1.0) if factor == 1.0 else (mb.reduce_mean, 1.0 / scaled.shape[axis])
    total = reduce(x=square, axes=[axis], keep_dims=True)
    rest = factor / divisor
    unit, count = _units(eps / rest)
    part = mb.real_div(x=unit, y=largest)
    small = mb.mul(x=mb.mul(x=part, y=part), y=count)
    inverse = mb.rsqrt(x=mb.add(x=total, y=small), epsilon=np.float16(0))
    y = mb.mul(x=scaled, y=inverse)
    return y if abs(rest - 1.0) < 1e-6 else mb.mul(x=y, y=np.float16(rest**-0.5))


def scaled(x: Any, value: float) -> Any:
    """A float16 variable times a number, which is exact: two factors where float16 does not hold it."""
    if float(np.float16(value)) == value:
        return mb.mul(x=x, y=np.float16(value))
    first, second = _factors(value)
    return mb.mul(x=mb.mul(x=x, y=first), y=second)


def _units(eps: float) -> tuple[np.float16, np.float16]:
    """A unit and how many of its squares make eps, to 1e-6: one float16 number would be off by as much as 5e-4."""
    units = (np.arange(1024) / 1024 + 1) * UNITS
    counts = (eps / units**2).astype(np.float16)
    best = np.argmin(np.abs(counts.astype(np.float64) * units**2 - eps))
    return np.float16(units[best]), np.float16(counts[best])


def _factors(value: float) -> tuple[np.float16, np.float16]:
    """Two float16 numbers near each other whose product is the value, to 1e-6: one squared would be off by 1e-3."""
    root = np.float16(value**0.5)
    near = (root.view(np.uint16) + np.arange(-64, 65)).astype(np.uint16).view(np.float16)
    product = np.outer(near.astype(np.float64), near.astype(np.float64))
    first, second = np.unravel_index(np.argmin(np.abs(product - value)), product.shape)
    return np.float16(near[first]), np.float16(near[second])


def rms_norm(low: Lowering, node: Node) -> None:
    source, weight, eps = operands(node)
    value = low.values[source]
    if len(shape_of(source)) == 3:
        x = low.heads(source, shape_of(source)[1])
        y = _normalised(low, x, 3, 1 / x.shape[3], eps)
        low.define(node, mb.mul(x=y, y=low.kept(weight, (1, 1, 1, x.shape[3]))), x.shape[1])
        return
    x = low.as_rows(value)
    y = _normalised(low, x, low.features, 1 / x.shape[low.features], eps)
    low.define(node, mb.mul(x=y, y=low.over_features(weight)))


def gated_rms_norm(low: Lowering, node: Node) -> None:
    source, weight, gate, eps = operands(node)
    x = low.heads(source, shape_of(source)[1])
    y = _normalised(low, x, 3, 1 / x.shape[3], eps)
    y = mb.mul(x=y, y=low.kept(weight, (1, 1, 1, x.shape[3])))
    rows = low.as_rows(Value(y, x.shape[1]))
    low.define(node, mb.mul(x=rows, y=mb.silu(x=low.rows(gate))))


def l2_norm(low: Lowering, node: Node) -> None:
    """x · scale / sqrt(sum + eps) is x / sqrt(sum / scale² + eps / scale²)."""
    source, eps, scale = operands(node)
    x = low.heads(source, shape_of(source)[1])
    low.define(node, _normalised(low, x, 3, scale**-2, eps * scale**-2), x.shape[1])


def layer_norm(low: Lowering, node: Node) -> None:
    source, _, weight, bias, eps = operands(node)[:5]
    x, axis = low.rows(source), low.features
    if low.profile.float32:
        wide = single(x)
        centred = mb.sub(x=wide, y=mb.reduce_mean(x=wide, axes=[axis], keep_dims=True))
        total = mb.reduce_sum_square(x=centred, axes=[axis], keep_dims=True)
        mean = mb.mul(x=total, y=np.float32(1 / x.shape[axis]))
        y = half(mb.mul(x=centred, y=mb.rsqrt(x=mean, epsilon=np.float32(eps))))
    else:
        largest = _largest(x, axis)
        part = mb.real_div(x=x, y=largest)
        centred = mb.sub(x=part, y=mb.reduce_mean(x=part, axes=[axis], keep_dims=True))
        y = _half_normalised(centred, largest, axis, 1 / x.shape[axis], eps)
    y = mb.mul(x=y, y=low.over_features(weight))
    low.define(node, mb.add(x=y, y=low.over_features(bias)))
