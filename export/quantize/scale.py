"""Residual streams times a power of two, so that float16 holds them: exact, and no norm sees it.

Layer norms and RMS norms divide by the size of what they read; only their eps knows it. So a model whose every
writer into a stream is multiplied by c, and the eps of every norm that reads the stream by c², answers the same. With
c = 2^-k nothing is rounded but what falls below float16's normal range, 6.1e-5, which is why c is 1 where it can be.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from export.checkpoint.weights import Weights
from export.model.config import ModelConfig
from export.spec import ExportError

COMFORTABLE = 4096.0
"""What a stream may reach on the samples that it is measured on, as float16 has it: a sixteenth of float16's end, for
a conversation that nobody tried and for what a layer writes to take an activation away again."""
WRITERS = {
    "text": re.compile(r"decoder\.layers\.\d+\.(mixer\.out|mlp\.down)\.weight"),
    "vision": re.compile(r"vision\.(patch\.(weight|bias)|position_weight|blocks\.\d+\.(out|down)\.(weight|bias))"),
}
"""Parameters that write into a stream. The text's other sources, embeddings and pictures, come from outside and are
multiplied in the graph, so that tables, image embeddings and a tied head stay what they are."""


class ScaleError(ExportError):
    """A stream cannot be scaled."""


@dataclass(frozen=True)
class StreamScale:
    """The factors c of both streams: powers of two, at most 1."""

    text: float = 1.0
    vision: float = 1.0

    def __post_init__(self) -> None:
        for name, factor in asdict(self).items():
            if not 0 < factor <= 1 or math.frexp(factor)[0] != 0.5:
                raise ScaleError(
                    f"the {name} stream cannot be scaled by {factor!r}; the factor must be a power of two, at most 1: "
                    "take the one that StreamScale.fitting finds"
                )

    @classmethod
    def fitting(cls, *, text: float, vision: float) -> StreamScale:
        """The largest factors with which streams of these largest magnitudes stay `COMFORTABLE`.

        Raises:
            ScaleError: a magnitude that is not a finite number.
        """
        return cls(_factor("text", text), _factor("vision", vision))

    @classmethod
    def parse(cls, entry: Mapping[str, Any]) -> StreamScale:
        """What `as_manifest` gave; a stream that is not named is not scaled.

        Raises:
            ScaleError: a factor that is no power of two.
        """
        return cls(**{name: float(entry[name]) for name in ("text", "vision") if name in entry})

    @property
    def changes(self) -> bool:
        """Whether anything is done at all."""
        return self != StreamScale()

    def as_manifest(self) -> dict[str, float]:
        return asdict(self)

    def of(self, parameter: str) -> float:
        """What a parameter of the model is multiplied by."""
        streams = [name for name, writers in WRITERS.items() if writers.fullmatch(parameter)]
        return float(getattr(self, streams[0])) if streams else 1.0

    def config(self, config: ModelConfig) -> ModelConfig:
        """The config of the model with scaled streams, from which its modules are built and traced."""
        vision = None if config.vision is None else replace(config.vision, stream_scale=self.vision)
        return replace(config, text=replace(config.text, stream_scale=self.text), vision=vision)


def _factor(stream: str, largest: float) -> float:
    if not math.isfinite(largest):
        raise ScaleError(
            f"the {stream} stream reaches {largest} in float32; it must be finite: repair the checkpoint"
        )
    return 2.0 ** min(0, math.floor(math.log2(COMFORTABLE / largest))) if largest > 0 else 1.0


class ScaledWeights(Weights):
    """Other weights, published or conditioned, with the writers of the streams multiplied.

    Args:
        weights: whose streams are not scaled yet.
    """

    def __init__(self, weights: Weights, scale: StreamScale) -> None:
        super().__init__(weights.checkpoint, scale.config(weights.config))
        self._weights = weights
        self.scale = scale

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        rows, factor = self._weights.rows(name, start, stop), self.scale.of(name)
        return rows if factor == 1.0 else rows * factor

    def to_stream(self, rows: Tensor) -> Tensor:
        """The factor of the text is in the graph, behind the embeddings."""
        return self._weights.to_stream(rows)


def scaled(weights: Weights, scale: StreamScale) -> Weights:
    """The weights as they are where nothing is scaled."""
    return ScaledWeights(weights, scale) if scale.changes else weights
