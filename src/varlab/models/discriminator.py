"""Discriminators of the adversarial loss, and the augmentations of their inputs. They take images in [-1, 1]; logits
are high for real ones. Group norm replaces the batch norm of the originals: no statistics to synchronize between
devices.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from varlab.models.feature_networks import frozen, load_weights
from varlab.models.weight_files import WeightFile, locate, read_state_dict

DINO_FILE = WeightFile("dino_deitsmall16_pretrain.pth")


class PatchDiscriminator(nn.Module):
    """Classifies overlapping patches (Isola et al. 2017; 70 pixels wide with three layers), one logit each. Images need
    3 * 2**num_layers pixels in each direction."""

    def __init__(self, channels: int = 64, num_layers: int = 3) -> None:
        super().__init__()
        self.smallest = 3 * 2**num_layers
        widths = [channels * min(2**i, 8) for i in range(num_layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 4, 2, 1), nn.LeakyReLU(0.2)]
        for i, (width_in, width) in enumerate(pairwise(widths)):
            stride = 2 if i < num_layers - 1 else 1
            layers += [
                nn.Conv2d(width_in, width, 4, stride, 1),
                nn.GroupNorm(min(32, width // 4), width),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, 1, 1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)  # pyright: ignore[reportArgumentType]

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B N"]:
        if min(images.shape[2:]) < self.smallest:
            raise ValueError(
                f"images of {images.shape[2]} x {images.shape[3]} pixels are too small for a patch discriminator that needs"
                f" {self.smallest}: set adversarial.discriminator.num_layers to less"
            )
        return self.layers(images).flatten(1)


class ViTBlock(nn.Module):
    """Pre-norm transformer block; module names match DINO's weight file."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})

    def forward(self, x: Float[Tensor, "B N c"]) -> Float[Tensor, "B N c"]:
        qkv = self.attn["qkv"](self.norm1(x))
        q, k, v = rearrange(qkv, "B N (three heads c) -> three B heads N c", three=3, heads=self.num_heads)
        x = x + self.attn["proj"](rearrange(F.scaled_dot_product_attention(q, k, v), "B heads N c -> B N (heads c)"))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class DINO(nn.Module):
    """ViT-S/16 trained by self-distillation (Caron et al. 2021), frozen. Returns the tokens after patch embedding and
    after some of its blocks."""

    mean: Tensor
    std: Tensor
    width, side, patch = 384, 224, 16
    READOUTS = (2, 5, 8, 11)

    def __init__(self, weights: str | None, is_random: bool = False) -> None:
        super().__init__()
        num_tokens = (self.side // self.patch) ** 2
        self.cls_token = nn.Parameter(torch.zeros(1, 1, self.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + num_tokens, self.width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, self.width, self.patch, self.patch)})
        self.blocks = nn.ModuleList(ViTBlock(self.width, 6) for _ in range(12))
        if not is_random:
            if weights is None:
                raise ValueError(
                    "adversarial=dino needs the weights of DINO: set adversarial.discriminator.weights=FILE"
                    " (dino_deitsmall16_pretrain.pth); adversarial=patch needs none"
                )
            path = locate(DINO_FILE, weights)
            load_weights(self, read_state_dict(path), str(path))
            for name, bias in self.named_parameters():  # the key bias shifts all scores equally; the authors zero it
                if name.endswith("qkv.bias"):
                    bias.data[self.width : 2 * self.width] = 0
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)
        frozen(self)

    def readouts(self, images: Float[Tensor, "B 3 224 224"]) -> list[Float[Tensor, "B c N"]]:
        """Patch tokens with the class token added, after patch embedding and four blocks; images in [-1, 1]."""
        x = self.patch_embed["proj"]((images / 2 + 0.5 - self.mean) / self.std).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        found = [x]
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in self.READOUTS:
                found.append(x)
        return [(x[:, 1:] + x[:, :1]).transpose(1, 2) for x in found]


class TokenHead(nn.Module):
    """One logit for each token of one readout."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = spectral_norm(nn.Conv1d(width, width, 1))
        self.second = spectral_norm(nn.Conv1d(width, width, 9, padding=4, padding_mode="circular"))
        self.norm1, self.norm2 = nn.GroupNorm(32, width, eps=1e-6), nn.GroupNorm(32, width, eps=1e-6)
        self.last = spectral_norm(nn.Conv1d(width, 1, 1))

    def forward(self, x: Float[Tensor, "B c N"]) -> Float[Tensor, "B N"]:
        x = F.leaky_relu(self.norm1(self.first(x)), 0.2)
        x = (x + F.leaky_relu(self.norm2(self.second(x)), 0.2)) / 2**0.5
        return self.last(x).squeeze(1)


class DINODiscriminator(nn.Module):
    """Heads on the tokens of a frozen DINO (as in the VAR authors' single-scale tokenizer and StyleGAN-T).

    Images larger than 224 pixels are cropped at a random position half of the time and resized otherwise; smaller ones
    are enlarged.
    """

    def __init__(self, weights: str | None = None, is_random: bool = False) -> None:
        super().__init__()
        self.trunk = DINO(weights, is_random)  # frozen: not part of the state dict
        self.heads = nn.ModuleList(TokenHead(DINO.width) for _ in range(1 + len(DINO.READOUTS)))

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B N"]:
        trunk, side = self.trunk, DINO.side
        height, width = images.shape[2:]
        if min(height, width) > side and torch.rand(()) < 0.5:
            top, left = (int(torch.randint(room - side + 1, ())) for room in (height, width))
            images = images[:, :, top : top + side, left : left + side]
        elif (height, width) != (side, side):
            mode = "area" if min(height, width) > side else "bicubic"
            images = F.interpolate(images, size=(side, side), mode=mode)
        readouts = trunk.readouts(images)
        return torch.cat([head(x) for head, x in zip(self.heads, readouts, strict=True)], dim=1)


class DiffAugment(nn.Module):
    """Differentiable augmentation of a discriminator's inputs (Zhao et al. 2020). `policy`: any of color, translation,
    cutout."""

    POLICIES = ("color", "translation", "cutout")

    def __init__(self, policy: Sequence[str] = POLICIES) -> None:
        super().__init__()
        if unknown := [name for name in policy if name not in self.POLICIES]:
            raise ValueError(f"augmentation {unknown[0]!r} is unknown: choose among {', '.join(self.POLICIES)}")
        self.policy = list(policy)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
        for name in self.policy:
            images = getattr(self, name)(images)
        return images

    def color(self, x: Tensor) -> Tensor:
        """Brightness +-0.5, saturation times [0, 2], contrast times [0.5, 1.5]."""
        brightness, saturation, contrast = torch.rand(3, len(x), 1, 1, 1, device=x.device, dtype=x.dtype)
        x = x + (brightness - 0.5)
        gray = x.mean(dim=1, keepdim=True)
        x = gray + (x - gray) * (2 * saturation)
        mean = x.mean(dim=(1, 2, 3), keepdim=True)
        return mean + (x - mean) * (contrast + 0.5)

    def translation(self, x: Tensor) -> Tensor:
        """Shifts by up to an eighth of the side, padding with zeros."""
        batch, _, height, width = x.shape
        room = [round(side / 8) for side in (height, width)]
        down, right = (torch.randint(-r, r + 1, (batch, 1), device=x.device) for r in room)
        rows = torch.arange(height, device=x.device) + down
        columns = torch.arange(width, device=x.device) + right
        inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
        index = torch.arange(batch, device=x.device)[:, None, None]
        moved = x[index, :, rows.clamp(0, height - 1)[:, :, None], columns.clamp(0, width - 1)[:, None, :]]
        return moved.permute(0, 3, 1, 2) * inside[:, None]

    def cutout(self, x: Tensor) -> Tensor:
        """Zeros a rectangle of about a fifth of each side."""
        batch, _, height, width = x.shape
        size = [max(1, round(side / 5)) for side in (height, width)]
        top, left = (torch.randint(0, side, (batch, 1), device=x.device) for side in (height, width))
        rows, columns = (torch.arange(side, device=x.device)[None] for side in (height, width))
        hides_row = (rows - top).abs() <= size[0] // 2
        hides_column = (columns - left).abs() <= size[1] // 2
        return x * ~(hides_row[:, :, None] & hides_column[:, None, :])[:, None]
