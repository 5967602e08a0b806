"""Every operation of the emulated Core ML backend, run from a saved package, against formulas in float64 and what
coremltools infers for constants; and how results are rounded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from runtime_tests.mil import IOS18, Function, function, mb, save, types
from targets.to_coreml.constants import Budget
from targets.to_coreml.interpreter import Interpreter
from targets.to_coreml.kernels import KERNELS
from targets.to_coreml.program import Package

RNG = np.random.default_rng(0)
Array = NDArray[Any]


def half(*shape: int, scale: float = 1.0) -> Array:
    return (RNG.standard_normal(shape) * scale).astype(np.float16)


def single(*shape: int) -> Array:
    return RNG.standard_normal(shape).astype(np.float32)


def ints(*shape: int, low: int = -5, high: int = 6) -> Array:
    return RNG.integers(low, high, shape).astype(np.int32)


def flags(*shape: int) -> Array:
    return RNG.integers(0, 2, shape).astype(bool)


@dataclass(frozen=True)
class Op:
    """An operation under test: `build` of variables or arrays by name; `want` of the same, floats as float64."""

    build: Callable[..., Any]
    inputs: dict[str, Array]
    want: Callable[..., Any] | None
    inferred: bool
    """Whether coremltools' own value, where it has one, counts."""


def op(build: Callable[..., Any], want: Callable[..., Any] | None = None, inferred: bool = True, **inputs: Array) -> Op:
    return Op(build, inputs, want, inferred)


def t(function: Callable[..., Any], *arguments: Any, **named: Any) -> Array:
    """A torch function of arrays."""
    return np.asarray(function(*(torch.as_tensor(one) for one in arguments), **named))


def unary(name: str, want: Callable[..., Any], x: Array, **named: Any) -> Op:
    return op(lambda x: getattr(mb, name)(x=x, **named), want, x=x)


def pair(name: str, want: Callable[..., Any], x: Array, y: Array) -> Op:
    return op(lambda x, y: getattr(mb, name)(x=x, y=y), want, x=x, y=y)


def binary(name: str, want: Callable[..., Any] | None = None) -> dict[str, Op]:
    """With broadcasting both ways, scalars, and integers."""
    build = getattr(mb, name)
    positive = half(4, 1, 3).__abs__() + np.float16(0.5)
    return {
        f"{name}_half": op(lambda x, y: build(x=x, y=y), want, x=positive, y=half(5, 1)),
        f"{name}_scalar": op(lambda x: build(x=x, y=np.float16(1.5)), want and (lambda x: want(x, 1.5)), x=half(3, 4)),
        f"{name}_float": op(lambda x, y: build(x=x, y=y), want, x=single(7), y=single(2, 7)),
    }


def softmax(x: Array, axis: int) -> Array:
    powers = np.exp(x - x.max(axis, keepdims=True))
    return np.asarray(powers / powers.sum(axis, keepdims=True))


def norm(x: Array, axes: tuple[int, ...], epsilon: float) -> Array:
    centred = x - x.mean(axes, keepdims=True)
    return np.asarray(centred / np.sqrt((centred**2).mean(axes, keepdims=True) + epsilon))


def attention(q: Array, k: Array, v: Array, mask: Array | None = None) -> Array:
    scores = q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = np.where(mask, scores, -np.inf) if mask.dtype == bool else scores + mask
    return softmax(scores, -1) @ v


W, B = half(6, 10), half(6)
"""A linear layer."""
LONG = half(3, 5, scale=30)
X = half(2, 3, 4)

CASES: dict[str, Op] = {
    **{k: v for name, want in (
        ("add", np.add), ("sub", np.subtract), ("mul", np.multiply), ("real_div", np.divide),
        ("maximum", np.maximum), ("minimum", np.minimum), ("floor_div", np.floor_divide), ("mod", np.mod),
    ) for k, v in binary(name, want).items()},
    **{f"{name}_int": pair(name, want, ints(4, 3), ints(3, low=1)) for name, want in (
        ("add", np.add), ("sub", np.subtract), ("mul", np.multiply), ("floor_div", np.floor_divide),
        ("mod", np.mod), ("maximum", np.maximum), ("minimum", np.minimum),
    )},
    "real_div_int": op(
        lambda x, y: mb.real_div(x=x, y=y), lambda x, y: np.trunc(x / y), False, x=ints(9), y=ints(9, low=1),
    ),
    "pow": op(lambda x, y: mb.pow(x=x, y=y), np.power, x=half(3, 4).__abs__(), y=half(4)),
    "pow_int": op(lambda x: mb.pow(x=x, y=np.int32(3)), lambda x: x**3, x=ints(5)),
    **{name: pair(name, want, ints(4, 3), ints(3)) for name, want in (
        ("equal", np.equal), ("not_equal", np.not_equal), ("greater", np.greater), ("less", np.less),
    )},
    **{name: pair(name, want, half(9).round(), half(9).round()) for name, want in (
        ("greater_equal", np.greater_equal), ("less_equal", np.less_equal),
    )},
    **{name: pair(name, want, flags(4, 3), flags(3)) for name, want in (
        ("logical_and", np.logical_and), ("logical_or", np.logical_or), ("logical_xor", np.logical_xor),
    )},
    "logical_not": unary("logical_not", np.logical_not, flags(7)),
    **{name: unary(name, want, half(5, 7, scale=2)) for name, want in (
        ("exp", np.exp), ("exp2", np.exp2), ("tanh", np.tanh), ("cos", np.cos), ("sin", np.sin), ("abs", np.abs),
        ("sign", np.sign), ("square", np.square), ("floor", np.floor), ("ceil", np.ceil), ("round", np.round),
        ("relu", lambda x: np.maximum(x, 0)), ("sigmoid", lambda x: 1 / (1 + np.exp(-x))),
        ("silu", lambda x: x / (1 + np.exp(-x))), ("erf", lambda x: t(torch.erf, x)),
        ("softplus", lambda x: np.logaddexp(x, 0)),
    )},
    "sign_nan": unary("sign", np.sign, np.array([np.nan, -1.5, -0.0, 0.0, np.inf], np.float16)),
    "sqrt": unary("sqrt", np.sqrt, half(9).__abs__()),
    "log": unary("log", lambda x: np.log(x + np.float16(0.01)), half(9).__abs__(), epsilon=np.float16(0.01)),
    "log_float": unary("log", lambda x: np.log(x + 1e-45), half(9).__abs__().astype(np.float32)),
    "rsqrt": unary("rsqrt", lambda x: 1 / np.sqrt(x + 1e-3), half(9).__abs__(), epsilon=np.float32(1e-3)),
    "rsqrt_default": unary("rsqrt", lambda x: 1 / np.sqrt(x), half(9).__abs__() + np.float16(0.1)),
    "inverse": unary("inverse", lambda x: 1 / (x + np.float64(np.float16(1e-4))), half(9)),
    "clip": unary(
        "clip", lambda x: np.clip(x, -0.5, 1.25), half(9), alpha=np.float16(-0.5), beta=np.float16(1.25),
    ),
    "threshold": unary("threshold", lambda x: np.maximum(x, 0.25), half(9), alpha=np.float16(0.25)),
    "sigmoid_hard": unary(
        "sigmoid_hard", lambda x: np.clip(0.25 * x + 0.5, 0, 1), half(9, scale=3),
        alpha=np.float16(0.25), beta=np.float16(0.5),
    ),
    "gelu": unary("gelu", lambda x: 0.5 * x * (1 + t(torch.erf, x / math.sqrt(2))), half(9), mode="EXACT"),
    "gelu_tanh": unary(
        "gelu", lambda x: t(F.gelu, x, approximate="tanh"), half(9), mode="TANH_APPROXIMATION",
    ),
    "gelu_sigmoid": unary(
        "gelu", lambda x: x / (1 + np.exp(-1.702 * x)), half(9), mode="SIGMOID_APPROXIMATION",
    ),
    "cast_int": unary("cast", np.trunc, half(9, scale=5), dtype="int32"),
    "cast_half": unary("cast", lambda x: x, np.array([1e-9, 70000, -70000, 0.1], np.float32), dtype="fp16"),
    "cast_bool": unary("cast", lambda x: x != 0, ints(9, low=-1, high=2), dtype="bool"),
    "cast_uint16": unary("cast", lambda x: x, ints(9, low=0, high=60000), dtype="uint16"),
    "cast_int8": unary("cast", lambda x: x, ints(9), dtype="int8"),
    "cast_uint8": unary("cast", lambda x: x, ints(9, low=0, high=250), dtype="uint8"),
    "cast_int16": unary("cast", lambda x: x, ints(9), dtype="int16"),
    "select": op(
        lambda c, a, b: mb.select(cond=c, a=a, b=b), np.where, c=flags(3, 1), a=half(3, 4), b=half(3, 4),
    ),
    "select_scalar": op(
        lambda c, a: mb.select(cond=c, a=a, b=np.float16(-9)),
        lambda c, a: np.where(c, a, -9), c=flags(3, 4), a=half(3, 4),
    ),
    # Sums
    "linear": op(
        lambda x: mb.linear(x=x, weight=W, bias=B), lambda x: x @ W.T.astype(float) + B, x=half(2, 3, 10),
    ),
    "linear_no_bias": op(lambda x: mb.linear(x=x, weight=W), lambda x: x @ W.T.astype(float), x=half(1, 10)),
    "linear_float": op(
        lambda x: mb.linear(x=x, weight=W.astype("f4")), lambda x: x @ W.T.astype(float), x=half(10).astype(np.float32)
    ),
    "matmul": op(lambda x, y: mb.matmul(x=x, y=y), np.matmul, x=half(5, 1, 3, 8), y=half(4, 8, 2)),
    "matmul_turned": op(
        lambda x, y: mb.matmul(x=x, y=y, transpose_x=True, transpose_y=True),
        lambda x, y: x.mT @ y.mT, x=half(2, 8, 3), y=half(5, 8),
    ),
    "matmul_constant": op(
        lambda x: mb.matmul(x=x, y=W, transpose_y=True), lambda x: x @ W.T.astype(float), x=half(2, 10),
    ),
    "matmul_left": op(lambda y: mb.matmul(x=W, y=y), lambda y: W.astype(float) @ y, y=half(2, 10, 3)),
    "matmul_vector": op(lambda x, y: mb.matmul(x=x, y=y), np.matmul, x=half(8), y=half(8, 3)),
    "matmul_int": op(lambda x, y: mb.matmul(x=x, y=y), np.matmul, x=ints(3, 4), y=ints(4, 2)),
    "reduce_sum": unary("reduce_sum", lambda x: x.sum(1), LONG, axes=[1]),
    "reduce_sum_keep": unary(
        "reduce_sum", lambda x: x.sum((0, 2), keepdims=True), X, axes=[0, -1], keep_dims=True,
    ),
    "reduce_sum_all": unary("reduce_sum", lambda x: x.sum(), X),
    "reduce_sum_int": unary("reduce_sum", lambda x: x.sum(-1), ints(3, 4), axes=[-1]),
    "reduce_mean": unary("reduce_mean", lambda x: x.mean(-1, keepdims=True), LONG, axes=[-1], keep_dims=True),
    "reduce_max": unary("reduce_max", lambda x: x.max((1, 2)), X, axes=[1, 2]),
    "reduce_min": unary("reduce_min", lambda x: x.min(0, keepdims=True), X, axes=[0], keep_dims=True),
    "reduce_sum_square": unary("reduce_sum_square", lambda x: (x**2).sum(-1), X, axes=[-1]),
    "reduce_l2_norm": unary("reduce_l2_norm", lambda x: np.sqrt((x**2).sum(1)), X, axes=[1]),
    "reduce_argmax": unary("reduce_argmax", lambda x: x.argmax(1), X, axis=1),
    "reduce_argmax_keep": unary(
        "reduce_argmax", lambda x: x.argmax(-1)[..., None], X, axis=-1, keep_dims=True,
    ),
    "reduce_argmin": unary("reduce_argmin", lambda x: x.argmin(-1), X, axis=-1),
    "cumsum": unary("cumsum", lambda x: x.cumsum(1), X, axis=1),
    "cumsum_reverse": unary("cumsum", lambda x: x[::-1].cumsum(0)[::-1], X, axis=0, reverse=True),
    "cumsum_exclusive": op(
        lambda x: mb.cumsum(x=x, axis=-1, exclusive=True), lambda x: x.cumsum(-1) - x, inferred=False, x=ints(3, 4)
    ),
    "softmax": unary("softmax", lambda x: softmax(x, -1), half(3, 40, scale=4), axis=-1),
    "softmax_first": unary("softmax", lambda x: softmax(x, 0), half(3, 4), axis=0),
    "layer_norm": op(
        lambda x: mb.layer_norm(x=x, axes=[-1], gamma=W[0], beta=W[1], epsilon=np.float16(1e-3)),
        lambda x: norm(x, (-1,), float(np.float16(1e-3))) * W[0] + W[1], x=half(2, 3, 10),
    ),
    "layer_norm_inner": op(
        lambda x: mb.layer_norm(x=x, axes=[1], epsilon=np.float16(1e-3)),
        lambda x: norm(x, (1,), float(np.float16(1e-3))), x=half(2, 10, 3),
    ),
    "l2_norm": op(
        lambda x: mb.l2_norm(x=x, epsilon=np.float16(1e-3)),
        lambda x: x / np.sqrt((x**2).sum((1, 2, 3), keepdims=True) + np.float16(1e-3)), x=half(2, 3, 4, 5),
    ),
    "attention": op(
        lambda q, k, v: mb.scaled_dot_product_attention(query=q, key=k, value=v), attention,
        q=half(1, 2, 3, 8), k=half(1, 2, 5, 8), v=half(1, 2, 5, 4),
    ),
    "attention_mask": op(
        lambda q, k, v, m: mb.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=m), attention,
        q=half(1, 2, 3, 8), k=half(1, 2, 5, 8), v=half(1, 2, 5, 4), m=half(1, 1, 3, 5),
    ),
    "attention_flags": op(
        lambda q, k, v, m: mb.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=m), attention,
        q=half(2, 3, 8), k=half(2, 5, 8), v=half(2, 5, 4), m=np.tril(np.ones((3, 5), bool), 2),
    ),
    # Layout
    "reshape": unary("reshape", lambda x: x.reshape(2, 12), X, shape=[2, -1]),
    "reshape_zero": unary("reshape", lambda x: x.reshape(1, 6, 4), X, shape=[1, -1, 0]),
    "transpose": unary("transpose", lambda x: x.transpose(2, 0, 1), X, perm=[-1, 0, 1]),
    "expand_dims": unary("expand_dims", lambda x: x[:, None, :, :, None], X, axes=[-1, 1]),
    "squeeze": unary("squeeze", lambda x: x[:, 0], half(3, 1, 4, 1)[..., 0], axes=[1]),
    "squeeze_all": unary("squeeze", np.squeeze, half(3, 1, 4, 1)),
    "concat": op(
        lambda x, y: mb.concat(values=[x, y, x], axis=-1),
        lambda x, y: np.concatenate([x, y, x], -1), x=X, y=half(2, 3, 1),
    ),
    "concat_interleave": op(
        lambda x, y: mb.concat(values=[x, y], axis=1, interleave=True),
        lambda x, y: np.stack([x, y], 2).reshape(2, 6, 4), inferred=False, x=X, y=half(2, 3, 4),
    ),
    "stack": op(
        lambda x, y: mb.stack(values=[x, y], axis=-1), lambda x, y: np.stack([x, y], -1), x=X, y=half(2, 3, 4),
    ),
    "split": unary("split", lambda x: tuple(np.split(x, [1, 3], -1)), X, axis=-1, split_sizes=[1, 2, 1]),
    "split_even": unary("split", lambda x: tuple(np.split(x, 2, 0)), X, axis=0, num_splits=2),
    "tile": unary("tile", lambda x: np.tile(x, (2, 1, 3)), X, reps=[2, 1, 3]),
    "reverse": unary("reverse", lambda x: x[::-1, :, ::-1], X, axes=[0, -1]),
    "identity": unary("identity", lambda x: x, X),
    "slice_flags": op(
        lambda x: mb.slice_by_index(
            x=x, begin=[9, 1, -3], end=[9, -1, 9], stride=[1, 1, 2], begin_mask=[True, False, False],
            end_mask=[True, False, True], squeeze_mask=[False, False, False]),
        lambda x: x[:, 1:-1, -3::2], x=half(2, 5, 7),
    ),
    "slice_squeeze": op(
        lambda x: mb.slice_by_index(x=x, begin=[-1, 0, 2], end=[0, 2, 0], squeeze_mask=[True, False, True]),
        lambda x: x[-1, 0:2, 2], x=X,
    ),
    "slice_backwards": op(
        lambda x: mb.slice_by_index(
            x=x, begin=[0, 5, -1], end=[2, 0, 0], stride=[1, -2, -1], end_mask=[False, False, True]),
        lambda x: x[:, 5:0:-2, ::-1], x=half(2, 7, 5),
    ),
    "slice_by_size": op(
        lambda x: mb.slice_by_size(x=x, begin=[0, -2, 1], size=[-1, 1, 2]), lambda x: x[:, -2:-1, 1:3], x=X,
    ),
    "slice_by_size_runtime": op(
        lambda x, begin: mb.slice_by_size(x=x, begin=begin, size=[1, 2, 2]),
        lambda x, begin: x[1:2, 1:3, 2:4], x=X, begin=np.array([1, 1, 2], np.int32),
    ),
    "slice_update": op(
        lambda x, u: mb.slice_update(
            x=x, update=u, begin=[0, 1, 0], end=[0, 3, 4], stride=[1, 1, 2], squeeze_mask=[True, False, False]),
        lambda x, u: np.stack([np.where(np.arange(4) % 2 == 0, np.vstack([x[0, :1], np.repeat(u, 2, 1)]), x[0]), x[1]]),
        x=X, u=half(2, 2),
    ),
    "gather": op(
        lambda x, i: mb.gather(x=x, indices=i, axis=-2), lambda x, i: x[:, i], x=X, i=ints(2, 5, low=0, high=3),
    ),
    "gather_scalar": op(lambda x: mb.gather(x=x, indices=np.int32(1), axis=1), lambda x: x[:, 1], x=X),
    "gather_batch": op(
        lambda x, i: mb.gather(x=x, indices=i, axis=2, batch_dims=1),
        lambda x, i: np.stack([x[b][:, i[b]] for b in range(2)]), x=X, i=ints(2, 5, low=0, high=4),
    ),
    "gather_along_axis": op(
        lambda x, i: mb.gather_along_axis(x=x, indices=i, axis=-1),
        lambda x, i: np.take_along_axis(x, i, -1), x=X, i=ints(2, 3, 2, low=0, high=4),
    ),
    "pad": unary(
        "pad", lambda x: np.pad(x, ((0, 0), (1, 2), (0, 3)), constant_values=7), X,
        pad=[1, 2, 0, 3], constant_val=np.float16(7),
    ),
    "pad_reflect": unary(
        "pad", lambda x: np.pad(x, ((1, 1), (2, 0), (0, 3)), "reflect"), X, pad=[1, 1, 2, 0, 0, 3], mode="reflect",
    ),
    "pad_replicate": unary(
        "pad", lambda x: np.pad(x, ((0, 0), (0, 0), (2, 5)), "edge"), X, pad=[2, 5], mode="replicate",
    ),
    "band_part": unary("band_part", lambda x: np.tril(x, 2) - np.tril(x, -2), half(4, 5), lower=1, upper=2),
    "band_part_lower": unary("band_part", np.tril, half(2, 4, 5), lower=-1, upper=0),
    "range": op(
        lambda n: mb.range_1d(start=np.int32(1), end=mb.squeeze(x=n), step=np.int32(2)),
        lambda n: np.arange(1, 8, 2), n=np.array([8], np.int32),
    ),
    "fill": op(
        lambda n: mb.fill(shape=n, value=np.float16(2.5)), lambda n: np.full((2, 3), 2.5), n=np.array([2, 3], np.int32),
    ),
    "shape": unary("shape", lambda x: np.array([2, 3, 4]), X),
    "one_hot": op(
        lambda i: mb.one_hot(
            indices=i, one_hot_vector_size=4, axis=-2, on_value=np.float16(2), off_value=np.float16(-1)),
        lambda i: np.where(i[:, None] == np.arange(4)[:, None], 2.0, -1.0), i=ints(2, 3, low=0, high=4),
    ),
    "topk": op(
        lambda x: mb.topk(x=x, k=2, axis=1), lambda x: (-np.sort(-x, 1)[:, :2], np.argsort(-x, 1)[:, :2]), x=X,
    ),
    "topk_ascending": op(
        lambda x: mb.topk(x=x, k=1, axis=-1, ascending=True),
        lambda x: (x.min(-1, keepdims=True), x.argmin(-1)[..., None]), x=X,
    ),
}  # fmt: skip


def convolution(shape: Sequence[int], kernel: Sequence[int], groups: int, pads: Sequence[int], **named: Any) -> Op:
    """Against torch in float64; `pads` are what `named` must come to."""
    weight, bias, space = half(*kernel), half(kernel[0]), len(kernel) - 2
    flat = [pad for place in range(space - 1, -1, -1) for pad in pads[2 * place : 2 * place + 2]]

    def want(x: Array) -> Array:
        parts = (torch.from_numpy(part).double() for part in (weight, bias))
        steps = {"stride": named.get("strides", 1), "dilation": named.get("dilations", 1), "groups": groups}
        return t((F.conv1d, F.conv2d, F.conv3d)[space - 1], F.pad(torch.from_numpy(x), flat), *parts, **steps)

    return op(lambda x: mb.conv(x=x, weight=weight, bias=bias, groups=groups, **named), want, x=half(*shape))


CASES |= {
    "conv_1x1": convolution((1, 6, 3, 5), (4, 6, 1, 1), 1, [0] * 4, pad_type="valid"),
    "conv_2d": convolution(
        (2, 4, 7, 6), (6, 2, 3, 2), 2, [1, 0, 2, 1], pad_type="custom", pad=[1, 0, 2, 1], strides=[2, 1]
    ),
    "conv_dilated": convolution((1, 2, 9), (3, 2, 3), 1, [2, 3], pad_type="custom", pad=[2, 3], dilations=[2]),
    "conv_same": convolution((1, 2, 8), (3, 2, 3), 1, [1, 1], pad_type="same"),
    "conv_same_lower": convolution((1, 2, 9), (3, 2, 4), 1, [2, 1], pad_type="same_lower"),
    "conv_depthwise": convolution((1, 5, 9), (5, 1, 4), 5, [0, 0], pad_type="valid"),
    "conv_causal": convolution((1, 5, 9), (5, 1, 4), 5, [3, 0], pad_type="custom", pad=[3, 0]),
    "conv_3d": convolution((1, 2, 3, 4, 5), (3, 2, 2, 2, 2), 1, [0] * 6, pad_type="valid"),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Array]]:
    """All cases as one program, run once from its package."""
    inputs = {f"{name}_{key}": array for name, case in CASES.items() for key, array in case.inputs.items()}
    counts: dict[str, int] = {}

    def body(**given: Any) -> list[Any]:
        outputs = []
        for name, case in CASES.items():
            variables = {key: given[f"{name}_{key}"] for key in case.inputs}
            for key, array in case.inputs.items():
                if array.dtype == bool:
                    variables[key] = mb.cast(x=variables[key], dtype="bool")
            found = case.build(**variables)
            found = list(found) if isinstance(found, list | tuple) else [found]
            counts[name] = len(found)
            for place, one in enumerate(found):
                if not types.is_float(one.dtype):
                    one = mb.cast(x=one, dtype="int32")
                outputs.append(mb.identity(x=one, name=f"{name}_out_{place}"))
        return outputs

    def signature(array: Array) -> tuple[tuple[int, ...], str]:
        return array.shape, "int32" if array.dtype == bool else str(array.dtype)

    made = function(body, {name: signature(array) for name, array in inputs.items()})
    interpreter = Interpreter(Package(save(tmp_path_factory.mktemp("ops") / "ops.mlpackage", main=made)))
    outputs = interpreter.run(
        "main", {name: array.astype(np.int32) if array.dtype == bool else array for name, array in inputs.items()}, {}
    )
    return {name: [outputs[f"{name}_out_{place}"] for place in range(count)] for name, count in counts.items()}


@pytest.mark.parametrize("name", CASES)
def test_an_operation_agrees_with_its_definition(name: str, results: dict[str, list[Array]]) -> None:
    """Within one unit of the last place of the exact result, rounded; and near what coremltools infers."""
    with np.errstate(over="ignore", invalid="ignore"):
        compare(name, results)


def compare(name: str, results: dict[str, list[Array]]) -> None:
    case = CASES[name]
    with Function({"unused": mb.placeholder((1,))}, IOS18):
        made = case.build(**case.inputs) if case.inferred else None
    inferred = [one.val for one in made] if isinstance(made, list | tuple) else [made.val if made is not None else None]
    exact: Any = [None] * len(results[name])
    if case.want is not None:
        wide = {key: array.astype(float) if array.dtype.kind == "f" else array for key, array in case.inputs.items()}
        exact = case.want(*wide.values())
        exact = list(exact) if isinstance(exact, tuple) else [exact]
    assert case.want is not None or inferred[0] is not None
    for got, own, theirs in zip(results[name], exact, inferred, strict=True):
        if own is not None:
            rounded = np.asarray(own).astype(got.dtype)
            assert got.shape == rounded.shape
            if got.dtype.kind == "f":
                same = (got == rounded) | (np.isnan(got) & np.isnan(rounded))
                last = 1 if got.dtype == np.float16 else 8  # float32 sums have no room to hide in
                near = np.abs(got.astype(float) - own) <= last * np.spacing(np.abs(rounded)).astype(float)
                assert (same | near).all(), (got, rounded)
            else:
                np.testing.assert_array_equal(got, rounded)
        if theirs is not None:
            np.testing.assert_allclose(got.astype(float), np.asarray(theirs).astype(float), rtol=4e-3, atol=4e-3)


def test_every_operation_has_a_case() -> None:
    types = {name for name in KERNELS if not any(case == name or case.startswith(f"{name}_") for case in CASES)}
    assert types == {"slice_by_index", "scaled_dot_product_attention", "range_1d"}  # slice_…, attention…, range


# Rounding


EVERY = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
"""All values of float16."""
EXACT: dict[str, Callable[..., torch.Tensor]] = {
    "exp": torch.exp, "exp2": torch.exp2, "log": torch.log, "sqrt": torch.sqrt, "rsqrt": torch.rsqrt, "cos": torch.cos,
    "sin": torch.sin, "tanh": torch.tanh, "sigmoid": torch.sigmoid, "silu": F.silu, "softplus": F.softplus,
    "erf": torch.erf, "square": torch.square, "inverse": lambda x: 1 / x, "round": torch.round,
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x * math.sqrt(0.5))),
}  # fmt: skip


def test_float16_results_are_rounded_once(tmp_path: Path) -> None:
    """For every value of float16, in long rows and in rows too short for vector instructions: torch has two codes."""
    named = {name: {"epsilon": np.float16(0)} for name in ("log", "rsqrt", "inverse")}

    def body(x: Any, short: Any) -> list[Any]:
        return [
            getattr(mb, name)(x=one, name=f"{name}_{size}", **named.get(name, {}))
            for name in EXACT
            for size, one in (("long", x), ("short", mb.split(x=short, num_splits=2, axis=1)[1]))
        ]

    short = np.stack([EVERY, EVERY], 1)  # its second column has a stride
    made = function(body, {"x": (EVERY.shape, "float16"), "short": (short.shape, "float16")})
    outputs = Interpreter(Package(save(tmp_path / "unary.mlpackage", main=made))).run(
        "main", {"x": EVERY, "short": short}, {}
    )
    for name, exact in EXACT.items():
        want = exact(torch.from_numpy(EVERY).float()).half().numpy()
        np.testing.assert_array_equal(outputs[f"{name}_long"], want, err_msg=name)
        np.testing.assert_array_equal(outputs[f"{name}_short"][:, 0], want, err_msg=name)


def test_float16_overflows_and_rounds_as_stored(tmp_path: Path) -> None:
    """2048 + 1 + 1 in float16 is 2048 twice; products beyond 65504 are infinite, and stay so."""

    def body(x: Any, big: Any) -> list[Any]:
        once = mb.add(x=x, y=np.float16(1))
        product = mb.mul(x=big, y=big, name="product")
        return [
            mb.add(x=once, y=np.float16(1), name="twice"), product,
            mb.mul(x=product, y=np.float16(0.5), name="still"), mb.softplus(x=big, name="softplus"),
            mb.cast(x=mb.mul(x=mb.cast(x=big, dtype="fp32"), y=np.float32(100)), dtype="fp16", name="cast"),
            mb.reduce_sum(x=mb.square(x=big), axes=[0], name="sum"),
        ]  # fmt: skip

    made = function(body, {"x": ((1,), "float16"), "big": ((2,), "float16")})
    found = Interpreter(Package(save(tmp_path / "round.mlpackage", main=made))).run(
        "main", {"x": np.array([2048], np.float16), "big": np.array([6e4, -1e3], np.float16)}, {}
    )
    assert found["twice"].tolist() == [2048]
    assert found["product"].tolist() == found["still"].tolist() == found["cast"].tolist()[:1] * 2 == [math.inf] * 2
    assert found["cast"].tolist() == [math.inf, -math.inf]
    assert found["softplus"].tolist() == [6e4, 0] and found["sum"] == math.inf


def in_blocks(x: Array, y: Array) -> Array:
    """x · y with the sum rounded to float16 after every eight terms."""
    total = np.zeros((x.shape[0], y.shape[1]), np.float32)
    for k in range(0, x.shape[1], 8):
        part = x[:, k : k + 8].astype(np.float32) @ y[k : k + 8].astype(np.float32)
        total = (total + part).astype(np.float16).astype(np.float32)
    return total.astype(np.float16)


def test_stress_mode_rounds_sums_as_they_grow(tmp_path: Path) -> None:
    weight, kernel = half(5, 300), half(5, 75, 4)

    def body(x: Any) -> list[Any]:
        rows = mb.reshape(x=x, shape=[4, 30, 10])
        windows = mb.reshape(x=x, shape=[4, 75, 4])
        return [
            mb.linear(x=x, weight=weight, name="linear"), mb.matmul(x=x, y=weight, transpose_y=True, name="matmul"),
            mb.conv(x=windows, weight=kernel, name="conv"), mb.reduce_sum(x=x, axes=[1], name="sum"),
            mb.reduce_mean(x=x, axes=[1], name="mean"), mb.softmax(x=x, axis=-1, name="softmax"),
            mb.layer_norm(x=x, axes=[1], name="norm"), mb.cumsum(x=x, axis=1, name="cumsum"),
            mb.scaled_dot_product_attention(query=rows, key=rows, value=rows, name="attention"),
            mb.matmul(x=mb.cast(x=x, dtype="fp32"), y=weight.astype(np.float32), transpose_y=True, name="single"),
            mb.reduce_sum(x=mb.cast(x=mb.round(x=x), dtype="int32"), axes=[1], name="whole"),
            mb.conv(x=mb.reshape(x=x, shape=[4, 300, 1]), weight=weight[..., None], name="pointwise"),
        ]  # fmt: skip

    x = half(4, 300) + np.float16(1)
    package = Package(save(tmp_path / "stress.mlpackage", main=function(body, {"x": (x.shape, "float16")})))
    exact = Interpreter(package).run("main", {"x": x}, {})
    stressed = Interpreter(package, "float16").run("main", {"x": x}, {})
    np.testing.assert_array_equal(stressed["linear"], in_blocks(x, weight.T))
    np.testing.assert_array_equal(stressed["matmul"], in_blocks(x, weight.T))
    np.testing.assert_array_equal(stressed["conv"][..., 0], in_blocks(x, kernel.reshape(5, -1).T))
    np.testing.assert_array_equal(stressed["pointwise"][..., 0], in_blocks(x, weight.T))
    tight = Interpreter(package, "float16", budget=Budget(0)).run("main", {"x": x}, {})
    for name in stressed:  # weights that are not kept are summed in the same order
        np.testing.assert_array_equal(tight[name], stressed[name], name)
    np.testing.assert_array_equal(stressed["sum"][:, None], in_blocks(x, np.ones((300, 1), np.float16)))
    for name in ("single", "whole"):  # only float16 is stressed
        np.testing.assert_array_equal(stressed[name], exact[name])
    for name in exact.keys() - {"single", "whole"}:
        assert not np.array_equal(exact[name], stressed[name]), name
        np.testing.assert_allclose(stressed[name].astype(float), exact[name].astype(float), rtol=0.05, atol=0.05)
