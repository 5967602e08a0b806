"""A checkpoint folder, as published or as a fine-tuning tool wrote it: config.json and safetensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from export.checkpoint.base import CheckpointError, equal_rows
from export.checkpoint.names import EMBEDDING, HEAD, canonical
from export.checkpoint.published import read_config, read_image_processor
from export.checkpoint.safetensors import Entry, check_dtype, read_rows, read_stored
from export.checkpoint.shards import find_tensors
from export.model.config import ModelConfig

_IDENTITY = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*/*.jinja", "README.md")


class FolderCheckpoint:
    """A folder with config.json and model.safetensors, or shards.

    Tensors go by their published names, whatever prefix the folder's tool gave them (`export.checkpoint.names`).
    `model_config` is tied as transformers ties: see `_tie`.

    Args:
        path: the folder.
        source: manifest `model.source`; by default kind path and the folder's own name, because a
            bundle must not carry the directory layout of the machine that made it.

    Raises:
        CheckpointError: absent or unreadable files, pickle-only weights, damaged or truncated shards, two tensors
            of one name, a head that cannot be the model's.
        ConfigError: config.json of another family, with unsupported features or with wrong values.
    """

    def __init__(self, path: Path | str, source: dict[str, Any] | None = None) -> None:
        self.path = Path(path)
        self.folder: Path | None = self.path
        self.notices: list[str] = []
        self.config: Mapping[str, Any] = read_config(self.path)
        self.preprocessor = read_image_processor(self.path)
        self.model_config = ModelConfig.from_dict(self.config, self.preprocessor)
        self.source: dict[str, Any] = source or {"kind": "path", "id": self.path.resolve().name}
        self._entries = _published(find_tensors(self.path))
        self._tie()
        if self.model_config.vision is not None and not any(n.startswith("model.visual.") for n in self._entries):
            self.model_config = self.model_config.without_vision()
            self.notices.append(
                "config.json describes a vision encoder but the weights hold none: the bundle will answer text only"
            )
        elif self.model_config.vision is None:
            self.notices.append("the checkpoint is a text decoder alone: the bundle will answer text only")

    def sidecar(self, name: str) -> Path | None:
        """Path of the file `name` in the folder, or None."""
        path = self.path / name
        return path if Path(name).name == name and path.is_file() else None

    def names(self) -> list[str]:
        """Published tensor names, sorted."""
        return sorted(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor; CheckpointError if it is missing or its dtype is not read."""
        return self._entry(name).shape

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows [start, stop) of a tensor as float32; see `Checkpoint.read`."""
        return read_rows(name, self._entry(name), start, stop)

    def content_key(self) -> str:
        """Names, sizes and modification times of every file that can reach the bundle."""
        files = {file for pattern in _IDENTITY for file in self.path.glob(pattern) if file.is_file()}
        stats = [(file.relative_to(self.path).as_posix(), file.stat()) for file in sorted(files)]
        return "folder:" + ";".join(f"{name}:{stat.st_size}:{stat.st_mtime_ns}" for name, stat in stats)

    def _entry(self, name: str) -> Entry:
        if name not in self._entries:
            raise CheckpointError(
                f"{self.path} has no tensor {name}; a Qwen3.5 checkpoint with this config.json must hold it: "
                "download the checkpoint again"
            )
        check_dtype(name, self._entries[name])
        return self._entries[name]

    def _tie(self) -> None:
        """Decide whether head and embedding are one, as transformers does (modeling_utils.tie_weights).

        A model that config.json ties is tied if either of the two is stored alone or both are equal; two that differ
        are both used. Where it does not tie, the head must be stored: `check` finds it missing.

        Raises:
            CheckpointError: a stored head of another shape than the embedding.
        """
        embedding, head = self._entries.get(EMBEDDING), self._entries.get(HEAD)
        text = self.model_config.text
        if head is not None and head.shape != (text.vocab_size, text.hidden_size):
            zero3 = " (DeepSpeed ZeRO-3 leaves such a placeholder)" if head.shape == (0,) else ""
            raise CheckpointError(
                f"{HEAD} has shape {list(head.shape)}{zero3}; config.json implies "
                f"{[text.vocab_size, text.hidden_size]}: save the "
                "model again after resizing its embeddings, with all weights gathered"
            )
        if not text.tie_word_embeddings or head is None:
            return
        if embedding is None:
            self._entries[EMBEDDING] = self._entries.pop(HEAD)
        elif embedding.shape != head.shape or not equal_rows(
            head.shape, partial(read_stored, EMBEDDING, embedding), partial(read_stored, HEAD, head)
        ):
            self.model_config = replace(self.model_config, text=replace(text, tie_word_embeddings=False))
            self.notices.append(
                f"config.json ties the head to the embedding, but {HEAD} is stored and differs from it: both are used, "
                "as transformers does"
            )


def _published(stored: Mapping[str, Entry]) -> dict[str, Entry]:
    """Entries by published name.

    Raises:
        CheckpointError: two stored names are one published name.
    """
    entries: dict[str, Entry] = {}
    spelled: dict[str, str] = {}
    for name, entry in stored.items():
        published = canonical(name)
        if published in entries:
            raise CheckpointError(
                f"the checkpoint holds {spelled[published]} and {name}, which are both {published}; keep one of them"
            )
        entries[published], spelled[published] = entry, name
    return entries
