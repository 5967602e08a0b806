"""Where weights come from: a hub id, a folder, random numbers, or the shipped tiny checkpoint."""

from __future__ import annotations

from pathlib import Path

from export.checkpoint.base import Checkpoint, CheckpointError
from export.sizes import SHIPPED, TINY, check_size, get_size, hub_id, shipped_tiny
from export.spec import ExportSpec

__all__ = ["Checkpoint", "CheckpointError", "open_checkpoint"]


def open_checkpoint(spec: ExportSpec) -> Checkpoint:
    """Open what `--checkpoint`, `--adapter`, `--size`, `--base` and `--revision` name; no weight is read yet.

    Raises:
        CheckpointError: it cannot be found or trusted. UsageError: it is of another size.
    """
    from export.checkpoint.adapter import AdapterCheckpoint
    from export.checkpoint.adapter_config import NO_ADAPTER
    from export.checkpoint.check import check

    checkpoint = _open(spec)
    if spec.adapter not in (None, NO_ADAPTER):
        checkpoint = AdapterCheckpoint(checkpoint, str(spec.adapter))
    if spec.checkpoint != "random":
        check_size(spec.size, checkpoint.config)
        config = checkpoint.model_config if spec.vision else checkpoint.model_config.without_vision()
        checkpoint.notices += check(checkpoint, config)
    return checkpoint


def _open(spec: ExportSpec) -> Checkpoint:
    from export.checkpoint.adapter_config import check_beside, is_adapter
    from export.checkpoint.folder import FolderCheckpoint
    from export.checkpoint.hub import open_hub
    from export.checkpoint.random import RandomCheckpoint

    if spec.checkpoint == "random":
        config = get_size(spec.size).config
        tiny = shipped_tiny() if spec.size == TINY else None
        if config is None and tiny is not None:
            config = FolderCheckpoint(tiny).config
        if config is None:
            raise CheckpointError(f"--size {spec.size}: no config to draw random weights for")
        return RandomCheckpoint(config, spec.seed, label=spec.size, sidecars=tiny)
    if spec.checkpoint is None and spec.size == TINY:
        return FolderCheckpoint(shipped_tiny(), {"kind": "path", "id": SHIPPED, "revision": None, "seed": None})
    if is_folder(spec.checkpoint):
        check_beside(Path(str(spec.checkpoint)), spec.adapter)
        found = FolderCheckpoint(str(spec.checkpoint))
    else:
        found = open_hub(spec.checkpoint or hub_id(spec.size, spec.base), spec.revision)
        check_beside(found.path, spec.adapter)
    if is_adapter(found.path):  # left out by the user's word, while transformers would apply it
        found.folder = None
    return found


def is_folder(checkpoint: str | None) -> bool:
    """Whether `--checkpoint` means a folder, there or not: all that is no hub id does."""
    return checkpoint not in (None, "random") and (Path(str(checkpoint)).exists() or not _is_hub_id(str(checkpoint)))


def _is_hub_id(text: str) -> bool:
    """"org/name" with no further slash and no leading dot, slash or tilde, or anything at ModelScope."""
    if text.startswith("modelscope:"):
        return True
    return text.count("/") == 1 and text[0] not in "./~" and not text.endswith("/")
