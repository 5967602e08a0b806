"""Single safetensors files: what the header says, and rows of one tensor as float32.

The header is parsed here so that exactly the bytes of the asked rows are read (seek and readinto).
Memory-mapping would count whole shards towards the process's memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from export.checkpoint.base import CheckpointError, check_finite, check_range

DTYPES: Mapping[str, torch.dtype] = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""What is read, always into float32; other dtypes are listed and refused when they are needed."""
# The limit of the safetensors library itself; a longer header is garbage read as a length.
_MAX_HEADER_BYTES = 100_000_000
_POINTER_BYTES = 1024


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: bytes [begin, end) of `shard`, `stored` as the file calls its dtype."""

    shard: Path
    stored: str
    shape: tuple[int, ...]
    begin: int
    end: int


def check_dtype(name: str, entry: Entry) -> None:
    """Refuse a tensor whose values are not plain floats.

    Raises:
        CheckpointError: naming file, tensor and dtype.
    """
    if entry.stored not in DTYPES:
        raise CheckpointError(
            f"{entry.shard} stores {name} as {entry.stored}; {', '.join(DTYPES)} are read: use the checkpoint that "
            "was published in bfloat16, not a quantised one"
        )


def read_rows(name: str, entry: Entry, start: int = 0, stop: int | None = None) -> torch.Tensor:
    """Rows [start, stop) of dimension 0 as float32 [stop - start, …]; a scalar has one row and comes as a scalar.

    Raises:
        CheckpointError: rows outside the tensor, a dtype that is not read, unreadable bytes, NaN or infinity.
    """
    start, stop = check_range(name, entry.shape, start, stop)
    stored = read_stored(name, entry, start, stop)
    values = stored.to(torch.float32)
    check_finite(name, values, start)
    return values if entry.shape else values.reshape(())


def read_stored(name: str, entry: Entry, start: int, stop: int) -> torch.Tensor:
    """Rows [start, stop), which must lie within the tensor, in the dtype of the file.

    Raises:
        CheckpointError: a dtype that is not read, or unreadable bytes.
    """
    check_dtype(name, entry)
    dtype = DTYPES[entry.stored]
    row_shape = entry.shape[1:]
    row_bytes = math.prod(row_shape) * dtype.itemsize
    stored = torch.empty((stop - start, *row_shape), dtype=dtype)
    buffer: memoryview = stored.reshape(-1).view(torch.uint8).numpy().data
    try:
        with entry.shard.open("rb", buffering=0) as file:
            file.seek(entry.begin + start * row_bytes)
            done = 0
            while done < len(buffer):
                count = file.readinto(buffer[done:])
                if not count:
                    raise CheckpointError(
                        f"{entry.shard} ends inside {name}: it was changed or truncated while being "
                        "read; download it again"
                    )
                done += count
    except OSError as error:
        raise CheckpointError(f"{entry.shard} cannot be read: {error.strerror or error}") from error
    return stored


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of one safetensors file: 8 bytes of header length, JSON, then the data without holes.

    Raises:
        CheckpointError: truncated or corrupt file, or the pointer that Git LFS leaves in place of one.
    """
    try:
        size = path.stat().st_size
        file = path.open("rb")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    with file:
        if size < _POINTER_BYTES and b"oid sha256:" in file.read(_POINTER_BYTES):
            raise CheckpointError(
                f"{path} is the pointer of a file in Git LFS ({size} bytes), not the file: run `git lfs pull` in the "
                "folder, or download the checkpoint from the hub"
            )
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise CheckpointError(
                f"{path} is truncated or no safetensors file: its header claims {length} bytes, the file "
                f"has {size}; download it again"
            )
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            tensors = {name: _entry(path, name, value, 8 + length) for name, value in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise CheckpointError(
                f"{path} has a corrupt header ({type(error).__name__}: {error}); download it again"
            ) from error
    end = 8 + length
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        # The format allows neither holes nor overlaps, so any of them means damage.
        if entry.begin != end:
            raise CheckpointError(
                f"{path} is corrupt: {name} begins at byte {entry.begin}, the tensor before it ends at "
                f"{end}; download it again"
            )
        end = entry.end
    if end != size:
        raise CheckpointError(
            f"{path} is {'truncated' if size < end else 'too long'}: its header describes {end} bytes, the "
            f"file has {size}; download it again"
        )
    return tensors


def _entry(path: Path, name: str, value: Mapping[str, Any], data: int) -> Entry:
    stored = str(value["dtype"])
    shape = tuple(int(n) for n in value["shape"])
    begin, end = (int(n) for n in value["data_offsets"])
    wrong = stored in DTYPES and end - begin != math.prod(shape) * DTYPES[stored].itemsize
    if wrong or end < begin or min((*shape, begin)) < 0:
        raise ValueError(f"{name} {list(shape)} {stored} has bytes {begin} to {end}")
    return Entry(path, stored, shape, data + begin, data + end)
