"""A `table` stage of the contract: rows of a matrix, dequantised from a memory-mapped region of a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

CODES: dict[int, np.dtype[Any]] = {
    4: np.dtype(np.uint8),
    8: np.dtype(np.int8),
    16: np.dtype("<f2"),
    32: np.dtype("<f4"),
}
SCALES: dict[str, np.dtype[Any]] = {"float16": np.dtype("<f2"), "float32": np.dtype("<f4")}


class Table:
    """Rows [n, columns] by index. Nothing is read before it is asked for.

    Args:
        folder: the bundle. stage: a stage of kind `table` of its manifest.
    """

    def __init__(self, folder: Path, stage: Mapping[str, Any]) -> None:
        table = stage["table"]
        self.rows, self.columns, self._bits = table["rows"], table["columns"], table["bits"]
        self._group = table["group_size"] or self.columns
        path = folder / stage["file"]

        def region(offset: int, dtype: np.dtype[Any], columns: int) -> NDArray[Any]:
            return np.memmap(path, dtype, "r", offset, (self.rows, columns))

        codes = CODES[self._bits]
        per_row = self.columns * self._bits // 8 // codes.itemsize
        self._codes = region(table["data_offset"], codes, per_row)
        self._scales: NDArray[Any] | None = None
        if self._bits < 16:
            scales = SCALES[table["scale_dtype"]]
            self._scales = region(table["scale_offset"], scales, self.columns // self._group)

    def __getitem__(self, rows: Any) -> NDArray[np.float32]:
        """float32 rows by an array of indices, or a slice of them."""
        codes = np.asarray(self._codes[rows])
        if self._scales is None:
            return codes.astype(np.float32)
        if self._bits == 4:
            nibbles = np.stack([codes & 15, codes >> 4], axis=-1).astype(np.int8)
            codes = nibbles.reshape(*codes.shape[:-1], self.columns) - np.int8(8)
        scales = np.repeat(self._scales[rows].astype(np.float32), self._group, axis=-1)
        return np.asarray(codes.astype(np.float32) * scales)
