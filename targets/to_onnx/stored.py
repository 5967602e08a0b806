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

from export.bundle.manifest import BundleError
from export.quantize.quantizer import Quantizer
from targets.stored import FLOATS, check_storage
from targets.to_onnx.pack import storage_key

ROWS = 4096
MULTIPLIES = {"MatMulNBits": (1, 2, 3), "GatherBlockQuantized": (0, 2, 3)}
"""Operator -> which inputs are codes, scales and zero points."""

Weight = tuple[str, tuple[int, Tensor]]


def stored_weights(folder: Path, manifest: Mapping[str, Any], quantizer: Quantizer) -> Iterator[Weight]:
    """(parameter, (first row, float32 rows)) for every tensor that a graph of the bundle takes from the weight
    file, the second graph for onnxruntime-genai included. A table of vision positions comes as
    `parameter@{height}x{width}` for each image size.

    Raises:
        BundleError: a tensor lies elsewhere, is no parameter's, or is stored otherwise than the recipe says.
    """
    names: dict[str, str] = {}
    for name, parameter in quantizer.weights.parameters.items():
        names.setdefault(_source(storage_key(parameter, None)), name)
    # During an export the manifest lists no files yet: then the folder holds what was just written.
    listed = {entry["path"] for entry in manifest.get("files", ())} or {path.name for path in folder.iterdir()}
    done: set[tuple[Any, ...]] = set()
    for file in sorted(path for path in listed if path.endswith(".onnx")):
        graph = onnx.load(folder / file, load_external_data=False).graph
        tensors = {t.name: t for t in graph.initializer}
        packed: set[str] = set()
        for node in graph.node:
            if node.op_type not in MULTIPLIES:
                continue
            inputs = [node.input[i] for i in MULTIPLIES[node.op_type] if i < len(node.input) and node.input[i]]
            packed.update(inputs)
            settings = tuple(sorted((a.name, a.i) for a in node.attribute))
            place = (*(_location(folder, listed, tensors[name]) for name in inputs), settings)
            if place not in done:
                done.add(place)
                name = _parameter(inputs[0].rsplit("|", 1)[0], names, file)
                bits, block = (onnx.helper.get_node_attr_value(node, a) for a in ("bits", "block_size"))
                # One scale per output channel is repeated for every block.
                check_storage(file, name, bits, None if bits == 8 else block, quantizer)
                yield from _quantised(folder, listed, node, tensors, name)
        taps: dict[str, list[Tensor]] = {}
        for tensor in graph.initializer:
            if tensor.name in packed or not tensor.external_data:
                continue
            place = (tensor.name, _location(folder, listed, tensor))
            if place in done:
                continue
            done.add(place)
            key = tensor.name.rsplit(":", 1)[0]
            if "|tap" in key:
                taps.setdefault(key.rsplit("|", 1)[0], []).append(_read(folder, listed, tensor))
            elif _source(key) in names:
                name = names[_source(key)]
                check_storage(file, name, FLOATS, None, quantizer)
                yield from _plain(folder, listed, tensor, name)
            else:
                yield from _positions(_read(folder, listed, tensor), key, quantizer)
        for key, columns in taps.items():
            yield _parameter(key, names, file), (0, torch.stack(columns, dim=1))


def _source(key: str) -> str:
    """A key of the weight file without how it is stored, see `storage_key`: source rows and transform, which a tied
    head and embedding share.
    """
    return key.rsplit("|", 1)[0]


def _parameter(key: str, names: Mapping[str, str], file: str) -> str:
    if _source(key) not in names:
        raise BundleError(f"{file} holds {key!r}, which is no parameter of the model; export it anew")
    return names[_source(key)]


def _location(folder: Path, listed: set[str], tensor: onnx.TensorProto) -> tuple[Path, int, int]:
    """File, offset and length of a tensor's bytes; the file must be one that the manifest lists."""
    entries = {e.key: e.value for e in tensor.external_data}
    if entries["location"] not in listed:
        raise BundleError(
            f"tensor {tensor.name} lies in {entries['location']!r}, which the manifest does not list; "
            "weights must stay inside the bundle: export it anew"
        )
    return folder / entries["location"], int(entries["offset"]), int(entries["length"])


def _map(folder: Path, listed: set[str], tensor: onnx.TensorProto) -> Any:
    path, offset, length = _location(folder, listed, tensor)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    count = length // np.dtype(dtype).itemsize
    return np.memmap(path, dtype, "r", offset, (count,)).reshape(tuple(tensor.dims))


def _read(folder: Path, listed: set[str], tensor: onnx.TensorProto) -> Tensor:
    return torch.from_numpy(np.array(_map(folder, listed, tensor)))


def _quantised(
    folder: Path, listed: set[str], node: onnx.NodeProto, tensors: Mapping[str, onnx.TensorProto], name: str
) -> Iterator[Weight]:
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    bits, block = attributes["bits"], attributes["block_size"]
    codes_at, scales_at, zeros_at = MULTIPLIES[node.op_type]
    codes = _map(folder, listed, tensors[node.input[codes_at]])
    scales = _map(folder, listed, tensors[node.input[scales_at]])
    has_zeros = len(node.input) > zeros_at and node.input[zeros_at]
    zeros = _map(folder, listed, tensors[node.input[zeros_at]]) if has_zeros else None
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


def _plain(folder: Path, listed: set[str], tensor: onnx.TensorProto, name: str) -> Iterator[Weight]:
    rows = _map(folder, listed, tensor)
    for start in range(0, rows.shape[0], ROWS):
        yield name, (start, torch.from_numpy(np.array(rows[start : start + ROWS])))


def _positions(tables: Tensor, key: str, quantizer: Quantizer) -> Iterator[Weight]:
    """Position tables of all image sizes, one after the other; the key names their patch grids."""
    vision = quantizer.weights.config.vision
    name, grids = key.split("|", 1)
    if vision is None or name not in quantizer.weights.parameters:
        raise BundleError(f"the weight file holds {key!r}, which is no parameter of the model; export it anew")
    first = 0
    for grid in grids.split(","):
        rows, columns = (int(side) for side in grid.split("x"))
        size = f"{rows * vision.patch_size}x{columns * vision.patch_size}"
        yield f"{name}@{size}", (0, tables[first : first + rows * columns])
        first += rows * columns


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
        lengths = ({e.key: e.value for e in t.external_data}.get("length", "0") for t in graph.initializer)
        total += sum(int(length) for length in lengths)
    for state in manifest["states"]:
        if state["kind"] in ("conv", "recurrent"):
            total += int(np.prod(state["shape"])) * np.dtype(state["dtype"]).itemsize
    return total
