"""The fixed, seeded sequence every rung runs: text, a picture, text, a second picture, text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.model.config import ModelConfig
from export.model.positions import PositionCounter

LEAST_TEXT = 9
"""Tokens of text before, between and after the pictures."""


@dataclass(frozen=True)
class Probe:
    """Token ids (image tokens expanded), their positions [3, T], pictures [3, H, W] in 0…1."""

    ids: list[int]
    positions: NDArray[np.int32]
    images: list[NDArray[np.float32]]

    def next(self, place: int) -> int | None:
        """The token behind a place; None behind the last."""
        return self.ids[place + 1] if place + 1 < len(self.ids) else None

    def before_text(self, config: ModelConfig, place: int) -> bool:
        """Whether what follows is text: no model is asked what follows within a picture."""
        return self.next(place) not in picture_tokens(config)


def picture_tokens(config: ModelConfig) -> set[int]:
    """Ids that are no text: a picture's own, and those before and behind it."""
    return {config.image_token_id, config.vision_start_token_id, config.vision_end_token_id}


def make_probe(
    config: ModelConfig,
    tokens: int,
    image_sizes: tuple[tuple[int, int], ...],
    seed: int = 0,
    text: list[int] | None = None,
) -> Probe:
    """A sequence of exactly `tokens` tokens. `text` supplies its words (repeated); else seeded random ids.

    Two pictures are used where they fit beside at least `LEAST_TEXT` tokens of text, else one or none: one in
    the first third, a second one later, so that a mistake in what an image leaves behind shows in the text
    after it.
    """
    random = np.random.default_rng(seed)
    special = picture_tokens(config)
    if text:
        words = [text[i % len(text)] for i in range(tokens)]
    else:
        allowed = [i for i in range(min(config.text.vocab_size, 2**16)) if i not in special]
        words = [int(i) for i in random.choice(allowed, tokens)]
    side = config.vision.pixels_per_token if config.vision is not None else 1
    grids = [(h // side, w // side) for h, w in chosen(config, tokens, image_sizes)]
    plain = tokens - sum(rows * columns + 2 for rows, columns in grids)
    ids: list[int] = []
    images: list[NDArray[np.float32]] = []
    for turn, (rows, columns) in enumerate(grids):
        lead = max(3, plain // 6 if turn == 0 else plain // 4)
        ids += words[len(ids) : len(ids) + lead]
        pads = [config.image_token_id] * (rows * columns)
        ids += [config.vision_start_token_id, *pads, config.vision_end_token_id]
        images.append(picture(random, rows * side, columns * side))
    ids += words[len(ids) : tokens]
    positions = PositionCounter().prompt(ids, config.image_token_id, grids)
    return Probe(ids, positions, images)


def chosen(
    config: ModelConfig, tokens: int, image_sizes: tuple[tuple[int, int], ...]
) -> list[tuple[int, int]]:
    """The pictures of a probe of that length: up to two, the first two sizes, as far as they fit."""
    if config.vision is None:
        return []
    sizes: list[tuple[int, int]] = []
    free = tokens - LEAST_TEXT
    for height, width in (list(image_sizes) * 2)[:2]:
        free -= image_tokens(config, height, width) + 2
        if free < 0:
            break
        sizes.append((height, width))
    return sizes


def image_tokens(config: ModelConfig, height: int, width: int) -> int:
    """Tokens a picture of that many pixels takes."""
    side = config.vision.pixels_per_token if config.vision is not None else 1
    return (height // side) * (width // side)


def picture(random: Any, height: int, width: int) -> NDArray[np.float32]:
    """Smooth colours with edges: closer to a photograph than noise, and different in every patch.

    Values [3, H, W] in 0…1 are multiples of 1/255, which transformers' image processor takes as bytes unrounded.
    """
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    waves = [
        0.5 + 0.5 * np.sin(x * random.uniform(0.02, 0.3) + y * random.uniform(0.02, 0.3) + c) for c in range(3)
    ]
    picture = np.stack(waves)
    top, left = int(random.integers(height // 2)), int(random.integers(width // 2))
    picture[:, top : top + height // 3, left : left + width // 3] = random.uniform(0, 1, (3, 1, 1))
    return np.asarray(np.rint(picture * 255) / 255, np.float32)
