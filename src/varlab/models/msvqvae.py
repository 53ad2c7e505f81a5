"""The tokenizer: encoder, multi-scale residual quantizer, decoder (VAR, section 3.2 and appendix)."""

import copy
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from varlab.models import scales
from varlab.models.autocast import autocast_of
from varlab.models.autoencoder import Decoder, Encoder
from varlab.models.custom_classes import RecordedModule
from varlab.models.quantizer import MultiScaleQuantizer, ResidualQuantizer


class Reconstruction(NamedTuple):
    """Result of a training forward pass of the tokenizer."""

    images: Float[Tensor, "B 3 H W"]  # not clamped
    vq_loss: Float[Tensor, ""]
    token_maps: list[Int[Tensor, "B _"]]
    vq_losses: Float[Tensor, " K"]


class MSVQVAE(RecordedModule):
    """Images in [-1, 1] <-> K token maps. Defaults are the released tokenizer's (109M parameters at 256 px).

    `quantizer`: a `ResidualQuantizer`; None is the released one. The other arguments are the
    sizes of encoder and decoder. Raises ValueError for incompatible sizes, and in `encode` for images whose size is not
    `downsample` times the last entry of patch_nums.
    """

    changeable: ClassVar = frozenset({"dropout"})
    quantizer: ResidualQuantizer

    def __init__(
        self,
        quantizer: ResidualQuantizer | None = None,
        channels: int = 160,
        channel_mult: Sequence[int] = (1, 1, 2, 2, 4),
        num_blocks: int = 2,
        num_groups: int = 32,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        made = MultiScaleQuantizer() if quantizer is None else quantizer
        dim = made.codebook_dim
        self.patch_nums = made.patch_nums
        self.downsample = 2 ** (len(channel_mult) - 1)
        self.encoder = Encoder(channels, channel_mult, num_blocks, dim, num_groups, dropout)
        self.pre_conv = nn.Conv2d(dim, dim, 3, padding=1)
        self.quantizer = made
        self.post_conv = nn.Conv2d(dim, dim, 3, padding=1)
        self.decoder = Decoder(channels, channel_mult, num_blocks, dim, num_groups, dropout)
        self.init_weights()
        self.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def resolved(self) -> dict[str, Any]:
        return {"quantizer": self.quantizer}

    def at(self, patch_nums: scales.PatchNums) -> "MSVQVAE":
        """The tokenizer of another pyramid with as many scales, and so of images of another size; it shares its weights with this
        one."""
        other = copy.copy(self)
        other._modules = {**self._modules, "quantizer": self.quantizer.at(patch_nums)}
        other.patch_nums = other.quantizer.patch_nums
        return other

    def pyramid_of(self, size: tuple[int, int], like: scales.PatchNums | None = None) -> scales.PatchNums:
        """patch_nums for images of a size (height, width) in pixels: those of this tokenizer, or `like` these, fitted to it. Raises
        ValueError for a size that is no multiple of `downsample`."""
        if min(size) < self.downsample or any(side % self.downsample for side in size):
            raise ValueError(
                f"images of {size[0]} x {size[1]} pixels: this tokenizer needs multiples of {self.downsample} as height and width"
            )
        h, w = (side // self.downsample for side in size)
        return scales.fitted(like or self.patch_nums, (h, w))

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels of the images that the pyramid encodes."""
        h, w = self.quantizer.sides[-1]
        return self.downsample * h, self.downsample * w

    def init_weights(self) -> None:
        """
        | parameter                     | rule                                                                        |
        |-------------------------------|-----------------------------------------------------------------------------|
        | convolutions                  | Xavier normal, gain 0.5; biases 0                                           |
        | group norms                   | weight 1, bias 0                                                            |
        | codes                         | see the quantizer                                                           |

        The released code does not initialize the tokenizer; these are the rules of its authors' single-scale tokenizer.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_normal_(module.weight, gain=0.5)
                nn.init.zeros_(module.bias)  # pyright: ignore[reportArgumentType]  # every convolution here has one
        self.quantizer.init_weights()

    def features(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C h w"]:
        """The continuous encoder output `f` that the quantizer encodes."""
        if tuple(images.shape[2:]) != self.image_size:
            raise ValueError(
                f"images are {tuple(images.shape[2:])} pixels; patch_nums {self.patch_nums} at downsample {self.downsample}"
                f" need {self.image_size}"
            )
        return self.pre_conv(self.encoder(images))

    @torch.no_grad()
    def encode(self, images: Float[Tensor, "B 3 H W"]) -> list[Int[Tensor, "B _"]]:
        """Token maps of images in [-1, 1], coarse to fine. Raises ValueError for NaN or infinite values."""
        if not torch.isfinite(images).all():
            raise ValueError("the images contain NaN or infinite values, which cannot be encoded")
        return self.quantizer.encode(self.features(images))

    def decode_features(self, f_hat: Float[Tensor, "B C h w"]) -> Float[Tensor, "B 3 H W"]:
        """Images in [-1, 1] from a sum of codes."""
        with autocast_of(self.post_conv.weight):
            return self.decoder(self.post_conv(f_hat)).clamp(-1, 1)

    def decode(self, token_maps: Sequence[Int[Tensor, "B _"]]) -> Float[Tensor, "B 3 H W"]:
        """Images in [-1, 1] from token maps. Fewer maps than scales give a coarser image."""
        return self.decode_features(self.quantizer.partial_sums(token_maps)[-1])

    def filmstrip(self, token_maps: Sequence[Int[Tensor, "B _"]]) -> Float[Tensor, "K B 3 H W"]:
        """Images in [-1, 1] after each scale, coarse to fine."""
        return torch.stack([self.decode_features(f_hat) for f_hat in self.quantizer.partial_sums(token_maps)])

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Reconstruction:
        """Reconstruction for training; gradients pass through the quantizer (see its `gradient`)."""
        f_hat, vq_loss, token_maps, vq_losses = self.quantizer(self.features(images))
        return Reconstruction(self.decoder(self.post_conv(f_hat)), vq_loss, token_maps, vq_losses)
