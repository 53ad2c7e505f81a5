"""Super-resolution: images drawn by a network whose condition is a smaller version of them."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from varlab.models.msvqvae import MSVQVAE
from varlab.models.var import VAR
from varlab.sampling.generate import generate


def upscaling_factor(var: VAR, tokenizer: MSVQVAE) -> int:
    """By how many times the images that a network draws are larger than its condition. Raises ValueError if it does not take images."""
    if var.embedder.kind != "image":
        raise ValueError(
            "this network does not take images: train one with embedder@model.embedder=image (see docs/own-images.md)"
        )
    return tokenizer.image_size[0] // var.embedder.condition_shape[1]


def upscale(
    var: VAR,
    tokenizer: MSVQVAE,
    images: Float[Tensor, "B 3 h w"],
    *,
    seed: int | Sequence[int] = 0,
    composite: bool = True,
    **settings: Any,
) -> Float[Tensor, "B 3 H W"]:
    """Larger versions, in [0, 1], of `images` in [-1, 1]. `composite`: see `match_means`. `settings`: fields of `SamplingSettings`.
    Raises ValueError for images of another size than the network takes, and for a value out of range."""
    upscaling_factor(var, tokenizer)
    drawn = generate(var, tokenizer, images, seed=seed, **settings)
    assert isinstance(drawn, Tensor)
    return match_means(drawn, images / 2 + 0.5) if composite else drawn


def match_means(drawn: Float[Tensor, "B 3 H W"], images: Float[Tensor, "B 3 h w"]) -> Float[Tensor, "B 3 H W"]:
    """The nearest images, in the mean square, whose blocks have the pixels of `images` as their means; all in [0, 1]. Every block is
    shifted by a constant and clamped, and the constant is found by bisection."""
    size, factor = drawn.shape[-2:], drawn.shape[-1] // images.shape[-1]
    low, high = -torch.ones_like(images), torch.ones_like(images)

    def shifted(by: Tensor) -> Tensor:
        return (drawn + F.interpolate(by, size=size, mode="nearest")).clamp(0, 1)

    for _ in range(24):
        middle = (low + high) / 2
        is_dark = F.avg_pool2d(shifted(middle), factor) < images
        low, high = torch.where(is_dark, middle, low), torch.where(is_dark, high, middle)
    return shifted((low + high) / 2)
