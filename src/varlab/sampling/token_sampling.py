"""From logits to tokens: guidance, filters, random numbers (VAR, appendix; released sampler).

Each image has its own random stream, derived from its seed alone, so it does not depend on the rest of its batch.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from varlab.models import scales
from varlab.models.digits import Bases, tokens_of

ByScale = float | int | Sequence[float | int]
GuidanceSchedule = Literal["linear", "cosine", "constant"]
DEVICES_WITHOUT_FLOAT64 = ("mps",)


def guide(cond: Float[Tensor, "B l V"], uncond: Float[Tensor, "B l V"], scale: float) -> Float[Tensor, "B l V"]:
    """Classifier-free guidance on logits. `scale` 0 is no guidance (VAR's convention; DiT's cfg_scale is this plus 1)."""
    return (1 + scale) * cond - scale * uncond


def filter_logits(logits: Float[Tensor, "*rows V"], top_k: int = 0, top_p: float = 0.0) -> Float[Tensor, "*rows V"]:
    """Logits with -inf for the codes that top-k, then top-p, remove; 0 turns a filter off.

    Codes that tie with the k-th largest are kept. Top-p keeps the smallest set whose probability exceeds `top_p`, at
    least one code. Raises ValueError for top_k above the codebook size or top_p outside [0, 1].
    """
    if not 0 <= top_k <= logits.shape[-1]:
        raise ValueError(f"top_k={top_k}: must be between 0 (off) and the codebook size {logits.shape[-1]}")
    if not 0 <= top_p <= 1:
        raise ValueError(f"top_p={top_p}: must be between 0 (off) and 1")
    if top_k > 0:
        kth = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p > 0:
        ascending, order = logits.sort(dim=-1)
        drop = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
        drop[..., -1] = False
        logits = logits.masked_fill(drop.scatter(-1, order, drop), -torch.inf)
    return logits


def sample_tokens(logits: Float[Tensor, "B l V"], uniform: Float[Tensor, "B l"]) -> Int[Tensor, "B l"]:
    """Tokens by inverse CDF from numbers in [0, 1): one number per token, so the stream is short and the same on any
    device."""
    cdf = in_float64(logits).softmax(dim=-1).cumsum(dim=-1)
    tokens = torch.searchsorted(cdf, in_float64(uniform)[..., None] * cdf[..., -1:], right=True)[..., 0]
    return tokens.to(logits.device)


def in_float64(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The same numbers in float64, on the CPU if they are on a device that has none (Apple's MPS): the same tokens follow
    from them on any device."""
    return (x.cpu() if x.device.type in DEVICES_WITHOUT_FLOAT64 else x).double()


class Randomness:
    """The random numbers of a batch: those of image i come from a CPU generator seeded with `seeds[i]`."""

    def __init__(self, seeds: Sequence[int], lengths: Sequence[int], num_digits: int = 1) -> None:
        """`num_digits`: numbers per token, one for each digit that is sampled."""
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.lengths = [num_digits * length for length in lengths]
        self.num_digits = num_digits
        self.joined = torch.stack([torch.rand(sum(self.lengths), generator=generator) for generator in self.generators])
        self.uniform_by_scale = self.joined.split(self.lengths, dim=1)

    def to(self, device: torch.device) -> "Randomness":
        """With the uniform numbers of all scales on a device, by one copy. Gumbel noise is made on the CPU."""
        return self.of(self.joined.to(device))

    def of(self, uniform: Float[Tensor, "B L"]) -> "Randomness":
        """With these uniform numbers instead."""
        other = copy.copy(self)
        other.joined, other.uniform_by_scale = uniform, uniform.split(self.lengths, dim=1)
        return other

    def uniform(self, k: int) -> Float[Tensor, "B l"] | Float[Tensor, "B l n"]:
        """Uniform numbers in [0, 1), one per token of scale k, or one per digit of each."""
        found = self.uniform_by_scale[k]
        return found if self.num_digits == 1 else found.unflatten(1, (-1, self.num_digits))

    def gumbel(self, k: int, codebook_size: int) -> Float[Tensor, "B l V"]:
        """Gumbel noise for each code at each token of scale k. Call it once per scale, in order."""
        shape = (self.uniform_by_scale[k].shape[1], codebook_size)
        return -torch.stack(
            [torch.empty(shape).exponential_(generator=generator).log() for generator in self.generators]
        )


def smooth_temperature(k: int, num_scales: int) -> float:
    """Temperature of the soft codes of the "smooth" option: falls linearly from 0.27 to 0.0135."""
    return max(0.27 * (1 - 0.95 * scales.progress(k, num_scales)), 0.005)


class ScaleSettings(NamedTuple):
    """Sampling settings of one scale."""

    guidance: float
    temperature: float
    top_k: int
    top_p: float
    min_p: float


@dataclass(frozen=True)
class SamplingSettings:
    """How tokens are sampled. `cfg_scale`, `temperature` and the filters may be a list, one entry per scale, coarse to
    fine.

    `cfg_scale`: classifier-free guidance; 0 is no guidance (DiT's scale minus 1). According to `cfg_schedule` it grows
    from 0 at the coarsest scale to `cfg_scale` at the finest (linear, as released, or a half cosine) or is `constant`;
    a list is used unchanged. Scales before `cfg_from` have no guidance. `temperature` then divides the logits. The
    filters are applied in this order, 0 turning each off: `top_k` keeps the most likely codes, `top_p` the smallest set
    whose probability exceeds it, `min_p` the codes whose probability is at least that fraction of the highest one.
    `smooth` mixes codes by a Gumbel softmax: for demos, not for scores.

    Raises ValueError for an unknown `cfg_schedule`, and in `by_scale` for a value that is out of range.
    """

    cfg_scale: ByScale = 1.5
    cfg_schedule: str = "linear"  # or cosine, constant
    cfg_from: int = 0
    temperature: ByScale = 1.0
    top_k: ByScale = 0
    top_p: ByScale = 0.0
    min_p: ByScale = 0.0
    smooth: bool = False

    def __post_init__(self) -> None:
        if self.cfg_schedule not in get_args(GuidanceSchedule):
            raise ValueError(
                f"cfg_schedule={self.cfg_schedule!r}: choose one of {', '.join(get_args(GuidanceSchedule))}"
            )

    def by_scale(self, num_scales: int, codebook_size: int) -> list[ScaleSettings]:
        """The settings of each scale. Raises ValueError naming the value that is out of range."""
        ranges = {"temperature": (1e-6, math.inf), "top_k": (0, codebook_size), "top_p": (0, 1), "min_p": (0, 1)}
        lists = {name: self.spread(name, num_scales) for name in ("cfg_scale", *ranges)}
        for name, (low, high) in ranges.items():
            for value in lists[name]:
                if not low <= value <= high:
                    hint = f"must be between {low:g} and {high:g}" + (", the codebook size" if name == "top_k" else "")
                    hint = "must be above 0 (top_k=1 takes the most likely code)" if name == "temperature" else hint
                    raise ValueError(f"{name}={value}: {hint}")
        rest = zip(*(lists[name] for name in ranges), strict=True)
        return [
            ScaleSettings(
                self.guidance(k, num_scales, lists["cfg_scale"][k]), float(t), int(top_k), float(top_p), float(min_p)
            )
            for k, (t, top_k, top_p, min_p) in enumerate(rest)
        ]

    def spread(self, name: str, num_scales: int) -> list[Any]:
        """A setting as a list of one entry per scale."""
        value = getattr(self, name)
        if not isinstance(value, Sequence):
            return [value] * num_scales
        if len(value) != num_scales:
            raise ValueError(f"{name}={list(value)} has {len(value)} entries, but the pyramid has {num_scales} scales")
        return list(value)

    def guidance(self, k: int, num_scales: int, cfg_scale: float | int) -> float:
        """Guidance at scale k."""
        if k < self.cfg_from:
            return 0.0
        if isinstance(self.cfg_scale, Sequence) or self.cfg_schedule == "constant":
            return float(cfg_scale)
        t = scales.progress(k, num_scales)
        return cfg_scale * (t if self.cfg_schedule == "linear" else (1 - math.cos(math.pi * t)) / 2)


def sample_filtered(
    logits: Float[Tensor, "B l V"], uniform: Float[Tensor, "B l"], scale_settings: ScaleSettings
) -> tuple[Int[Tensor, "B l"], Float[Tensor, "B l V"]]:
    """(tokens, filtered logits): applies temperature and filters, then samples each token."""
    logits = logits if scale_settings.temperature == 1 else logits / scale_settings.temperature
    if scale_settings.top_k == 1:
        return logits.argmax(dim=-1), filter_logits(logits, 1)
    logits = filter_logits(logits, scale_settings.top_k, scale_settings.top_p)
    if scale_settings.min_p > 0:
        highest = logits.amax(dim=-1, keepdim=True)
        logits = logits.masked_fill(logits < highest + math.log(scale_settings.min_p), -torch.inf)
    return sample_tokens(logits, uniform), logits


def sample_codes(
    logits: Float[Tensor, "B l S"], uniform: Float[Tensor, "B l *n"], scale_settings: ScaleSettings, bases: Bases
) -> Int[Tensor, "B l"]:
    """Samples each token: digit by digit if it has several, otherwise by the cheaper of two methods, from the `top_k` codes only
    or from all."""
    if len(bases) > 1:
        return sample_digits(logits, uniform, scale_settings, bases)
    if 1 < scale_settings.top_k < logits.shape[-1]:
        return sample_top_k(logits, uniform, scale_settings)
    return sample_filtered(logits, uniform, scale_settings)[0]


def sample_digits(
    logits: Float[Tensor, "B l S"], uniform: Float[Tensor, "B l n"], scale_settings: ScaleSettings, bases: Bases
) -> Int[Tensor, "B l"]:
    """Samples each digit of each token by itself. Temperature, `top_p` and `min_p` apply to each digit; `top_k` applies to digits
    with more values than that, and 1 takes the most likely token."""
    digits = []
    for part, numbers, base in zip(logits.split(list(bases), dim=-1), uniform.unbind(-1), bases, strict=True):
        top_k = scale_settings.top_k if scale_settings.top_k < base else 0
        digits.append(sample_filtered(part, numbers, scale_settings._replace(top_k=top_k))[0])
    return tokens_of(torch.stack(digits, dim=-1), bases)


def sample_top_k(
    logits: Float[Tensor, "B l V"], uniform: Float[Tensor, "B l"], scale_settings: ScaleSettings
) -> Int[Tensor, "B l"]:
    """Tokens only, from the `top_k` most likely codes in descending order: nothing of codebook length is sorted, summed
    or exponentiated. The distribution is that of `sample_filtered`, but the same random numbers give different tokens,
    and of codes that tie with the k-th only the first are kept."""
    values, codes = logits.topk(scale_settings.top_k, dim=-1)  # descending
    probabilities = (in_float64(values) / scale_settings.temperature).softmax(dim=-1)
    reached = probabilities.cumsum(dim=-1)
    if scale_settings.top_p > 0:
        probabilities = probabilities.masked_fill(reached - probabilities >= scale_settings.top_p, 0)
    if scale_settings.min_p > 0:
        probabilities = probabilities.masked_fill(probabilities < scale_settings.min_p * probabilities[..., :1], 0)
    cdf = probabilities.cumsum(dim=-1)
    place = torch.searchsorted(cdf, in_float64(uniform)[..., None] * cdf[..., -1:], right=True).to(codes.device)
    return codes.gather(-1, place.clamp(max=scale_settings.top_k - 1))[..., 0]
