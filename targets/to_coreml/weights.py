"""weight.bin of a package: planned while the program is built, written by streaming.

Storage is that of MILBlob: a header of 64 bytes, then for each constant a record of 64 bytes that says where its
data is, everything aligned to 64. Several records may point into one region: pieces of a head lie together as one
matrix, so that a `table` stage can read them as the embedding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.quantize.quantizer import Quantizer
from export.quantize.recipe import Setting
from export.quantize.tensor import QuantizedBlock
from targets.to_coreml.blob import CODES, HEADER, RECORD, SENTINEL, VERSION
from targets.to_coreml.cut import ALIGNMENT, UNSIGNED, Form, aligned, element_bits, stored_parts


@dataclass(frozen=True)
class Region:
    """Rows of one constant as they lie in the file."""

    dtype: str
    row_elements: int
    rows: int
    offset: int

    @property
    def row_bits(self) -> int:
        return self.row_elements * element_bits(self.dtype)

    @property
    def size(self) -> int:
        return self.rows * self.row_bits // 8


@dataclass(frozen=True)
class Matrix:
    """Where the parts of a matrix are; each a region and one record per piece. Without codes, `values` are float16."""

    first: int
    """First row of the parameter that the file holds."""
    values: Region
    scales: Region | None
    offsets: Region | None
    palettes: Region | None


class WeightFile:
    """Plans regions and records by first use, then writes them.

    Args:
        quantizer: of the export. advance: told how many weights were just written.
    """

    def __init__(self, quantizer: Quantizer, advance: Callable[[int], None] = lambda count: None) -> None:
        self.quantizer = quantizer
        self._advance = advance
        self._end = ALIGNMENT
        self._records: list[tuple[int, Region, int, int]] = []
        """(place of the record, region, first row, rows) of each constant."""
        self._matrices: dict[str, Matrix] = {}
        self._pieces: dict[str, list[dict[str, int]]] = {}
        self.places: dict[str, int] = {}
        """Name of a constant of the program -> place of its record."""
        self._small: dict[tuple[str, bytes], tuple[int, NDArray[Any]]] = {}

    # -- planning ---------------------------------------------------------------------------------
    def matrix(self, name: str, pieces: list[range], form: Form = "signed") -> list[dict[str, int]]:
        """Plan rows of a parameter [N, K], once; returns for each piece the places of its records by part.

        Args:
            pieces: consecutive row ranges, all but the last a multiple of 128 rows.
        """
        if name in self._pieces:
            return self._pieces[name]
        columns = self.quantizer.weights.parameter(name).shape[1]
        setting = self.quantizer.setting(name)
        first, rows = pieces[0].start, pieces[-1].stop - pieces[0].start
        found: list[dict[str, int]] = [{} for _ in pieces]
        regions: dict[str, Region] = {}
        for part, (dtype, elements) in stored_parts(setting, columns, form).items():
            records, self._end = self._end, self._end + ALIGNMENT * len(pieces)
            regions[part] = self._region(dtype, elements, rows)
            for index, piece in enumerate(pieces):
                place = records + ALIGNMENT * index
                self._records.append((place, regions[part], piece.start - first, len(piece)))
                found[index][part] = place
        others = (regions.get(part) for part in ("scales", "offsets", "palettes"))
        self._matrices[name] = Matrix(first, regions["values"], *others)
        self._pieces[name] = found
        return found

    def small(self, array: NDArray[Any]) -> int:
        """Plan a constant that is in memory; returns the place of its record. Equal ones are stored once."""
        array = np.ascontiguousarray(array)
        key = str(array.dtype), hashlib.sha256(array.tobytes()).digest()
        if key not in self._small:
            place, self._end = self._end, self._end + ALIGNMENT
            region = self._region(str(array.dtype), array.size, 1)
            self._records.append((place, region, 0, 1))
            self._small[key] = (region.offset, array)
        else:
            place = self._small[key][0] - ALIGNMENT
        return place

    def planned(self, name: str) -> Matrix:
        """Where a planned matrix is."""
        return self._matrices[name]

    @property
    def size(self) -> int:
        """Bytes of the file, as far as it is planned."""
        return self._end

    @property
    def elements(self) -> int:
        """Weights of all planned matrices."""
        return sum(matrix.values.rows * matrix.values.row_elements for matrix in self._matrices.values())

    def _region(self, dtype: str, elements: int, rows: int) -> Region:
        region = Region(dtype, elements, rows, self._end)
        self._end = aligned(self._end + region.size)
        return region

    # -- writing ----------------------------------------------------------------------------------
    def write(self, path: Path) -> None:
        """Write everything planned, one row block in memory at a time."""
        with open(path, "wb") as file:
            file.truncate(self._end)
            file.write(HEADER.pack(len(self._records), VERSION))
            for place, region, first, rows in self._records:
                file.seek(place)
                bits = rows * region.row_bits
                begin = region.offset + first * region.row_bits // 8
                file.write(_record(region.dtype, -(-bits // 8), begin, -bits % 8))
            for offset, array in self._small.values():
                file.seek(offset)
                file.write(array.tobytes())
            for name, matrix in self._matrices.items():
                for region, start, data in self._blocks(name, matrix):
                    file.seek(region.offset + start * region.row_bits // 8)
                    file.write(data)

    def _blocks(self, name: str, matrix: Matrix) -> Iterator[tuple[Region, int, bytes]]:
        """(region, first row in it, bytes) of a matrix, in blocks of rows."""
        setting = self.quantizer.setting(name)
        last = matrix.first + matrix.values.rows
        if setting is None:
            for start, rows in self.quantizer.weights.blocks(name, matrix.first, last):
                self._advance(rows.numel())
                yield matrix.values, start - matrix.first, rows.numpy().astype(np.float16).tobytes()
            return
        for start, block in self.quantizer.blocks(name, matrix.first, last):
            self._advance(block.codes.numel())
            start -= matrix.first
            yield matrix.values, start, pack_codes(block, setting, matrix.values.dtype)
            if matrix.scales is not None:
                yield matrix.scales, start, block.scales.numpy().astype(np.float16).tobytes()
            if matrix.palettes is not None:
                numbers = np.arange(-8, 8, dtype=np.float32)  # times a scale of 8 bits: exact in float16
                yield matrix.palettes, start, (block.scales.numpy()[..., None] * numbers).astype(np.float16).tobytes()
            if matrix.offsets is not None:
                zeros = block.zero_points
                flat = np.full(block.scales.shape, 8, np.uint8) if zeros is None else zeros.numpy()
                yield matrix.offsets, start, _nibbles(flat)


def _record(dtype: str, size: int, offset: int, padding_bits: int) -> bytes:
    return RECORD.pack(SENTINEL, CODES[dtype], size, offset, padding_bits)


def pack_codes(block: QuantizedBlock, setting: Setting, dtype: str) -> bytes:
    """Codes of some rows: int8 as they are, two nibbles a byte with the first one low, signed or code + 8."""
    codes = block.codes.numpy()
    if dtype == "int8":
        if block.zero_points is not None:
            wide = codes.reshape(*block.scales.shape, -1) - block.zero_points.numpy().astype(np.int8)[..., None]
            codes = wide.astype(np.int8)
        return codes.tobytes()
    if dtype == UNSIGNED and setting.symmetric:
        codes = codes + 8
    return _nibbles((codes & 15).astype(np.uint8))


def _nibbles(values: NDArray[np.uint8]) -> bytes:
    flat = values.reshape(-1)
    if flat.size % 2:
        flat = np.append(flat, np.uint8(0))
    return (flat[0::2] | (flat[1::2] << 4)).tobytes()
