"""Zero-shot editing: the image's tokens are kept outside (or inside) a region, the rest is generated (VAR, section
5.3).

The kept content is inserted as tokens (as released), as latents (the image's sum of codes is restored after each
scale), or, afterward, as pixels, which makes the kept region exact.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from varlab.models import scales
from varlab.models.msvqvae import MSVQVAE
from varlab.models.var import VAR
from varlab.sampling.generate import KeptTokens, decode, generate_tokens
from varlab.sampling.token_sampling import SamplingSettings

Blend = Literal["tokens", "latents"]


def box_mask(box: tuple[float, float, float, float], size: tuple[int, int]) -> Float[Tensor, "H W"]:
    """1 inside the box (y0, x0, y1, x1), fractions of the side, on a map of `size`; borders round half to even."""
    (y0, x0, y1, x1), (height, width) = box, size
    mask = torch.zeros(size)
    mask[round(y0 * height) : round(y1 * height), round(x0 * width) : round(x1 * width)] = 1
    return mask


def keep_masks(
    keep: Float[Tensor, "H W"], patch_nums: scales.PatchNums, strength: float = 1.0
) -> list[Bool[Tensor, " _"]]:
    """For each scale, which tokens of the given image are kept. `keep` is 1 at the latent positions to keep.

    Scales of fewer than 4 tokens and the coarsest (1 - `strength`) K of the K scales are kept entirely: at strength 1
    the region is generated from scratch, below 1 it follows the image's coarse shapes. The bilinear resizing is not
    antialiased, as released: coarse masks are sparse samples of the fine one. Raises ValueError for a strength outside
    (0, 1].
    """
    if not 0 < strength <= 1:
        raise ValueError(f"strength={strength}: must be above 0 and at most 1")
    masks, num_kept = [], round((1 - strength) * len(patch_nums))
    for k, (h, w) in enumerate(scales.sides(patch_nums)):
        resized = F.interpolate(keep[None, None], size=(h, w), mode="bilinear", align_corners=False)
        is_kept = h * w < 4 or k < num_kept
        masks.append(torch.ones(h * w, dtype=torch.bool) if is_kept else (resized > 0.5).flatten())
    return masks


def latent_mask(keep: Float[Tensor, "h w"], size: tuple[int, int]) -> Float[Tensor, "H W"]:
    """A pixel mask reduced to the latent map: a position is kept if all of its pixels are."""
    return (F.interpolate(keep[None, None], size=size, mode="area")[0, 0] > 0.999).float()


def edit(
    var: VAR,
    tokenizer: MSVQVAE,
    images: Float[Tensor, "B 3 H W"],
    keep: Float[Tensor, "h w"],
    condition: Tensor,
    *,
    seed: int | Sequence[int] = 0,
    strength: float = 1.0,
    blend: str = "tokens",
    **settings: Any,
) -> Float[Tensor, "B 3 H W"]:
    """Images (B 3 H W) in [0, 1] with the content of `images` (B 3 H W, in [-1, 1]) where `keep` is 1 and generated
    content elsewhere.

    `keep`: on the latent map, see `latent_mask`. `condition`: class labels (B); the null label inpaints without a
    class, any other label edits toward that class. `strength`: see `keep_masks`. `blend`: whether `tokens` (as
    released) or `latents` are kept. `settings`: fields of `SamplingSettings`. Raises ValueError for a value out of
    range.
    """
    if blend not in get_args(Blend):
        raise ValueError(f"blend={blend!r}: choose one of {', '.join(get_args(Blend))}")
    with torch.no_grad():
        token_maps = tokenizer.encode(images)
        partial_sums = tokenizer.quantizer.partial_sums(token_maps) if blend == "latents" else None
        kept = KeptTokens(token_maps, keep_masks(keep, tokenizer.patch_nums, strength), partial_sums, keep)
        f_hat, _ = generate_tokens(var, tokenizer, condition, SamplingSettings(**settings), seed=seed, kept=kept)
        return decode(tokenizer, f_hat)


def composite(
    edited: Float[Tensor, "B 3 H W"], originals: Float[Tensor, "B 3 H W"], keep: Float[Tensor, "H W"], feather: int = 0
) -> Float[Tensor, "B 3 H W"]:
    """The original's exact pixels where `keep` is 1, the edited ones elsewhere; both in [0, 1]. The two are blended
    over `feather` pixels next to the kept region, on the edited side."""
    weight = keep
    if feather > 0:
        padded = F.pad(keep[None, None], (feather,) * 4, mode="replicate")
        near = (
            2 * F.avg_pool2d(padded, 2 * feather + 1, stride=1)[0, 0]
        )  # 1 next to the kept region, 0 beyond its reach
        weight = torch.where(keep > 0.5, torch.ones_like(near), near.clamp(max=1))
    return weight * originals + (1 - weight) * edited


@dataclass(frozen=True)
class EditErrors:
    """How well an edit stays within its region, in gray levels (0 to 255), means over images."""

    outside: float  # mean absolute difference to the original in the kept region
    seam: float  # mean absolute step across the border of the region ...
    usual: float  # ... and the original's mean absolute step between neighbors everywhere


def edit_errors(
    edited: Float[Tensor, "B 3 H W"], originals: Float[Tensor, "B 3 H W"], keep: Float[Tensor, "H W"]
) -> EditErrors:
    """Errors of edited images against their originals, both in [0, 1]."""
    outside = ((edited - originals).abs() * keep).sum() / (keep.sum().clamp(min=1) * 3 * len(edited))
    across, total, count = 0.0, 0.0, 0
    for dim in (-2, -1):
        border = keep.diff(dim=dim).abs() > 0.5
        if border.any():
            across += float((edited.diff(dim=dim).abs() * border).sum())
            count += int(border.sum()) * 3 * len(edited)
        total += float(originals.diff(dim=dim).abs().mean()) / 2
    return EditErrors(255 * float(outside), 255 * across / max(count, 1), 255 * total)
