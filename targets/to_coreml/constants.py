"""Constants of a program as tensors: compressed weights are expanded in blocks of rows, and each is kept once, however
many functions of the package use it. Factors of products beyond a budget are not kept but expanded at every use.

What a weight is worth is computed in float32 and rounded once to the type that the program declares, as the
definitions of the `constexpr_*` operations in coremltools do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from export.bundle.manifest import BundleError
from export.spec import ExportError
from targets.to_coreml.blob import BlobTensor
from targets.to_coreml.program import Function, Operation, Reference

BLOCK = 1 << 15
"""Elements that are expanded at a time: as many as torch leaves to one thread. With more, its threads wait for each
other at every step, eight times as long where another process is busy.
"""
PART = 1 << 24
"""Elements of a factor that is not kept which are in memory at a time."""

TORCH: dict[str, torch.dtype] = {
    "float16": torch.float16, "float32": torch.float32, "bool": torch.bool, "int32": torch.int32,
    "int16": torch.int16, "int8": torch.int8, "uint8": torch.uint8, "int4": torch.int8, "uint4": torch.uint8,
    "uint1": torch.uint8, "uint2": torch.uint8, "uint3": torch.uint8, "uint6": torch.uint8,
    "uint16": torch.int32,
}  # fmt: skip
"""How a dtype of MIL is held here. torch has next to no kernels for uint16, so it rides in int32."""


class UnsupportedOperation(ExportError):
    """A program uses what the interpreter does not know."""


Rows: TypeAlias = "Callable[[int, int], Tensor]"


@dataclass(frozen=True, eq=False)
class Weight:
    """A constant tensor of a program, read or expanded when it is asked for."""

    shape: tuple[int, ...]
    dtype: str
    """As MIL names it."""
    key: Hashable
    """What it is made of in the weight files; None where a part is not in one."""
    rows: Rows
    """Rows `start` to `stop` of the first axis, in that dtype."""
    whole: Callable[[], Tensor] | None = None
    """All of it, where it is stored as it is."""


def weights(function: Function) -> dict[str, Weight]:
    """Every constant tensor of a function by name, compressed ones included.

    Raises:
        UnsupportedOperation, BundleError: a compressed one cannot be expanded.
    """
    named: dict[str, Weight] = {}
    for operation in function.operations:
        if operation.type == "const":
            (value,) = operation.inputs["val"]
            if isinstance(value, np.ndarray | BlobTensor):
                name, kind = operation.outputs[0]
                named[name] = stored(value, kind.dtype)
        elif operation.type.startswith("constexpr_"):
            named[operation.outputs[0][0]] = compressed(operation, named, function.name)
    return named


def stored(value: NDArray[Any] | BlobTensor, dtype: str | None = None) -> Weight:
    """A constant that is not compressed; float16 in a file may be declared to be float32 (see `exact`)."""
    if isinstance(value, BlobTensor):
        if (value.dtype, dtype) == ("float16", "float32"):
            wide: Rows = lambda start, stop: as_tensor(value.rows(start, stop)).float()  # noqa: E731
            return Weight(value.shape, "float32", (*value.key, dtype), wide, lambda: as_tensor(value.array()).float())
        rows: Rows = lambda start, stop: as_tensor(value.rows(start, stop))  # noqa: E731
        return Weight(value.shape, value.dtype, value.key, rows, lambda: as_tensor(value.array()))
    rows = lambda start, stop: as_tensor(value[start:stop])  # noqa: E731
    return Weight(value.shape, str(value.dtype), None, rows, lambda: as_tensor(value))


def as_tensor(array: NDArray[Any]) -> Tensor:
    """A numpy array of any dtype of MIL as the interpreter holds it; shares memory where it can."""
    if array.dtype in (np.uint16, np.uint32):
        array = array.astype(np.int32)
    return torch.from_numpy(array)


def compressed(operation: Operation, named: Mapping[str, Weight], function: str) -> Weight:
    """The weight that a `constexpr_*` operation describes; `named` has the constants that came before.

    Raises:
        UnsupportedOperation: another operation than those of `EXPAND`, or parameters it does not take.
        BundleError: parameters are missing or do not fit, or the program declares another shape.
    """
    where = f"{operation.name} ({operation.type}) of {function}"
    if operation.type not in EXPAND:
        raise UnsupportedOperation(f"{where} is not known to the interpreter; it expands {', '.join(EXPAND)}")
    expand, parameters = EXPAND[operation.type]
    parts: dict[str, Weight] = {}
    for name, (value, *_) in operation.inputs.items():
        if name not in parameters or isinstance(value, str | tuple):
            raise UnsupportedOperation(f"{where}: {name!r} is not supported; supported: {', '.join(parameters)}")
        if isinstance(value, Reference) and value.name not in named:
            raise UnsupportedOperation(f"{where}: {name!r} must be a constant")
        parts[name] = named[value.name] if isinstance(value, Reference) else stored(value)
    try:
        shape, exact = expand(**parts)
    except (TypeError, ValueError, RuntimeError) as error:
        raise BundleError(f"{where}: its parts do not fit ({error}); export the package again") from error
    kind = operation.outputs[0][1]
    if shape != kind.shape:
        raise BundleError(f"{where} makes {list(shape)}, but the program declares {kind}; export the package again")
    keys = [(name, part.key) for name, part in sorted(parts.items())]
    key = (operation.type, *keys) if all(part is not None for _, part in keys) else None
    return Weight(shape, kind.dtype, key, lambda start, stop: exact(start, stop).to(TORCH[kind.dtype]))


Expanded: TypeAlias = "tuple[tuple[int, ...], Rows]"
"""Shape and rows of what a compressed weight stands for; the rows are float32, not yet rounded."""


def _shift_scale(data: Weight, scale: Weight, offset: Weight | None = None) -> Expanded:
    """constexpr_blockwise_shift_scale: scale · (data − offset). `data` [d0, …], `scale` and `offset` [s0, …]: each
    scale holds for a block of d/s elements along every axis.
    """
    blocks = _blocks(data.shape, scale.shape)

    def rows(start: int, stop: int) -> Tensor:
        first, last = start // blocks[0], -(-stop // blocks[0])
        values = data.rows(start, stop).float()
        per_row = [part.rows(first, last).float() for part in (scale, offset) if part is not None]
        if blocks[0] > 1:
            own = torch.arange(start, stop) // blocks[0] - first
            per_row = [part.index_select(0, own) for part in per_row]
        # [rows, s1, d1/s1, s2, d2/s2, …] against [rows, s1, 1, s2, 1, …]
        split = [length for part in zip(scale.shape[1:], blocks[1:], strict=True) for length in part]
        grouped = values.reshape(stop - start, *split)
        once = [stop - start, *(length for groups in scale.shape[1:] for length in (groups, 1))]
        if offset is not None:
            grouped = grouped - per_row[1].reshape(once)
        return (grouped * per_row[0].reshape(once)).reshape(values.shape)

    return data.shape, rows


def _blocks(whole: tuple[int, ...], groups: tuple[int, ...]) -> list[int]:
    if len(whole) != len(groups) or any(length % count for length, count in zip(whole, groups, strict=True)):
        raise ValueError(f"{list(groups)} groups do not divide {list(whole)} elements")
    return [length // count for length, count in zip(whole, groups, strict=True)]


def _lookup(indices: Weight, lut: Weight, vector_axis: Weight | None = None) -> Expanded:
    """constexpr_lut_to_dense. `indices` [n0, …], `lut` [g0, …, palette, vector]: the table of an element is the one of
    its group along every axis; vectors are laid along `vector_axis`.
    """
    shape, groups = indices.shape, lut.shape[:-2]
    *_, palette, vector = lut.shape
    axis = 0 if vector_axis is None or vector_axis.whole is None else int(vector_axis.whole()) % len(shape)
    blocks = _blocks(shape, groups)
    table = lut.rows(0, lut.shape[0]).reshape(-1, palette, vector)

    def rows(start: int, stop: int) -> Tensor:
        per_index = vector if axis == 0 else 1
        first, last = start // per_index, -(-stop // per_index)
        chosen = torch.zeros((), dtype=torch.int64)
        for place, block in enumerate(blocks):
            group = (torch.arange(first, last) if place == 0 else torch.arange(shape[place])) // block
            fit = [-1 if place == other else 1 for other in range(len(shape))]
            chosen = chosen * groups[place] + group.reshape(fit)
        values = table[chosen, indices.rows(first, last).long()]  # [rows, …, vector]
        values = values.movedim(-1, axis + 1).flatten(axis, axis + 1)
        return values[start - first * per_index : stop - first * per_index]

    return tuple(length * vector if place == axis else length for place, length in enumerate(shape)), rows


EXPAND: dict[str, tuple[Callable[..., Expanded], tuple[str, ...]]] = {
    "constexpr_blockwise_shift_scale": (_shift_scale, ("data", "scale", "offset")),
    "constexpr_lut_to_dense": (_lookup, ("indices", "lut", "vector_axis")),
}
"""What expands a compressed weight, and its parameters."""


class Budget:
    """How many bytes factors may take together; one may serve several packages."""

    def __init__(self, size_bytes: int) -> None:
        self._left = size_bytes

    def take(self, size_bytes: int) -> bool:
        """Whether there is room, which is gone then."""
        if size_bytes > self._left:
            return False
        self._left -= size_bytes
        return True


class Factor:
    """A constant factor of products, float32: kept whole, or expanded from the weight file at every use."""

    def __init__(self, shape: tuple[int, ...], kept: Tensor | None, rows: Rows) -> None:
        self.shape = shape
        self._kept = kept
        self._rows = rows

    def whole(self) -> Tensor:
        """All of it."""
        return self._kept if self._kept is not None else _expand(self.shape, self._rows, torch.float32)

    def parts(self) -> Iterator[Tensor]:
        """Blocks of its rows, in order; only one of them is in memory if it is not kept."""
        if self._kept is not None:
            yield self._kept
            return
        step = max(1, PART // math.prod(self.shape[1:]))
        for start in range(0, self.shape[0], step):
            stop = min(start + step, self.shape[0])
            shape = (stop - start, *self.shape[1:])
            yield _expand(shape, partial(self._block, start), torch.float32)

    def _block(self, origin: int, start: int, stop: int) -> Tensor:
        return self._rows(origin + start, origin + stop)


class Constants:
    """The constants of a package, shared by its functions."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._kept: dict[Hashable, Tensor] = {}
        self._factors: dict[Hashable, Factor] = {}

    def tensor(self, weight: Weight) -> Tensor:
        """In the dtype that the program declares."""
        if weight.key in self._kept:
            return self._kept[weight.key]
        found = weight.whole() if weight.whole is not None else _expand(weight.shape, weight.rows, TORCH[weight.dtype])
        if weight.key is not None:
            self._kept[weight.key] = found
        return found

    def factor(self, weight: Weight) -> Factor:
        """As a factor of products, of a weight that is no scalar: kept while the budget lasts."""
        if weight.key in self._factors:
            return self._factors[weight.key]
        kept = None
        if self._budget.take(4 * math.prod(weight.shape)):
            kept = _expand(weight.shape, weight.rows, torch.float32)
        found = Factor(weight.shape, kept, weight.rows)
        if weight.key is not None:
            self._factors[weight.key] = found
        return found


def _expand(shape: tuple[int, ...], rows: Rows, dtype: torch.dtype) -> Tensor:
    """Rows of a weight [d0, …] as `dtype`, a block at a time."""
    result = torch.empty(shape, dtype=dtype)
    step = max(1, BLOCK // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0], step):
        stop = min(start + step, shape[0])
        result[start:stop] = rows(start, stop)
    return result
