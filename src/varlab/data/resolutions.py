"""Sizes of images in pixels: the side of a square, or (height, width)."""

import math
from collections.abc import Sequence
from typing import Any

Resolution = int | Sequence[int]


def height_and_width(resolution: Any, name: str = "resolution") -> tuple[int, int]:
    """(height, width) in pixels: of a square given its side, or of a pair. Raises ValueError for anything else, with
    the `name` of the setting."""
    pair = tuple(resolution) if isinstance(resolution, Sequence) else (resolution, resolution)
    if len(pair) != 2 or not all(isinstance(side, int) and side >= 1 for side in pair):
        raise ValueError(f"{name}={resolution}: give the side of a square, or [height, width], in pixels")
    return pair


def different_shapes(given: Any) -> list[tuple[int, int]]:
    """The setting `shapes`, a list of pairs. Raises ValueError for anything else, and for two shapes of one aspect ratio."""
    if not isinstance(given, list) or not all(isinstance(shape, list) for shape in given):
        raise ValueError(f"shapes={given}: give a list of [height, width], in pixels")
    shapes = [height_and_width(shape, "shapes") for shape in given]
    if len({height / width for height, width in shapes}) < len(shapes):
        raise ValueError(f"shapes={given}: each image goes to the nearest aspect ratio, so give each aspect ratio once")
    return shapes


def resolution_of(size: tuple[int, int]) -> int | list[int]:
    """The shortest form of a size: the side of a square, or [height, width]."""
    return size[0] if size[0] == size[1] else list(size)


def nearest_shape(size: tuple[int, int], shapes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The (height, width) whose aspect ratio is nearest to that of a `size`, so that the least is cropped."""
    return min(shapes, key=lambda shape: abs(math.log(shape[0] / shape[1]) - math.log(size[0] / size[1])))
