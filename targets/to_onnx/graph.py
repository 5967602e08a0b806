"""Building ONNX graphs by hand: nodes, constants, reshaped views, and one external weight file.

Several graphs share one weight file: a tensor is written once under a key and referenced by offset from
every graph that uses it. Offsets are multiples of 256, so that a runtime can map them in place.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

ALIGNMENT = 256
MICROSOFT = "com.microsoft"
OPSET = 23
IR_VERSION = 11

Shape = tuple[int | str, ...]
"""Extents; a string names a symbolic one. A graph has at most one symbolic extent per tensor."""


@dataclass(frozen=True)
class Stored:
    """A tensor in the weight file: `count` elements of an ONNX data type at a byte range."""

    dtype: int
    offset: int
    length: int
    count: int


class WeightFile:
    """Append-only external data. A journal beside it names what is complete, for `--resume`."""

    def __init__(self, path: Path, resume: bool = False) -> None:
        self.path = path
        self._journal_path = path.with_suffix(".journal")
        self._stored: dict[str, Stored] = {}
        if resume and path.exists() and self._journal_path.exists():
            self._read_journal()
        end = max((s.offset + s.length for s in self._stored.values()), default=0)
        # Both files stay open for as long as the object; __exit__ closes them.
        self._file = open(path, "r+b" if self._stored else "wb")  # noqa: SIM115
        self._file.truncate(end)
        self._file.seek(end)
        self._journal = open(self._journal_path, "a" if self._stored else "w")  # noqa: SIM115

    def _read_journal(self) -> None:
        size = self.path.stat().st_size
        for line in self._journal_path.read_text().splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                break  # the interrupt cut the last line; its tensor is written again
            key = entry.pop("key")
            stored = Stored(**entry)
            if stored.offset + stored.length > size:
                break
            self._stored[key] = stored

    def __contains__(self, key: str) -> bool:
        return key in self._stored

    def __getitem__(self, key: str) -> Stored:
        return self._stored[key]

    def write(self, key: str, dtype: np.dtype[Any], chunks: Iterable[NDArray[Any]]) -> Stored:
        """Append one tensor given in consecutive pieces; the key must be new."""
        self._file.write(b"\0" * (-self._file.tell() % ALIGNMENT))
        offset = self._file.tell()
        count = 0
        for chunk in chunks:
            if chunk.dtype != dtype:
                raise TypeError(f"{key}: chunk of {chunk.dtype}, expected {dtype}")
            self._file.write(np.ascontiguousarray(chunk).data.cast("B"))
            count += chunk.size
        stored = Stored(helper.np_dtype_to_tensor_dtype(dtype), offset, self._file.tell() - offset, count)
        self._file.flush()
        self._journal.write(json.dumps({"key": key, **asdict(stored)}) + "\n")
        self._journal.flush()
        self._stored[key] = stored
        return stored

    def __enter__(self) -> WeightFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._journal.close()
        if kind is None:
            self._journal_path.unlink()


class Graph:
    """One ONNX graph under construction. Values are known by name, with their shape beside them."""

    def __init__(self, name: str, weights: WeightFile) -> None:
        self.name = name
        self.weights = weights
        self.shapes: dict[str, Shape] = {}
        self._nodes: list[onnx.NodeProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._initializers: dict[str, TensorProto] = {}
        self._views: dict[tuple[str, Shape], str] = {}
        self._count = 0

    def input(self, name: str, dtype: int, shape: Shape) -> str:
        self._inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        self.shapes[name] = shape
        return name

    def output(self, value: str, name: str, dtype: int) -> None:
        """Make a computed value a graph output under its contract name.

        The value itself is renamed: a copy would break states that are updated in place.
        """
        shape = self.shapes[name] = self.shapes.pop(value)
        for node in self._nodes:
            for names in (node.input, node.output):
                for place, used in enumerate(names):
                    if used == value:
                        names[place] = name
        self._outputs.append(helper.make_tensor_value_info(name, dtype, shape))

    def node(
        self,
        op: str,
        inputs: Sequence[str],
        shapes: Sequence[Shape | None],
        *,
        domain: str = "",
        names: Sequence[str | None] | None = None,
        **attributes: Any,
    ) -> list[str]:
        """Append a node; one output per entry of `shapes` (None: an optional output left out)."""
        self._count += 1
        outputs = []
        for index, shape in enumerate(shapes):
            given = names[index] if names else None
            output = "" if shape is None else given or f"{op}_{self._count}_{index}"
            if shape is not None:
                self.shapes[output] = shape
            outputs.append(output)
        self._nodes.append(
            helper.make_node(op, list(inputs), outputs, name=f"{op}_{self._count}", domain=domain, **attributes)
        )
        return outputs

    def apply(self, op: str, inputs: Sequence[str], shape: Shape, **attributes: Any) -> str:
        """Append a node with one output."""
        return self.node(op, inputs, [shape], **attributes)[0]

    def constant(self, value: Any, dtype: Any) -> str:
        """A small constant stored in the graph itself; equal constants are one."""
        array = np.asarray(value, dtype=dtype)
        name = f"const_{array.dtype}_{'x'.join(map(str, array.shape))}_{array.tobytes().hex()}"
        if len(name) > 120:
            import hashlib

            name = f"const_{array.dtype}_{hashlib.sha256(name.encode()).hexdigest()[:24]}"
        if name not in self._initializers:
            self._initializers[name] = onnx.numpy_helper.from_array(array, name)
            self.shapes[name] = array.shape
        return name

    def default(self, name: str, value: Any, dtype: Any) -> None:
        """Give a graph input a value used when the caller does not feed it."""
        self._initializers[name] = onnx.numpy_helper.from_array(np.asarray(value, dtype=dtype), name)

    def stored(self, key: str, shape: Sequence[int]) -> str:
        """Reference a tensor of the weight file under the given shape."""
        entry = self.weights[key]
        if math.prod(shape) != entry.count:
            raise ValueError(f"{key} holds {entry.count} elements, not the {math.prod(shape)} of {shape}")
        name = f"{key}:{'x'.join(map(str, shape))}"
        if name not in self._initializers:
            tensor = TensorProto(name=name, data_type=entry.dtype, data_location=TensorProto.EXTERNAL)
            tensor.dims.extend(shape)
            for field, value in (
                ("location", self.weights.path.name),
                ("offset", str(entry.offset)),
                ("length", str(entry.length)),
            ):
                tensor.external_data.add(key=field, value=value)
            self._initializers[name] = tensor
            self.shapes[name] = tuple(shape)
        return name

    def view(self, name: str, shape: Shape) -> str:
        """The same elements under another shape; the reshape is made once and only if it changes anything."""
        if self.shapes[name] == shape:
            return name
        if (name, shape) not in self._views:
            target = self.constant([-1 if isinstance(d, str) else d for d in shape], np.int64)
            self._views[name, shape] = self.apply("Reshape", [name, target], shape)
        return self._views[name, shape]

    def save(self, path: Path) -> None:
        """Write the model file; weights stay in the external file."""
        graph = helper.make_graph(
            self._nodes, self.name, self._inputs, self._outputs, list(self._initializers.values())
        )
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)],
            ir_version=IR_VERSION,
            producer_name="qwen35-mobile",
        )
        path.write_bytes(model.SerializeToString(deterministic=True))
