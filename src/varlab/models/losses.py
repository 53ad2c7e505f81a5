"""Losses and the figures read off them. Losses are in nats per token, errors in percent of tokens."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from varlab.models import scales


class TokenScores(NamedTuple):
    """Cross entropy and error of each image, averaged over the tokens of each scale."""

    loss: Float[Tensor, "B K"]  # nats per token, without label smoothing
    error: Float[Tensor, "B K"]  # percent of tokens whose most likely code is another


def cross_entropy(
    logits: Float[Tensor, "B L V"], sequence: Int[Tensor, "B L"], label_smoothing: float = 0.0
) -> Float[Tensor, "B L"]:
    """Cross entropy of each token in nats; computed in fp32 whatever the type of the logits."""
    loss = F.cross_entropy(
        logits.float().flatten(0, 1), sequence.flatten(), label_smoothing=label_smoothing, reduction="none"
    )
    return loss.view_as(sequence)


def token_errors(logits: Float[Tensor, "B L V"], sequence: Int[Tensor, "B L"]) -> Float[Tensor, "B L"]:
    """100 for each token whose most likely code is another, else 0: their mean is percent."""
    return 100 * (logits.argmax(dim=-1) != sequence).float()


@torch.no_grad()
def token_scores(
    logits: Float[Tensor, "B L V"], sequence: Int[Tensor, "B L"], patch_nums: scales.PatchNums
) -> TokenScores:
    """Loss and error by image and scale."""
    return TokenScores(
        by_scale(cross_entropy(logits, sequence), patch_nums), by_scale(token_errors(logits, sequence), patch_nums)
    )


def by_scale(by_token: Float[Tensor, "B L"], patch_nums: scales.PatchNums) -> Float[Tensor, "B K"]:
    """Means over the tokens of each scale."""
    return torch.stack([by_token[:, first:last].mean(dim=1) for first, last in scales.scale_bounds(patch_nums)], dim=1)


def over_tokens(by_scale: Float[Tensor, "*rows K"], patch_nums: scales.PatchNums) -> Float[Tensor, " *rows"]:
    """Mean over all L tokens of figures averaged by scale."""
    weights = torch.tensor(scales.lengths(patch_nums), dtype=by_scale.dtype, device=by_scale.device)
    return by_scale @ (weights / weights.sum())


def psnr(images: Float[Tensor, "B 3 H W"], references: Float[Tensor, "B 3 H W"]) -> Float[Tensor, " B"]:
    """Peak signal-to-noise ratio of each image in dB; images in [-1, 1], so the peak is 2."""
    return 10 * torch.log10(4 / (images - references).square().mean(dim=(1, 2, 3)).clamp(min=1e-10))


def discriminator_loss(
    real: Float[Tensor, "B N"], fake: Float[Tensor, "B N"], kind: str = "hinge"
) -> Float[Tensor, ""]:
    """What the discriminator minimizes: high logits for real images, low ones for reconstructions."""
    if kind == "hinge":
        return F.relu(1 - real).mean() + F.relu(1 + fake).mean()
    if kind == "nonsaturating":
        return F.softplus(-real).mean() + F.softplus(fake).mean()
    raise ValueError(f"adversarial loss {kind!r} is unknown: choose hinge or nonsaturating")


def generator_loss(fake: Float[Tensor, "B N"], kind: str = "hinge") -> Float[Tensor, ""]:
    """What the tokenizer minimizes against the discriminator."""
    return -fake.mean() if kind == "hinge" else F.softplus(-fake).mean()


def adaptive_weight(
    reconstruction: Float[Tensor, ""],
    adversarial: Float[Tensor, ""],
    last_layer: Tensor,
    bounds: tuple[float, float] = (0.015, 1e4),
) -> Float[Tensor, ""]:
    """Ratio of the two losses' gradients at the decoder's last layer (VQGAN, equation 7), clamped: with it the adversarial
    loss pulls as hard as the reconstruction loss."""
    gradients = [
        torch.autograd.grad(loss, last_layer, retain_graph=True)[0].norm() for loss in (reconstruction, adversarial)
    ]
    return (gradients[0] / (gradients[1] + 1e-6)).clamp(*bounds).detach()


def gradient_penalty(logits: Float[Tensor, "B N"], images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, ""]:
    """R1: half the squared norm of the gradient of the logits at real images (Mescheder et al. 2018), mean over images."""
    (gradient,) = torch.autograd.grad(logits.mean(dim=1).sum(), images, create_graph=True)
    return gradient.square().sum(dim=(1, 2, 3)).mean() / 2
