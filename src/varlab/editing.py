"""Zero-shot editing: tokens of a given image are kept outside (or inside) a region, the rest is generated
(VAR, section 5.3)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from varlab import scales
from varlab.models.msvqvae import MSVQVAE
from varlab.models.var import VAR
from varlab.sampling import Kept, decode, generate_tokens


def box_mask(box: tuple[float, float, float, float], size: tuple[int, int]) -> Float[Tensor, "H W"]:
    """1 inside the box (y0, x0, y1, x1), shares of the side, on a latent map of `size`; borders round half to even."""
    (y0, x0, y1, x1), (height, width) = box, size
    mask = torch.zeros(size)
    mask[round(y0 * height) : round(y1 * height), round(x0 * width) : round(x1 * width)] = 1
    return mask


def keep_masks(keep: Float[Tensor, "H W"], patch_nums: scales.PatchNums) -> list[Bool[Tensor, " _"]]:
    """For each scale, which tokens of the given image stay. `keep` is 1 at the latent positions to keep.

    Scales of fewer than 4 tokens are kept whole. The bilinear sampling is not antialiased, as released: coarse masks
    are thin samples of the fine one.
    """
    masks = []
    for h, w in scales.sides(patch_nums):
        resized = F.interpolate(keep[None, None], size=(h, w), mode="bilinear", align_corners=False)
        masks.append((resized > 0.5).flatten() if h * w >= 4 else torch.ones(h * w, dtype=torch.bool))
    return masks


def edit(
    var: VAR,
    tokenizer: MSVQVAE,
    images: Float[Tensor, "B 3 H W"],
    keep: Float[Tensor, "h w"],
    labels: Int[Tensor, " B"],
    *,
    cfg_scale: float,
    top_k: int = 0,
    top_p: float = 0.0,
    seed: int | Sequence[int] = 0,
    smooth: bool = False,
) -> Float[Tensor, "B 3 H W"]:
    """Images in [0, 1] with the tokens of `images` (in [-1, 1]) where `keep` is 1 and generated ones elsewhere.

    The null label in-paints without a class; a class edits towards it.
    """
    with torch.no_grad():
        kept = Kept(tokenizer.encode(images), keep_masks(keep, tokenizer.patch_nums))
        f_hat, _ = generate_tokens(
            var, tokenizer, labels, cfg_scale=cfg_scale, top_k=top_k, top_p=top_p, seed=seed, smooth=smooth, kept=kept
        )
        return decode(tokenizer, f_hat)
