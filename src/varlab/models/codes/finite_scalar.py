"""Finite scalar quantization (FSQ, Mentzer et al. 2023, arXiv 2309.15505): each dim is rounded to one of a few levels."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from varlab.models import scales
from varlab.models.codes.lengths import LengthByScaleQuantizer
from varlab.models.digits import MOST_CODES


class FiniteScalarQuantizer(LengthByScaleQuantizer):
    """`levels`: of each dim; tokens are the numbers with these digits. The levels lie evenly from -1 to 1 times
    `length`_k, learned for each scale. Each dim is rounded to the nearest level instead of being bounded by tanh first as in the
    paper, because a residual must find the code that is nearest. Needs neither a table nor a regularizer."""

    base: Tensor
    steps: Tensor

    def __init__(self, patch_nums: scales.PatchNums, levels: Sequence[int] = (8, 8, 8, 8), **residual: Any) -> None:
        """`residual`: arguments of `ResidualQuantizer`. Raises ValueError for fewer than 2 levels, or too many codes."""
        levels = [int(level) for level in levels]
        if not levels or min(levels) < 2 or math.prod(levels) > MOST_CODES:
            raise ValueError(f"levels={levels}: give 2 or more for each dim, at most {MOST_CODES} codes in all")
        super().__init__(
            patch_nums, codebook_size=math.prod(levels), codebook_dim=len(levels), bases=levels, **residual
        )
        self.levels = levels
        self.register_buffer(
            "base", torch.tensor([math.prod(levels[:i]) for i in range(len(levels))]), persistent=False
        )
        self.register_buffer("steps", torch.tensor(levels) - 1, persistent=False)

    def nearest(self, z: Float[Tensor, "B l C"], k: int) -> Int[Tensor, "B l"]:
        with torch.autocast(z.device.type, enabled=False):
            place = (z.float() / self.length(k) + 1) / 2 * self.steps
            return (place.round().clamp(min=0).minimum(self.steps).long() * self.base).sum(dim=-1)

    def embed(self, tokens: Int[Tensor, "*rows"], k: int) -> Float[Tensor, "*rows C"]:
        digits = tokens[..., None] // self.base % (self.steps + 1)
        return (2 * digits / self.steps - 1) * self.length(k)
