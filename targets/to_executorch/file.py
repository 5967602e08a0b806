"""Writing a .pte: the runtime's own serialiser lays it out, weights are streamed into their places.

Layout and bytes of everything but weights come from `serialize_pte_binary`, which is given stand-ins of the
right size. The weight cache of mobile builds looks packed weights up by key alone, across files, so keys end
with a hash of the contents: the file is laid out with stand-in keys of the same length, the weights are
streamed and hashed, and the rest is written with the true keys. A journal beside the file serves `--resume`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from executorch.exir import schema
from executorch.exir._serialize._cord import Cord, FileBackedData
from executorch.exir._serialize._named_data_store import NamedDataStoreOutput
from executorch.exir._serialize._program import PTEFile, serialize_pte_binary
from executorch.exir._serialize.data_serializer import DataEntry

from targets.to_executorch.program import Constants, Method

SEGMENT_ALIGNMENT = 256
CONSTANT_ALIGNMENT = 64
_FORMAT = 0
"""Version of the program schema: the one that every release so far reads."""


@dataclass(frozen=True)
class Weight:
    """Named data that one pass over a weight yields: its codes, and its scales where it has any.

    `read` yields (piece, bytes), each piece in order; `sizes` says how many bytes a piece has.
    """

    name: str
    sizes: Mapping[str, int]
    read: Callable[[], Iterator[tuple[str, bytes]]]


class _StandIn(FileBackedData):  # type: ignore[misc]  # the SDK has no types
    """So many bytes that are written later."""

    def __init__(self, size: int) -> None:
        self._size = size


@dataclass(frozen=True)
class Source:
    """What a file is made of: methods, numbers that methods return, constants and weights."""

    methods: Sequence[Method]
    values: Sequence[Any]
    constants: Constants
    weights: Sequence[Weight]


def write(path: Path, source: Source, resume: bool = False) -> dict[str, int]:
    """Write the file; returns the offset of every piece of every weight."""
    blank = {piece: f"{piece}#{0:064x}" for weight in source.weights for piece in weight.sizes}
    blobs = [d.serialize(blank) for method in source.methods for d in method.delegates()]
    _, places, size = _lay_out(source, blobs, blank)
    journal = path.with_suffix(".journal")
    done = _read_journal(journal) if resume and path.exists() and path.stat().st_size == size else {}
    with open(path, "r+b" if done else "wb") as file, open(journal, "a" if done else "w") as log:
        file.truncate(size)
        for weight in source.weights:
            if weight.name not in done:
                done[weight.name] = _stream(file, weight, places)
                file.flush()
                log.write(json.dumps({"name": weight.name, "hash": done[weight.name]}) + "\n")
                log.flush()
        keys = {piece: f"{piece}#{done[weight.name]}" for weight in source.weights for piece in weight.sizes}
        cord, again, _ = _lay_out(source, [_with_keys(blob, blank, keys) for blob in blobs], keys)
        if again != places:
            raise RuntimeError(f"{path.name}: the layout depends on the keys of weights")
        file.seek(0)
        for part in cord._buffers:
            file.seek(len(part), 1) if isinstance(part, _StandIn) else file.write(part)
    return places


def _with_keys(blob: bytes, blank: Mapping[str, str], keys: Mapping[str, str]) -> bytes:
    """A delegate with other keys of the same length, wherever it names one; a key is followed by a zero byte."""
    for piece, old in blank.items():
        blob = blob.replace(b"\0" + old.encode() + b"\0", b"\0" + keys[piece].encode() + b"\0")
    return blob


def _lay_out(
    source: Source, blobs: Sequence[bytes], keys: Mapping[str, str]
) -> tuple[Cord, dict[str, int], int]:
    """The file with stand-ins for its weights, the offset of each piece, and the size of the whole."""
    plans, first = [], 0
    for method in source.methods:
        plans.append(method.plan(first))
        first += len(method.delegates())
    program = schema.Program(
        version=_FORMAT,
        execution_plan=[*plans, *source.values],
        constant_buffer=[schema.Buffer(data) for data in source.constants.arrays],
        backend_delegate_data=[schema.BackendDelegateInlineData(blob) for blob in blobs],
        segments=[],
        constant_segment=schema.SubsegmentOffsets(0, []),
    )
    stand_ins: dict[str, _StandIn] = {}
    for weight in source.weights:
        stand_ins |= {piece: _StandIn(size) for piece, size in weight.sizes.items()}
    entries = {
        keys[piece]: DataEntry(index, SEGMENT_ALIGNMENT, None) for index, piece in enumerate(stand_ins)
    }
    cord = serialize_pte_binary(
        PTEFile(program, named_data=NamedDataStoreOutput(list(stand_ins.values()), entries, {})),
        extract_delegate_segments=True,
        segment_alignment=SEGMENT_ALIGNMENT,
        constant_tensor_alignment=CONSTANT_ALIGNMENT,
    )
    names = {id(stand_in): piece for piece, stand_in in stand_ins.items()}
    places, offset = {}, 0
    for part in cord._buffers:
        if isinstance(part, _StandIn):
            places[names[id(part)]] = offset
        offset += len(part)
    return cord, places, offset


def _stream(file: Any, weight: Weight, places: Mapping[str, int]) -> str:
    """Write all pieces of a weight; returns the hash of its contents."""
    written = dict.fromkeys(weight.sizes, 0)
    hashes = {piece: hashlib.sha256() for piece in weight.sizes}
    for piece, data in weight.read():
        file.seek(places[piece] + written[piece])
        file.write(data)
        written[piece] += len(data)
        hashes[piece].update(data)
    if written != dict(weight.sizes):
        raise RuntimeError(f"{weight.name}: wrote {written} bytes, laid out {dict(weight.sizes)}")
    return hashlib.sha256(b"".join(each.digest() for each in hashes.values())).hexdigest()


def _read_journal(path: Path) -> dict[str, str]:
    done: dict[str, str] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            break  # the interrupt cut the last line; its weight is written again
        done[entry["name"]] = entry["hash"]
    return done
