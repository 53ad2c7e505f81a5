"""Networks for images of other shapes than the square that most models are made for."""

import math

from varlab.data.resolutions import Resolution, height_and_width
from varlab.models import scales
from varlab.models.msvqvae import MSVQVAE
from varlab.models.var import VAR


def trained_sizes(tokenizer: MSVQVAE, var: VAR) -> list[tuple[int, int]]:
    """(height, width) in pixels of the images that a network was trained on, the most frequent one first."""
    finest = [scales.sides(pyramid)[-1] for pyramid in var.pyramids or [var.patch_nums]]
    return [(tokenizer.downsample * h, tokenizer.downsample * w) for h, w in finest]


def at_size(tokenizer: MSVQVAE, var: VAR, image_size: Resolution | None) -> tuple[MSVQVAE, VAR]:
    """Both networks for images of a size in pixels, sharing their weights with the given ones; None is the first trained one. For a
    size that was not trained, the pyramid of the one with the nearest height and width is fitted to it. Raises ValueError for a size
    that the tokenizer cannot have, and for a network whose positions are learned or that enlarges images.
    """
    if image_size is None or (size := height_and_width(image_size, "image_size")) == tokenizer.image_size:
        return tokenizer, var

    def distance(pyramid: scales.PatchNums) -> float:
        h, w = scales.sides(pyramid)[-1]
        return abs(math.log(tokenizer.downsample * h / size[0])) + abs(math.log(tokenizer.downsample * w / size[1]))

    if var.embedder.kind == "image":
        raise ValueError(
            f"image_size={list(size)}: this network enlarges images of one size, to {list(tokenizer.image_size)}"
        )
    pyramid = tokenizer.pyramid_of(size, min(var.pyramids or [var.patch_nums], key=distance))
    return tokenizer.at(pyramid), var.at(pyramid)
