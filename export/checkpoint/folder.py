"""A checkpoint folder in the published form: config.json and single or sharded safetensors.

The safetensors header is parsed here so that exactly the bytes of the asked rows are read (seek and
readinto). Memory-mapping would count whole shards towards the process's memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from export.checkpoint.base import CheckpointError, check_finite, check_range, read_json
from export.model.config import ModelConfig

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES: Mapping[str, torch.dtype] = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
}
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_IDENTITY = ("*.json", "*.safetensors", "*.jinja", "*.txt")
# The limit of the safetensors library itself; a longer header is garbage read as a length.
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: `begin` is its first byte in `shard`."""

    shard: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int


class FolderCheckpoint:
    """A folder with config.json and model.safetensors, or shards with their index.

    Args:
        path: the folder.
        source: manifest `model.source`; by default kind path and the folder's own name, because a
            bundle must not carry the directory layout of the machine that made it.

    Raises:
        CheckpointError: absent or unreadable files, another family, pickle-only weights, damaged or
            truncated shards, an index that does not fit its shards.
        ConfigError: config.json of another family, with unsupported features or with wrong values.
    """

    def __init__(self, path: Path | str, source: dict[str, Any] | None = None) -> None:
        self.path = Path(path)
        self.folder: Path | None = self.path
        self.notices: list[str] = []
        if not self.path.is_dir():
            raise CheckpointError(
                f"checkpoint {self.path} is not a folder; give a folder with config.json and {SINGLE}, "
                "a hub id, or random"
            )
        self.config: Mapping[str, Any] = read_json(self.path / "config.json")
        if self.config.get("model_type") == "qwen3_5_text":
            raise CheckpointError(
                f"{self.path / 'config.json'} has model_type 'qwen3_5_text', a text decoder saved alone; "
                "this project reads the published form, model_type 'qwen3_5' with a text_config: save the "
                "whole Qwen3_5ForConditionalGeneration"
            )
        preprocessor = self.path / "preprocessor_config.json"
        self.preprocessor: Mapping[str, Any] | None = (
            read_json(preprocessor) if preprocessor.is_file() else None
        )
        self.model_config = ModelConfig.from_dict(self.config, self.preprocessor)
        self.source: dict[str, Any] = source or {"kind": "path", "id": self.path.resolve().name}
        self._entries = _entries(self.path)

    def sidecar(self, name: str) -> Path | None:
        """Path of the file `name` in the folder, or None."""
        path = self.path / name
        return path if Path(name).name == name and path.is_file() else None

    def names(self) -> list[str]:
        """Published tensor names, sorted."""
        return sorted(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor; CheckpointError if it is missing."""
        return self._entry(name).shape

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows [start, stop) of a tensor as float32; see `Checkpoint.read`."""
        return read_rows(name, self._entry(name), start, stop)

    def content_key(self) -> str:
        """Names, sizes and modification times of every file that can reach the bundle."""
        files = {file for pattern in _IDENTITY for file in self.path.glob(pattern) if file.is_file()}
        stats = [(file.name, file.stat()) for file in sorted(files)]
        return "folder:" + ";".join(f"{name}:{stat.st_size}:{stat.st_mtime_ns}" for name, stat in stats)

    def _entry(self, name: str) -> Entry:
        if name not in self._entries:
            raise CheckpointError(
                f"{self.path} has no tensor {name}; a Qwen3.5 checkpoint with this config.json must hold it: "
                "download the checkpoint again"
            )
        return self._entries[name]


def read_rows(name: str, entry: Entry, start: int = 0, stop: int | None = None) -> torch.Tensor:
    """Rows [start, stop) of a stored tensor as float32 [stop - start, ...]; only their bytes are read.

    Raises:
        CheckpointError: rows outside it, unreadable bytes, NaN or infinity.
    """
    start, stop = check_range(name, entry.shape, start, stop)
    row_shape = entry.shape[1:]
    row_bytes = math.prod(row_shape) * entry.dtype.itemsize
    stored = torch.empty((stop - start, *row_shape), dtype=entry.dtype)
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
    values = stored.to(torch.float32)
    check_finite(name, values, start)
    return values if entry.shape else values.reshape(())


def _entries(folder: Path) -> dict[str, Entry]:
    """Every tensor of a checkpoint, from the headers of its shards."""
    if (folder / SINGLE).is_file():
        return read_header(folder / SINGLE)
    if (folder / INDEX).is_file():
        return _indexed(folder)
    if any(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"{folder} has safetensors files but neither {SINGLE} nor {INDEX}; add the index that was "
            "published with the shards"
        )
    pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{folder} holds its weights as pickle ({pickles[0]}); only safetensors are read, because "
            "unpickling runs code: convert with save_pretrained(safe_serialization=True)"
        )
    raise CheckpointError(f"{folder} has no weights; {SINGLE} or {INDEX} with its shards must be there")


def _indexed(folder: Path) -> dict[str, Entry]:
    index = folder / INDEX
    placed = read_json(index).get("weight_map")
    if not isinstance(placed, dict) or not all(isinstance(shard, str) for shard in placed.values()):
        raise CheckpointError(f"{index} has no weight_map of tensor to file name; download it again")
    shards: dict[str, dict[str, Entry]] = {}
    for shard in sorted(set(placed.values())):
        if Path(shard).name != shard:
            raise CheckpointError(f"{index} names the shard {shard!r}; shards must lie beside the index")
        if not (folder / shard).is_file():
            count = sum(value == shard for value in placed.values())
            raise CheckpointError(
                f"{index} names the shard {shard} ({count} tensors), which is absent; download it into {folder}"
            )
        shards[shard] = read_header(folder / shard)
    entries = {}
    for name, shard in placed.items():
        if name not in shards[shard]:
            raise CheckpointError(
                f"{index} places {name} in {shard}, which does not hold it; download index and shards again"
            )
        entries[name] = shards[shard][name]
    return entries


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of one safetensors file: 8 bytes of header length, JSON, then the data without holes.

    Raises:
        CheckpointError: truncated or corrupt file, unsupported dtype.
    """
    try:
        size = path.stat().st_size
        file = path.open("rb")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    with file:
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
    for name, entry in sorted(tensors.items(), key=lambda item: item[1].begin):
        # The format allows neither holes nor overlaps, so any of them means damage.
        num_bytes = math.prod(entry.shape) * entry.dtype.itemsize
        if entry.begin != end:
            raise CheckpointError(
                f"{path} is corrupt: {name} begins at byte {entry.begin}, the tensor before it ends at "
                f"{end}; download it again"
            )
        end += num_bytes
    if end != size:
        raise CheckpointError(
            f"{path} is {'truncated' if size < end else 'too long'}: its header describes {end} bytes, the "
            f"file has {size}; download it again"
        )
    return tensors


def _entry(path: Path, name: str, value: Mapping[str, Any], data: int) -> Entry:
    dtype = value["dtype"]
    if dtype not in DTYPES:
        raise CheckpointError(
            f"{path} stores {name} as {dtype}; {', '.join(DTYPES)} are read: use the checkpoint that was "
            "published in bfloat16, not a quantised one"
        )
    shape = tuple(int(n) for n in value["shape"])
    begin, end = (int(n) for n in value["data_offsets"])
    if min((*shape, begin)) < 0 or end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(f"{name} {list(shape)} {dtype} has bytes {begin} to {end}")
    return Entry(path, DTYPES[dtype], shape, data + begin)
