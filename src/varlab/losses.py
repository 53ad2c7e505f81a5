"""Losses and the figures read off them. Losses are in nats per token, errors in percent of tokens."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from varlab import scales


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


@torch.no_grad()
def token_scores(
    logits: Float[Tensor, "B L V"], sequence: Int[Tensor, "B L"], patch_nums: scales.PatchNums
) -> TokenScores:
    """Loss and error by image and scale."""
    loss = cross_entropy(logits, sequence)
    error = 100 * (logits.argmax(dim=-1) != sequence).float()
    spans = scales.spans(patch_nums)
    return TokenScores(
        *(torch.stack([x[:, first:last].mean(dim=1) for first, last in spans], dim=1) for x in (loss, error))
    )


def over_tokens(by_scale: Float[Tensor, "*rows K"], patch_nums: scales.PatchNums) -> Float[Tensor, " *rows"]:
    """Mean over all L tokens of figures averaged by scale."""
    weights = torch.tensor(scales.lengths(patch_nums), dtype=by_scale.dtype, device=by_scale.device)
    return by_scale @ (weights / weights.sum())


def psnr(images: Float[Tensor, "B 3 H W"], references: Float[Tensor, "B 3 H W"]) -> Float[Tensor, " B"]:
    """Peak signal-to-noise ratio of each image in dB; images in [-1, 1], so the peak is 2."""
    return 10 * torch.log10(4 / (images - references).square().mean(dim=(1, 2, 3)).clamp(min=1e-10))
