"""Convolutional encoder and decoder of the tokenizer (the VQGAN architecture, as adopted in VAR's appendix).

Widths are `channels * channel_mult[i]` for level i, level 0 at full resolution. Every level but the last halves the
side, so `downsample` = 2 ** (levels - 1). Only the coarsest level and the middle blocks have attention.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn


def norm(width: int, num_groups: int) -> nn.GroupNorm:
    """The autoencoder's group norm. Raises ValueError if the width is not divisible by the number of groups."""
    if width % num_groups:
        raise ValueError(f"width {width} is not divisible by num_groups={num_groups}; choose channels so that it is")
    return nn.GroupNorm(num_groups, width, eps=1e-6)


def silu(x: Float[Tensor, "B c H W"]) -> Float[Tensor, "B c H W"]:
    """SiLU of a tensor that is not used elsewhere: in place when gradients are off, which saves a large allocation."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


class ResidualBlock(nn.Module):
    """x + branch(x); a 1x1 convolution on the skip where the width changes."""

    def __init__(self, width_in: int, width_out: int, num_groups: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = norm(width_in, num_groups)
        self.conv1 = nn.Conv2d(width_in, width_out, 3, padding=1)
        self.norm2 = norm(width_out, num_groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1)
        self.skip = nn.Conv2d(width_in, width_out, 1) if width_in != width_out else nn.Identity()

    def forward(self, x: Float[Tensor, "B c H W"]) -> Float[Tensor, "B d H W"]:
        h = self.conv1(silu(self.norm1(x)))
        h = self.conv2(self.dropout(silu(self.norm2(h))))
        return h.add_(self.skip(x))


class SpatialAttention(nn.Module):
    """Single-head attention over all positions of the map, added to the input."""

    def __init__(self, width: int, num_groups: int) -> None:
        super().__init__()
        self.norm = norm(width, num_groups)
        self.qkv = nn.Conv2d(width, 3 * width, 1)
        self.proj = nn.Conv2d(width, width, 1)

    def forward(self, x: Float[Tensor, "B c H W"]) -> Float[Tensor, "B c H W"]:
        q, k, v = rearrange(self.qkv(self.norm(x)), "B (three c) H W -> three B 1 (H W) c", three=3)
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj(rearrange(h, "B 1 (H W) c -> B c H W", H=x.shape[2]))


class Downsample(nn.Conv2d):
    """Halves the side. The released weights expect zero padding at the bottom and right only."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width, 3, stride=2)

    def forward(self, input: Float[Tensor, "B c H W"]) -> Float[Tensor, "B c h w"]:
        return super().forward(F.pad(input, (0, 1, 0, 1)))


class Upsample(nn.Conv2d):
    """Doubles the side: nearest neighbor, then a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width, 3, padding=1)

    def forward(self, input: Float[Tensor, "B c h w"]) -> Float[Tensor, "B c H W"]:
        return super().forward(F.interpolate(input, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks at one resolution, each followed by attention if the level has it, then the resampling."""

    def __init__(
        self,
        width_in: int,
        width_out: int,
        num_blocks: int,
        has_attention: bool,
        resample: nn.Module,
        num_groups: int,
        dropout: float,
    ) -> None:
        super().__init__()
        widths = [width_in] + [width_out] * (num_blocks - 1)
        self.blocks = nn.ModuleList([ResidualBlock(width, width_out, num_groups, dropout) for width in widths])
        self.attentions = nn.ModuleList(
            [SpatialAttention(width_out, num_groups) if has_attention else nn.Identity() for _ in widths]
        )
        self.resample = resample

    def forward(self, x: Float[Tensor, "B c H W"]) -> Float[Tensor, "B d h w"]:
        for block, attention in zip(self.blocks, self.attentions, strict=True):
            x = attention(block(x))
        return self.resample(x)


def middle(width: int, num_groups: int, dropout: float) -> nn.Sequential:
    """Residual block, attention, residual block at the coarsest resolution."""
    return nn.Sequential(
        ResidualBlock(width, width, num_groups, dropout),
        SpatialAttention(width, num_groups),
        ResidualBlock(width, width, num_groups, dropout),
    )


class Encoder(nn.Module):
    """Images in [-1, 1] -> feature map, `downsample` times smaller per side."""

    def __init__(
        self,
        channels: int,
        channel_mult: Sequence[int],
        num_blocks: int,
        codebook_dim: int,
        num_groups: int,
        dropout: float,
    ) -> None:
        super().__init__()
        widths = [channels * mult for mult in channel_mult]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)
        self.levels = nn.ModuleList(
            Level(
                width_in,
                width,
                num_blocks,
                i == last,
                nn.Identity() if i == last else Downsample(width),
                num_groups,
                dropout,
            )
            for i, (width_in, width) in enumerate(zip([channels, *widths], widths, strict=False))
        )
        self.middle = middle(widths[-1], num_groups, dropout)
        self.norm_out = norm(widths[-1], num_groups)
        self.conv_out = nn.Conv2d(widths[-1], codebook_dim, 3, padding=1)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C h w"]:
        x = self.conv_in(images)
        for level in self.levels:
            x = level(x)
        return self.conv_out(silu(self.norm_out(self.middle(x))))


class Decoder(nn.Module):
    """Feature map -> images, not clamped. Levels are numbered as in the encoder and run from last to first."""

    def __init__(
        self,
        channels: int,
        channel_mult: Sequence[int],
        num_blocks: int,
        codebook_dim: int,
        num_groups: int,
        dropout: float,
    ) -> None:
        super().__init__()
        widths = [channels * mult for mult in channel_mult]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(codebook_dim, widths[-1], 3, padding=1)
        self.middle = middle(widths[-1], num_groups, dropout)
        self.levels = nn.ModuleList(
            Level(
                width_in,
                width,
                num_blocks + 1,
                i == last,
                nn.Identity() if i == 0 else Upsample(width),
                num_groups,
                dropout,
            )
            for i, (width_in, width) in enumerate(zip([*widths[1:], widths[-1]], widths, strict=True))
        )
        self.norm_out = norm(widths[0], num_groups)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, f_hat: Float[Tensor, "B C h w"]) -> Float[Tensor, "B 3 H W"]:
        x = self.middle(self.conv_in(f_hat))
        for level in reversed(self.levels):
            x = level(x)
        return self.conv_out(silu(self.norm_out(x)))
