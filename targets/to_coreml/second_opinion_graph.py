"""An ONNX graph in the making, and an operation of a saved program as the second opinion's emitters see it.

Float16 values are float16 tensors of ONNX, so that they are stored as Core ML stores them. onnxruntime's CPU provider
has float16 kernels for moving values only; before any other operation it widens to float32 by itself, and then takes
away the rounding before it. So arithmetic is written in float32 with the casts spelled out: those it keeps.

Shares no code with the interpreter; constants are expanded here, in numpy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from export.spec import ExportError
from targets.to_coreml.blob import BlobTensor
from targets.to_coreml.program import Constant, Operation, Reference, TensorType

OPSET, IR = 21, 10
TYPES = {
    "float16": TensorProto.FLOAT16, "float32": TensorProto.FLOAT, "int32": TensorProto.INT32, "bool": TensorProto.BOOL,
}  # fmt: skip
"""dtypes of values, as ONNX numbers them."""
LARGEST = 1 << 30
"""Bytes of constants of a function: a protobuf ends at twice that."""

Value: TypeAlias = "NDArray[Any] | str | tuple[Constant, ...]"
"""What a constant is worth."""


class Untranslatable(ExportError):
    """A program uses what the second opinion does not know."""


class Graph:
    """Nodes and initializers under names that no MIL program has: those contain a slash."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self._size = 0

    def constant(self, array: NDArray[Any]) -> str:
        """An initializer.

        Raises:
            Untranslatable: there are more bytes of them than `LARGEST`.
        """
        self._size += array.nbytes
        if self._size > LARGEST:
            raise Untranslatable(f"more than {LARGEST} bytes of constants: a second opinion is for small models")
        name = f"c/{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def node(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> list[str]:
        """A node; returns the names of its outputs."""
        names = [f"{kind}/{len(self.nodes)}/{place}" for place in range(outputs)]
        self.nodes.append(helper.make_node(kind, inputs, names, **attributes))
        return names

    def rename(self, source: str, name: str) -> None:
        """A value under the name of a graph's output."""
        self.nodes.append(helper.make_node("Identity", [source], [name]))

    def model(self, inputs: Mapping[str, TensorType], outputs: Mapping[str, TensorType]) -> onnx.ModelProto:
        """The finished model."""
        graph = helper.make_graph(
            self.nodes, "second_opinion", _described(inputs), _described(outputs), self.initializers
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR)


def _described(values: Mapping[str, TensorType]) -> list[onnx.ValueInfoProto]:
    return [helper.make_tensor_value_info(name, _type(kind), kind.shape) for name, kind in values.items()]


def _type(kind: TensorType) -> int:
    if kind.dtype not in TYPES:
        raise Untranslatable(f"a value is {kind}; the second opinion has {', '.join(TYPES)}")
    return TYPES[kind.dtype]


@dataclass
class Values:
    """What the names of a function stand for, and its graph."""

    function: str
    graph: Graph = field(default_factory=Graph)
    constants: dict[str, Value] = field(default_factory=dict)
    tensors: dict[str, str] = field(default_factory=dict)
    """Name in the program → name in the graph; constants get one when they are first used."""
    types: dict[str, TensorType] = field(default_factory=dict)
    widened: dict[str, str] = field(default_factory=dict)
    """Constants as float32."""


class Call:
    """One operation. What an emitter does not ask for must not be there: `finish` refuses it."""

    def __init__(self, operation: Operation, values: Values) -> None:
        self.operation = operation
        self._values = values
        self._taken: set[str] = set()

    def refuse(self, reason: str) -> Untranslatable:
        """An error that says where and why."""
        where = f"{self.operation.name} ({self.operation.type}) of {self._values.function}"
        return Untranslatable(f"{where}: {reason}")

    def node(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """A node of one output."""
        return self._values.graph.node(kind, *inputs, **attributes)[0]

    def nodes(self, kind: str, outputs: int, *inputs: str, **attributes: Any) -> list[str]:
        """A node of several outputs."""
        return self._values.graph.node(kind, *inputs, outputs=outputs, **attributes)

    def constant(self, value: Any, dtype: str) -> str:
        """A constant of the emitter's own."""
        return self._values.graph.constant(np.asarray(value, dtype))

    # Inputs of the operation

    def has(self, name: str) -> bool:
        """Whether an optional input is given."""
        return name in self.operation.inputs

    def _arguments(self, name: str) -> tuple[Reference | Constant, ...]:
        self._taken.add(name)
        if not self.has(name):
            raise self.refuse(f"it has no input {name!r}")
        return self.operation.inputs[name]

    def tensors(self, name: str) -> list[str]:
        """All arguments of an input, in their own dtypes."""
        return [self._tensor(one) for one in self._arguments(name)]

    def tensor(self, name: str) -> str:
        """An input in its own dtype."""
        return self.tensors(name)[0]

    def wide(self, name: str) -> str:
        """An input; one of float16 as float32."""
        (argument,) = self._arguments(name)
        if self.type(name).dtype != "float16":
            return self._tensor(argument)
        found, values = self._constant(argument), self._values
        if found is None:
            return self.node("Cast", self._tensor(argument), to=TensorProto.FLOAT)
        if not isinstance(argument, Reference):
            return self.constant(found, "float32")
        if argument.name not in values.widened:
            values.widened[argument.name] = self.constant(found, "float32")
        return values.widened[argument.name]

    def _tensor(self, argument: Reference | Constant) -> str:
        found, tensors = self._constant(argument), self._values.tensors
        if isinstance(argument, Reference) and argument.name in tensors:
            return tensors[argument.name]
        if not isinstance(found, np.ndarray):
            raise self.refuse("an input that should be a tensor is none")
        name = self._values.graph.constant(found)
        if isinstance(argument, Reference):
            tensors[argument.name] = name
        return name

    def _constant(self, argument: Reference | Constant) -> Value | None:
        if isinstance(argument, Reference):
            return self._values.constants.get(argument.name)
        return argument.array() if isinstance(argument, BlobTensor) else argument

    def array(self, name: str) -> NDArray[Any]:
        """A constant input.

        Raises:
            Untranslatable: it is known only at run time, or a text.
        """
        found = self._constant(self._arguments(name)[0])
        if not isinstance(found, np.ndarray):
            raise self.refuse(f"{name} must be a constant tensor")
        return found

    def numbers(self, name: str) -> list[int]:
        """A constant vector of whole numbers."""
        return [int(one) for one in self.array(name).reshape(-1)]

    def number(self, name: str) -> Any:
        """A constant scalar."""
        return self.array(name).item()

    def text(self, name: str, *allowed: str) -> str:
        """A constant text, one of `allowed`."""
        found = self._constant(self._arguments(name)[0])
        if found not in allowed:
            raise self.refuse(f"{name} is {found!r}; known: {', '.join(allowed)}")
        return str(found)

    def type(self, name: str) -> TensorType:
        """Shape and dtype of an input."""
        argument = self._arguments(name)[0]
        if isinstance(argument, Reference):
            return self._values.types[argument.name]
        if isinstance(argument, np.ndarray | BlobTensor):
            return TensorType(tuple(argument.shape), str(argument.dtype))
        raise self.refuse(f"{name} must be a tensor")

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of an input."""
        return self.type(name).shape

    def finish(self) -> None:
        """Refuse what the emitter has not looked at."""
        unknown = sorted(self.operation.inputs.keys() - self._taken)
        if unknown:
            raise self.refuse(f"it has the input {unknown[0]!r}, which the second opinion does not know")


Emitter: TypeAlias = "Callable[[Call], str | list[str]]"


def shift_scale(call: Call) -> NDArray[Any]:
    """scale · (data − offset), one scale and offset for each block along every axis; computed in float32."""
    data, scale = call.array("data"), call.array("scale")

    def spread(part: NDArray[Any]) -> NDArray[Any]:
        for axis, length in enumerate(data.shape):
            part = np.repeat(part, length // part.shape[axis], axis)
        return part.astype(np.float32)

    shifted = data.astype(np.float32)
    if call.has("offset"):
        shifted -= spread(call.array("offset"))
    return shifted * spread(scale)


def lookup(call: Call) -> NDArray[Any]:
    """The number of a table for every index; `lut` [groups…, numbers, 1] has a table for each block of indices."""
    indices, lut = call.array("indices"), call.array("lut")
    if lut.shape[-1] != 1:
        raise call.refuse(f"a palette of vectors of {lut.shape[-1]}; known are palettes of numbers")
    lengths = zip(indices.shape, lut.shape, strict=False)
    groups = np.ix_(*(np.arange(length) // (length // count) for length, count in lengths))
    return np.asarray(lut[(*groups, indices, 0)])


EXPAND: dict[str, Callable[[Call], NDArray[Any]]] = {
    "constexpr_blockwise_shift_scale": shift_scale,
    "constexpr_lut_to_dense": lookup,
}
