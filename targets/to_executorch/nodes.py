"""XNNPACK nodes as functions of tensors: each appends to the open delegate of a method and returns its result.

Shapes are inferred here, because the runtime checks them only when it loads the file. XNNPACK has no reduction
nodes: a sum over the last axis is a linear with a row of ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from executorch.backends.xnnpack.serialization import xnnpack_graph_schema as schema

from targets.to_executorch.program import Method
from targets.to_executorch.xnnpack import Filter, Tensor

INVALID = 2**32 - 1
TRANSPOSE_B = 1
"""XNN_FLAG_TRANSPOSE_B of a batched product: B is [.., N, K]."""


def unary(m: Method, kind: str, x: Tensor) -> Tensor:
    """Elementwise: Sigmoid, Exp, Log, Abs, Square, ReciprocalSquareRoot, Sin, Cos, Softmax (last axis), …"""
    source = m.read(x)
    result = m.delegate.define(x.shape)
    m.delegate.add(getattr(schema, f"XNN{kind}")(source, m.read(result), 0))
    return result


def clamp(m: Method, x: Tensor, low: float, high: float) -> Tensor:
    """min(max(x, low), high)."""
    source = m.read(x)
    result = m.delegate.define(x.shape)
    m.delegate.add(schema.XNNClamp(source, m.read(result), 0), (low, high))
    return result


def binary(m: Method, kind: str, a: Tensor, b: Tensor) -> Tensor:
    """Elementwise with broadcasting: Add, Subtract, Multiply, Div, Minimum, Maximum."""
    left, right = m.read(a), m.read(b)
    result = m.delegate.define(tuple(np.broadcast_shapes(a.shape, b.shape)))
    # Without limits the runtime takes -inf…inf.
    m.delegate.add(getattr(schema, f"XNN{kind}")(left, right, m.read(result), 0))
    return result


def add(m: Method, a: Tensor, b: Tensor) -> Tensor:
    return binary(m, "Add", a, b)


def subtract(m: Method, a: Tensor, b: Tensor) -> Tensor:
    return binary(m, "Subtract", a, b)


def multiply(m: Method, a: Tensor, b: Tensor) -> Tensor:
    return binary(m, "Multiply", a, b)


def scale(m: Method, x: Tensor, factor: float) -> Tensor:
    return multiply(m, x, m.constant(np.full((1,), factor, np.float32)))


def silu(m: Method, x: Tensor) -> Tensor:
    return multiply(m, x, unary(m, "Sigmoid", x))


def linear(m: Method, x: Tensor, weight: Filter, bias: Filter | None = None) -> Tensor:
    """x [..., K] · weightᵀ [..., N]. A quantised weight multiplies x as int8, one scale and zero point per row."""
    rows, columns = weight.shape
    if x.shape[-1] != columns:
        raise ValueError(f"linear of {list(x.shape)} and [{rows}, {columns}]")
    source = m.read(x) if weight.bits == 32 else _quantise(m, x)
    delegate = m.delegate
    result = delegate.define((*x.shape[:-1], rows))
    at = delegate.filter(bias) if bias else INVALID
    delegate.add(schema.XNNFullyConnected(source, delegate.filter(weight), at, m.read(result), 0))
    return result


def _quantise(m: Method, x: Tensor) -> int:
    """Rows of x as int8; linears that read the same x share it."""
    delegate = m.delegate
    source = m.read(x)
    if source not in delegate.quantised_rows:
        delegate.quantised_rows[source] = delegate.quantised(x.shape)
        delegate.add(schema.XNNConvert(source, delegate.quantised_rows[source], 0))
    return delegate.quantised_rows[source]


def matmul(m: Method, a: Tensor, b: Tensor, transpose_b: bool = False) -> Tensor:
    """a [..., M, K] · b [..., K, N] (or its transpose [..., N, K]), same leading dimensions."""
    inner, columns = (b.shape[-1], b.shape[-2]) if transpose_b else (b.shape[-2], b.shape[-1])
    if a.shape[-1] != inner or a.shape[:-2] != b.shape[:-2]:
        raise ValueError(f"matmul of {list(a.shape)} and {list(b.shape)}, transposed: {transpose_b}")
    left, right = m.read(a), m.read(b)
    result = m.delegate.define((*a.shape[:-1], columns))
    flags = TRANSPOSE_B if transpose_b else 0
    m.delegate.add(schema.XNNBatchMatrixMultiply(left, right, m.read(result), flags))
    return result


def reshape(m: Method, x: Tensor, shape: Sequence[int]) -> Tensor:
    """The same elements under another shape; nothing if it is the same."""
    target = tuple(int(extent) for extent in shape)
    if target == x.shape:
        return x
    if math.prod(target) != math.prod(x.shape):
        raise ValueError(f"reshape of {list(x.shape)} to {list(target)}")
    source = m.read(x)
    result = m.delegate.define(target)
    m.delegate.add(schema.XNNStaticReshape(len(target), list(target), source, m.read(result), 0))
    return result


def transpose(m: Method, x: Tensor, order: Sequence[int]) -> Tensor:
    """Axes in another order."""
    source = m.read(x)
    result = m.delegate.define(tuple(x.shape[axis] for axis in order))
    m.delegate.add(schema.XNNStaticTranspose(len(order), list(order), source, m.read(result), 0))
    return result


def cut(m: Method, x: Tensor, axis: int, first: int, count: int) -> Tensor:
    """`count` entries of an axis from `first` on; nothing if that is all of it."""
    axis %= len(x.shape)
    if first == 0 and count == x.shape[axis]:
        return x
    offsets = [first if place == axis else 0 for place in range(len(x.shape))]
    sizes = [count if place == axis else extent for place, extent in enumerate(x.shape)]
    source = m.read(x)
    result = m.delegate.define(tuple(sizes))
    m.delegate.add(schema.XNNStaticSlice(len(sizes), offsets, sizes, source, m.read(result), 0))
    return result


def concat(m: Method, parts: Sequence[Tensor], axis: int) -> Tensor:
    """Tensors one after the other; more than five in steps of five."""
    parts = list(parts)
    while len(parts) > 1:
        parts = [_concat(m, parts[i : i + 5], axis) for i in range(0, len(parts), 5)]
    return parts[0]


def _concat(m: Method, parts: Sequence[Tensor], axis: int) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    axis %= len(parts[0].shape)
    shape = list(parts[0].shape)
    shape[axis] = sum(part.shape[axis] for part in parts)
    ids = [m.read(part) for part in parts] + [INVALID] * (5 - len(parts))
    result = m.delegate.define(tuple(shape))
    node = getattr(schema, f"XNNConcatenate{len(parts)}")
    m.delegate.add(node(axis, *ids[:4], m.read(result), 0, ids[4]))
    return result


def depthwise(m: Method, x: Tensor, weight: Filter) -> Tensor:
    """x [R, Ch] convolved along its rows with weight [1, K, 1, Ch]: [1, R-K+1, 1, Ch]."""
    (rows, channels), width = x.shape, weight.shape[1]
    series = reshape(m, x, (1, rows, 1, channels))
    source = m.read(series)
    delegate = m.delegate
    result = delegate.define((1, rows - width + 1, 1, channels))
    node: Any = schema.XNNDepthwiseConv2d(
        padding_top=0, padding_right=0, padding_bottom=0, padding_left=0,
        kernel_height=width, kernel_width=1, subsampling_height=1, subsampling_width=1,
        dilation_height=1, dilation_width=1, group_input_channels=1, group_output_channels=1,
        groups=channels, adjustment_height=0, adjustment_width=0,
        input1_id=source, filter_id=delegate.filter(weight), bias_id=INVALID, output_id=m.read(result), flags=0,
    )  # fmt: skip
    delegate.add(node)
    return result


