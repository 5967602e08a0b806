"""Reading the weight file of an ML program. Torch-free; memory-mapped, nothing is read before it is asked for.

The file starts with 64 bytes (number of entries, version 2). Each tensor has a metadata record of 64 bytes, whose
offset the program names, and its data elsewhere in the file. Elements below a byte follow one another from the
lowest bit of the first byte on; the last byte is filled up with zeros.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.bundle.manifest import BundleError

HEADER = struct.Struct("<II56x")
"""Number of entries, version."""
RECORD = struct.Struct("<IIQQQ32x")
"""Sentinel, data type, size in bytes, offset of the data, unused bits of the last byte."""
VERSION = 2
SENTINEL = 0xDEADBEEF

CODES = {
    "float16": 1, "float32": 2, "uint8": 3, "int8": 4, "bfloat16": 5, "int16": 6, "uint16": 7, "int4": 8,
    "uint1": 9, "uint2": 10, "uint4": 11, "uint3": 12, "uint6": 13, "int32": 14, "uint32": 15,
}  # fmt: skip
"""Data types as a metadata record numbers them."""
BITS = {"int4": 4, "uint1": 1, "uint2": 2, "uint3": 3, "uint4": 4, "uint6": 6}
"""Width of the types that are smaller than a byte."""
DTYPES: dict[str, np.dtype[Any]] = {
    "float16": np.dtype("<f2"), "float32": np.dtype("<f4"), "bool": np.dtype(np.bool_),
    "int8": np.dtype(np.int8), "int16": np.dtype("<i2"), "int32": np.dtype("<i4"),
    "uint8": np.dtype(np.uint8), "uint16": np.dtype("<u2"), "uint32": np.dtype("<u4"),
    **{name: np.dtype(np.int8 if name.startswith("int") else np.uint8) for name in BITS},
}  # fmt: skip
"""numpy's form of each type; elements below a byte are widened to one."""


class BlobFile:
    """The weight file of a package."""

    def __init__(self, path: Path) -> None:
        """Check the file's header.

        Raises:
            BundleError: no such file, or not a weight file.
        """
        self.path = path
        if not path.is_file():
            raise BundleError(f"weight file {path} is missing; copy the package again")
        if path.stat().st_size < HEADER.size:
            raise BundleError(f"weight file {path} is cut short: it has no header; copy the package again")
        # Copy on write: torch warns about read-only arrays, and nobody writes.
        self._bytes: NDArray[np.uint8] = np.memmap(path, np.uint8, "c")
        version = HEADER.unpack(self._bytes[: HEADER.size].tobytes())[1]
        if version != VERSION:
            raise BundleError(f"{path} is no weight file of version {VERSION} (it says {version}); export it again")

    def tensor(self, offset: int, dtype: str, shape: tuple[int, ...]) -> BlobTensor:
        """The tensor whose metadata record lies at `offset`.

        Raises:
            BundleError: no record there, or one that does not describe `shape` of `dtype`, or data past the end.
        """
        where = f"{self.path.name} at offset {offset}"
        if offset + RECORD.size > len(self._bytes):
            raise BundleError(
                f"{where}: the program reads there, but the file has {len(self._bytes)} bytes; copy the package again"
            )
        sentinel, code, size, start, _ = RECORD.unpack(self._bytes[offset : offset + RECORD.size].tobytes())
        if sentinel != SENTINEL:
            raise BundleError(
                f"{where} begins with {sentinel:#010x}, a metadata record with {SENTINEL:#010x}; "
                "program and weight file do not belong together: export the package again"
            )
        if CODES.get(dtype) != code:
            stored = next((name for name, known in CODES.items() if known == code), f"type {code}")
            raise BundleError(f"{where} holds {stored}, the program declares {dtype}; export the package again")
        count = math.prod(shape)
        needed = -(-count * BITS.get(dtype, 8 * DTYPES[dtype].itemsize) // 8) if dtype in DTYPES else size
        if size != needed:
            raise BundleError(
                f"{where} holds {size} bytes, {dtype} {list(shape)} needs {needed}; export the package again"
            )
        if start + size > len(self._bytes):
            raise BundleError(
                f"{where}: its data ends at byte {start + size} of {len(self._bytes)}; copy the package again"
            )
        return BlobTensor(dtype, shape, self.path, offset, self._bytes[start : start + size])


@dataclass(frozen=True, eq=False)
class BlobTensor:
    """A tensor in a weight file."""

    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    _data: NDArray[np.uint8] = field(repr=False)

    @property
    def key(self) -> tuple[Path, int, tuple[int, ...]]:
        """Equal wherever a program uses the same tensor; one record may serve several shapes."""
        return self.file, self.offset, self.shape

    def array(self) -> NDArray[Any]:
        """All of it, in `shape`; a view of the mapped file where an element has whole bytes."""
        return self.rows(0, self.shape[0]) if self.shape else self.flat(0, 1).reshape(())

    def rows(self, start: int, stop: int) -> NDArray[Any]:
        """Rows `start` to `stop` of the first axis."""
        width = math.prod(self.shape[1:])
        return self.flat(start * width, stop * width).reshape(stop - start, *self.shape[1:])

    def flat(self, start: int, stop: int) -> NDArray[Any]:
        """Elements `start` to `stop` in row-major order.

        Raises:
            BundleError: a type of which numpy has no form.
        """
        if self.dtype in BITS:
            bits = BITS[self.dtype]
            first = start // 8 * 8  # eight elements fill whole bytes
            packed = self._data[first * bits // 8 : -(-stop * bits // 8)]
            return elements(packed, self.dtype)[start - first : stop - first]
        if self.dtype not in DTYPES:
            raise BundleError(f"{self.file.name} holds {self.dtype} at offset {self.offset}; read {sorted(DTYPES)}")
        return self._data.view(DTYPES[self.dtype])[start:stop]


def elements(packed: NDArray[np.uint8], dtype: str) -> NDArray[Any]:
    """Elements below a byte, widened to one: int8 or uint8; those of the filling included."""
    bits = BITS[dtype]
    if 8 % bits == 0:
        return _contents(dtype).take(packed).view(DTYPES[dtype])
    stream = np.unpackbits(packed, bitorder="little")
    codes = stream[: stream.size // bits * bits].reshape(-1, bits)
    return np.packbits(codes, axis=-1, bitorder="little").reshape(-1)


@cache
def _contents(dtype: str) -> NDArray[Any]:
    """The elements [8 / bits] in each of the 256 bytes, as one integer: a table is ten times as fast as shifts."""
    bits = BITS[dtype]
    codes = (np.arange(256)[:, None] >> np.arange(0, 8, bits)) & ((1 << bits) - 1)
    if dtype.startswith("int"):
        codes = np.where(codes >> (bits - 1), codes - (1 << bits), codes)
    return codes.astype(DTYPES[dtype]).view(f"<u{8 // bits}").reshape(-1)
