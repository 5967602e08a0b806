"""Pictures for a bundle: choose one of its image sizes, stretch the picture to it, 0…1 floats."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from export.spec import UsageError


def load(path: str | Path) -> NDArray[np.float32]:
    """Read a picture file as [H, W, 3] floats in 0…1.

    Raises:
        UsageError: the file is no picture, damaged, or has more pixels than are safe to unpack.
    """
    try:
        with warnings.catch_warnings():
            # PIL warns from this size on and refuses twice of it: no phone takes a larger picture.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as picture:
                return np.asarray(picture.convert("RGB"), np.float32) / 255.0
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UsageError(
            f"picture {path} is too large: more than {Image.MAX_IMAGE_PIXELS} pixels may be an attack on memory; "
            "scale it down"
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # each of PIL's decoders has its own kinds for damaged files
        raise UsageError(f"cannot read picture {path}: {error}; give a PNG or JPEG file") from error


def nearest_size(height: int, width: int, sizes: Sequence[Sequence[int]]) -> tuple[int, int]:
    """The (H, W) of a bundle nearest in aspect ratio; among equals, the nearest in area."""

    def distance(size: Sequence[int]) -> tuple[float, float]:
        ratio = abs(math.log((size[1] / size[0]) / (width / height)))
        area = abs(math.log(size[0] * size[1] / (height * width)))
        return round(ratio, 9), area

    best = min(sizes, key=distance)
    return best[0], best[1]


def stretch(picture: NDArray[Any], size: tuple[int, int]) -> NDArray[np.float32]:
    """[H, W, 3] in 0…1 -> [3, h, w] in 0…1, bicubic with antialias and no letterbox."""
    height, width = size
    if picture.shape[:2] == size:
        planes = [picture[..., c].astype(np.float32) for c in range(3)]
    else:
        planes = [
            np.asarray(
                Image.fromarray(picture[..., c].astype(np.float32)).resize((width, height), Image.Resampling.BICUBIC)
            )
            for c in range(3)
        ]
    return np.clip(np.stack(planes), 0.0, 1.0).astype(np.float32)
