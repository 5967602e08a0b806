"""Reading the weights back out of the packages that ship: the numbers that their codes, palettes, scales and offsets
stand for, in float32.

Shares no code with what writes them: the operations of the saved programs decide. Core ML expands a compressed weight
to float16. For float16 weights and symmetric 4 bits, whose scales have 8 bits, that changes nothing: what is compared
bit for bit with the quantiser is what the device computes with. For 8 bits and for 4 bits with zero points it rounds
code x scale once more; that is not applied here, and what is compared bit for bit is the product before it. L1 and L3
run the packages with the rounding.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from export.bundle.manifest import BundleError
from export.quantize.quantizer import Quantizer
from targets.stored import FLOATS, check_storage, check_table
from targets.table import Table
from targets.to_coreml.blob import BITS, DTYPES, BlobTensor
from targets.to_coreml.program import Constant, Operation, Package, Reference

ROWS = 4096
BLOCKWISE, PALETTE = "constexpr_blockwise_shift_scale", "constexpr_lut_to_dense"
TITLE = re.compile(r"(?P<name>.+?)(__(?P<rest>t|\d+|\d+x\d+))?")

Weight = tuple[str, tuple[int, torch.Tensor]]


def packages(manifest: Mapping[str, Any]) -> list[str]:
    """The packages that the signatures of a bundle call."""
    stages = [stage for entry in manifest["signatures"].values() for stage in entry["stages"]]
    return sorted({stage["file"] for stage in stages if stage["kind"] == "graph"})


def stored_weights(folder: Path, manifest: Mapping[str, Any], quantizer: Quantizer) -> Iterator[Weight]:
    """(parameter, (first row, float32 rows)) for every parameter in the files of a bundle. A table of vision
    positions comes as `parameter@{height}x{width}` for each image size.
    """
    known = {name.replace(".", "_"): name for name in quantizer.weights.parameters}
    for stage in manifest["signatures"]["embed"]["stages"]:
        table = Table(folder, stage)
        check_table(stage, quantizer)
        for start in range(0, table.rows, ROWS):
            yield "embedding.weight", (start, torch.from_numpy(table[slice(start, start + ROWS)]))
    for file in packages(manifest):
        package = Package(folder / file)
        done: set[Any] = set()
        for function in package.functions.values():
            tables = {o.outputs[0][0]: o for o in function.operations if o.type == PALETTE}
            for operation in function.operations:
                title = TITLE.fullmatch(operation.name)
                if title is None or title["name"] not in known or operation.type not in ("const", BLOCKWISE, PALETTE):
                    continue
                name, rest = known[title["name"]], title["rest"]
                parts = _parts(operation, tables)
                key = operation.name, tuple(one.key for one in parts if isinstance(one, BlobTensor)), _shape(parts)
                if key in done and any(isinstance(one, BlobTensor) for one in parts):
                    continue
                done.add(key)
                yield from _rows(name, rest, parts, quantizer, file)


def _parts(operation: Operation, tables: Mapping[str, Operation]) -> tuple[Constant | None, ...]:
    """Values, palettes, scales and offsets of a constant, as far as it has them; `tables`: what looks up palettes, by
    the name of the result, over which there may be scales.
    """
    if operation.type == "const":
        return (_constant(operation, "val"), None, None, None)
    if operation.type == PALETTE:
        return (_constant(operation, "indices"), _constant(operation, "lut"), None, None)
    scale = _constant(operation, "scale")
    offset = _constant(operation, "offset") if "offset" in operation.inputs else None
    data = operation.inputs["data"][0]
    if isinstance(data, Reference) and data.name in tables:
        return (*_parts(tables[data.name], {})[:2], scale, offset)
    return (_constant(operation, "data"), None, scale, offset)


def _constant(operation: Operation, key: str) -> Constant:
    value = operation.inputs[key][0]
    if isinstance(value, Reference):
        raise BundleError(f"{operation.name} takes its {key} from {value.name!r}, not a constant; export it anew")
    return value


def _shape(parts: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(None if one is None else tuple(one.shape) for one in parts)


def _rows(
    name: str, rest: str | None, parts: tuple[Any, ...], quantizer: Quantizer, file: str
) -> Iterator[Weight]:
    values, lut, scales, offsets = parts
    shape = quantizer.weights.parameter(name).shape
    if rest is not None and "x" in rest:
        array = _array(values).astype(np.float32)
        rows = array[0, :, 0].T if array.ndim == 4 else array[0]
        yield f"{name}@{rest}", (0, torch.from_numpy(np.ascontiguousarray(rows)))
        return
    check_storage(file, name, *_declared(values, lut, scales), quantizer)
    if scales is None and lut is None:
        if rest == "t":
            whole = _array(values).astype(np.float32).reshape(shape[::-1]).T
            yield name, (0, torch.from_numpy(np.ascontiguousarray(whole)))
            return
        first = int(rest or 0)
        if len(shape) == 1:  # small, and stored with leading ones
            yield name, (first, torch.from_numpy(_array(values).astype(np.float32).reshape(-1)))
            return
        for start in range(0, values.shape[0], ROWS):
            rows = _slice(values, start, min(start + ROWS, values.shape[0])).astype(np.float32)
            yield name, (first + start, torch.from_numpy(rows.reshape(-1, *shape[1:])))
        return
    first = int(rest or 0)
    for start in range(0, values.shape[0], ROWS):
        stop = min(start + ROWS, values.shape[0])
        count = stop - start
        codes = _slice(values, start, stop).reshape(count, -1)
        rows = codes.astype(np.float32)
        if lut is not None:
            own = _slice(lut, start, stop) if lut.shape[0] > 1 else _array(lut)
            numbers = own.astype(np.float32).reshape(own.shape[0], -1, lut.shape[-2]).repeat(count // own.shape[0], 0)
            grouped = codes.reshape(count, numbers.shape[1], -1).astype(np.int64)
            rows = np.take_along_axis(numbers, grouped, axis=2)
        if scales is not None:
            scale = _slice(scales, start, stop).astype(np.float32).reshape(count, -1, 1)
            if codes.shape[1] % scale.shape[1]:
                raise BundleError(
                    f"{file} holds {name} with {scale.shape[1]} scales a row of {codes.shape[1]}; export it anew"
                )
            rows = rows.reshape(count, scale.shape[1], -1)
            if offsets is not None:
                rows = rows - _slice(offsets, start, stop).astype(np.float32).reshape(scale.shape)
            rows = rows * scale
        yield name, (first + start, torch.from_numpy(rows.reshape(count, -1)))


def _declared(values: Any, lut: Any, scales: Any) -> tuple[int, int | None]:
    """Bits and group size of a matrix [N, K], as `check_storage` wants them."""
    if lut is None and scales is None:
        return FLOATS, None
    bits = 8 if str(values.dtype) == "int8" else 4
    groups = (lut if scales is None else scales).shape[1]
    return bits, None if bits == 8 and groups == 1 else values.shape[1] // groups


def _array(value: Any) -> NDArray[Any]:
    return np.asarray(value.array() if isinstance(value, BlobTensor) else value)


def _slice(value: Any, start: int, stop: int) -> NDArray[Any]:
    return np.asarray(value.rows(start, stop) if isinstance(value, BlobTensor) else value[start:stop])


def _bytes(tensor: BlobTensor) -> int:
    bits = BITS.get(tensor.dtype) or 8 * DTYPES[tensor.dtype].itemsize
    return -(-math.prod(tensor.shape) * bits // 8)


def decode_bytes(folder: Path, manifest: Mapping[str, Any]) -> int:
    """Constants that `decode` reads from weight files, plus the conv and recurrent states, read whole."""
    total = 0
    for stage in manifest["signatures"]["decode"]["stages"]:
        package = Package(folder / stage["file"])
        sizes = {}
        for operation in package.function(stage["entry"]).operations:
            for given in operation.inputs.values():
                for one in given:
                    if isinstance(one, BlobTensor):
                        sizes[one.key] = _bytes(one)
        total += sum(sizes.values())
    for state in manifest["states"]:
        if state["kind"] in ("conv", "recurrent"):
            total += int(np.prod(state["shape"])) * np.dtype(state["dtype"]).itemsize
    return total
