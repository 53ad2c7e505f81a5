"""Positions of tokens from their coordinates, so that they have a meaning on maps of any shape."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from varlab.models import scales


def coordinates(patch_nums: scales.PatchNums) -> Float[Tensor, "L 2"]:
    """(y, x) of the center of each token, from the center of the image, in units of the root of the image's area: the same distance
    means the same number of pixels in images of all shapes of that area."""
    found = []
    height, width = scales.sides(patch_nums)[-1]
    for h, w in scales.sides(patch_nums):
        y = ((torch.arange(h) + 0.5) / h - 0.5) * math.sqrt(height / width)
        x = ((torch.arange(w) + 0.5) / w - 0.5) * math.sqrt(width / height)
        found.append(torch.cartesian_prod(y, x))
    return torch.cat(found)


def num_waves(pyramids: Sequence[scales.PatchNums]) -> int:
    """Number of wavelengths, from two sides of the image down to two tokens of the longest side of the finest maps."""
    return 1 + math.ceil(math.log2(max(max(scales.sides(pyramid)[-1]) for pyramid in pyramids)))


class CoordinatePositions(nn.Module):
    """A linear map of sines and cosines of the coordinates, with the `num_waves` wavelengths of the given pyramids."""

    def __init__(self, pyramids: Sequence[scales.PatchNums], width: int) -> None:
        super().__init__()
        self.num_waves = num_waves(pyramids)
        self.linear = nn.Linear(4 * self.num_waves, width, bias=False)

    def features(self, patch_nums: scales.PatchNums) -> Float[Tensor, "L F"]:
        """The waves at each token, with a mean square of 1 / F."""
        angles = coordinates(patch_nums)[:, :, None] * math.pi * 2.0 ** torch.arange(self.num_waves)
        waves = torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1)
        return waves * math.sqrt(2 / waves.shape[1])

    def forward(self, features: Float[Tensor, "l F"]) -> Float[Tensor, "1 l D"]:
        """Position embeddings."""
        return self.linear(features)[None]
