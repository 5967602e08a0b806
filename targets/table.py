"""A `table` stage of the contract: rows of a matrix, dequantised from a memory-mapped region of a file. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.bundle.manifest import BundleError
from targets.base import Job
from targets.contract import CallError

CODES: dict[int, np.dtype[Any]] = {
    4: np.dtype(np.uint8),
    8: np.dtype(np.int8),
    16: np.dtype("<f2"),
    32: np.dtype("<f4"),
}
SCALES: dict[str, np.dtype[Any]] = {"float16": np.dtype("<f2"), "float32": np.dtype("<f4")}


def table_stage(job: Job, file: str, data_offset: int, scale_offset: int | None, *, floats: str) -> dict[str, Any]:
    """The stage `table` that a target's manifest has for the embedding.

    Args:
        file: path inside the bundle. data_offset, scale_offset: bytes from its start; None: no scales.
        floats: dtype of what is not quantised, float16 or float32. Scales have it too, but float16 at 4 bits.
    """
    setting = job.quantizer.setting("embedding.weight")
    bits = 8 * SCALES[floats].itemsize
    if setting is not None:
        bits = setting.bits if setting.symmetric else 8  # code - zero point: a table has none
    return {
        "kind": "table",
        "file": file,
        "inputs": {"input_ids": "input_ids"},
        "outputs": {"embeddings": "embeddings"},
        "table": {
            "rows": job.config.text.vocab_size,
            "columns": job.config.text.hidden_size,
            "bits": bits,
            "group_size": None if setting is None else setting.group_size,
            "scale_dtype": "float16" if bits == 4 else floats,
            "data_offset": data_offset,
            "scale_offset": scale_offset if setting is not None and scale_offset is not None else 0,
        },
    }


class Table:
    """Rows [n, columns] by index. Nothing is read before it is asked for.

    Args:
        folder: the bundle. stage: a stage of kind `table` of its manifest.

    Raises:
        BundleError: the file is missing, or ends before the table does.
    """

    def __init__(self, folder: Path, stage: Mapping[str, Any]) -> None:
        table = stage["table"]
        self.rows, self.columns, self._bits = table["rows"], table["columns"], table["bits"]
        self._group = table["group_size"] or self.columns
        path = folder / stage["file"]

        def region(offset: int, dtype: np.dtype[Any], columns: int) -> NDArray[Any]:
            size = path.stat().st_size if path.is_file() else 0
            end = offset + self.rows * columns * dtype.itemsize
            if end > size:
                raise BundleError(
                    f"{stage['file']} has {size} bytes, the table in it reaches byte {end}; copy the bundle again"
                )
            return np.memmap(path, dtype, "r", offset, (self.rows, columns))

        codes = CODES[self._bits]
        per_row = self.columns * self._bits // 8 // codes.itemsize
        self._codes = region(table["data_offset"], codes, per_row)
        self._scales: NDArray[Any] | None = None
        if self._bits < 16:
            scales = SCALES[table["scale_dtype"]]
            self._scales = region(table["scale_offset"], scales, self.columns // self._group)

    def of(self, ids: NDArray[Any]) -> NDArray[np.float32]:
        """float32 rows [..., columns] of token ids [...].

        Raises:
            CallError: an id without a row; numpy would take negative ones from the end.
        """
        wrong = ids[(ids < 0) | (ids >= self.rows)]
        if wrong.size:
            raise CallError(f"token id {int(wrong[0])} has no row in the embedding; ids are 0 to {self.rows - 1}")
        return self[ids]

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
