"""The next-scale loop with guidance and a key/value cache (VAR, section 3.2 and appendix); token by token for the
raster baseline."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from varlab.models import scales
from varlab.models.autocast import autocast_of
from varlab.models.msvqvae import MSVQVAE
from varlab.models.quantizer import ResidualQuantizer
from varlab.models.var import VAR
from varlab.sampling.acceleration import Drawn, accelerate
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
    """Tokens taken from given images instead of generated (editing), where `masks[k]` is True. With `partial_sums`, the
    images' sums of codes replace the generated ones after each scale where `latents` is 1."""

    token_maps: Sequence[Int[Tensor, "B _"]]
    masks: Sequence[Bool[Tensor, " _"]]
    partial_sums: Sequence[Float[Tensor, "B C H W"]] | None = None
    latents: Float[Tensor, "H W"] | None = None


def image_seeds(seed: int | Sequence[int], batch_size: int) -> list[int]:
    """One seed per image: `seed + i` for an int, the given ones otherwise."""
    seeds = [seed + i for i in range(batch_size)] if isinstance(seed, int) else list(seed)
    if len(seeds) != batch_size:
        raise ValueError(f"{len(seeds)} seeds were given for {batch_size} images")
    return seeds


def check_pair(var: VAR, tokenizer: MSVQVAE) -> None:
    """Raises ValueError if the transformer does not match the tokenizer."""
    for name in ("patch_nums", "codebook_size", "codebook_dim", "bases"):
        expected, found = getattr(var, name), getattr(tokenizer.quantizer, name)
        if expected != found:
            raise ValueError(f"the VAR has {name}={expected}, the tokenizer {found}: they do not belong together")


def generate_tokens(
    var: VAR, tokenizer: MSVQVAE, condition: Tensor, settings: SamplingSettings, **options: Any
) -> tuple[Float[Tensor, "B C H W"], list[Int[Tensor, "B _"]]]:
    """The sum of codes `f_hat` of all scales and the token maps for the given conditions. `options`: see
    `generate_scales`."""
    by_scale = list(generate_scales(var, tokenizer, condition, settings, **options))
    return by_scale[-1][0], [tokens for _, tokens in by_scale]


@torch.no_grad()
def generate_scales(
    var: VAR,
    tokenizer: MSVQVAE,
    condition: Tensor,
    settings: SamplingSettings,
    *,
    seed: int | Sequence[int] = 0,
    kept: KeptTokens | None = None,
    randomness: Randomness | None = None,
) -> Iterator[tuple[Float[Tensor, "B C H W"], Int[Tensor, "B _"]]]:
    """The loop over scales: yields, after each, coarse to fine, the sum of codes so far and the scale's tokens.

    Image i depends on `condition[i]` and its seed (`seed + i`, or `seed[i]`). With `settings.smooth`, `f_hat` is the
    sum of soft codes, not of the codes of the returned tokens. `randomness` overrides the random numbers of the seeds.
    """
    check(var, tokenizer, condition, settings, kept)
    randomness = randomness or Randomness(
        image_seeds(seed, len(condition)), scales.lengths(var.patch_nums), len(var.bases)
    )
    yield from scale_loop(var, tokenizer.quantizer, condition, settings, randomness.to(condition.device), kept)


def check(
    var: VAR, tokenizer: MSVQVAE, condition: Tensor, settings: SamplingSettings, kept: KeptTokens | None = None
) -> None:
    """Raises ValueError for networks that do not belong together, and for conditions and settings out of range."""
    check_pair(var, tokenizer)
    var.embedder.check(condition)
    settings.by_scale(len(var.patch_nums), var.codebook_size)
    if len(var.bases) > 1 and settings.smooth:
        raise ValueError("smooth=true mixes the rows of a table: this network predicts its codes digit by digit")
    if var.order == "raster" and (settings.smooth or kept is not None):
        raise ValueError(
            "a network with order=raster samples token by token and supports neither smooth codes nor editing"
        )


def scale_loop(
    var: VAR,
    quantizer: ResidualQuantizer,
    condition: Tensor,
    settings: SamplingSettings,
    randomness: Randomness,
    kept: KeptTokens | None = None,
) -> Iterator[tuple[Float[Tensor, "B C H W"], Int[Tensor, "B _"]]]:
    """`generate_scales` for arguments that were checked and are on the device. The host neither waits for the device
    nor sends anything to it, so that the loop can be captured as a CUDA graph (not with smooth codes or kept tokens).
    """
    device, lengths = condition.device, scales.lengths(var.patch_nums)
    by_scale = [
        scale_settings._replace(top_k=min(scale_settings.top_k, quantizer.size_of(k)))
        for k, scale_settings in enumerate(settings.by_scale(len(lengths), quantizer.codebook_size))
    ]
    var.eval()
    is_guided = any(scale_settings.guidance != 0 for scale_settings in by_scale)
    rows = torch.cat([condition, var.embedder.null(condition)]) if is_guided else condition
    with autocast_of(var.head.weight):
        has_autocast = torch.is_autocast_enabled(device.type)
        cache = var.start_cache(rows, torch.get_autocast_dtype(device.type) if has_autocast else torch.float32)

    def predict(step: int, inputs: Tensor | None, scale_settings: ScaleSettings, k: int) -> Tensor:
        """Guided logits of one step, of the codes of scale k; `inputs` are the same for both halves of a guided batch."""
        if inputs is not None and is_guided:
            inputs = torch.cat([inputs, inputs])
        with autocast_of(var.head.weight):
            logits = var.predict_scale(step, inputs, cache).float()[..., : quantizer.size_of(k)]
        if not is_guided:
            return logits
        cond, uncond = logits.chunk(2)
        return guide(cond, uncond, scale_settings.guidance)

    def choose(k: int, f_hat: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and codes of scale k, predicted from the sum of the coarser ones."""
        inputs = None if k == 0 else quantizer.at_scale(f_hat, k)
        logits, uniform = predict(k, inputs, by_scale[k], k), randomness.uniform(k)
        if settings.smooth:
            tokens, logits = sample_filtered(logits, uniform, by_scale[k])
            codes = soft_codes(logits, randomness.gumbel(k, logits.shape[-1]).to(device), k, quantizer)
        else:
            tokens = sample_codes(logits, uniform, by_scale[k], var.bases)
            codes = quantizer.embed(tokens, k)
        if kept is not None:
            mask = kept.masks[k].to(device)
            tokens = torch.where(mask, kept.token_maps[k], tokens)
            codes = torch.where(mask[:, None], quantizer.embed(tokens, k), codes)
        return tokens, codes

    previous: list[Tensor | None] = [None]  # code of the previous token, in raster order

    def choose_one_by_one(k: int, f_hat: Tensor) -> tuple[Tensor, Tensor]:
        """The same in raster order: each token from the previous one."""
        sampled = []
        for step, uniform in enumerate(randomness.uniform(k).split(1, dim=1), start=sum(lengths[:k])):
            logits = predict(step, previous[0], by_scale[k], k)
            sampled.append(sample_codes(logits, uniform, by_scale[k], var.bases))
            previous[0] = quantizer.embed(sampled[-1], k)
        tokens = torch.cat(sampled, dim=1)
        return tokens, quantizer.embed(tokens, k)

    def put_back(k: int, before: Tensor, after: Tensor) -> Tensor:
        """Restores the images' sums of codes where they are kept as latents."""
        if kept is None or kept.partial_sums is None or kept.latents is None:
            return after
        return torch.where(kept.latents.to(device) > 0.5, kept.partial_sums[k], after)

    choice = choose if var.order == "scales" else choose_one_by_one
    for tokens, f_hat in quantizer.residual_loop(quantizer.empty(len(condition)), choice, put_back):
        yield f_hat, tokens


def soft_codes(
    logits: Float[Tensor, "B l V"], noise: Float[Tensor, "B l V"], k: int, quantizer: ResidualQuantizer
) -> Float[Tensor, "B l C"]:
    """Means of the codes weighted by a Gumbel softmax of filtered logits (the released "smooth" option)."""
    t = scales.progress(k, quantizer.num_scales)
    weights = ((logits * (1 + t) + noise) / smooth_temperature(k, quantizer.num_scales)).softmax(dim=-1)
    with torch.autocast(logits.device.type, enabled=False):
        return weights @ quantizer.embed(torch.arange(quantizer.size_of(k), device=logits.device), k)


@torch.no_grad()
def generate(
    var: VAR,
    tokenizer: MSVQVAE,
    condition: Tensor,
    *,
    seed: int | Sequence[int] = 0,
    return_tokens: bool = False,
    compiled: str = "none",
    **settings: Any,
) -> Float[Tensor, "B 3 H W"] | tuple[Float[Tensor, "B 3 H W"], list[Int[Tensor, "B _"]]]:
    """Images (B 3 H W) in [0, 1], and their token maps (B l_k each) if `return_tokens`.

    `condition`: class labels (B), 0 to num_classes - 1, or num_classes for none; or what the network's embedder takes.
    `seed`: image i has seed `seed + i`, or `seed[i]`, and does not depend on the other images. `compiled`: `none`;
    `blocks` runs compiled blocks and decoder; `graph` runs them as one CUDA graph, captured in the first call for each
    batch size and settings. `settings`: fields of `SamplingSettings` (cfg_scale=4.0, top_k=900, ...). Raises ValueError
    for a label or a setting out of range, and for a transformer and a tokenizer that do not belong together.
    """
    chosen = SamplingSettings(**settings)
    drawn = draw(var, tokenizer, condition, chosen, image_seeds(seed, len(condition)), compiled)
    return (drawn.images, drawn.token_maps) if return_tokens else drawn.images


@torch.no_grad()
def draw(
    var: VAR, tokenizer: MSVQVAE, condition: Tensor, settings: SamplingSettings, seeds: Sequence[int], compiled: str
) -> Drawn:
    """Images, their token maps and sums of codes; see `generate`."""
    check(var, tokenizer, condition, settings)
    randomness = Randomness(seeds, scales.lengths(var.patch_nums), len(var.bases)).to(condition.device)

    def plain(condition: Tensor, uniform: Tensor) -> Drawn:
        numbers = randomness.of(uniform)
        by_scale = list(scale_loop(var, tokenizer.quantizer, condition, settings, numbers))
        return Drawn(by_scale[-1][0], decode(tokenizer, by_scale[-1][0]), [tokens for _, tokens in by_scale])

    fast = accelerate(plain, tokenizer, var, settings, condition, randomness.joined, compiled)
    return fast(condition, randomness.joined)


@torch.no_grad()
def decode(tokenizer: MSVQVAE, f_hat: Float[Tensor, "B C H W"]) -> Float[Tensor, "B 3 h w"]:
    """Images in [0, 1] from a sum of codes."""
    return tokenizer.decode_features(f_hat).float() / 2 + 0.5
