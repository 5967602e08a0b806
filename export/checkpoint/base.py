"""What every source of weights offers: the config, the published tensor names and rows of float32.

Nothing here holds a model: a caller reads the rows it needs and drops them. `check_finite` is the one
place where NaN and infinities are found, on rows as they stream by.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from export.model.config import ModelConfig
from export.spec import ExportError

if TYPE_CHECKING:  # names and shapes are wanted without torch, by --dry-run
    import torch

# Rows are generated, and best read, in blocks of about this many elements (4 MiB of float32).
BLOCK_ELEMENTS = 1 << 20


class CheckpointError(ExportError):
    """A checkpoint that cannot be found, read or trusted."""


class Checkpoint(Protocol):
    """One checkpoint, read lazily by published tensor name.

    Attributes:
        config: config.json as read.
        model_config: its dimensions, all layers and vision included.
        source: `model.source` of the manifest: kind, id, revision, seed.
        preprocessor: what the checkpoint's image processor is told (preprocessor_config.json, or the part of
            processor_config.json about pictures), or None.
        folder: where transformers can load the same model from by itself, or None.
        notices: whole sentences for the user about what was found on opening.
    """

    folder: Path | None
    notices: list[str]

    @property
    def config(self) -> Mapping[str, Any]: ...

    @property
    def model_config(self) -> ModelConfig: ...

    @property
    def source(self) -> dict[str, Any]: ...

    @property
    def preprocessor(self) -> Mapping[str, Any] | None: ...

    def sidecar(self, name: str) -> Path | None:
        """Path of a file beside the weights (tokenizer.json, ...), or None if there is none."""
        ...

    def names(self) -> list[str]:
        """Published tensor names, sorted."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor; CheckpointError if it is missing."""
        ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows [start, stop) of dimension 0 as float32 [stop - start, ...]; reads only those bytes.

        Raises:
            CheckpointError: missing tensor, rows outside it, unreadable bytes, NaN or infinity.
        """
        ...

    def content_key(self) -> str:
        """Cheap identity of the content, for --resume."""
        ...


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: absent, unreadable or malformed file, or one that holds no object.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if text.startswith("\ufeff"):  # transformers does not read such a file either
            raise CheckpointError(f"{path} begins with a byte order mark, which JSON has not; save it as plain UTF-8")
        value = json.loads(text, parse_constant=_no_number)
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.parent} has no {path.name}; give the folder of a complete Qwen3.5 checkpoint"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}; it must be a JSON object")
    return value


def _no_number(constant: str) -> None:
    """Python writes and reads NaN and Infinity; no bundle may carry them on, because other readers stop there."""
    raise ValueError(f"it holds {constant}, which JSON has not")


def block_rows(shape: tuple[int, ...]) -> int:
    """Rows of dimension 0 in one block of about BLOCK_ELEMENTS elements."""
    return max(1, BLOCK_ELEMENTS // max(1, math.prod(shape[1:])))


def equal_rows(
    shape: tuple[int, ...], one: Callable[[int, int], torch.Tensor], other: Callable[[int, int], torch.Tensor]
) -> bool:
    """Whether two readers of rows (start, stop) of a tensor give the same values, block by block up to the first
    difference.
    """
    step = block_rows(shape)
    blocks = ((start, min(start + step, shape[0])) for start in range(0, shape[0], step))
    return all(bool((one(*rows) == other(*rows)).all()) for rows in blocks)


def check_range(name: str, shape: tuple[int, ...], start: int, stop: int | None) -> tuple[int, int]:
    """Resolve and check a row range.

    Raises:
        CheckpointError: rows outside the tensor.
    """
    rows = shape[0] if shape else 1
    end = rows if stop is None else stop
    if not 0 <= start <= end <= rows:
        raise CheckpointError(f"{name}: rows {start} to {end} asked of {rows}; ask for rows within 0 to {rows}")
    return start, end


def check_finite(name: str, values: torch.Tensor, start: int = 0) -> None:
    """Refuse NaN and infinities in rows that begin at row `start` of tensor `name`.

    Raises:
        CheckpointError: naming tensor and row.
    """
    import torch

    # A sum is one pass at memory speed and NaN or infinity always survive it; the exact search is rare.
    if values.numel() == 0 or math.isfinite(float(values.sum())):
        return
    bad = ~torch.isfinite(values.reshape(values.shape[0], -1) if values.dim() else values.reshape(1, 1))
    if not bool(bad.any()):
        return  # finite values whose sum overflowed
    row = int(bad.any(dim=1).nonzero()[0])
    kind = "NaN" if bool(torch.isnan(values.reshape(bad.shape)[row]).any()) else "an infinite value"
    raise CheckpointError(
        f"{name} has {kind} in row {start + row}; weights must be finite: this checkpoint is damaged, "
        "download it again or use another one"
    )
