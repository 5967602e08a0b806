"""Kernels that move values without computing: shapes, slices, gathers, and tensors made from nothing.

Results that may share memory with an operand are declared as views; the compiler decides from them where
`slice_update` may write in place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from targets.to_coreml.kernel_call import Bound, Builder, Call

Index: TypeAlias = "int | slice"


def _reshape(call: Call) -> Bound:
    """−1 stands for what is left, 0 for the dimension of x as many places from the right (since iOS 17)."""
    if not call.is_constant("shape"):
        return Bound(lambda x, shape: x.reshape(_filled(x.shape, shape.tolist())), ("x", "shape"), view=True)
    wanted = _filled(call.type("x").shape, call.numbers("shape"))
    return Bound(lambda x: x.reshape(wanted), ("x",), view=True)


def _filled(source: Sequence[int], wanted: list[int]) -> list[int]:
    offset = len(source) - len(wanted)
    return [
        (source[place + offset] if place + offset >= 0 else 1) if length == 0 else length
        for place, length in enumerate(wanted)
    ]


def _transpose(call: Call) -> Bound:
    perm = call.numbers("perm")
    return Bound(lambda x: x.permute(perm), ("x",), view=True)


def _expand_dims(call: Call) -> Bound:
    """A dimension of one at each of `axes`, which count in the result."""
    given = call.numbers("axes")
    rank = len(call.type("x").shape) + len(given)
    axes = sorted(int(axis) % rank for axis in given)
    if len(axes) == 1:
        (axis,) = axes
        return Bound(lambda x: x.unsqueeze(axis), ("x",), view=True)

    def run(x: Tensor) -> Tensor:
        for axis in axes:
            x = x.unsqueeze(axis)
        return x

    return Bound(run, ("x",), view=True)


def _squeeze(call: Call) -> Bound:
    shape = call.shape("x")
    ones = [axis for axis, length in enumerate(shape) if length == 1]
    axes = call.axes("axes", len(shape)) if call.has("axes") else ones
    if not set(axes) <= set(ones):
        raise call.refuse(f"axes {axes} of x {list(shape)} are not all of length 1")
    return Bound(lambda x: x.squeeze(axes), ("x",), view=True)


def _split(call: Call) -> Bound:
    shape = call.shape("x")
    axis = call.axis("axis", len(shape))
    count = int(call.number("num_splits", 0))
    sizes = call.numbers("split_sizes", [shape[axis] // max(count, 1)] * count)
    if sum(sizes) != shape[axis]:
        raise call.refuse(f"parts {sizes} do not add up to dimension {axis} of x {list(shape)}")
    return Bound(lambda x: torch.split_with_sizes(x, sizes, axis), ("x",), view=True)


def _concat(call: Call) -> Bound:
    """Scalars become a vector. `interleave` takes the first of each, then the second of each, and so on."""
    rank = len(call.type("values").shape)
    axis = call.axis("axis", rank)
    if rank == 0:
        return Bound(lambda *values: torch.stack(values), ("values",))
    if call.number("interleave", False):
        return Bound(lambda *values: torch.stack(values, axis + 1).flatten(axis, axis + 1), ("values",))
    return Bound(lambda *values: torch.cat(values, axis), ("values",))


def _stack(call: Call) -> Bound:
    axis = call.axis("axis", len(call.type("values").shape) + 1)
    return Bound(lambda *values: torch.stack(values, axis), ("values",))


def _tile(call: Call) -> Bound:
    """Repeats axis by axis: a concatenation takes a sixth of the time of torch's own `repeat`."""
    repeats = [(axis, int(count)) for axis, count in enumerate(call.numbers("reps")) if count != 1]

    def run(x: Tensor) -> Tensor:
        for axis, count in repeats:
            x = torch.cat([x] * count, axis)
        return x

    return Bound(run, ("x",), view=not repeats)


def _reverse(call: Call) -> Bound:
    axes = call.axes("axes", len(call.type("x").shape))
    return Bound(lambda x: x.flip(axes), ("x",))


def _identity(call: Call) -> Bound:
    return Bound(lambda x: x, ("x",), view=True)


# Slices. Begin and end may be known only at run time (the place of a token in a cache).

SLICE = ("begin", "end")
STATIC = ("stride", "begin_mask", "end_mask", "squeeze_mask")


def _indices(begin: list[int], end: list[int], flags: dict[str, list[Any]]) -> list[Index]:
    """numpy's form of a slice; squeezed axes become their position."""
    found: list[Index] = []
    for place, (first, last) in enumerate(zip(begin, end, strict=True)):
        start = None if flags["begin_mask"][place] else first
        if flags["squeeze_mask"][place]:
            found.append(start or 0)
        else:
            found.append(slice(start, None if flags["end_mask"][place] else last, flags["stride"][place]))
    return found


def _flags(call: Call, rank: int) -> dict[str, list[Any]]:
    flags = {name: call.numbers(name, [name == "stride" or False] * rank) for name in STATIC}
    flags["stride"] = [int(step) for step in flags["stride"]]
    for name, values in flags.items():
        if len(values) != rank or 0 in flags["stride"]:
            raise call.refuse(f"{name} {values} does not fit rank {rank}")
    return flags


def _take(x: Tensor, index: Sequence[Index]) -> Tensor:
    """x[index], strides of either sign."""
    for axis, part in reversed(list(enumerate(index))):
        if isinstance(part, int):
            x = x.select(axis, part)
            continue
        places = range(*part.indices(x.shape[axis]))
        if len(places) == x.shape[axis] and places.step == 1:
            continue
        if len(places) == 0:
            x = x.narrow(axis, 0, 0)
        elif places.step == 1:
            x = x.narrow(axis, places[0], len(places))
        else:
            low, high = sorted((places[0], places[-1]))
            x = x[(slice(None),) * axis + (slice(low, high + 1, abs(places.step)),)]
            x = x.flip(axis) if places.step < 0 else x
    return x


def _slice_by_index(call: Call) -> Bound:
    rank = len(call.type("x").shape)
    flags = _flags(call, rank)
    if all(call.is_constant(name) for name in SLICE):
        index = _indices(call.numbers("begin"), call.numbers("end"), flags)
        return Bound(lambda x: _take(x, index), ("x",), view=True)
    return Bound(
        lambda x, begin, end: _take(x, _indices(begin.tolist(), end.tolist(), flags)), ("x", *SLICE), view=True
    )


def _slice_by_size(call: Call) -> Bound:
    """−1 takes everything from `begin` on. A negative begin counts from the end, as everywhere in numpy."""

    def index(begin: list[int], size: list[int]) -> list[Index]:
        ends = [first + length if length >= 0 else 0 for first, length in zip(begin, size, strict=True)]
        return [slice(first, end or None) for first, end in zip(begin, ends, strict=True)]

    if call.is_constant("begin") and call.is_constant("size"):
        fixed = index(call.numbers("begin"), call.numbers("size"))
        return Bound(lambda x: _take(x, fixed), ("x",), view=True)
    if call.is_constant("size"):
        size = call.numbers("size")
        return Bound(lambda x, begin: _fitting(x, index(begin.tolist(), size), size), ("x", "begin"), view=True)
    return Bound(
        lambda x, begin, size: _fitting(x, index(begin.tolist(), size.tolist()), size.tolist()),
        ("x", "begin", "size"), view=True,
    )  # fmt: skip


def _fitting(x: Tensor, index: list[Index], size: list[int]) -> Tensor:
    found = _take(x, index)
    if any(want not in (-1, got) for want, got in zip(size, found.shape, strict=True)):
        raise IndexError(f"a slice of size {size} at {index} leaves x {list(x.shape)}")
    return found


def _slice_update(call: Call) -> Bound:
    """x with the slice replaced by `update`, which must have the slice's shape."""
    rank = len(call.type("x").shape)
    flags = _flags(call, rank)
    if any(step < 0 for step in flags["stride"]):
        raise call.refuse(f"stride {flags['stride']}: only positive strides are supported")

    def write(x: Tensor, update: Tensor, index: list[Index]) -> Tensor:
        place = _take(x, index)
        if place.shape != update.shape:
            raise IndexError(f"the slice of x {list(x.shape)} is {list(place.shape)}, update {list(update.shape)}")
        place.copy_(update)
        return x

    if all(call.is_constant(name) for name in SLICE):
        index = _indices(call.numbers("begin"), call.numbers("end"), flags)
        return Bound(
            lambda x, update: write(x.clone(), update, index), ("x", "update"),
            in_place=lambda x, update: write(x, update, index),
        )  # fmt: skip

    def in_place(x: Tensor, update: Tensor, begin: Tensor, end: Tensor) -> Tensor:
        return write(x, update, _indices(begin.tolist(), end.tolist(), flags))

    return Bound(
        lambda x, *rest: in_place(x.clone(), *rest), ("x", "update", *SLICE), in_place=in_place
    )


# Gathers. Since iOS 17 a negative index is out of bounds (and what it yields is undefined), so it is an error here.


def _gather(call: Call) -> Bound:
    """x [D…], indices [N…]: D[:axis] + N[batch_dims:] + D[axis + 1:]."""
    shape, own = call.shape("x"), call.shape("indices")
    axis, batch = call.axis("axis", len(shape), 0), int(call.number("batch_dims", 0))
    call.number("validate_indices", False)
    result = (*shape[:axis], *own[batch:], *shape[axis + 1 :])
    if not batch:
        return Bound(
            lambda x, indices: x.index_select(axis, _index(indices).reshape(-1)).reshape(result), ("x", "indices")
        )
    if axis < batch:
        raise call.refuse(f"axis {axis} lies in the first {batch} dimensions, which are batches")
    count = math.prod(shape[:batch])

    def run(x: Tensor, indices: Tensor) -> Tensor:
        pairs = zip(x.reshape(count, *shape[batch:]), _index(indices).reshape(count, -1), strict=True)
        return torch.stack([part.index_select(axis - batch, chosen) for part, chosen in pairs]).reshape(result)

    return Bound(run, ("x", "indices"))


def _index(indices: Tensor) -> Tensor:
    return indices if indices.dtype == torch.int32 else indices.to(torch.int32)


def _gather_along_axis(call: Call) -> Bound:
    shape, own = call.shape("x"), call.shape("indices")
    axis = call.axis("axis", len(shape), 0)
    call.number("validate_indices", False)
    if any(a != b for place, (a, b) in enumerate(zip(shape, own, strict=True)) if place != axis):
        raise call.refuse(f"x {list(shape)} and indices {list(own)} may differ along axis {axis} only")
    return Bound(lambda x, indices: x.gather(axis, indices.long()), ("x", "indices"))


def _pad(call: Call) -> Bound:
    """`pad` has before and after of the last axes; reflect leaves out the edge, replicate repeats it."""
    shape, pads = call.shape("x"), call.numbers("pad")
    mode = call.text("mode", "constant", ["constant", "reflect", "replicate"])
    value = call.number("constant_val", 0.0)
    skipped = len(shape) - len(pads) // 2
    if mode == "constant":
        flat = [pad for place in range(len(pads) - 2, -1, -2) for pad in pads[place : place + 2]]
        return Bound(lambda x: torch.nn.functional.pad(x, flat, value=value), ("x",))
    sources = [
        (axis, torch.from_numpy(np.pad(np.arange(shape[axis]), pair, "edge" if mode == "replicate" else "reflect")))
        for axis, pair in enumerate(zip(pads[::2], pads[1::2], strict=True), skipped)
        if any(pair)
    ]

    def run(x: Tensor) -> Tensor:
        for axis, source in sources:
            x = x.index_select(axis, source)
        return x

    return Bound(run, ("x",), view=not sources)


def _band_part(call: Call) -> Bound:
    """Zero where (m, n) is more than `lower` below or `upper` above the diagonal; negative: no limit."""
    *_, rows, columns = call.shape("x")
    lower, upper = int(call.number("lower", -1)), int(call.number("upper", -1))
    below = torch.arange(rows)[:, None] - torch.arange(columns)
    inside = ((below <= lower) | (lower < 0)) & ((-below <= upper) | (upper < 0))
    return Bound(lambda x: torch.where(inside, x, torch.zeros((), dtype=x.dtype)), ("x",))


def _range(call: Call) -> Bound:
    names, kind = ("start", "end", "step"), call.dtype
    return Bound(lambda *ends: torch.arange(*(end.item() for end in ends)).to(kind), names)


def _fill(call: Call) -> Bound:
    value, kind = call.number("value", 0.0), call.dtype
    return Bound(lambda shape: torch.full(shape.tolist(), value, dtype=kind), ("shape",))


def _shape(call: Call) -> Bound:
    return Bound(lambda x: torch.tensor(x.shape, dtype=torch.int32), ("x",))


def _one_hot(call: Call) -> Bound:
    """Indices beyond the vector give one without the on_value."""
    rank, size, kind = len(call.type("indices").shape), int(call.number("one_hot_vector_size")), call.dtype
    axis = call.axis("axis", rank + 1, -1)
    on, off = (torch.tensor(call.number(*given), dtype=kind) for given in (("on_value", 1), ("off_value", 0)))
    places = torch.arange(size).reshape([-1 if place == axis else 1 for place in range(rank + 1)])
    return Bound(lambda indices: torch.where(indices.unsqueeze(axis) == places, on, off), ("indices",))


def _topk(call: Call) -> Bound:
    """The first of equal values comes first."""
    shape = call.shape("x")
    axis, ascending = call.axis("axis", len(shape), -1), bool(call.number("ascending", False))
    wanted = int(call.number("k", 1))
    count, indices = shape[axis] if wanted < 0 else wanted, bool(call.number("return_indices", True))
    call.number("sort", True)
    call.text("output_indices_dtype", "int32", ["int32", "uint16"])

    def run(x: Tensor) -> Sequence[Tensor]:
        values, places = torch.sort(x, dim=axis, descending=not ascending, stable=True)
        found = [values.narrow(axis, 0, count).contiguous()]
        return [*found, places.narrow(axis, 0, count).to(torch.int32)] if indices else found

    return Bound(run, ("x",))


KERNELS: dict[str, Builder] = {
    "reshape": _reshape, "transpose": _transpose, "expand_dims": _expand_dims, "squeeze": _squeeze,
    "split": _split, "concat": _concat, "stack": _stack, "tile": _tile, "reverse": _reverse, "identity": _identity,
    "slice_by_index": _slice_by_index, "slice_by_size": _slice_by_size, "slice_update": _slice_update,
    "gather": _gather, "gather_along_axis": _gather_along_axis, "pad": _pad, "band_part": _band_part,
    "range_1d": _range, "fill": _fill, "shape": _shape, "one_hot": _one_hot, "topk": _topk,
}  # fmt: skip
