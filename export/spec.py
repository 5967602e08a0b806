"""What to export, and the errors that stop an export with a message for the user."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any


class ExportError(Exception):
    """Anything that stops an export; the message says what, the value, the rule and the remedy."""

    exit_code = 1


class UsageError(ExportError):
    """An option has a value that cannot be honoured."""

    exit_code = 2


class GateError(ExportError):
    """The bundle was written but a check of the ladder failed."""

    exit_code = 3


DEFAULT_RECIPE = "int4-mlp"
"""The smallest of the shipped recipes that published evidence calls safe without calibration (docs/decisions/016)."""


@dataclass(frozen=True)
class ExportSpec:
    """Everything an export depends on. Two equal specs give the same bundle, byte for byte."""

    target: str
    size: str
    base: bool = False
    checkpoint: str | None = None
    """None: the size's hub id, or the shipped tiny; else "random", a folder or a hub id."""
    revision: str | None = None
    adapter: str | None = None
    """Folder of a PEFT adapter to merge; "none" leaves one out that lies beside the weights."""
    seed: int = 0
    recipe: str = DEFAULT_RECIPE
    group_size: int | None = None
    context_length: int = 1024
    prefill_lengths: tuple[int, ...] = (64, 512)
    image_sizes: tuple[tuple[int, int], ...] = ((448, 448),)
    """Height × width in pixels."""
    vision: bool = True
    num_layers: int | None = None
    max_file_layers: int | None = None
    max_file_bytes: int | None = None
    """Limits of one decoder file: layers, and bytes of weights."""
    max_head_columns: int | None = None
    """Limit of one piece of the head, in vocabulary entries; None: the target's own."""
    text_runner: bool = False
    """Also serve the runtime's own runner of text models."""
    profile: str | None = None
    """Compute unit to build for; None: the target's default."""
    state_layout: str | None = None
    """How states are kept; None: the profile's default."""
    palettes: bool = False
    """4-bit codes as indices into a palette."""
    output: Path = Path("bundle")
    overwrite: bool = False
    resume: bool = False
    skip_validation: bool = False
    threads: int = 2

    @property
    def name(self) -> str:
        """What the bundle is called: qwen3.5-2b-onnx-int4, with -base, profile and group size where they apply."""
        recipe = Path(self.recipe).stem if self.recipe.endswith(".toml") else self.recipe
        base = "-base" if self.base else ""
        group = f"-g{self.group_size}" if self.group_size else ""
        profile = f"-{self.profile}" if self.profile else ""
        name = f"qwen3.5-{self.size}{base}-{self.target}{profile}-{recipe}{group}".lower()
        return re.sub(r"[^a-z0-9._-]+", "-", name)

    def at(self, output: Path) -> ExportSpec:
        """The same spec with another output folder."""
        return replace(self, output=output)

    def build_key(self) -> dict[str, Any]:
        """The fields that decide the bundle's bytes, for `--resume`."""
        fields = asdict(self)
        for name in ("output", "overwrite", "resume", "threads", "skip_validation"):
            del fields[name]
        return fields
