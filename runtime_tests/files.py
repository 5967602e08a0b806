"""A checkpoint without its weights, for tests of the files beside them, and the published chat templates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from export.checkpoint.base import read_json
from export.model.config import ModelConfig

PUBLISHED = ("chat_template_0.8b_2b.jinja", "chat_template_4b_9b.jinja")


def published_template(name: str) -> str:
    """One of PUBLISHED. They lie beside the project, not in it; a test without them is skipped."""
    path = Path(__file__).parents[2] / "shared" / "data" / name
    if not path.exists():
        pytest.skip(f"{name} is not beside the project (../shared/data)")
    return path.read_text(encoding="utf-8")


class Files:
    """The part of a checkpoint that this is about: its config and the files beside the weights."""

    def __init__(self, folder: Path) -> None:
        self.folder: Path | None = folder
        self.notices: list[str] = []
        self.source = {"kind": "path", "id": folder.name}
        self.config = read_json(folder / "config.json")
        self.preprocessor: dict[str, Any] | None = None
        self.model_config = ModelConfig.from_dict(self.config)

    def sidecar(self, name: str) -> Path | None:
        path = Path(str(self.folder)) / name
        return path if path.is_file() else None

    def names(self) -> list[str]:
        return []

    def shape(self, name: str) -> tuple[int, ...]:
        raise NotImplementedError

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Any:
        raise NotImplementedError

    def content_key(self) -> str:
        return ""
