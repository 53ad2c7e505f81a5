"""Sampling: the next-scale loop with guidance and a key/value cache (VAR, section 3.2 and appendix); token by token for the
baseline in raster order."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from varlab.models import scales
from varlab.models.msvqvae import MSVQVAE
from varlab.models.quantizer import MultiScaleQuantizer
from varlab.models.var import VAR
from varlab.sampling.token_sampling import (
    Randomness,
    SamplingSettings,
    ScaleSettings,
    guide,
    sample_codes,
    sample_filtered,
    smooth_temperature,
)


@dataclass(frozen=True)
class KeptTokens:
    """Tokens that are not generated but taken from given images (editing): where `masks[k]` is True. With `partial_sums` the
    images' own sums of codes stand, after each scale, where `latents` is 1."""

    token_maps: Sequence[Int[Tensor, "B _"]]
    masks: Sequence[Bool[Tensor, " _"]]
    partial_sums: Sequence[Float[Tensor, "B C H W"]] | None = None
    latents: Float[Tensor, "H W"] | None = None


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


def compile_scales(var: VAR) -> None:
    """From now on `generate` runs one compiled program for each scale (and batch size: keep it the same) of this network.

    The first batch takes a minute or more; tokens stay the same but for rounding.
    """
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, 4 * len(var.step_bounds))
    var.predict_scale = torch.compile(var.predict_scale, dynamic=False)


def generate_tokens(
    var: VAR, tokenizer: MSVQVAE, labels: Int[Tensor, " B"], settings: SamplingSettings, **given: Any
) -> tuple[Float[Tensor, "B C H W"], list[Int[Tensor, "B _"]]]:
    """The sum of codes `f_hat` of all scales and the token maps of the given classes. `given`: see `generate_scales`."""
    by_scale = list(generate_scales(var, tokenizer, labels, settings, **given))
    return by_scale[-1][0], [tokens for _, tokens in by_scale]


@torch.no_grad()
def generate_scales(
    var: VAR,
    tokenizer: MSVQVAE,
    labels: Int[Tensor, " B"],
    settings: SamplingSettings,
    *,
    seed: int | Sequence[int] = 0,
    kept: KeptTokens | None = None,
    randomness: Randomness | None = None,
) -> Iterator[tuple[Float[Tensor, "B C H W"], Int[Tensor, "B _"]]]:
    """The loop over scales: after each, coarse to fine, the sum of codes so far and the scale's tokens.

    Image i depends on `labels[i]` and its seed (`seed + i`, or `seed[i]`). With `settings.smooth` the tokens returned are the ones
    drawn, which `f_hat` does not follow. `randomness` replaces the numbers that the seeds would give.
    """
    check_pair(var, tokenizer)
    check_labels(labels, var.num_classes)
    if var.order == "raster" and (settings.smooth or kept is not None):
        raise ValueError("a network with order=raster draws token by token: no smooth codes, no editing")
    quantizer, device, lengths = tokenizer.quantizer, labels.device, scales.lengths(var.patch_nums)
    num_scales, by_scale = len(lengths), settings.by_scale(len(lengths), quantizer.codebook_size)
    var.eval()
    randomness = randomness or Randomness(image_seeds(seed, len(labels)), lengths)
    is_guided = any(how.guidance != 0 for how in by_scale)
    rows = torch.cat([labels, torch.full_like(labels, var.null_label)]) if is_guided else labels
    has_autocast = torch.is_autocast_enabled(device.type)
    cache = var.start_cache(len(rows), torch.get_autocast_dtype(device.type) if has_autocast else torch.float32)

    def predict(step: int, inputs: Tensor | None, how: ScaleSettings) -> Tensor:
        """Guided logits of one step; `inputs` serve both halves of a guided batch."""
        if inputs is not None and is_guided:
            inputs = torch.cat([inputs, inputs])
        logits = var.predict_scale(step, inputs, rows, cache).float()
        if not is_guided:
            return logits
        cond, uncond = logits.chunk(2)
        return guide(cond, uncond, how.guidance)

    f_hat, inputs = quantizer.empty(len(labels)), None
    if var.order == "raster":
        for k, how in enumerate(by_scale):
            drawn = []
            for i, uniform in enumerate(randomness.uniform(k).to(device).split(1, dim=1), start=sum(lengths[:k])):
                drawn.append(sample_codes(predict(i, inputs, how), uniform, how))
                inputs = quantizer.codebook(drawn[-1])
            tokens = torch.cat(drawn, dim=1)
            f_hat = quantizer.accumulate(f_hat, quantizer.codebook(tokens), k)
            yield f_hat, tokens
        return
    for k, how in enumerate(by_scale):
        logits = predict(k, inputs, how)
        uniform = randomness.uniform(k).to(device)
        if settings.smooth:
            tokens, logits = sample_filtered(logits, uniform, how)
            codes = soft_codes(logits, randomness.gumbel(k, logits.shape[-1]).to(device), k, num_scales, quantizer)
        else:
            tokens = sample_codes(logits, uniform, how)
            codes = quantizer.codebook(tokens)
        if kept is not None:
            mask = kept.masks[k].to(device)
            tokens = torch.where(mask, kept.token_maps[k], tokens)
            codes = torch.where(mask[:, None], quantizer.codebook(tokens), codes)
        f_hat = quantizer.accumulate(f_hat, codes, k)
        if kept is not None and kept.partial_sums is not None and kept.latents is not None:
            f_hat = torch.where(kept.latents.to(device) > 0.5, kept.partial_sums[k], f_hat)
        if k + 1 < num_scales:
            inputs = quantizer.at_scale(f_hat, k + 1)
        yield f_hat, tokens


def soft_codes(
    logits: Float[Tensor, "B l V"],
    noise: Float[Tensor, "B l V"],
    k: int,
    num_scales: int,
    quantizer: MultiScaleQuantizer,
) -> Float[Tensor, "B l C"]:
    """Means of the codebook weighted by a soft Gumbel softmax of filtered logits (the released "smooth" option)."""
    t = scales.progress(k, num_scales)
    weights = ((logits * (1 + t) + noise) / smooth_temperature(k, num_scales)).softmax(dim=-1)
    with torch.autocast(logits.device.type, enabled=False):
        return weights @ quantizer.codebook.weight


@torch.no_grad()
def generate(
    var: VAR,
    tokenizer: MSVQVAE,
    labels: Int[Tensor, " B"],
    *,
    seed: int | Sequence[int] = 0,
    return_tokens: bool = False,
    **settings: Any,
) -> Float[Tensor, "B 3 H W"] | tuple[Float[Tensor, "B 3 H W"], list[Int[Tensor, "B _"]]]:
    """Images in [0, 1] of the given classes, and their token maps if `return_tokens`. `settings`: fields of `SamplingSettings`
    (cfg_scale=4.0, top_k=900, ...)."""
    f_hat, token_maps = generate_tokens(var, tokenizer, labels, SamplingSettings(**settings), seed=seed)
    images = decode(tokenizer, f_hat)
    return (images, token_maps) if return_tokens else images


@torch.no_grad()
def decode(tokenizer: MSVQVAE, f_hat: Float[Tensor, "B C H W"]) -> Float[Tensor, "B 3 h w"]:
    """Images in [0, 1] of a sum of codes."""
    return tokenizer.decode_features(f_hat).float() / 2 + 0.5
