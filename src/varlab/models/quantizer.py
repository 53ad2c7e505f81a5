"""Multi-scale residual vector quantizer (VAR, section 3.2, algorithms 1 and 2).

The residual loop is implemented once, in `residual_loop`; encoding, decoding, teacher forcing, training, k-means and
sampling all use it.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from varlab.models import scales
from varlab.models.custom_classes import RecordedModule
from varlab.models.digits import Bases, digits_of, with_errors

MIN_NORM = 1e-4  # shorter vectors have no direction
MAX_DISTANCES = 1 << 26  # distances between codes and vectors computed at a time: 256 MB


def phi_of_scale(num_phis: int, num_scales: int) -> list[int]:
    """Which of `num_phis` smoothing convolutions each scale uses: the one whose tick is nearest to t = k / (K - 1).

    Scales 2 and 7 of the released 10 are exact ties, decided by float64 rounding: numpy's `linspace` and the first
    minimum reproduce the choice that the weights were trained with; other arithmetic does not.
    """
    margin = 1 / 3 / num_phis if num_phis == 4 else 1 / 2 / num_phis
    ticks = np.linspace(margin, 1 - margin, num_phis)
    return [int(np.argmin(np.abs(ticks - scales.progress(k, num_scales)))) for k in range(num_scales)]


class Quantized(NamedTuple):
    """What a training step of the tokenizer needs from the quantizer."""

    f_hat: Float[Tensor, "B C H W"]  # quantized f; gradients pass through to f
    vq_loss: Float[Tensor, ""]
    token_maps: list[Int[Tensor, "B _"]]
    vq_losses: Float[Tensor, " K"]  # per scale; vq_loss is their mean, plus that of the regularizers


class CodebookHealth(NamedTuple):
    """How many codes are used, and how evenly."""

    usage: Float[Tensor, ""]  # percent of the codebook
    perplexity: Float[Tensor, ""]  # 1 to V


def perplexity(hits: Float[Tensor, "*rows V"]) -> Float[Tensor, " *rows"]:
    """Exponential of the entropy of hit counts."""
    share = hits / hits.sum(dim=-1, keepdim=True).clamp(min=1e-12)
    return torch.exp(-(share * share.clamp(min=1e-12).log()).sum(dim=-1))


def perplexity_of(digits: Sequence[Float[Tensor, " _"]]) -> Float[Tensor, ""]:
    """The product of the perplexities of the hits of each digit."""
    return torch.stack([perplexity(hits) for hits in digits]).prod(dim=0)


def rotated(f: Float[Tensor, "B C H W"], f_hat: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
    """`f_hat` expressed as a rotation and scaling of `f`, through which the gradient flows (the rotation trick, Fifty
    et al. 2024)."""
    with torch.no_grad():
        f_norm, f_hat_norm = (x.norm(dim=1, keepdim=True) for x in (f, f_hat))
        has_direction = (f_norm > MIN_NORM) & (f_hat_norm > MIN_NORM)
        f_unit, f_hat_unit = f / f_norm.clamp(min=MIN_NORM), f_hat / f_hat_norm.clamp(min=MIN_NORM)
        middle = F.normalize(f_unit + f_hat_unit, dim=1)
        ratio = f_hat_norm / f_norm.clamp(min=MIN_NORM)

    def along(x: Tensor, unit: Tensor) -> Tensor:
        return (x * unit).sum(dim=1, keepdim=True)

    turned = f - 2 * along(f, middle) * middle + 2 * along(f, f_unit) * f_hat_unit
    return torch.where(has_direction, ratio * turned, f + (f_hat - f).detach())


class ResidualQuantizer(RecordedModule):
    """Encodes a feature map as K token maps, coarse to fine, each encoding the residual of the coarser ones. What a token
    stands for is up to the members of this family: `nearest` (vectors -> tokens) and `embed` (tokens -> vectors).

    `codebook_size` V: tokens are 0 to V - 1. `bases`: of the digits of a token that a head can predict one by one
    (models/digits.py); None is one digit. `codebook_dim` C: of the vectors. `num_phis`: smoothing convolutions shared by
    the scales (4 in the released weights, 1 for all scales, None for one per scale). `phi_ratio` r: phi(h) = (1 - r) h +
    r conv(h); 0 is the identity, without parameters. `beta`: weight of the commitment loss. `gradient`: gradient estimator of
    the lookup. `scale_dropout`: in training mode, fraction of the images that stop at a random scale from `dropout_from` on,
    so that coarse maps can be decoded on their own.
    """

    changeable: ClassVar = frozenset({"beta", "gradient", "scale_dropout", "dropout_from"})
    hits: Tensor
    num_updates: Tensor

    def __init__(
        self,
        patch_nums: scales.PatchNums,
        codebook_size: int,
        codebook_dim: int,
        num_phis: int | None = 4,
        phi_ratio: float = 0.5,
        beta: float = 0.25,
        gradient: Literal["straight_through", "rotation"] = "straight_through",
        scale_dropout: float = 0.0,
        dropout_from: int = 3,
        bases: Bases | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= scale_dropout <= 1:
            raise ValueError(f"scale_dropout={scale_dropout}: give a fraction of the images between 0 and 1")
        self.patch_nums = scales.plain(patch_nums)
        self.sides = scales.sides(patch_nums)
        self.num_scales = len(self.sides)
        self.bases = [codebook_size] if bases is None else list(bases)
        self.codebook_size = codebook_size
        self.codebook_dim = codebook_dim
        self.num_phis = num_phis
        self.phi_ratio = phi_ratio
        self.beta = beta
        self.gradient = gradient
        self.scale_dropout = scale_dropout
        self.dropout_from = dropout_from
        self.phi_index = list(range(self.num_scales)) if num_phis is None else phi_of_scale(num_phis, self.num_scales)
        self.phis = nn.ModuleList(
            nn.Conv2d(codebook_dim, codebook_dim, 3, padding=1) if phi_ratio > 0 else nn.Identity()
            for _ in range(num_phis or self.num_scales)
        )
        self.register_buffer(
            "hits", torch.zeros(self.num_scales, sum(self.bases))
        )  # moving average, per value of each digit
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))

    def head_arguments(self) -> dict[str, Any]:
        """Further arguments of a VAR that predicts these codes."""
        return {"bases": self.bases} if len(self.bases) > 1 else {}

    def at(self, patch_nums: scales.PatchNums) -> "ResidualQuantizer":
        """The quantizer of another pyramid with as many scales; it shares its weights with this one."""
        if len(patch_nums) != self.num_scales:
            raise ValueError(f"patch_nums={list(patch_nums)}: give as many scales as {self.patch_nums}")
        other = copy.copy(self)
        other.patch_nums, other.sides = scales.plain(patch_nums), scales.sides(patch_nums)
        other.arguments = {**self.arguments, "patch_nums": other.patch_nums}
        return other

    def init_weights(self) -> None:
        """Called once by the tokenizer, which initializes the convolutions."""

    def undecayed(self) -> list[Tensor]:
        """Parameters without weight decay."""
        return []

    def size_of(self, k: int) -> int:
        """Number of codes of scale k, of which tokens are the first ones."""
        return self.codebook_size

    def bases_of(self, k: int) -> list[int]:
        """`bases` of the tokens of scale k."""
        return self.bases if len(self.bases) > 1 else [self.size_of(k)]

    def nearest(self, z: Float[Tensor, "B l C"], k: int) -> Int[Tensor, "B l"]:
        """The token whose vector represents each vector of scale k best. Always fp32: bf16 confuses nearby codes."""
        raise NotImplementedError

    def embed(self, tokens: Int[Tensor, "*rows"], k: int) -> Float[Tensor, "*rows C"]:
        """The vector of each token of scale k."""
        raise NotImplementedError

    def regularizer(self, z: Float[Tensor, "B l C"], k: int) -> Float[Tensor, ""] | None:
        """A loss of the vectors that are looked up at scale k, through which they get a gradient; added to `vq_loss`."""
        return None

    def phi(self, h: Float[Tensor, "B C H W"], k: int) -> Float[Tensor, "B C H W"]:
        """Smooths the upsampled codes of scale k."""
        if self.phi_ratio == 0:
            return h
        return (1 - self.phi_ratio) * h + self.phi_ratio * self.phis[self.phi_index[k]](h)

    def accumulate(
        self, f_hat: Float[Tensor, "B C H W"], codes: Float[Tensor, "B l C"], k: int
    ) -> Float[Tensor, "B C H W"]:
        """`f_hat` with the codes of scale k added."""
        h, w = self.sides[k]
        with torch.autocast(f_hat.device.type, enabled=False):  # rounded sums would select other codes
            code_map = rearrange(codes, "B (h w) C -> B C h w", h=h, w=w)
            if (h, w) != self.sides[-1]:
                code_map = F.interpolate(code_map, size=self.sides[-1], mode="bicubic")
            return f_hat + self.phi(code_map, k)

    def at_scale(self, x: Float[Tensor, "B C H W"], k: int) -> Float[Tensor, "B l C"]:
        """A map at latent resolution, area-averaged to scale k and flattened row by row."""
        if self.sides[k] != self.sides[-1]:
            x = F.interpolate(x, size=self.sides[k], mode="area")
        return rearrange(x, "B C h w -> B (h w) C")

    def empty(self, batch_size: int) -> Float[Tensor, "B C H W"]:
        """The zero `f_hat` that every pyramid starts from."""
        return self.hits.new_zeros(batch_size, self.codebook_dim, *self.sides[-1])

    def residual_loop(
        self,
        f_hat: Float[Tensor, "B C H W"],
        choose: Callable[[int, Tensor], tuple[Any, Tensor]],
        adjust: Callable[[int, Tensor, Tensor], Tensor] | None = None,
    ) -> Iterator[tuple[Any, Float[Tensor, "B C H W"]]]:
        """Yields, scale by scale, coarse to fine, (tokens, `f_hat` with their codes added).

        `choose(k, f_hat)` returns tokens and codes (B l C) of scale k given the sum so far. `adjust(k, before, after)`
        may replace the new sum. Callers that need fewer scales stop early: nothing is computed ahead.
        """
        for k in range(self.num_scales):
            tokens, codes = choose(k, f_hat)
            after = self.accumulate(f_hat, codes, k)
            f_hat = after if adjust is None else adjust(k, f_hat, after)
            yield tokens, f_hat

    def encode(self, f: Float[Tensor, "B C H W"]) -> list[Int[Tensor, "B _"]]:
        """Token maps of `f`, coarse to fine (VAR, algorithm 1)."""
        return self.encode_with_errors(f, None)[0]

    def encode_with_errors(
        self, f: Float[Tensor, "B C H W"], rates: Float[Tensor, " B"] | None
    ) -> tuple[list[Int[Tensor, "B _"]], list[Int[Tensor, "B _"]]]:
        """(token maps of `f`, the same with errors that the finer ones correct): after each scale a share of digits, `rates` for
        each image, is replaced at random, and the next scale encodes what is then left over (Infinity, section 3.4: bitwise
        self-correction). None leaves out errors: both are equal."""
        f, found = f.float(), []

        def choose(k: int, f_hat: Tensor) -> tuple[Tensor, Tensor]:
            tokens = self.nearest(self.at_scale(f - f_hat, k), k)
            found.append(tokens)
            if rates is not None:
                tokens = with_errors(tokens, self.bases_of(k), rates)
            return tokens, self.embed(tokens, k)

        seen = [tokens for tokens, _ in self.residual_loop(torch.zeros_like(f), choose)]
        return found, seen

    def partial_sums(self, token_maps: Sequence[Int[Tensor, "B _"]]) -> list[Float[Tensor, "B C H W"]]:
        """`f_hat` after each scale, coarse to fine (VAR, algorithm 2); the last one is the decoder's input. One
        sum per token map, which may be fewer than the scales."""
        loop = self.residual_loop(self.empty(len(token_maps[0])), lambda k, _: (None, self.embed(token_maps[k], k)))
        return [f_hat for _, f_hat in islice(loop, len(token_maps))]

    def teacher_forcing_inputs(
        self, token_maps: Sequence[Int[Tensor, "B _"]], order: scales.Order = "scales"
    ) -> Float[Tensor, "B Lm1 C"]:
        """The transformer's inputs for predicting scales 1..K-1: the sum of the coarser scales, area-averaged to each
        scale. In raster order, for predicting all tokens but the first: the code of the previous token.

        Empty (B 0 C) for a pyramid of one scale.
        """
        if order == "raster":
            return torch.cat([self.embed(tokens, k) for k, tokens in enumerate(token_maps)], dim=1)[:, :-1]
        if len(token_maps) == 1:
            return self.empty(len(token_maps[0])).flatten(2).mT[:, :0]
        partial = self.partial_sums(token_maps[:-1])
        return torch.cat([self.at_scale(f_hat, k) for k, f_hat in enumerate(partial, start=1)], dim=1)

    def forward(self, f: Float[Tensor, "B C H W"]) -> Quantized:
        """Quantizes for training. `vq_loss` is the mean over scales of codebook loss + beta * commitment loss, each a
        mean over all elements, so its value is (1 + beta) times the mean squared error of f_hat after each scale."""
        f = f.float()
        last = self.last_scales(len(f), f.device)

        penalties: list[Tensor] = []

        def choose(k: int, f_hat: Tensor) -> tuple[Tensor, Tensor]:
            z = self.at_scale(f - f_hat.detach(), k)
            tokens = self.nearest(z.detach(), k)
            if self.training and (penalty := self.regularizer(z, k)) is not None:
                penalties.append(penalty)
            return tokens, self.embed(tokens, k)

        def used(k: int) -> Tensor | None:
            return None if last is None else (last >= k)[:, None, None, None]

        def adjust(k: int, before: Tensor, after: Tensor) -> Tensor:
            is_used = used(k)
            return after if is_used is None else torch.where(is_used, after, before)

        token_maps, vq_losses, f_hat = [], [], torch.zeros_like(f)
        loop = self.residual_loop(f_hat, choose, adjust)
        for k, (tokens, f_hat) in enumerate(loop):
            error = (f_hat - f.detach()).square() + self.beta * (f_hat.detach() - f).square()
            is_used = used(k)
            vq_losses.append(error.mean() if is_used is None else (error * is_used).mean())
            token_maps.append(tokens)
        by_scale = torch.stack(vq_losses)
        through = f + (f_hat - f).detach() if self.gradient == "straight_through" else rotated(f, f_hat.detach())
        vq_loss = by_scale.mean() + (torch.stack(penalties).mean() if penalties else 0)
        return Quantized(through, vq_loss, token_maps, by_scale)

    def last_scales(self, batch_size: int, device: torch.device) -> Int[Tensor, " B"] | None:
        """The last scale of each image in this training step; None if all scales are used."""
        if not self.training or self.scale_dropout == 0:
            return None
        finest = self.num_scales - 1
        stop = torch.randint(min(self.dropout_from, finest), finest + 1, (batch_size,), device=device)
        return torch.where(torch.rand(batch_size, device=device) < self.scale_dropout, stop, finest)

    @torch.no_grad()
    def update_hits(self, token_maps: Sequence[Int[Tensor, "B _"]]) -> None:
        """Updates the moving average of hit counts; counts are summed over all ranks, so every rank must call this. The
        weight of the new counts is 1 at first, then 0.1, and 0.01 after 100 updates."""
        counts = self.count(token_maps)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(counts)
        weight = torch.where(self.num_updates < 100, 0.1, 0.01)
        self.hits.lerp_(counts, torch.where(self.num_updates == 0, 1.0, weight))
        self.num_updates += 1

    def count(self, token_maps: Sequence[Int[Tensor, "B _"]]) -> Float[Tensor, "K S"]:
        """How often each code, or each value of each digit, occurs at each scale."""
        counts = torch.zeros_like(self.hits)
        for count, tokens in zip(counts, token_maps, strict=True):  # bincount would make the host wait
            for part, digits in zip(
                count.split(self.bases), digits_of(tokens.flatten(), self.bases).unbind(-1), strict=True
            ):
                part.scatter_add_(0, digits, torch.ones_like(digits, dtype=counts.dtype))
        return counts

    def lookup_vectors(self, f: Float[Tensor, "B C H W"]) -> list[Float[Tensor, "B _ C"]]:
        """The vectors that are looked up at each scale while encoding `f`."""
        f, vectors = f.float(), []

        def choose(k: int, f_hat: Tensor) -> tuple[None, Tensor]:
            vectors.append(self.at_scale(f - f_hat, k))
            return None, self.embed(self.nearest(vectors[-1], k), k)

        for _ in self.residual_loop(torch.zeros_like(f), choose):
            pass
        return vectors

    def hits_of_scale(self, hits: Float[Tensor, "K S"], k: int) -> list[Float[Tensor, " _"]]:
        """Hits of the values that each digit can have at scale k."""
        bases = self.bases_of(k)
        return list(hits[k, : sum(bases)].split(bases))

    def hits_of_all(self, hits: Float[Tensor, "K S"]) -> list[Float[Tensor, " _"]]:
        """Hits of the values of each digit, over all scales."""
        return list(hits.sum(dim=0).split(self.bases))

    def perplexity(self) -> Float[Tensor, " K"]:
        """Number of codes in use at each scale as the exponential of the entropy of the hits: 1 to V. For codes of several digits
        the entropies of the digits are added, as if they were independent: an upper bound."""
        return torch.stack([perplexity_of(self.hits_of_scale(self.hits, k)) for k in range(self.num_scales)])

    def overall(self) -> CodebookHealth:
        """Usage and perplexity over all scales; a code (or a value of a digit) counts as used if it has at least 0.08 times
        the mean hits."""
        parts = self.hits_of_all(self.hits)
        used = torch.cat([part >= 0.08 * part.mean() for part in parts]).float().mean() * (self.hits.sum() > 0)
        return CodebookHealth(100 * used, perplexity_of(parts))

    def codebook_usage(self, global_batch_size: int) -> Float[Tensor, " K"]:
        """Percent of the codebook in use at each scale: codes with at least 0.08 times the mean hits per code of a
        full-resolution map."""
        h, w = self.sides[-1]
        least = 0.08 * global_batch_size * h * w
        used = [
            torch.cat([part >= least / len(part) for part in self.hits_of_scale(self.hits, k)])
            for k in range(self.num_scales)
        ]
        return 100 * torch.stack([values.float().mean() for values in used])


class MultiScaleQuantizer(ResidualQuantizer):
    """Codes are the rows of a table, as released. `lookup`: "l2" or "cosine" (released name: znorm); the vector added is the
    raw row in both."""

    def __init__(
        self,
        patch_nums: scales.PatchNums = scales.RELEASED_256,
        codebook_size: int = 4096,
        codebook_dim: int = 32,
        num_phis: int | None = 4,
        phi_ratio: float = 0.5,
        lookup: Literal["l2", "cosine"] = "l2",
        beta: float = 0.25,
        gradient: Literal["straight_through", "rotation"] = "straight_through",
        scale_dropout: float = 0.0,
        dropout_from: int = 3,
    ) -> None:
        super().__init__(
            patch_nums, codebook_size, codebook_dim, num_phis, phi_ratio, beta, gradient, scale_dropout, dropout_from
        )
        self.lookup = lookup
        self.codebook = nn.Embedding(codebook_size, codebook_dim)

    def init_weights(self) -> None:
        """Codebook uniform in +-1 / (36 sqrt(C)): 0.0049 at C = 32."""
        bound = 1 / (36 * self.codebook_dim**0.5)
        nn.init.uniform_(self.codebook.weight, -bound, bound)

    def undecayed(self) -> list[Tensor]:
        return [self.codebook.weight]

    def table(self, k: int) -> Float[Tensor, "_ C"]:
        """The codes of scale k: the same for all scales."""
        return self.codebook.weight

    def nearest(self, z: Float[Tensor, "B l C"], k: int = 0) -> Int[Tensor, "B l"]:
        """Index of the code nearest to each vector; ties go to the lowest index."""
        with torch.autocast(z.device.type, enabled=False):
            z, codes = z.float(), self.table(k).float()
            if self.lookup == "cosine":
                return (F.normalize(z, dim=-1) @ F.normalize(codes, dim=-1).T).argmax(dim=-1)
            norms = codes.square().sum(dim=1)  # the squared length of z is the same for all codes
            chunks = z.flatten(0, 1).split(max(1, MAX_DISTANCES // len(codes)))
            found = [torch.addmm(norms, chunk, codes.T, alpha=-2).argmin(dim=1) for chunk in chunks]
            return torch.cat(found).view(z.shape[:2])

    def embed(self, tokens: Int[Tensor, "*rows"], k: int = 0) -> Float[Tensor, "*rows C"]:
        return F.embedding(tokens, self.table(k))
