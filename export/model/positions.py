"""M-RoPE positions of a conversation, and the splice of image embeddings into token embeddings.

A `PositionCounter` is the host's side of the contract: text advances time, height and width together; an
image at p gives p to time, p + row to height, p + column to width, and the next text starts at
p + max(rows, columns). It equals transformers' `get_rope_index` (tested), but works chunk by chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from export.spec import ExportError


class PromptError(ExportError):
    """Tokens and images of a prompt do not fit together."""


@dataclass
class PositionCounter:
    """Next free position of one conversation."""

    next: int = 0

    def text(self, count: int) -> NDArray[np.int32]:
        """Positions [3, count] of `count` text tokens."""
        ids = np.arange(self.next, self.next + count, dtype=np.int32)
        self.next += count
        return np.tile(ids, (3, 1))

    def image(self, rows: int, columns: int) -> NDArray[np.int32]:
        """Positions [3, rows·columns] of an image whose merged grid is rows×columns."""
        row, column = np.divmod(np.arange(rows * columns, dtype=np.int32), columns)
        ids = np.stack([np.full(rows * columns, self.next), self.next + row, self.next + column])
        self.next += max(rows, columns)
        return ids.astype(np.int32)

    def prompt(
        self, ids: Sequence[int], image_token_id: int, grids: Sequence[tuple[int, int]]
    ) -> NDArray[np.int32]:
        """Positions [3, len(ids)] of a prompt with one merged grid (rows, columns) per run of image tokens.

        Raises:
            PromptError: number or length of the runs of image tokens does not match `grids`.
        """
        parts, place, images = [], 0, 0
        while place < len(ids):
            stop = place
            is_image = ids[place] == image_token_id
            while stop < len(ids) and (ids[stop] == image_token_id) == is_image:
                stop += 1
            if not is_image:
                parts.append(self.text(stop - place))
            else:
                while place < stop:
                    if images >= len(grids):
                        raise PromptError(
                            f"the prompt has image tokens for more than the {len(grids)} images given; "
                            "give one image per image placeholder"
                        )
                    rows, columns = grids[images]
                    if rows * columns > stop - place:
                        raise PromptError(
                            f"image {images} has {rows * columns} tokens but the prompt leaves "
                            f"{stop - place} places for it; repeat the image token {rows * columns} times"
                        )
                    parts.append(self.image(rows, columns))
                    place += rows * columns
                    images += 1
            place = stop
        if images != len(grids):
            raise PromptError(
                f"{len(grids)} images were given but the prompt has places for {images}; "
                "put one image placeholder per image"
            )
        return np.concatenate(parts, axis=1) if parts else np.zeros((3, 0), np.int32)


def splice(
    embeddings: NDArray[np.floating], ids: Sequence[int], image_token_id: int, images: Sequence[NDArray[np.floating]]
) -> NDArray[np.floating]:
    """Replace the rows [len(ids), D] of image tokens by the rows of the image embeddings, in order.

    Raises:
        PromptError: the images do not have exactly as many rows as the prompt has image tokens.
    """
    places = np.flatnonzero(np.asarray(ids) == image_token_id)
    rows = sum(len(image) for image in images)
    if rows != len(places):
        raise PromptError(
            f"{len(images)} images bring {rows} embedding rows but the prompt has {len(places)} image tokens; "
            "both must agree"
        )
    result = embeddings.copy()
    if rows:
        result[places] = np.concatenate(images).astype(embeddings.dtype)
    return result
