"""The tokenizer: encoder, multi-scale residual quantizer, decoder (VAR, section 3.2 and appendix)."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from varlab.models import scales
from varlab.models.autoencoder import Decoder, Encoder
from varlab.models.custom_classes import named
from varlab.models.quantizer import MultiScaleQuantizer


class Reconstruction(NamedTuple):
    """Outcome of a training forward pass of the tokenizer."""

    images: Float[Tensor, "B 3 H W"]  # not clamped
    vq_loss: Float[Tensor, ""]
    token_maps: list[Int[Tensor, "B _"]]
    vq_losses: Float[Tensor, " K"]


class MSVQVAE(nn.Module):
    """Images in [-1, 1] <-> K token maps. Defaults are the released tokenizer's (109M parameters at 256 px).

    Raises ValueError for a pyramid or widths that do not fit together, and in `encode` for images of another side than
    `downsample` times the last entry of patch_nums.
    """

    quantizer_class = MultiScaleQuantizer

    def __init__(
        self,
        patch_nums: scales.PatchNums = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
        codebook_size: int = 4096,
        codebook_dim: int = 32,
        channels: int = 160,
        channel_mult: Sequence[int] = (1, 1, 2, 2, 4),
        num_blocks: int = 2,
        num_groups: int = 32,
        num_phis: int | None = 4,
        phi_ratio: float = 0.5,
        lookup: str = "l2",
        beta: float = 0.25,
        dropout: float = 0.0,
        gradient: str = "straight_through",
        scale_dropout: float = 0.0,
        dropout_from: int = 3,
    ) -> None:
        super().__init__()
        self.sizes: dict[str, Any] = {
            "patch_nums": [pn if isinstance(pn, int) else list(pn) for pn in patch_nums],
            "codebook_size": codebook_size,
            "codebook_dim": codebook_dim,
            "channels": channels,
            "channel_mult": list(channel_mult),
            "num_blocks": num_blocks,
            "num_groups": num_groups,
            "num_phis": num_phis,
            "phi_ratio": phi_ratio,
            "lookup": lookup,
            "beta": beta,
            "dropout": dropout,
            **named(self, MSVQVAE),
        }
        self.patch_nums = self.sizes["patch_nums"]
        self.downsample = 2 ** (len(channel_mult) - 1)
        self.encoder = Encoder(channels, channel_mult, num_blocks, codebook_dim, num_groups, dropout)
        self.pre_conv = nn.Conv2d(codebook_dim, codebook_dim, 3, padding=1)
        self.quantizer = self.quantizer_class(
            patch_nums,
            codebook_size,
            codebook_dim,
            num_phis,
            phi_ratio,
            lookup,
            beta,
            gradient,
            scale_dropout,
            dropout_from,
        )
        self.post_conv = nn.Conv2d(codebook_dim, codebook_dim, 3, padding=1)
        self.decoder = Decoder(channels, channel_mult, num_blocks, codebook_dim, num_groups, dropout)
        self.init_weights()
        self.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels that the pyramid codes."""
        h, w = self.quantizer.sides[-1]
        return self.downsample * h, self.downsample * w

    def init_weights(self) -> None:
        """
        | parameter                     | rule                                                                        |
        |-------------------------------|-----------------------------------------------------------------------------|
        | convolutions                  | Xavier normal, gain 0.5; biases 0                                           |
        | group norms                   | weight 1, bias 0                                                            |
        | codebook                      | uniform in +-1 / (36 sqrt(C)): 0.0049 at C = 32                             |

        The released code leaves the tokenizer uninitialized until weights are loaded; these are its authors' rules
        elsewhere (their single-scale tokenizer).
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_normal_(module.weight, gain=0.5)
                nn.init.zeros_(module.bias)  # pyright: ignore[reportArgumentType]  # every convolution here has one
        bound = 1 / (36 * self.quantizer.codebook_dim**0.5)
        nn.init.uniform_(self.quantizer.codebook.weight, -bound, bound)

    def features(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C h w"]:
        """The continuous encoder output `f` that the quantizer codes."""
        if tuple(images.shape[2:]) != self.image_size:
            raise ValueError(
                f"images are {tuple(images.shape[2:])} pixels; patch_nums {self.patch_nums} at downsample {self.downsample}"
                f" code {self.image_size}"
            )
        return self.pre_conv(self.encoder(images))

    @torch.no_grad()
    def encode(self, images: Float[Tensor, "B 3 H W"]) -> list[Int[Tensor, "B _"]]:
        """Token maps of images in [-1, 1], coarse to fine. Raises ValueError for NaN or infinite values."""
        if not torch.isfinite(images).all():
            raise ValueError("the images hold NaN or infinite values, which no code stands for")
        return self.quantizer.encode(self.features(images))

    def decode_features(self, f_hat: Float[Tensor, "B C h w"]) -> Float[Tensor, "B 3 H W"]:
        """Images in [-1, 1] of a sum of codes."""
        return self.decoder(self.post_conv(f_hat)).clamp(-1, 1)

    def decode(self, token_maps: Sequence[Int[Tensor, "B _"]]) -> Float[Tensor, "B 3 H W"]:
        """Images in [-1, 1] of all token maps. Fewer maps than scales give the coarser picture they hold."""
        return self.decode_features(self.quantizer.partial_sums(token_maps)[-1])

    def filmstrip(self, token_maps: Sequence[Int[Tensor, "B _"]]) -> Float[Tensor, "K B 3 H W"]:
        """Images in [-1, 1] after each scale, coarse to fine."""
        return torch.stack([self.decode_features(f_hat) for f_hat in self.quantizer.partial_sums(token_maps)])

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Reconstruction:
        """Reconstruction for training: gradients pass the quantizer straight through."""
        f_hat, vq_loss, token_maps, vq_losses = self.quantizer(self.features(images))
        return Reconstruction(self.decoder(self.post_conv(f_hat)), vq_loss, token_maps, vq_losses)
