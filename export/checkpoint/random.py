"""Random weights with the true shapes of a size, generated row block by row block, never stored.

A value depends on (seed, tensor name, row block) only, so any partition into reads gives the same
tensor. Values are rounded to bfloat16 and scaled like a trained checkpoint of this family.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from export.checkpoint.base import CheckpointError, block_rows, check_range
from export.checkpoint.names import expected
from export.model.config import ModelConfig


class RandomCheckpoint:
    """Random weights of one config.

    Args:
        config: a config.json; `export.sizes.SIZES[...].config` for the published sizes.
        seed: the same seed gives the same weights on every machine with the same torch.
        label: what the weights are called in the manifest and in `content_key`.
        sidecars: folder with tokenizer and processor files (the tiny checkpoint's), else none.

    Raises:
        ConfigError: the config is not of this family.
    """

    def __init__(
        self, config: Mapping[str, Any], seed: int = 0, label: str = "custom", sidecars: Path | None = None
    ) -> None:
        self.config = config
        self.seed = seed
        self.folder: Path | None = None
        self.notices: list[str] = []
        self.preprocessor: Mapping[str, Any] | None = None
        self.model_config = ModelConfig.from_dict(config, None)
        self.source: dict[str, Any] = {"kind": "random", "id": label, "revision": None, "seed": seed}
        self._label = label
        self._sidecars = sidecars
        self._shapes = expected(self.model_config)
        self._last: tuple[str, int, torch.Tensor] | None = None

    def sidecar(self, name: str) -> Path | None:
        """Path of a tokenizer or processor file, or None: random weights come without unless tiny."""
        if self._sidecars is None or Path(name).name != name:
            return None
        path = self._sidecars / name
        return path if path.is_file() else None

    def names(self) -> list[str]:
        """Published tensor names, sorted."""
        return sorted(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor; CheckpointError if the config implies no such tensor."""
        if name not in self._shapes:
            raise CheckpointError(
                f"the random checkpoint {self._label} has no tensor {name}; its config implies none of that name"
            )
        return self._shapes[name]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows [start, stop) of a tensor as float32; see `Checkpoint.read`."""
        shape = self.shape(name)
        start, stop = check_range(name, shape, start, stop)
        rows = block_rows(shape)
        first, last = start // rows, max(start, stop - 1) // rows
        if first == last:
            return self._block(name, shape, first)[start - first * rows : stop - first * rows].clone()
        out = torch.empty((stop - start, *shape[1:]))
        for block in range(first, last + 1):
            begin, end = max(start, block * rows), min(stop, (block + 1) * rows)
            values = self._block(name, shape, block)
            out[begin - start : end - start] = values[begin - block * rows : end - block * rows]
        return out

    def content_key(self) -> str:
        """What the values depend on: size, seed and number of layers."""
        return f"random:{self._label}:{self.seed}:{self.model_config.text.num_hidden_layers}"

    def _block(self, name: str, shape: tuple[int, ...], block: int) -> torch.Tensor:
        """Block number `block` of a tensor; the last one is kept, for readers of few rows at a time."""
        if self._last is not None and self._last[:2] == (name, block):
            return self._last[2]
        rows = block_rows(shape)
        begin, end = block * rows, min(shape[0], (block + 1) * rows)
        digest = hashlib.sha256(f"{self.seed}/{name}/{block}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
        values = _values(name, shape, torch.empty((end - begin, *shape[1:])), generator)
        # Published checkpoints are bfloat16; random ones must not be easier or harder to store.
        values = values.to(torch.bfloat16).to(torch.float32)
        self._last = (name, block, values)
        return values


def _values(
    name: str, shape: tuple[int, ...], out: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Fill `out`, rows of tensor `name`, at the scale a trained tensor of that name has."""

    def normal(std: float, mean: float = 0.0) -> torch.Tensor:
        return out.normal_(mean, std, generator=generator)

    kind = name.rsplit(".", 1)[-1]
    if kind == "A_log":  # decay rates A spread over (0, 16), as the architecture initialises them
        return out.uniform_(0.01, 16.0, generator=generator).log_()
    if kind == "dt_bias":  # inverse softplus of time steps log-uniform in 0.001 ... 0.1 (Mamba)
        dt = out.uniform_(math.log(1e-3), math.log(0.1), generator=generator).exp_()
        return dt + torch.log(-torch.expm1(-dt))
    if kind == "bias":
        return normal(0.02)
    if "norm" in name:
        # The family stores RMS norm weights minus one; DeltaNet's gated norm and vision's are plain.
        plain = name.endswith("linear_attn.norm.weight") or name.startswith("model.visual.")
        return normal(0.05, 1.0 if plain else 0.0)
    if "conv1d" in name:
        return normal(0.3)
    if "pos_embed" in name:
        return normal(0.02)
    # 1 / sqrt(K) keeps activations at order one at any width, where a fixed 0.02 would silence small ones.
    return normal(1.0 / math.sqrt(math.prod(shape[1:])))
