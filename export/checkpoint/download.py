"""What is asked before a checkpoint is downloaded, whatever hub it lies on: which files, are they weights
that can be read, and is there room for them. Every refusal comes before the first byte of a weight.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from export.checkpoint.base import CheckpointError

PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.txt", "README.md", "LICENSE*"]
"""Never pickles, never code."""
IGNORED = [f"*/{pattern}" for pattern in PATTERNS if pattern != "*.jinja"]
"""Folders hold intermediate checkpoints and other formats; only named chat templates lie in one."""
MARGIN_BYTES = 256 << 20
"""What must stay free beside a download: the disk serves others too, and caches keep books of their own."""
_CONVERTED = "take the checkpoint that it was converted from"
_PICKLED = "convert it with save_pretrained(safe_serialization=True)"
OTHER_FORMATS: Mapping[str, tuple[str, str]] = {
    ".gguf": ("GGUF", _CONVERTED),
    ".npz": ("MLX arrays", _CONVERTED),
    ".bin": ("pickle", _PICKLED),
    ".pt": ("pickle", _PICKLED),
    ".pth": ("pickle", _PICKLED),
    ".ckpt": ("pickle", _PICKLED),
    ".onnx": ("ONNX", _CONVERTED),
    ".safetensors": ("safetensors in a folder of its own", "download that folder and give it with --checkpoint PATH"),
}
"""Suffix to name and remedy; the first that is found is named."""


def wanted(names: Iterable[str]) -> list[str]:
    """The files of a repository that are fetched, filtered as huggingface_hub filters."""
    from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]

    return list(filter_repo_objects(names, allow_patterns=PATTERNS, ignore_patterns=IGNORED))


def check_files(name: str, names: Iterable[str]) -> None:
    """Refuse a repository without config.json or without safetensors, saying what it holds instead.

    Raises:
        CheckpointError: naming repository, format and remedy.
    """
    every = sorted(names)
    for file in every:
        if file.startswith("/") or "\\" in file or ".." in file.split("/"):
            raise CheckpointError(f"{name} lists the file {file!r}, which lies outside the repository; do not use it")
    fetched = wanted(every)
    if any(file.endswith(".safetensors") for file in fetched):
        if "config.json" not in fetched and "adapter_config.json" in fetched:
            raise CheckpointError(
                f"{name} is an adapter, not a checkpoint; download it into a folder and give that with --adapter, and "
                "the base that it was trained on with --checkpoint"
            )
        if "config.json" not in fetched:
            raise CheckpointError(f"{name} has no config.json; give the repository of a complete Qwen3.5 checkpoint")
        return
    for suffix, (label, remedy) in OTHER_FORMATS.items():
        found = [file for file in every if PurePosixPath(file).suffix == suffix]
        if found:
            others = f" and {len(found) - 1} more" if len(found) > 1 else ""
            raise CheckpointError(
                f"{name} holds its weights as {label} ({found[0]}{others}); only safetensors beside config.json "
                f"are read: {remedy}"
            )
    raise CheckpointError(f"{name} holds no weights ({len(every)} files); give the repository of a Qwen3.5 checkpoint")


def check_unquantised(name: str, config: Mapping[str, Any]) -> None:
    """Refuse weights that their config.json says are quantised already: MLX, GPTQ, AWQ, FP8, ...

    Raises:
        CheckpointError: naming repository and method.
    """
    # MLX writes its settings under both keys, the second without a method.
    settings = config.get("quantization") or config.get("quantization_config")
    if settings:
        method = settings.get("quant_method", "mlx") if isinstance(settings, Mapping) else settings
        raise CheckpointError(
            f"{name} holds weights quantised already (config.json: {method}); an export quantises by itself and "
            "reads float weights: take the checkpoint that it was made from"
        )


def check_room(name: str, needed_bytes: int, folder: Path, remedy: str) -> None:
    """Refuse a download of `needed_bytes` that leaves less than MARGIN_BYTES on the disk of `folder`.

    Raises:
        CheckpointError: what is needed, what is free, where, and the remedy.
    """
    folder = folder.expanduser().absolute()
    disk = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(disk).free
    if needed_bytes and needed_bytes + MARGIN_BYTES > free:
        raise CheckpointError(
            f"cannot download {name}: {needed_bytes / 1e9:.2f} GB are missing and {MARGIN_BYTES / 1e9:.2f} GB must "
            f"stay free, but {folder} has {free / 1e9:.2f} GB; free some, or {remedy}"
        )
