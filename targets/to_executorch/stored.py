"""Reading the weights back out of the .pte files that ship, as the runtime will interpret them.

Deliberately shares no code with the packer: the segments, keys, datatypes and group sizes that the files
themselves declare decide, so that a wrong nibble order, offset or scale shows up as weights that differ.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Iterator, Mapping
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from executorch.backends.xnnpack import serialization
from executorch.exir._serialize._flatbuffer import _flatc_decompile
from executorch.exir._serialize._flatbuffer_program import _flatbuffer_to_program
from executorch.exir._serialize._program import _get_extended_header
from executorch.exir.scalar_type import ScalarType
from executorch.exir.schema import DataLocation, Tensor
from numpy.typing import NDArray

from export.bundle.manifest import BundleError
from export.quantize.quantizer import Quantizer
from targets.stored import FLOATS, check_storage, check_table
from targets.table import Table

ROWS = 4096
HEADER = 64
XNN_OFFSETS = slice(10, 14), slice(14, 18)
"""Where an XNNPACK blob says at which byte its flatbuffer begins and how long it is (XNNHeader)."""

DTYPES = {ScalarType.FLOAT: np.float32, ScalarType.CHAR: np.int8, ScalarType.BYTE: np.uint8}

Weight = tuple[str, tuple[int, torch.Tensor]]


class Pte:
    """A .pte file: its program, and its segments memory-mapped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with open(path, "rb") as file:
            header = _get_extended_header(file.read(HEADER))
            if header is None:
                raise BundleError(f"{path.name} is no ExecuTorch program with segments; export the bundle anew")
            file.seek(0)
            self.program = _flatbuffer_to_program(file.read(header.program_size))
        self._base = header.segment_base_offset
        self._named = {entry.key: entry.segment_index for entry in self.program.named_data or ()}

    def segment(self, index: int) -> NDArray[np.uint8]:
        """Bytes of a segment."""
        segment = self.program.segments[index]
        return np.memmap(self.path, np.uint8, "r", self._base + segment.offset, (segment.size,))

    def named(self, key: str) -> NDArray[np.uint8]:
        """Bytes of named data."""
        if key not in self._named:
            raise BundleError(f"{self.path.name} has no named data {key!r}; export the bundle anew")
        return self.segment(self._named[key])

    @cached_property
    def graphs(self) -> list[dict[str, Any]]:
        """The XNNPACK graphs of all delegates."""
        found: dict[int, None] = {}
        for plan in self.program.execution_plan:
            for delegate in plan.delegates:
                if delegate.processed.location != DataLocation.SEGMENT:
                    raise BundleError(f"{self.path.name} holds a delegate inline; export the bundle anew")
                found[delegate.processed.index] = None
        return _graphs([bytes(self.segment(index)) for index in found])

    def constants(self) -> Iterator[tuple[str, NDArray[Any]]]:
        """Constants of the program that are parameters of the model, by name: each place that one is read from."""
        where = self.program.constant_segment
        data = self.segment(where.segment_index)
        done = set()
        for plan in self.program.execution_plan:
            for value in plan.values:
                tensor = value.val
                if not isinstance(tensor, Tensor) or not tensor.data_buffer_idx or tensor.extra_tensor_info is None:
                    continue
                first = where.offsets[tensor.data_buffer_idx]
                name = str(tensor.extra_tensor_info.fully_qualified_name)
                if (name, first) not in done:
                    done.add((name, first))
                    dtype = DTYPES[tensor.scalar_type]
                    yield name, np.frombuffer(data, dtype, math.prod(tensor.sizes), first).reshape(tensor.sizes)


def _graphs(blobs: list[bytes]) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        schema = Path(folder, "schema.fbs")
        schema.write_bytes(resources.files(serialization).joinpath("schema.fbs").read_bytes())
        graphs = []
        for blob in blobs:
            first, size = (int.from_bytes(blob[part], "little") for part in XNN_OFFSETS)
            binary = Path(folder, "graph.bin")
            binary.write_bytes(blob[first : first + size])
            _flatc_decompile(folder, str(schema), str(binary), ["--raw-binary"])
            text = Path(folder, "graph.json").read_text()
            graphs.append(json.loads(re.sub(r"(: -?)inf\b", r"\1Infinity", text)))  # as Python spells it
        return graphs


def stored_weights(folder: Path, manifest: Mapping[str, Any], quantizer: Quantizer) -> Iterator[Weight]:
    """(parameter, (first row, float32 rows)) for every parameter in the files of a bundle. A table of vision
    positions comes as `parameter@{height}x{width}` for each image size.
    """
    known = quantizer.weights.parameters
    for stage in manifest["signatures"]["embed"]["stages"]:
        table = Table(folder, stage)
        check_table(stage, quantizer)
        for start in range(0, table.rows, ROWS):
            yield "embedding.weight", (start, torch.from_numpy(table[slice(start, start + ROWS)]))
    for file in sorted(_files(manifest)):
        pte = Pte(folder / file)
        done: set[tuple[str | None, str, int]] = set()
        halves: dict[str, NDArray[Any]] = {}
        for name, array in pte.constants():
            plain, _, half = name.partition("!")
            _check(plain, known, file)
            if not half:
                yield name, (0, torch.from_numpy(array.copy()))
            halves[name] = array
        if "embedding.weight!codes" in halves:
            yield from _gathered(file, halves["embedding.weight!codes"], halves["embedding.weight!scales"], quantizer)
        for graph in pte.graphs:
            for value in graph["xvalues"]:
                key = _key(graph, _tensor(value)["constant_buffer_idx"])
                # A later method may declare the same bytes otherwise: then they are other weights.
                group = value["xvalue_union"].get("quant_params", {}).get("group_size", 0)
                kind = key, str(_tensor(value)["datatype"]), group
                if key is not None and kind not in done:
                    done.add(kind)
                    name = key.rsplit("#", 1)[0]
                    if name.startswith("small:"):
                        continue  # no parameter of the model: rows of ones and the like, which L1 judges
                    _check(name, known, file)
                    yield from _filter(pte, graph, value, name, quantizer)


def _gathered(file: str, codes: NDArray[Any], scales: NDArray[Any], quantizer: Quantizer) -> Iterator[Weight]:
    """An embedding as the kernels `embedding_byte` (int8) and `embedding_4bit` (high nibble first) read it."""
    bits = 4 if codes.dtype == np.uint8 else 8
    group = codes.shape[1] * 8 // bits // scales.shape[1]
    check_storage(file, "embedding.weight", bits, None if bits == 8 else group, quantizer)
    for start in range(0, len(codes), ROWS):
        part = codes[start : start + ROWS]
        if part.dtype == np.uint8:
            part = np.stack([part >> 4, part & 15], axis=-1).reshape(len(part), -1).astype(np.int16) - 8
        grouped = part.astype(np.float32).reshape(len(part), scales.shape[1], -1)
        rows = grouped * scales[start : start + ROWS, :, None]
        yield "embedding.weight", (start, torch.from_numpy(rows.reshape(len(part), -1)))


def _files(manifest: Mapping[str, Any]) -> set[str]:
    stages = [stage for entry in manifest["signatures"].values() for stage in entry["stages"]]
    return {stage["file"] for stage in stages if stage["kind"] == "graph"}


def _check(name: str, known: Mapping[str, Any], file: str) -> None:
    if name.split("@")[0] not in known:
        raise BundleError(f"{file} holds {name!r}, which is no parameter of the model; export it anew")


def _tensor(value: Mapping[str, Any]) -> dict[str, Any]:
    union = value["xvalue_union"]
    found: dict[str, Any] = union.get("tensor_value", union)
    return {"constant_buffer_idx": 0, **found}


def _key(graph: Mapping[str, Any], buffer: int) -> str | None:
    """Key of the named data behind a constant, None where there is no constant."""
    return str(graph["constant_data"][buffer]["named_key"]) if buffer else None


def _filter(
    pte: Pte, graph: Mapping[str, Any], value: Mapping[str, Any], name: str, quantizer: Quantizer
) -> Iterator[Weight]:
    """The weight behind a constant value, as XNNPACK reads it."""
    tensor = _tensor(value)
    datatype, dims = tensor["datatype"], tensor["dims"]
    data = pte.named(str(_key(graph, tensor["constant_buffer_idx"])))
    if datatype == "xnn_datatype_fp32":
        check_storage(pte.path.name, name.split("@")[0], FLOATS, None, quantizer)
        rows = data.view(np.float32).reshape(dims)
        if len(dims) == 4:  # taps of the depthwise convolution: [1, K, 1, Ch]
            yield name, (0, torch.from_numpy(rows[0, :, 0, :].T.copy()))
            return
        for start in range(0, dims[0], ROWS):
            yield name, (start, torch.from_numpy(np.array(rows[start : start + ROWS])))
        return
    params = value["xvalue_union"]["quant_params"]
    scales = pte.named(str(_key(graph, params["scale_buffer_idx"])))
    if datatype == "xnn_datatype_qcint8":
        check_storage(pte.path.name, name, 8, None, quantizer)
        codes, factors = data.view(np.int8).reshape(dims), scales.view(np.float32).reshape(dims[0], 1)
    elif datatype == "xnn_datatype_qbint4":
        codes = data.reshape(dims[0], dims[1] // 2)
        wide = scales.view(np.uint16).astype(np.uint32) << np.uint32(16)  # bfloat16 is the upper half of float32
        group = params["group_size"]
        if wide.size * group != dims[0] * dims[1]:
            raise BundleError(
                f"{pte.path.name} declares groups of {group} for {name} {dims}, but holds {wide.size} scales; "
                "export the bundle anew"
            )
        check_storage(pte.path.name, name, 4, group, quantizer)
        factors = wide.view(np.float32).reshape(dims[0], dims[1] // group)
    else:
        raise BundleError(f"{pte.path.name} stores {name} as {datatype}, which no recipe gives; export it anew")
    for start in range(0, dims[0], ROWS):
        part = np.asarray(codes[start : start + ROWS])
        if datatype == "xnn_datatype_qbint4":
            part = np.stack([part & 15, part >> 4], axis=-1).reshape(len(part), -1).astype(np.int16) - 8
        group = dims[1] // factors.shape[1]
        rows = part.astype(np.float32).reshape(len(part), -1, group) * factors[start : start + ROWS, :, None]
        yield name, (start, torch.from_numpy(rows.reshape(len(part), -1)))


def decode_bytes(folder: Path, manifest: Mapping[str, Any]) -> int:
    """Named data that the delegates of `decode` read, plus the conv and recurrent states, read whole."""
    total = 0
    for stage in manifest["signatures"]["decode"]["stages"]:
        pte = Pte(folder / stage["file"])
        (plan,) = (p for p in pte.program.execution_plan if p.name == stage["entry"])
        blobs = [bytes(pte.segment(delegate.processed.index)) for delegate in plan.delegates]
        keys = {entry["named_key"] for graph in _graphs(blobs) for entry in graph["constant_data"][1:]}
        total += sum(len(pte.named(key)) for key in keys)
    for state in manifest["states"]:
        if state["kind"] in ("conv", "recurrent"):
            total += int(np.prod(state["shape"])) * np.dtype(state["dtype"]).itemsize
    return total
