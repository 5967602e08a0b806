"""Reading the weights back out of the files that ship, as the runtime will interpret them.

Deliberately shares no code with the packer: node attributes and initializers decide, so that a wrong block
size, nibble order or offset shows up as weights that differ from the quantiser's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

from export.quantize.quantizer import Quantizer
from targets.to_onnx.pack import storage_key

ROWS = 4096


def stored_weights(
    folder: Path, manifest: Mapping[str, Any], quantizer: Quantizer
) -> Iterator[tuple[str, tuple[int, Tensor]]]:
    """(parameter, (first row, float32 rows)) for every weight a graph of the bundle multiplies with."""
    names: dict[str, str] = {}
    for name, parameter in quantizer.weights.parameters.items():
        names.setdefault(storage_key(parameter, quantizer.setting(name)), name)
    files = {s["file"] for entry in manifest["signatures"].values() for s in entry["stages"]}
    for file in sorted(files):
        graph = onnx.load(folder / file, load_external_data=False).graph
        tensors = {t.name: t for t in graph.initializer}
        for node in graph.node:
            if node.op_type in ("MatMulNBits", "GatherBlockQuantized"):
                codes = node.input[1 if node.op_type == "MatMulNBits" else 0]
                yield from _quantised(folder, node, tensors, names[codes.rsplit("|", 1)[0]])
            elif node.op_type in ("Gemm", "FusedMatMul", "Gather"):
                weight = node.input[0 if node.op_type == "Gather" else 1]
                if "|" in weight:
                    yield from _plain(folder, tensors[weight], names[weight.rsplit(":", 1)[0]])


def _location(folder: Path, tensor: onnx.TensorProto) -> tuple[Path, int, int]:
    entries = {e.key: e.value for e in tensor.external_data}
    return folder / entries["location"], int(entries["offset"]), int(entries["length"])


def _map(folder: Path, tensor: onnx.TensorProto) -> Any:
    path, offset, length = _location(folder, tensor)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    count = length // np.dtype(dtype).itemsize
    return np.memmap(path, dtype, "r", offset, (count,)).reshape(tuple(tensor.dims))


def _quantised(
    folder: Path, node: onnx.NodeProto, tensors: Mapping[str, onnx.TensorProto], name: str
) -> Iterator[tuple[str, tuple[int, Tensor]]]:
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    bits, block = attributes["bits"], attributes["block_size"]
    matmul = node.op_type == "MatMulNBits"
    codes_at, scales_at, zeros_at = (1, 2, 3) if matmul else (0, 2, 3)
    codes = _map(folder, tensors[node.input[codes_at]])
    scales = _map(folder, tensors[node.input[scales_at]])
    has_zeros = len(node.input) > zeros_at and node.input[zeros_at]
    zeros = _map(folder, tensors[node.input[zeros_at]]) if has_zeros else None
    for start in range(0, codes.shape[0], ROWS):
        rows = slice(start, start + ROWS)
        values = _unpack(np.asarray(codes[rows]).reshape(len(codes[rows]), -1), bits)
        groups = values.reshape(len(values), -1, block).astype(np.float32)
        if zeros is None:
            groups -= np.float32(2 ** (bits - 1))
        else:
            points = _unpack(np.asarray(zeros[rows]), bits)[:, : groups.shape[1]]
            groups -= points[:, :, None].astype(np.float32)
        result = groups * np.asarray(scales[rows])[:, :, None]
        yield name, (start, torch.from_numpy(result.reshape(len(values), -1)))


def _plain(folder: Path, tensor: onnx.TensorProto, name: str) -> Iterator[tuple[str, tuple[int, Tensor]]]:
    rows = _map(folder, tensor)
    for start in range(0, rows.shape[0], ROWS):
        yield name, (start, torch.from_numpy(np.array(rows[start : start + ROWS])))


def _unpack(packed: Any, bits: int) -> Any:
    """uint8 [r, n] -> [r, n·8/bits], low bits first."""
    if bits == 8:
        return packed
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)


def decode_bytes(folder: Path, manifest: Mapping[str, Any]) -> int:
    """Weights of the decoder's graphs plus the conv and recurrent states; the KV cache grows with use."""
    total = 0
    for stage in manifest["signatures"]["decode"]["stages"]:
        graph = onnx.load(folder / stage["file"], load_external_data=False).graph
        total += sum(_location(folder, t)[2] for t in graph.initializer if t.external_data)
    for state in manifest["states"]:
        if state["kind"] in ("conv", "recurrent"):
            total += int(np.prod(state["shape"])) * np.dtype(state["dtype"]).itemsize
    return total
