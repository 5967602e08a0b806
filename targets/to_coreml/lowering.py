"""One function of a package under construction: values of traced nodes in the forms that MIL builders want.

Letters: C tokens, D width, H heads. Rows are [1, C, D], or [1, D, 1, C] where matrices are convolutions; values by
head are [1, H, C, D]. A node's value keeps the form it was made in and is brought into another one on demand, so
that reshapes and transposes of the traced program cost nothing of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from coremltools.converters.mil.mil import Builder as mb
from coremltools.converters.mil.mil.types import np_int4_dtype, np_uint4_dtype
from torch.fx import Node

from export.model.trace import Program
from targets.to_coreml.cut import HEAD, PALETTE, UNSIGNED, form_of
from targets.to_coreml.profiles import Profile
from targets.to_coreml.weights import WeightFile

EMPTY = {"float16": np.float16, "int8": np.int8, "int4": np_int4_dtype, "uint4": np_uint4_dtype}


def identifier(parameter: str) -> str:
    """A parameter's name as MIL allows it."""
    return parameter.replace(".", "_").replace("@", "__")


def ints(*values: int) -> Any:
    """An int32 vector."""
    return np.asarray(values, np.int32)


def shape_of(node: Node) -> tuple[int, ...]:
    """Traced shape of a node's tensor."""
    return tuple(int(extent) for extent in node.meta["val"].shape)


def operands(node: Node) -> tuple[Any, ...]:
    """Arguments of a node: nodes, numbers, lists; their types are those of the operator's schema."""
    return node.args


@dataclass(frozen=True)
class Value:
    """A MIL variable; `heads` None: rows, else so many heads."""

    var: Any
    heads: int | None = None


@dataclass(frozen=True)
class Storage:
    """How the matrices of a package are stored."""

    head: tuple[range, ...]
    """Rows of the head that the package holds, cut into pieces."""
    tied: bool
    """The head's bytes are also the embedding's table, which wants 4-bit codes as code + 8."""
    palettes: bool
    """Symmetric 4-bit codes as indices into a palette; not of a table's. See `cut.form_of`."""


class Lowering:
    """State of one walk over a traced program, inside an open MIL function."""

    def __init__(self, program: Program, weights: WeightFile, profile: Profile, storage: Storage) -> None:
        self.program = program
        self.weights = weights
        self.profile = profile
        self.storage = storage
        self.values: dict[Node, Value] = {}
        self.results: dict[tuple[Node, int], Value] = {}
        self.patch: dict[Node, tuple[int, int]] = {}
        """Pictures that wait for their patch embedding: side of a patch, patches of a token's side."""
        self.last: list[Any] = []
        """Results of the last linear."""
        self.start: Any = None
        self.valid: Any = None
        self.states: Any = None
        self._shared: dict[str, Any] = {}

    # -- values -----------------------------------------------------------------------------------
    @property
    def features(self) -> int:
        """Axis of the width in rows."""
        return 1 if self.profile.convolutions else 2

    @property
    def tokens(self) -> int:
        """Axis of the tokens in rows."""
        return 3 if self.profile.convolutions else 1

    def row_shape(self, tokens: int, width: int) -> tuple[int, ...]:
        return (1, width, 1, tokens) if self.profile.convolutions else (1, tokens, width)

    def define(self, node: Node, var: Any, heads: int | None = None) -> None:
        self.values[node] = Value(var, heads)

    def rows(self, node: Node) -> Any:
        """The value of a node as rows."""
        return self.as_rows(self.values[node])

    def heads(self, node: Node, heads: int) -> Any:
        """The value of a node by head, [1, H, C, D]."""
        return self.as_heads(self.values[node], heads)

    def as_rows(self, value: Value) -> Any:
        if value.heads is None:
            return value.var
        _, heads, tokens, width = value.var.shape
        if self.profile.convolutions:
            apart = self.transpose(value.var, (0, 1, 3, 2))
        else:
            apart = self.transpose(value.var, (0, 2, 1, 3))
        return self.reshape(apart, self.row_shape(tokens, heads * width))

    def as_heads(self, value: Value, heads: int) -> Any:
        if value.heads is not None:
            if value.heads != heads:
                raise ValueError(f"a value of {value.heads} heads cannot be read as {heads}")
            return value.var
        tokens, width = value.var.shape[self.tokens], value.var.shape[self.features] // heads
        if self.profile.convolutions:
            return self.transpose(self.reshape(value.var, (1, heads, width, tokens)), (0, 1, 3, 2))
        return self.transpose(self.reshape(value.var, (1, tokens, heads, width)), (0, 2, 1, 3))

    def transpose(self, x: Any, order: Sequence[int]) -> Any:
        """A permutation of axes; one that only moves axes of extent 1 is a reshape."""
        shape = tuple(x.shape[axis] for axis in order)
        if [axis for axis in order if x.shape[axis] > 1] == [axis for axis in range(x.rank) if x.shape[axis] > 1]:
            return self.reshape(x, shape)
        return mb.transpose(x=x, perm=list(order))

    def reshape(self, x: Any, shape: Sequence[int]) -> Any:
        return x if tuple(x.shape) == tuple(shape) else mb.reshape(x=x, shape=list(shape))

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """Something all layers of the function share."""
        if name not in self._shared:
            self._shared[name] = make()
        return self._shared[name]

    def real(self, shape: Sequence[int]) -> Any:
        """bool of the given shape, one of whose axes is the tokens: which of them are before `valid`."""

        def make() -> Any:
            index = np.arange(int(np.prod(shape)), dtype=np.int32).reshape(shape)
            return mb.less(x=index, y=self.valid)

        return self.once(f"real {tuple(shape)}", make)

    # -- constants --------------------------------------------------------------------------------
    def parameter(self, node: Node) -> str:
        """Name of the model's parameter behind a placeholder."""
        name = self.program.parameter(node.name) if node.op == "placeholder" else None
        if name is None:
            raise TypeError(f"{node.name} is not a parameter of the model")
        return name

    def kept(self, node: Node, shape: Sequence[int], *, transposed: bool = False) -> Any:
        """A parameter that stays float16, under another shape; `transposed` first swaps its two axes."""
        name = self.parameter(node)
        tensor = self.once(f"parameter {name}", lambda: self.weights.quantizer.weights.tensor(name))
        array = (tensor.T if transposed else tensor).numpy().astype(np.float16).reshape(shape)
        return self.constant(identifier(name) + ("__t" if transposed else ""), array)

    def constant(self, name: str, array: Any) -> Any:
        """A constant of the function under its own name, made once."""
        return self.once(f"{name} {array.shape}", lambda: mb.const(val=array, name=name))

    def over_features(self, node: Node) -> Any:
        """A parameter [D] that broadcasts over rows."""
        (width,) = shape_of(node)
        return self.kept(node, self.row_shape(1, width))

    def matrices(self, name: str) -> list[Any]:
        """A parameter [N, K] as the weights of linears or convolutions: one for each piece."""
        rows, columns = self.weights.quantizer.weights.parameter(name).shape
        pieces = list(self.storage.head) if name == HEAD else [range(rows)]
        setting = self.weights.quantizer.setting(name)
        how = self.storage
        form = form_of(name, setting, tied=how.tied, palettes=how.palettes, profile=self.profile.name)
        plans = self.weights.matrix(name, pieces, form)
        found = []
        for piece, plan in zip(pieces, plans, strict=True):
            title = identifier(name) + (f"__{piece.start}" if len(pieces) > 1 or piece.start else "")
            found.append(self._matrix(name, title, (len(piece), columns), plan, indexed=form == "palette"))
        return found

    def _matrix(
        self, name: str, title: str, shape: tuple[int, int], plan: dict[str, int], *, indexed: bool
    ) -> Any:
        rows, columns = shape
        setting = self.weights.quantizer.setting(name)
        ones = (1, 1) if self.profile.convolutions else ()

        def part(label: str, kind: str, dtype: str, count: int, *more: int) -> Any:
            self.weights.places[label] = plan[kind]
            # Without memory of its own: the bytes are written later, by streaming.
            return mb.const(val=np.broadcast_to(np.zeros((), EMPTY[dtype]), (rows, count, *ones, *more)), name=label)

        if setting is None:
            return part(title, "values", "float16", columns)
        groups = columns // (setting.group_size or columns)
        codes = part(f"{title}_codes", "values", self.weights.planned(name).values.dtype, columns)
        if "palettes" in plan:
            lut = part(f"{title}_palettes", "palettes", "float16", groups, PALETTE, 1)
            return mb.constexpr_lut_to_dense(indices=codes, lut=lut, name=title)
        if indexed:
            numbers = np.arange(-8, 8, dtype=np.float16).reshape(*[1] * (2 + len(ones)), PALETTE, 1)
            lut = self.constant("palette", numbers)
            codes = mb.constexpr_lut_to_dense(indices=codes, lut=lut, name=f"{title}_numbers")
        scale = part(f"{title}_scales", "scales", "float16", groups)
        offset = part(f"{title}_offsets", "offsets", UNSIGNED, groups) if "offsets" in plan else None
        return mb.constexpr_blockwise_shift_scale(data=codes, scale=scale, offset=offset, name=title)
