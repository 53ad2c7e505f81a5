"""Sizes of images in pixels: the side of a square, or (height, width)."""

import math
from collections.abc import Sequence

Resolution = int | Sequence[int]


def height_and_width(resolution: Resolution, name: str = "resolution") -> tuple[int, int]:
    """(height, width) in pixels: of a square given its side, or of a pair. Raises ValueError for anything else, with
    the `name` of the setting."""
    pair = (resolution, resolution) if isinstance(resolution, int) else tuple(resolution)
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(f"{name}={resolution}: give the side of a square, or [height, width], in pixels")
    return pair


def resolution_of(size: tuple[int, int]) -> int | list[int]:
    """The shortest form of a size: the side of a square, or [height, width]."""
    return size[0] if size[0] == size[1] else list(size)


def nearest_shape(size: tuple[int, int], shapes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The (height, width) whose aspect ratio is nearest to that of a `size`, so that the least is cropped."""
    return min(shapes, key=lambda shape: abs(math.log(shape[0] / shape[1]) - math.log(size[0] / size[1])))
