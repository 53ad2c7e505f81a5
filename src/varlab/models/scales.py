"""Arithmetic of the token pyramid: how many tokens a scale has, where it starts, which scale a token belongs to.

`patch_nums` is the list of side lengths of the token maps, coarse to fine (VAR, section 3). An entry is an int for a
square map or a pair (h, w).
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Literal

PatchNums = Sequence[int | Sequence[int]]
Order = Literal["scales", "raster"]
RELEASED_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
RELEASED_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)


def plain(patch_nums: PatchNums) -> list[int | list[int]]:
    """patch_nums as lists, the form stored in manifests and checkpoints."""
    return [pn if isinstance(pn, int) else list(pn) for pn in patch_nums]


def sides(patch_nums: PatchNums) -> list[tuple[int, int]]:
    """(h, w) of each scale, coarse to fine. Raises ValueError for an empty, non-positive or shrinking pyramid."""
    pairs = [(pn, pn) if isinstance(pn, int) else (int(pn[0]), int(pn[1])) for pn in patch_nums]
    if not pairs:
        raise ValueError("patch_nums is empty: give at least one side, for example [1, 2, 3, 4]")
    for (h, w), (next_h, next_w) in zip([(1, 1), *pairs], pairs, strict=False):
        if next_h < h or next_w < w:
            raise ValueError(
                f"patch_nums {list(patch_nums)}: sides must be positive and must not shrink from coarse to fine"
            )
    return pairs


def fitted(patch_nums: PatchNums, size: tuple[int, int]) -> list[int | list[int]]:
    """The pyramid with a finest map of `size` (h, w), whose other scales have the same shares of it; the coarsest one stays."""
    pairs = sides(patch_nums)
    (least_h, least_w), (height, width) = pairs[0], pairs[-1]
    inner = [
        (max(least_h, round(h * size[0] / height)), max(least_w, round(w * size[1] / width))) for h, w in pairs[1:-1]
    ]
    fitting = [*pairs[: len(pairs) > 1], *inner, size]
    sides(fitting)
    return [h if h == w else [h, w] for h, w in fitting]


def lengths(patch_nums: PatchNums) -> list[int]:
    """Tokens of each scale, l_k = h_k * w_k."""
    return [h * w for h, w in sides(patch_nums)]


def num_tokens(patch_nums: PatchNums) -> int:
    """Tokens of all scales, L."""
    return sum(lengths(patch_nums))


def scale_bounds(patch_nums: PatchNums) -> list[tuple[int, int]]:
    """(first, one past the last) position of each scale in the flattened sequence."""
    ends = list(accumulate(lengths(patch_nums)))
    return list(zip([0, *ends], ends, strict=False))


def step_bounds(patch_nums: PatchNums, order: Order) -> list[tuple[int, int]]:
    """(first, one past the last) position of each prediction step: a scale (order `scales`) or, for next-token
    prediction of the same sequence, one token (`raster`)."""
    return scale_bounds(patch_nums) if order == "scales" else [(i, i + 1) for i in range(num_tokens(patch_nums))]


def scale_of_token(patch_nums: PatchNums) -> list[int]:
    """Index of the scale that each of the L tokens belongs to."""
    return [k for k, length in enumerate(lengths(patch_nums)) for _ in range(length)]


def progress(k: int, num_scales: int) -> float:
    """t = k / (K - 1), the position of scale k between 0 (coarsest) and 1 (finest); 0 if there is only one scale."""
    return k / (num_scales - 1) if num_scales > 1 else 0.0
