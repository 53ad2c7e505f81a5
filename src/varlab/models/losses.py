"""Losses and scores. Losses of tokens are in nats per token, errors in percent of tokens."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from varlab.models import scales
from varlab.models.digits import Bases, most_likely, over_digits

AdversarialLoss = Literal["hinge", "nonsaturating"]


class TokenScores(NamedTuple):
    """Cross entropy and error of each image, averaged over the tokens of each scale."""

    loss: Float[Tensor, "B K"]  # nats per token, without label smoothing
    error: Float[Tensor, "B K"]  # percent of tokens whose most likely code is wrong


def cross_entropy(
    logits: Float[Tensor, "B L V"], sequence: Int[Tensor, "B L"], label_smoothing: float = 0.0
) -> Float[Tensor, "B L"]:
    """Cross entropy of each token in nats; computed in fp32 regardless of the logits' dtype."""
    loss = F.cross_entropy(
        logits.float().flatten(0, 1), sequence.flatten(), label_smoothing=label_smoothing, reduction="none"
    )
    return loss.view_as(sequence)


@dataclass(frozen=True)
class TokenCrossEntropy:
    """The token loss of a `VARModule`: logits (B l V) and tokens (B l) -> loss of each token (B l)."""

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"label_smoothing={self.label_smoothing}: give a number from 0 up to, but not including, 1"
            )

    def __call__(self, logits: Float[Tensor, "B l V"], tokens: Int[Tensor, "B l"]) -> Float[Tensor, "B l"]:
        return cross_entropy(logits, tokens, self.label_smoothing)


def in_chunks(
    head: Callable[[Tensor], Tensor],
    x: Float[Tensor, "B L D"],
    loss_fn: Callable[[Tensor, slice], Tensor],
    num_chunks: int,
) -> Tensor:
    """`loss_fn(logits, token_slice)` of the logits that `head` computes from the hidden states `x`, concatenated along
    the tokens.

    The tokens are split into `num_chunks` slices. With more than one, the logits of only one slice are in memory at a
    time: the backward pass recomputes them.
    """
    length = x.shape[1]
    if num_chunks == 1:
        return loss_fn(head(x), slice(0, length))
    bounds = [length * i // num_chunks for i in range(num_chunks + 1)]

    def loss_of(x: Tensor, token_slice: slice) -> Tensor:
        return loss_fn(head(x), token_slice)

    parts = [
        checkpoint(loss_of, x[:, first:last], slice(first, last), use_reentrant=False)
        for first, last in pairwise(bounds)
    ]
    return torch.cat(parts, dim=1)  # pyright: ignore[reportArgumentType]


def token_errors(
    logits: Float[Tensor, "B L S"], sequence: Int[Tensor, "B L"], bases: Bases | None = None
) -> Float[Tensor, "B L"]:
    """100 for each token whose most likely code is wrong, else 0; the mean is a percentage. `bases`: of the digits that the logits
    are of; None for one logit per code."""
    if bases is None or len(bases) == 1:
        return 100 * (logits.argmax(dim=-1) != sequence).float()
    return 100 * (most_likely(logits, bases)[0] != sequence).float()


@torch.no_grad()
def token_scores(
    logits: Float[Tensor, "B L S"],
    sequence: Int[Tensor, "B L"],
    patch_nums: scales.PatchNums,
    bases: Bases | None = None,
) -> TokenScores:
    """Loss and error by image and scale. `bases`: see `token_errors`."""
    loss = over_digits(cross_entropy, logits, sequence, bases or [logits.shape[-1]])
    return TokenScores(by_scale(loss, patch_nums), by_scale(token_errors(logits, sequence, bases), patch_nums))


def by_scale(by_token: Float[Tensor, "B L"], patch_nums: scales.PatchNums) -> Float[Tensor, "B K"]:
    """Means over the tokens of each scale."""
    return torch.stack([by_token[:, first:last].mean(dim=1) for first, last in scales.scale_bounds(patch_nums)], dim=1)


def over_tokens(by_scale: Float[Tensor, "*rows K"], patch_nums: scales.PatchNums) -> Float[Tensor, " *rows"]:
    """Mean over all L tokens, from means per scale."""
    weights = torch.tensor(scales.lengths(patch_nums), dtype=by_scale.dtype, device=by_scale.device)
    return by_scale @ (weights / weights.sum())


@dataclass(frozen=True)
class L1:
    """Mean absolute difference of images in [-1, 1], times `weight`: a reconstruction loss of an `MSVQVAEModule`."""

    weight: float = 1.0

    def __call__(self, output: Float[Tensor, "B 3 H W"], images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, ""]:
        return self.weight * F.l1_loss(output, images)


@dataclass(frozen=True)
class L2:
    """Mean squared difference of images in [-1, 1], times `weight`: a reconstruction loss of an `MSVQVAEModule`."""

    weight: float = 1.0

    def __call__(self, output: Float[Tensor, "B 3 H W"], images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, ""]:
        return self.weight * F.mse_loss(output, images)


def psnr(images: Float[Tensor, "B 3 H W"], references: Float[Tensor, "B 3 H W"]) -> Float[Tensor, " B"]:
    """Peak signal-to-noise ratio of each image in dB; images in [-1, 1], so the peak is 2."""
    return 10 * torch.log10(4 / (images - references).square().mean(dim=(1, 2, 3)).clamp(min=1e-10))


def discriminator_loss(
    real: Float[Tensor, "B N"], fake: Float[Tensor, "B N"], kind: AdversarialLoss = "hinge"
) -> Float[Tensor, ""]:
    """The discriminator's loss: minimal for high logits on real images and low ones on reconstructions."""
    if kind == "hinge":
        return F.relu(1 - real).mean() + F.relu(1 + fake).mean()
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def generator_loss(fake: Float[Tensor, "B N"], kind: AdversarialLoss = "hinge") -> Float[Tensor, ""]:
    """The tokenizer's adversarial loss."""
    return -fake.mean() if kind == "hinge" else F.softplus(-fake).mean()


def adaptive_weight(
    reconstruction: Float[Tensor, ""],
    adversarial: Float[Tensor, ""],
    last_layer: Tensor,
    bounds: tuple[float, float] = (0.015, 1e4),
) -> Float[Tensor, ""]:
    """Ratio of the two losses' gradient norms at the decoder's last layer (VQGAN, equation 7), clamped to `bounds`: it
    gives the adversarial loss the same gradient norm there as the reconstruction loss."""
    gradients = [
        torch.autograd.grad(loss, last_layer, retain_graph=True)[0].norm() for loss in (reconstruction, adversarial)
    ]
    return (gradients[0] / (gradients[1] + 1e-6)).clamp(*bounds).detach()


def gradient_penalty(logits: Float[Tensor, "B N"], images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, ""]:
    """R1: half the squared norm of the gradient of the logits at real images (Mescheder et al. 2018), mean over images."""
    (gradient,) = torch.autograd.grad(logits.mean(dim=1).sum(), images, create_graph=True)
    return gradient.square().sum(dim=(1, 2, 3)).mean() / 2
