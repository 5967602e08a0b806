"""One XNNPACK graph under construction: a delegate of an ExecuTorch program.

A delegate holds no constant of its own. Weights and biases of linears and convolutions are named data, which
XNNPACK packs and lets go of when the delegate is created; whatever else a node reads, constants included, is
an argument of the delegate, so that no released memory is ever read (docs/decisions/007).
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from executorch.backends.xnnpack.serialization import xnnpack_graph_schema as schema
from executorch.backends.xnnpack.serialization import xnnpack_graph_serialize as serializer

BACKEND = "XnnpackBackend"
MAX_DIMENSIONS = 6
"""XNN_MAX_TENSOR_DIMS."""
_INVALID = 2**32 - 1
_NAMED = 2**64 - 1
_INPUT, _OUTPUT = 1, 2

Shape = tuple[int, ...]


@dataclass(eq=False)
class Tensor:
    """A tensor of a method: float32 unless said otherwise.

    `delegate` computes it, or None where it is an input, a constant or a kernel's result. `slot` is its place
    among the method's values; one that never leaves its delegate has none.
    """

    shape: Shape
    dtype: str = "float32"
    delegate: Delegate | None = None
    slot: int | None = None


@dataclass(frozen=True)
class Filter:
    """Weight [N, K] of a linear (or [1, K, 1, Ch] of a depthwise convolution) in named data.

    `codes` names its bytes, `scales` those of its scales. bits 32: float32; 8: one float32 scale per row;
    4: code + 8, low nibble first, one bfloat16 scale per `group` columns.
    """

    shape: Shape
    codes: str
    bits: int = 32
    scales: str | None = None
    group: int = 0


@dataclass(frozen=True)
class _Value:
    shape: Shape
    datatype: int
    filter: Filter | None = None
    dynamic: bool = False


class Delegate:
    """Values and nodes in order. Ids of values are their places in `_values`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self.nodes: list[Any] = []
        self._values: list[_Value] = []
        self._ids: dict[Tensor, int] = {}
        self.quantised_rows: dict[int, int] = {}
        """Id of a float tensor -> that of its rows in int8."""
        self._filters: dict[Filter, int] = {}

    def read(self, tensor: Tensor) -> int:
        """Id of a tensor, which becomes an argument of the delegate where it was not computed here."""
        if tensor not in self._ids:
            self._ids[tensor] = self._value(_Value(tensor.shape, schema.XNNDatatype.xnn_datatype_fp32))
            self.inputs.append(tensor)
        return self._ids[tensor]

    def define(self, shape: Shape) -> Tensor:
        """A new float32 tensor, to be written by the next node."""
        tensor = Tensor(shape, delegate=self)
        self._ids[tensor] = self._value(_Value(shape, schema.XNNDatatype.xnn_datatype_fp32))
        return tensor

    def quantised(self, shape: Shape) -> int:
        """Id of a new tensor of int8 rows, each with its own scale and zero point found while running."""
        return self._value(_Value(shape, schema.XNNDatatype.xnn_datatype_qdint8, dynamic=True))

    def filter(self, weight: Filter) -> int:
        """Id of a weight."""
        if weight not in self._filters:
            datatype = {
                32: schema.XNNDatatype.xnn_datatype_fp32,
                8: schema.XNNDatatype.xnn_datatype_qcint8,
                4: schema.XNNDatatype.xnn_datatype_qbint4,
            }[weight.bits]
            self._filters[weight] = self._value(_Value(weight.shape, datatype, weight))
        return self._filters[weight]

    def leaves(self, tensor: Tensor) -> None:
        """The tensor computed here is wanted outside: it becomes a result of the delegate."""
        if tensor not in self.outputs:
            self.outputs.append(tensor)

    def add(self, node: Any, limits: tuple[float, float] | None = None) -> None:
        """Append a node of the schema; `limits` clamp its result."""
        bounds = None if limits is None else schema.OutputMinMax(_number(limits[0]), _number(limits[1]))
        self.nodes.append(schema.XNode(node, len(self.nodes), bounds))

    def _value(self, value: _Value) -> int:
        if len(value.shape) > MAX_DIMENSIONS:
            raise ValueError(f"XNNPACK has at most {MAX_DIMENSIONS} dimensions; got {list(value.shape)}")
        self._values.append(value)
        return len(self._values) - 1

    def serialize(self, keys: Mapping[str, str]) -> bytes:
        """The bytes that the runtime's XNNPACK backend reads; `keys` gives each piece of named data its key."""
        external: dict[int, tuple[int, int]] = {}
        for place, tensor in enumerate([*self.inputs, *self.outputs]):
            flag = _INPUT if place < len(self.inputs) else _OUTPUT
            external[self._ids[tensor]] = (place, flag)
        data = [schema.ConstantDataOffset(0, 0)]  # index 0 says "no constant"

        def named(name: str, size: int) -> int:
            data.append(schema.ConstantDataOffset(_NAMED, size, keys[name]))
            return len(data) - 1

        values = []
        for id_out, value in enumerate(self._values):
            place, flags = external.get(id_out, (_INVALID, 0))
            weight = value.filter
            buffer = named(weight.codes, math.prod(weight.shape) * weight.bits // 8) if weight else 0
            dims = list(value.shape)
            plain = schema.XNNTensorValue(value.datatype, len(dims), dims, buffer, place, flags, id_out)
            quant: Any = None
            if value.dynamic:
                quant = schema.PerTokenDynamicQuant(num_nonbatch_dims=1)
            elif weight and weight.scales:
                rows, columns = weight.shape
                if weight.bits == 8:
                    at = named(weight.scales, 4 * rows)
                    quant = schema.PerChannelQuant([], 0, scale_buffer_idx=at, num_scales=rows)
                else:
                    count = rows * columns // weight.group
                    at = named(weight.scales, 2 * count)
                    quant = schema.PerChannelGroupQuant(
                        [], 0, group_size=weight.group, scale_buffer_idx=at, num_scales=count
                    )
            union = plain if quant is None else schema.XNNQuantizedTensorValue(plain, quant)
            values.append(schema.XValue(union))
        graph = schema.XNNGraph(
            version="0",
            xnodes=self.nodes,
            xvalues=values,
            num_externs=len(external),
            input_ids=[self._ids[tensor] for tensor in self.inputs],
            output_ids=[self._ids[tensor] for tensor in self.outputs],
            constant_data=data,
        )
        return _binary(graph)

    def filters(self) -> Sequence[Filter]:
        """Weights the delegate reads."""
        return list(self._filters)


_UNIONS = {"xnode_union", "xvalue_union", "quant_params"}
"""Fields of the schema that say of what kind they are in a second field."""


def _binary(graph: Any) -> bytes:
    """The graph as `serialize_xnnpack_binary` writes it, by a JSON encoder that does not ask for type hints anew at
    every object: that took two thirds of a lowering.
    """
    with tempfile.TemporaryDirectory() as folder:
        schema_path, json_path = Path(folder, "schema.fbs"), Path(folder, "graph.json")
        schema_path.write_bytes(serializer._get_schema_bytes())
        json_path.write_text(json.dumps(_plain(graph)), encoding="ascii")
        serializer._flatc_compile(folder, str(schema_path), str(json_path))
        flatbuffer = Path(folder, "graph.bin").read_bytes()
    align = serializer.CONSTANT_TENSOR_ALIGNMENT
    start = serializer._aligned_size(serializer.XNNHeader.EXPECTED_LENGTH, align)
    end = start + serializer._aligned_size(len(flatbuffer), align)
    header = serializer.XNNHeader(start, len(flatbuffer), end, 0).to_bytes()
    return bytes(header.ljust(start, b"\0") + flatbuffer.ljust(end - start, b"\0"))


def _plain(value: Any) -> Any:
    """Objects of the schema as dictionaries; absent ones are left out."""
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if not is_dataclass(value):
        return int(value) if isinstance(value, IntEnum) else value
    fields: dict[str, Any] = {}
    for name, each in vars(value).items():
        if each is None:
            continue
        if name in _UNIONS:
            fields[f"{name}_type"] = type(each).__name__
        fields[name] = _plain(each)
    return fields


def _number(value: float) -> float | str:
    """The schema's JSON has no infinity."""
    return value if math.isfinite(value) else str(value)
