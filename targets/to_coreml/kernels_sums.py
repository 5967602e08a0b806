"""Kernels that add up: products of matrices, convolution, attention, reductions, normalisations.

Each computes in float32 from its inputs to its end and rounds once. In stress mode (`Call.half_sums`) the sums are
rounded to float16 after every `BLOCK` terms, and so is every step inside softmax, attention and the norms, as on the
Neural Engine, which has no float32 to keep them in: a score or a square beyond float16 is infinite there. It shows how
sensitive a model is to such arithmetic, it is no model of any device. What a program declares as float32 stays that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from targets.to_coreml.constants import TORCH, Factor
from targets.to_coreml.kernel_call import Bound, Builder, Call

BLOCK = 8
"""Terms that stress mode sums exactly before it rounds."""


def _half(x: Tensor) -> Tensor:
    """float32 rounded to what float16 holds."""
    return x.half().float()


def _rounding(half_sums: bool) -> Callable[[Tensor], Tensor]:
    """What is done to each step inside an operation."""
    return _half if half_sums else lambda x: x


def _product(x: Tensor, y: Tensor, half_sums: bool) -> Tensor:
    """x [..., M, K] · y [..., K, N], both float32."""
    if not half_sums:
        return torch.matmul(x, y)
    total = torch.zeros(())
    for first in range(0, y.shape[-2], BLOCK):
        total = _half(total + torch.matmul(x[..., first : first + BLOCK], y[..., first : first + BLOCK, :]))
    return total


def _joined(parts: list[Tensor], axis: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, axis)


def _sum(x: Tensor, axes: list[int], keep: bool, half_sums: bool) -> Tensor:
    """float32 sum over axes."""
    if not half_sums:
        return torch.sum(x, axes, keep)
    rest = [axis for axis in range(x.dim()) if axis not in axes]
    terms = x.permute(*rest, *axes).flatten(len(rest))
    total = torch.zeros(terms.shape[:-1])
    for block in terms.split(BLOCK, -1):
        total = _half(total + block.sum(-1))
    for axis in axes if keep else ():
        total = total.unsqueeze(axis)
    return total


def _linear(call: Call) -> Bound:
    """x [..., K] · weight [N, K]ᵀ + bias [N]. A bias of zeros, which coremltools writes where there is none, is
    left out.
    """
    kind = TORCH[call.type("x").dtype]
    if not call.is_constant("weight"):
        raise call.refuse("weight must be a constant; use matmul")
    if kind == torch.int32:
        raise call.refuse("x is int32; supported: float16, float32")
    weight = call.factor("weight")
    bias = call.tensor("bias").float() if call.has("bias") else None
    if bias is not None and not bias.any():
        bias = None

    def run(x: Tensor) -> Tensor:
        wide = x.float()
        found = _joined([_product(wide, part.T, call.half_sums) for part in weight.parts()], -1)
        return (found if bias is None else found + bias).to(kind)

    return Bound(run, ("x",))


def _matmul(call: Call) -> Bound:
    """x · y over the last two axes, batches broadcast; a vector counts as a row of x or a column of y."""
    kind = TORCH[call.type("x").dtype]
    turn_x = call.number("transpose_x", False) and len(call.type("x").shape) > 1
    turn_y = call.number("transpose_y", False) and len(call.type("y").shape) > 1
    if kind != TORCH[call.type("y").dtype]:
        raise call.refuse("x and y must have one dtype: cast one")
    half_sums = call.half_sums and len(call.type("y").shape) > 1

    def run(x: Tensor, y: Tensor) -> Tensor:
        x, y = x.mT if turn_x else x, y.mT if turn_y else y
        if kind == torch.int32:
            return torch.matmul(x, y)
        return _product(x.float(), y.float(), half_sums).to(kind)

    if call.is_constant("y"):
        right = call.factor("y")
        return Bound(lambda x: run(x, right.whole()), ("x",))
    if call.is_constant("x"):
        left = call.factor("x")
        return Bound(lambda y: run(left.whole(), y), ("y",))
    return Bound(run, ("x", "y"))


def _conv(call: Call) -> Bound:
    """x [N, C, *D] with weight [O, C/groups, *K] (convolution as networks mean it: correlation), one to three
    spatial dimensions.
    """
    shape, kernel = call.shape("x"), call.shape("weight")[2:]
    space = len(kernel)
    strides, dilations = call.numbers("strides", [1] * space), call.numbers("dilations", [1] * space)
    groups, kind = int(call.number("groups", 1)), TORCH[call.type("x").dtype]
    pads = _pads(call, shape[2:], kernel, strides, dilations)
    bias = call.tensor("bias").float() if call.has("bias") else None
    if bias is not None and not bias.any():
        bias = None
    if not call.is_constant("weight"):
        raise call.refuse("weight must be a constant")
    plain = set(strides) == set(dilations) == {1}
    if groups == 1 and plain and math.prod(kernel) == 1 and not any(map(any, pads)):
        return Bound(_pointwise(call.factor("weight"), bias, kind, call.half_sums), ("x",))
    if call.half_sums:
        return _conv_stressed(call, pads, strides, dilations, groups, bias)
    weight = call.tensor("weight").float()
    depthwise = groups == shape[1] == weight.shape[0] and weight.shape[1] == 1
    if depthwise and plain and math.prod(kernel) == kernel[-1] and math.prod(shape[2:]) == shape[-1]:
        return Bound(_depthwise(weight, bias, pads[-1], kind), ("x",))
    function = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[space]
    flat = [pad for pair in reversed(pads) for pad in pair]

    def run(x: Tensor) -> Tensor:
        wide = F.pad(x.float(), flat) if any(flat) else x.float()
        return function(wide, weight, bias, strides, 0, dilations, groups).to(kind)

    return Bound(run, ("x",))


def _pads(
    call: Call, length: Sequence[int], kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> list[tuple[int, int]]:
    """Elements to add before and after each spatial dimension.

    Where `same` needs an odd number, coremltools' text puts the odd one at the end and its formula at the beginning,
    so it is refused.
    """
    how = call.text("pad_type", "valid", ["valid", "custom", "same", "same_lower"])
    custom = call.numbers("pad", [0] * 2 * len(kernel))
    if how == "custom":
        return list(zip(custom[::2], custom[1::2], strict=True))
    if how == "valid":
        return [(0, 0)] * len(kernel)
    pads = []
    for whole, size, stride, dilation in zip(length, kernel, strides, dilations, strict=True):
        missing = max(0, (-(-whole // stride) - 1) * stride + (size - 1) * dilation + 1 - whole)
        if missing % 2 and how == "same":
            raise call.refuse(f"pad_type 'same' with an odd padding of {missing} is ambiguous; use 'custom'")
        pads.append((missing - missing // 2, missing // 2))
    return pads


def _pointwise(
    weight: Factor, bias: Tensor | None, kind: torch.dtype, half_sums: bool
) -> Callable[[Tensor], Tensor]:
    """weight [O, C, 1…] over x [N, C, *D]: one product, which is many times faster than torch's convolution."""

    def run(x: Tensor) -> Tensor:
        wide = x.flatten(2).float()
        total = _joined([_product(part.flatten(1), wide, half_sums) for part in weight.parts()], 1)
        if bias is not None:
            total = total + bias[:, None]
        return total.unflatten(2, x.shape[2:]).to(kind)

    return run


def _depthwise(
    weight: Tensor, bias: Tensor | None, pad: tuple[int, int], kind: torch.dtype
) -> Callable[[Tensor], Tensor]:
    """weight [C, 1, 1…, K] over x [N, C, 1…, L]: K products of whole rows beat torch's kernel where L is short."""
    axes = (1,) * (weight.dim() - 2)
    taps = [tap.reshape(-1, *axes) for tap in weight.flatten(1).unbind(1)]  # each [C, 1…]

    def run(x: Tensor) -> Tensor:
        wide = F.pad(x.float(), pad) if any(pad) else x.float()
        length = wide.shape[-1] - len(taps) + 1
        total = wide.narrow(-1, 0, length) * taps[0]
        for place in range(1, len(taps)):
            total.addcmul_(wide.narrow(-1, place, length), taps[place])
        return (total if bias is None else total.add_(bias.reshape(-1, *axes))).to(kind)

    return run


def _conv_stressed(
    call: Call, pads: list[tuple[int, int]], strides: list[int], dilations: list[int], groups: int, bias: Tensor | None
) -> Bound:
    """As a product of windows [N, groups, C/groups·K, L] with the weight, for the sums to be rounded."""
    kind, weight = TORCH[call.type("x").dtype], call.tensor("weight").float()
    kernel = weight.shape[2:]
    matrix = weight.reshape(groups, weight.shape[0] // groups, -1)
    flat = [pad for pair in reversed(pads) for pad in pair]

    def run(x: Tensor) -> Tensor:
        windows = F.pad(x.float(), flat)
        for axis, (size, stride, dilation) in enumerate(zip(kernel, strides, dilations, strict=True), 2):
            windows = windows.unfold(axis, (size - 1) * dilation + 1, stride)[..., ::dilation]
        space = windows.shape[2 : 2 + len(kernel)]  # windows are [N, C, *out, *K]
        order = (0, 1, *range(2 + len(kernel), windows.dim()), *range(2, 2 + len(kernel)))
        columns = windows.permute(order).reshape(x.shape[0], groups, matrix.shape[-1], math.prod(space))
        total = _product(matrix, columns, True).reshape(x.shape[0], -1, *space)
        return (total if bias is None else total + bias.reshape(-1, *[1] * len(kernel))).to(kind)

    return Bound(run, ("x",))


def _attention(call: Call) -> Bound:
    """softmax(query · keyᵀ / √E + mask) · value: query [B, …, L, E], key [B, …, S, E], value [B, …, S, V]; a boolean
    mask says which places take part, another is added.
    """
    kind, scale = TORCH[call.type("query").dtype], 1 / math.sqrt(call.shape("query")[-1])
    operands: tuple[str, ...] = ("query", "key", "value")
    if call.has("attn_mask"):
        operands += ("attn_mask",)
    half_sums, step = call.half_sums, _rounding(call.half_sums)

    def run(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        scores = step(_product(query.float(), key.float().mT, half_sums) * scale)
        if mask is not None and mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, -math.inf)
        elif mask is not None:
            scores = step(scores + mask)
        return _product(_softmax_float(scores, -1, half_sums), value.float(), half_sums).to(kind)

    return Bound(run, operands)


def _softmax_float(x: Tensor, axis: int, half_sums: bool) -> Tensor:
    if not half_sums:
        return torch.softmax(x, axis)
    powers = _half(torch.exp(_half(x - x.amax(axis, True))))
    return _half(powers / _sum(powers, [axis % x.dim()], True, True))


def _softmax(call: Call) -> Bound:
    kind, half_sums = TORCH[call.type("x").dtype], call.half_sums
    axis = call.axis("axis", len(call.type("x").shape), -1)
    return Bound(lambda x: _softmax_float(x.float(), axis, half_sums).to(kind), ("x",))


def _layer_norm(call: Call) -> Bound:
    """gamma · (x − mean) / √(variance + epsilon) + beta over `axes`."""
    shape, kind, half_sums = call.shape("x"), TORCH[call.type("x").dtype], call.half_sums
    axes, epsilon = call.axes("axes", len(shape)), call.number("epsilon", 1e-5)
    fit = [length if axis in axes else 1 for axis, length in enumerate(shape)]
    gamma, beta = (call.tensor(name).float().reshape(fit) if call.has(name) else None for name in ("gamma", "beta"))
    if axes == list(range(axes[0], len(shape))) and not half_sums:
        over = shape[axes[0] :]
        scale, shift = (part if part is None else part.reshape(over) for part in (gamma, beta))
        return Bound(lambda x: F.layer_norm(x.float(), over, scale, shift, epsilon).to(kind), ("x",))
    count = math.prod(shape[axis] for axis in axes)
    step = _rounding(half_sums)

    def run(x: Tensor) -> Tensor:
        wide = x.float()
        centred = step(wide - step(_sum(wide, axes, True, half_sums) / count))
        variance = step(_sum(step(centred * centred), axes, True, half_sums) / count)
        found = step(centred * step(torch.rsqrt(step(variance + epsilon))))
        found = found if gamma is None else step(found * gamma)
        return (found if beta is None else found + beta).to(kind)

    return Bound(run, ("x",))


def _l2_norm(call: Call) -> Bound:
    """x / √(Σx² + epsilon) over the last three axes."""
    kind, half_sums, rank = TORCH[call.type("x").dtype], call.half_sums, len(call.type("x").shape)
    epsilon, axes, step = call.number("epsilon", 1e-6), list(range(rank - 3, rank)), _rounding(half_sums)

    def run(x: Tensor) -> Tensor:
        wide = x.float()
        total = step(_sum(step(wide * wide), axes, True, half_sums) + epsilon)
        return (wide / step(torch.sqrt(total))).to(kind)

    return Bound(run, ("x",))


def _reduce(terms: Callable[[Tensor], Tensor] | None, finish: Callable[[Tensor, int], Tensor] | None) -> Builder:
    """finish(Σ terms(x), number of terms) over `axes`."""

    def build(call: Call) -> Bound:
        shape, kind, half_sums = call.shape("x"), TORCH[call.type("x").dtype], call.half_sums
        axes, keep = call.axes("axes", len(shape)), bool(call.number("keep_dims", False))
        count, step = math.prod(shape[axis] for axis in axes), _rounding(half_sums)
        if terms is None and finish is None and not half_sums:
            return Bound(lambda x: torch.sum(x, axes, keep, dtype=kind), ("x",))

        def run(x: Tensor) -> Tensor:
            wide = x.float() if x.is_floating_point() else x.double()
            total = _sum(wide if terms is None else step(terms(wide)), axes, keep, half_sums)
            return (total if finish is None else finish(total, count)).to(kind)

        return Bound(run, ("x",))

    return build


def _extreme(function: Callable[[Tensor, list[int], bool], Tensor]) -> Builder:
    def build(call: Call) -> Bound:
        axes, keep = call.axes("axes", len(call.shape("x"))), bool(call.number("keep_dims", False))
        return Bound(lambda x: function(x, axes, keep), ("x",))

    return build


def _argument(function: Callable[[Tensor, int, bool], Tensor]) -> Builder:
    def build(call: Call) -> Bound:
        axis, keep = call.axis("axis", len(call.shape("x")), -1), bool(call.number("keep_dims", False))
        call.text("output_dtype", "int32", ["int32", "uint16"])
        return Bound(lambda x: function(x, axis, keep).to(torch.int32), ("x",))

    return build


def _cumsum(call: Call) -> Bound:
    """Σ of the elements up to each one (`exclusive`: before it), from the other end if `reverse`."""
    kind, half_sums = TORCH[call.type("x").dtype], call.half_sums
    axis = call.axis("axis", len(call.type("x").shape), 0)
    exclusive, reverse = bool(call.number("exclusive", False)), bool(call.number("reverse", False))

    def run(x: Tensor) -> Tensor:
        wide = x.float() if x.is_floating_point() else x
        wide = wide.flip(axis) if reverse else wide
        if half_sums:
            running, total = [], torch.zeros(())
            for term in wide.unbind(axis):
                total = _half(total + term)
                running.append(total)
            found = torch.stack(running, axis)
        else:
            found = torch.cumsum(wide, axis)
        if exclusive:
            first, rest = found.split([1, found.shape[axis] - 1], axis)
            found = torch.cat([torch.zeros_like(first), found.narrow(axis, 0, rest.shape[axis])], axis)
        return (found.flip(axis) if reverse else found).to(kind)

    return Bound(run, ("x",))


KERNELS: dict[str, Builder] = {
    "linear": _linear, "matmul": _matmul, "conv": _conv, "scaled_dot_product_attention": _attention,
    "softmax": _softmax, "layer_norm": _layer_norm, "l2_norm": _l2_norm, "cumsum": _cumsum,
    "reduce_sum": _reduce(None, None), "reduce_mean": _reduce(None, lambda total, count: total / count),
    "reduce_sum_square": _reduce(torch.square, None),
    "reduce_l2_norm": _reduce(torch.square, lambda total, _: torch.sqrt(total)),
    "reduce_max": _extreme(torch.amax), "reduce_min": _extreme(torch.amin),
    "reduce_argmax": _argument(torch.argmax), "reduce_argmin": _argument(torch.argmin),
}  # fmt: skip
