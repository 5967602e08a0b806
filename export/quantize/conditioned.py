"""Weights that answer the same in float32 and lose less when rounded: norms folded, MLPs equalised, stream rotated.

Rows are made as they are asked for, the same ones whatever block they are asked in: sums run in a fixed order, other
steps are elementwise. At most one matrix is in memory, a writer's of a rotated stream, whose every row needs all rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from export.checkpoint.base import Checkpoint
from export.checkpoint.weights import HEAD_BASIS, Weights
from export.model.config import FULL, ModelConfig
from export.quantize import rotation
from export.quantize.conditioning import Conditioning

SPAN = 1 << 20
"""Elements read at a time where a whole parameter is looked at, 4 MiB of float32."""
LARGEST_SHIFT = 40
"""Channels are scaled by at most 2^40: far more than any checkpoint needs, far from float32's limits."""


@dataclass(frozen=True)
class Treatment:
    """What becomes of one parameter; the steps are in the order of the fields."""

    constant: float | None = None
    """All entries are this: the parameter was folded into others."""
    factor: str | None = None
    """Parameter whose entries multiply the columns, over and over where there are more columns."""
    shift: tuple[str, str] | None = None
    """(matrix, vector): the product of the matrix as published with the repeated vector is added, for a bias."""
    equalise: tuple[str, int] | None = None
    """("rows" are multiplied or "columns" divided, layer): by the factors of the layer's MLP."""
    turn: str | None = None
    """"reads": columns times Q, "writes": Qᵀ from the left."""


def weights_for(checkpoint: Checkpoint, config: ModelConfig, conditioning: Conditioning) -> Weights:
    """The weights of a bundle: as published, or conditioned. `weights.config` is the config of the bundle's model."""
    return ConditionedWeights(checkpoint, config, conditioning) if conditioning.changes else Weights(checkpoint, config)


class ConditionedWeights(Weights):
    """`Weights` with conditioning applied; rows are float32."""

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig, conditioning: Conditioning) -> None:
        text = config.text
        if conditioning.rotate:
            rotation.factors(text.hidden_size)  # before any weight is read
            config = replace(config, text=replace(text, head_basis=text.tie_word_embeddings))
        super().__init__(checkpoint, config)
        self.conditioning = conditioning
        self.treatments = treatments(config, conditioning)
        self._scales: dict[int, Tensor] = {}
        self._written: tuple[str, Tensor] | None = None

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        if name == HEAD_BASIS:
            return self._head_basis[start:stop].clone()
        treatment = self.treatments.get(name)
        if treatment is None:
            return super().rows(name, start, stop)
        if treatment.turn == "writes":
            return self._whole_writer(name)[start:stop].clone()
        rows = self._unturned(name, treatment, start, stop)
        return rotation.turn(rows) if treatment.turn == "reads" else rows

    def to_stream(self, rows: Tensor) -> Tensor:
        return rotation.turn(rows) if self.conditioning.rotate else rows

    def _published(self, name: str) -> Tensor:
        """A whole parameter as it was before."""
        return super().rows(name, 0, self.parameters[name].shape[0])

    def _unturned(self, name: str, treatment: Treatment, start: int, stop: int) -> Tensor:
        """Rows before rotation."""
        if treatment.constant is not None:
            return torch.full((stop - start, *self.parameters[name].shape[1:]), treatment.constant)
        rows = super().rows(name, start, stop)
        if treatment.factor is not None:
            factor = self._published(treatment.factor)
            rows = rows * factor.repeat(rows.shape[1] // len(factor))
        if treatment.shift is not None:
            rows = rows.double() + self._product(*treatment.shift, start, stop)
            rows = rows.float()
        if treatment.equalise is not None:
            side, layer = treatment.equalise
            scale = self._mlp_scales(layer)
            rows = rows * scale[start:stop, None] if side == "rows" else rows / scale
        return rows

    def _product(self, matrix: str, vector: str, start: int, stop: int) -> Tensor:
        """Rows of published matrix · vector as float64 [rows], summed in halves: the same on every machine."""
        x = self._published(vector).double()
        rows = super().rows(matrix, start, stop).double()
        return _sum(rows * x.repeat(rows.shape[1] // len(x)))

    def _mlp_scales(self, layer: int) -> Tensor:
        """Powers of two [F] that make the root mean square of each row of `up`, its norm folded, that of the column of
        `down` it meets. Both are taken before rotation, which would not change them.
        """
        if layer not in self._scales:
            up, down = (f"decoder.layers.{layer}.mlp.{name}.weight" for name in ("up", "down"))
            folded = replace(self.treatments[up], equalise=None)
            rows = [self._unturned(up, folded, *span).double().square_().sum(1) for span in self._spans(up)]
            squares = torch.zeros(self.parameters[down].shape[1], dtype=torch.float64)
            for span in self._spans(down):
                squares += super().rows(down, *span).double().square_().sum(0)
            self._scales[layer] = balance(squares, torch.cat(rows))
        return self._scales[layer]

    def _spans(self, name: str) -> Iterator[tuple[int, int]]:
        """Blocks of rows that cover a parameter."""
        shape = self.parameters[name].shape
        step = max(1, SPAN // math.prod(shape[1:]))
        for start in range(0, shape[0], step):
            yield start, min(start + step, shape[0])

    def _whole_writer(self, name: str) -> Tensor:
        """A parameter [D, …] whose rows write into the rotated stream; the last one asked for stays in memory."""
        if self._written is None or self._written[0] != name:
            self._written = None  # first, so that two are never there at once
            shape = self.parameters[name].shape
            whole = torch.empty(shape)
            for start, stop in self._spans(name):
                whole[start:stop] = self._unturned(name, self.treatments[name], start, stop)
            rotation.turn_outputs(whole.view(shape[0], -1))
            self._written = name, whole
        return self._written[1]

    @cached_property
    def _head_basis(self) -> Tensor:
        """Qᵀ · diag(factors of the last norm) · Q, symmetric: turns normed rows back, multiplies, and turns again."""
        matrix = rotation.turn(torch.diag(self._published("decoder.norm.weight").double()))
        rotation.turn_outputs(matrix)
        return matrix.float()


def treatments(config: ModelConfig, conditioning: Conditioning) -> dict[str, Treatment]:
    """What is done to each parameter that is not left alone."""
    found: dict[str, Treatment] = {}

    def add(name: str, **steps: object) -> None:
        found[name] = replace(found.get(name, Treatment()), **steps)  # type: ignore[arg-type]

    text, last = config.text, "decoder.norm.weight"
    reads, writes = ("reads", "writes") if conditioning.rotate else (None, None)
    for index, kind in enumerate(text.layer_types):
        layer = f"decoder.layers.{index}"
        mixer = ("q", "k", "v", "gate") if kind == FULL else ("qkv", "z", "a", "b")
        for norm, readers in (
            (f"{layer}.input_norm.weight", [f"{layer}.mixer.{name}.weight" for name in mixer]),
            (f"{layer}.post_norm.weight", [f"{layer}.mlp.{name}.weight" for name in ("gate", "up")]),
        ):
            if conditioning.fold:
                add(norm, constant=1.0)
            for reader in readers:
                add(reader, factor=norm if conditioning.fold else None, turn=reads)
        out, down = f"{layer}.mixer.out.weight", f"{layer}.mlp.down.weight"
        if conditioning.fold and kind != FULL:
            add(f"{layer}.mixer.norm_weight", constant=1.0)
            add(out, factor=f"{layer}.mixer.norm_weight")
        add(out, turn=writes)
        add(down, turn=writes)
        if conditioning.equalise:
            add(f"{layer}.mlp.up.weight", equalise=("rows", index))
            add(down, equalise=("columns", index))
    if conditioning.rotate:
        add("embedding.weight", turn="reads")
        add("decoder.head.weight", turn="reads")
    if conditioning.fold and (text.head_basis or not text.tie_word_embeddings):
        add(last, constant=1.0)
    if conditioning.fold and not text.tie_word_embeddings:
        add("decoder.head.weight", factor=last)
    if config.vision is not None:
        if conditioning.fold:
            blocks = [f"vision.blocks.{i}" for i in range(config.vision.depth)]
            pairs = [(f"{b}.norm1", f"{b}.qkv") for b in blocks] + [(f"{b}.norm2", f"{b}.up") for b in blocks]
            for norm, reader in [*pairs, ("vision.merger_norm", "vision.merger_up")]:
                add(f"{norm}.weight", constant=1.0)
                add(f"{norm}.bias", constant=0.0)
                add(f"{reader}.weight", factor=f"{norm}.weight")
                add(f"{reader}.bias", shift=(f"{reader}.weight", f"{norm}.bias"))
        for part in ("weight", "bias"):
            add(f"vision.merger_down.{part}", turn=writes)
    return {name: steps for name, steps in found.items() if steps != Treatment()}


def balance(wanted: Tensor, found: Tensor) -> Tensor:
    """float32 [n], from sums of squares: powers of two near sqrt(rms wanted / rms found), so that multiplying one side
    and dividing the other makes both alike; 1 where either is 0. Their median is 1: only channels that differ from the
    others matter, and activations keep their size. Exact, without a logarithm that rounds as a machine likes.
    """
    alive = (wanted > 0) & (found > 0)
    # A ratio r is in [2^(e-1), 2^e); 2^k is nearest to its fourth root for 2^(4k-2) <= r < 2^(4k+2).
    exponents = torch.frexp(wanted[alive] / found[alive]).exponent
    steps = torch.div(exponents + 1, 4, rounding_mode="floor")
    if len(steps):
        steps = (steps - steps.median()).clamp(-LARGEST_SHIFT, LARGEST_SHIFT)
    result = torch.ones(len(wanted))
    result[alive] = torch.ldexp(torch.ones(len(steps)), steps)
    return result


def _sum(x: Tensor) -> Tensor:
    """Sums over the last axis of [r, n], halving it again and again: the same order on every machine."""
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        rest = x[..., 2 * half :]
        x = x[..., :half] + x[..., half : 2 * half]
        if rest.shape[-1]:
            x = torch.cat([x, rest], dim=-1)
    return x[..., 0]
