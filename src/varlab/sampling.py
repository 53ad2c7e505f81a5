"""Sampling: the next-scale loop with guidance, filters and a key/value cache (VAR, section 3.2 and appendix).

Each image has a random stream of its own, made from its seed alone, so it does not depend on the batch it was in.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from varlab import scales
from varlab.models.msvqvae import MSVQVAE
from varlab.models.var import VAR


def guide(cond: Float[Tensor, "B l V"], uncond: Float[Tensor, "B l V"], scale: float) -> Float[Tensor, "B l V"]:
    """Classifier-free guidance on logits. `scale` 0 is no guidance (VAR's convention; DiT's cfg_scale is this plus 1)."""
    return (1 + scale) * cond - scale * uncond


def filter_logits(logits: Float[Tensor, "*rows V"], top_k: int = 0, top_p: float = 0.0) -> Float[Tensor, "*rows V"]:
    """Logits with -inf for the codes that top-k, then top-p, drop; 0 turns a filter off.

    Codes equal to the k-th largest stay. Top-p keeps the smallest set whose probability exceeds `top_p`, at least one
    code. Raises ValueError for top_k above the codebook size or top_p outside [0, 1].
    """
    if not 0 <= top_k <= logits.shape[-1]:
        raise ValueError(f"top_k={top_k}: must lie between 0 (off) and the codebook size {logits.shape[-1]}")
    if not 0 <= top_p <= 1:
        raise ValueError(f"top_p={top_p}: must lie between 0 (off) and 1")
    if top_k > 0:
        kth = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p > 0:
        ascending, order = logits.sort(dim=-1)
        drop = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
        drop[..., -1] = False
        logits = logits.masked_fill(drop.scatter(-1, order, drop), -torch.inf)
    return logits


def draw(logits: Float[Tensor, "B l V"], uniform: Float[Tensor, "B l"]) -> Int[Tensor, "B l"]:
    """Tokens by inverse CDF from numbers in [0, 1): one number a token, so the stream is short and the same on any device."""
    cdf = logits.double().softmax(dim=-1).cumsum(dim=-1)
    return torch.searchsorted(cdf, uniform.double()[..., None] * cdf[..., -1:], right=True)[..., 0]


class Randomness:
    """The random numbers of a batch: image i draws from a generator seeded with `seeds[i]`, on the CPU."""

    def __init__(self, seeds: Sequence[int], lengths: Sequence[int]) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        uniform = torch.stack([torch.rand(sum(lengths), generator=generator) for generator in self.generators])
        self.uniform_by_scale = uniform.split(list(lengths), dim=1)

    def uniform(self, k: int) -> Float[Tensor, "B l"]:
        """Uniform numbers in [0, 1), one for each token of scale k."""
        return self.uniform_by_scale[k]

    def gumbel(self, k: int, codebook_size: int) -> Float[Tensor, "B l V"]:
        """Gumbel noise for each code at each token of scale k; call once a scale, in order."""
        shape = (self.uniform_by_scale[k].shape[1], codebook_size)
        return -torch.stack(
            [torch.empty(shape).exponential_(generator=generator).log() for generator in self.generators]
        )


def smooth_temperature(k: int, num_scales: int) -> float:
    """Temperature of the soft codes of the "smooth" option: 0.27 falling linearly to 0.0135."""
    return max(0.27 * (1 - 0.95 * scales.progress(k, num_scales)), 0.005)


@dataclass(frozen=True)
class Kept:
    """Tokens that are not generated but taken from given images (editing): where `masks[k]` is True."""

    token_maps: Sequence[Int[Tensor, "B _"]]
    masks: Sequence[Bool[Tensor, " _"]]


def image_seeds(seed: int | Sequence[int], batch_size: int) -> list[int]:
    """One seed an image: `seed + i` for an int, the given ones otherwise."""
    seeds = [seed + i for i in range(batch_size)] if isinstance(seed, int) else list(seed)
    if len(seeds) != batch_size:
        raise ValueError(f"{len(seeds)} seeds were given for {batch_size} labels")
    return seeds


def check_pair(var: VAR, tokenizer: MSVQVAE) -> None:
    """Raises ValueError when the transformer was not made for such a tokenizer."""
    for name in ("patch_nums", "codebook_size", "codebook_dim"):
        if var.sizes[name] != tokenizer.sizes[name]:
            raise ValueError(
                f"the VAR has {name}={var.sizes[name]}, the tokenizer {tokenizer.sizes[name]}: they do not belong together"
            )


def check_labels(labels: Int[Tensor, " B"], num_classes: int) -> None:
    """Raises ValueError for a label outside 0..num_classes, the last being the null label."""
    wrong = [label for label in labels.tolist() if not 0 <= label <= num_classes]
    if wrong:
        raise ValueError(
            f"label {wrong[0]} is out of range: there are {num_classes} classes, 0..{num_classes - 1} (and {num_classes} for none)"
        )


@torch.no_grad()
def generate_tokens(
    var: VAR,
    tokenizer: MSVQVAE,
    labels: Int[Tensor, " B"],
    *,
    cfg_scale: float,
    top_k: int = 0,
    top_p: float = 0.0,
    seed: int | Sequence[int] = 0,
    smooth: bool = False,
    kept: Kept | None = None,
    randomness: Randomness | None = None,
) -> tuple[Float[Tensor, "B C H W"], list[Int[Tensor, "B _"]]]:
    """The sum of codes `f_hat` and the token maps of the given classes: the loop over scales.

    Guidance grows linearly over the scales, from 0 at the coarsest to `cfg_scale` at the finest; 0 is none. Image i
    depends on `labels[i]` and its seed (`seed + i`, or `seed[i]`). `smooth` mixes codes by a soft Gumbel softmax: for
    looks, not for scores; the tokens returned are then the ones drawn, which `f_hat` does not follow.
    `randomness` replaces the numbers that the seeds would give.
    """
    check_pair(var, tokenizer)
    check_labels(labels, var.num_classes)
    var.eval()
    quantizer, device, lengths = tokenizer.quantizer, labels.device, scales.lengths(var.patch_nums)
    num_scales = len(lengths)
    randomness = randomness or Randomness(image_seeds(seed, len(labels)), lengths)
    is_guided = cfg_scale != 0
    rows = torch.cat([labels, torch.full_like(labels, var.null_label)]) if is_guided else labels
    has_autocast = torch.is_autocast_enabled(device.type)
    cache = var.start_cache(len(rows), torch.get_autocast_dtype(device.type) if has_autocast else torch.float32)

    f_hat, inputs, token_maps = quantizer.empty(len(labels)), None, []
    for k in range(num_scales):
        t = scales.progress(k, num_scales)
        logits = var.predict_scale(k, inputs, rows, cache).float()
        if is_guided:
            cond, uncond = logits.chunk(2)
            logits = guide(cond, uncond, cfg_scale * t)
        logits = filter_logits(logits, top_k, top_p)
        tokens = draw(logits, randomness.uniform(k).to(device))
        codes = quantizer.codebook(tokens)
        if smooth:
            noise = randomness.gumbel(k, logits.shape[-1]).to(device)
            soft = ((logits * (1 + t) + noise) / smooth_temperature(k, num_scales)).softmax(dim=-1)
            with torch.autocast(device.type, enabled=False):
                codes = soft @ quantizer.codebook.weight
        if kept is not None:
            mask = kept.masks[k].to(device)
            tokens = torch.where(mask, kept.token_maps[k], tokens)
            codes = torch.where(mask[:, None], quantizer.codebook(tokens), codes)
        f_hat = quantizer.accumulate(f_hat, codes, k)
        if k + 1 < num_scales:
            inputs = quantizer.at_scale(f_hat, k + 1)
            inputs = torch.cat([inputs, inputs]) if is_guided else inputs
        token_maps.append(tokens)
    return f_hat, token_maps


@torch.no_grad()
def generate(
    var: VAR,
    tokenizer: MSVQVAE,
    labels: Int[Tensor, " B"],
    *,
    cfg_scale: float,
    top_k: int = 0,
    top_p: float = 0.0,
    seed: int | Sequence[int] = 0,
    smooth: bool = False,
    return_tokens: bool = False,
) -> Float[Tensor, "B 3 H W"] | tuple[Float[Tensor, "B 3 H W"], list[Int[Tensor, "B _"]]]:
    """Images in [0, 1] of the given classes, and their token maps if `return_tokens`; settings as in `generate_tokens`."""
    settings = {"cfg_scale": cfg_scale, "top_k": top_k, "top_p": top_p, "seed": seed, "smooth": smooth}
    f_hat, token_maps = generate_tokens(var, tokenizer, labels, **settings)
    images = decode(tokenizer, f_hat)
    return (images, token_maps) if return_tokens else images


def decode(tokenizer: MSVQVAE, f_hat: Float[Tensor, "B C H W"]) -> Float[Tensor, "B 3 h w"]:
    """Images in [0, 1] of a sum of codes."""
    return tokenizer.decode_features(f_hat).float() / 2 + 0.5
