"""Kernels that compute every element by itself: arithmetic, comparisons, activations, casts.

Float16 results are those of float32 arithmetic, rounded once. torch's own float16 kernels do that for most operations;
the others go through float32 here (`_through_float`), as rsqrt, which rounds twice where a vector is not full. A test
holds every one against float32, for all values of float16.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from targets.to_coreml.constants import TORCH
from targets.to_coreml.kernel_call import Bound, Builder, Call

Unary = Callable[[Tensor], Tensor]


def _through_float(function: Unary) -> Unary:
    """The same in float32, rounded to the dtype of the argument."""

    def run(x: Tensor) -> Tensor:
        return function(x.float()).to(x.dtype)

    return run


def _unary(function: Unary) -> Builder:
    return lambda call: Bound(function, ("x",))


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Builder:
    """With broadcasting as numpy's."""

    def build(call: Call) -> Bound:
        first, second = call.type("x").dtype, call.type("y").dtype
        if first != second:
            raise call.refuse(f"x is {first} and y {second}; both must have one dtype: cast one")
        return Bound(function, ("x", "y"))

    return build


def _real_div(x: Tensor, y: Tensor) -> Tensor:
    """Integers are divided and cut towards zero, for the result is an integer too."""
    return torch.div(x, y) if x.is_floating_point() else torch.div(x, y, rounding_mode="trunc")


def _floor_div(x: Tensor, y: Tensor) -> Tensor:
    return torch.div(x.float(), y.float(), rounding_mode="floor").to(x.dtype) if x.is_floating_point() else x // y


def _sign(x: Tensor) -> Tensor:
    """NaN stays NaN, as numpy and coremltools have it; torch makes 0 of it."""
    return torch.where(torch.isnan(x), x, torch.sign(x)) if x.is_floating_point() else torch.sign(x)


def _with_epsilon(function: Unary, default: float) -> Builder:
    """function(x + epsilon). The default is rounded to the dtype of x: below float16's range it is zero. In stress mode
    the sum is rounded too: it is a step inside a norm.
    """

    def build(call: Call) -> Bound:
        kind = TORCH[call.type("x").dtype]
        epsilon = call.number("epsilon", torch.tensor(default, dtype=kind).item())
        if epsilon == 0:
            return Bound(_through_float(function), ("x",))
        if call.half_sums:
            return Bound(lambda x: function((x.float() + epsilon).half().float()).to(kind), ("x",))
        return Bound(lambda x: function(x.float() + epsilon).to(kind), ("x",))

    return build


def _clip(call: Call) -> Bound:
    low, high = call.number("alpha"), call.number("beta")
    return Bound(lambda x: torch.clamp(x, low, high), ("x",))


def _threshold(call: Call) -> Bound:
    low = call.number("alpha")
    return Bound(lambda x: torch.clamp(x, low), ("x",))


def _sigmoid_hard(call: Call) -> Bound:
    alpha, beta = call.number("alpha"), call.number("beta")
    return Bound(_through_float(lambda x: torch.clamp(x * alpha + beta, 0, 1)), ("x",))


def _gelu(call: Call) -> Bound:
    """EXACT: x/2·(1 + erf(x/√2)). TANH_APPROXIMATION as torch's. SIGMOID_APPROXIMATION: x·sigmoid(1.702 x)."""
    forms: dict[str, Unary] = {
        "EXACT": lambda x: 0.5 * x * (1 + torch.erf(x * math.sqrt(0.5))),
        "TANH_APPROXIMATION": lambda x: F.gelu(x, approximate="tanh"),
        "SIGMOID_APPROXIMATION": lambda x: x * torch.sigmoid(1.702 * x),
    }
    return Bound(_through_float(forms[call.text("mode", "EXACT", list(forms))]), ("x",))


CASTS = {
    "fp16": "float16", "fp32": "float32", "int32": "int32", "bool": "bool",
    "int16": "int16", "uint16": "uint16", "int8": "int8", "uint8": "uint8",
}  # fmt: skip


def _cast(call: Call) -> Bound:
    """To float16: beyond its range is infinity. To integers: cut towards zero, wrapped into the type's range."""
    name = CASTS[call.text("dtype", "", list(CASTS))]
    kind = TORCH[name]
    if name == "uint16":  # held in int32
        return Bound(lambda x: x.to(torch.int32).bitwise_and(0xFFFF), ("x",))
    if name in ("int8", "int16", "uint8"):
        return Bound(lambda x: x.to(torch.int32).to(kind), ("x",))
    return Bound(lambda x: x.to(kind), ("x",), view=True)


def _select(call: Call) -> Bound:
    """cond ? a : b, with broadcasting."""
    first, second = call.type("a").dtype, call.type("b").dtype
    if first != second:
        raise call.refuse(f"a is {first} and b {second}; both must have one dtype: cast one")
    return Bound(torch.where, ("cond", "a", "b"))


KERNELS: dict[str, Builder] = {
    "add": _binary(torch.add), "sub": _binary(torch.sub), "mul": _binary(torch.mul),
    "real_div": _binary(_real_div), "floor_div": _binary(_floor_div), "mod": _binary(torch.remainder),
    "pow": _binary(torch.pow), "maximum": _binary(torch.maximum), "minimum": _binary(torch.minimum),
    "equal": _binary(torch.eq), "not_equal": _binary(torch.ne), "greater": _binary(torch.gt),
    "greater_equal": _binary(torch.ge), "less": _binary(torch.lt), "less_equal": _binary(torch.le),
    "logical_and": _binary(torch.logical_and), "logical_or": _binary(torch.logical_or),
    "logical_xor": _binary(torch.logical_xor), "logical_not": _unary(torch.logical_not),
    "abs": _unary(torch.abs), "sign": _unary(_sign), "square": _unary(torch.square),
    "floor": _unary(torch.floor), "ceil": _unary(torch.ceil), "round": _unary(torch.round),
    "exp": _unary(torch.exp), "exp2": _unary(torch.exp2), "tanh": _unary(torch.tanh), "cos": _unary(torch.cos),
    "sin": _unary(_through_float(torch.sin)), "erf": _unary(_through_float(torch.erf)),
    "sqrt": _unary(_through_float(torch.sqrt)),
    "log": _with_epsilon(torch.log, 1e-45), "rsqrt": _with_epsilon(torch.rsqrt, 1e-12),
    "inverse": _with_epsilon(torch.reciprocal, 1e-4),
    "relu": _unary(torch.relu), "sigmoid": _unary(torch.sigmoid), "silu": _unary(F.silu),
    "softplus": _unary(F.softplus),  # above 20 it is x, which float32 cannot tell from log(1 + e^x)
    "gelu": _gelu, "sigmoid_hard": _sigmoid_hard, "clip": _clip, "threshold": _threshold,
    "cast": _cast, "select": _select,
}  # fmt: skip
