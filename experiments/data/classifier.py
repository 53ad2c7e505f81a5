"""A small classifier of 32 pixel images, trained on one data set. It judges what samples and reconstructions show, and its
features give distances under the name of that data set.

    python experiments/data/classifier.py data/glyphs32/shards data/glyphs32/classifier.safetensors      (three minutes)

    varlab evaluate samples=FOLDER reference=data/glyphs32/shards features=none \\
        +features='{_target_: classifier.Classifier, weights: data/glyphs32/classifier.safetensors}'     (PYTHONPATH=experiments/data)
"""

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from varlab.data.images import CenterCrops
from varlab.data.shards import ShardReader, load_manifest
from varlab.models.feature_networks import frozen

SIDE, WIDTHS, NUM_FEATURES, BATCH = 32, (32, 64, 128), 256, 128


def layers(num_classes: int) -> nn.ModuleDict:
    """Three strided convolutions, 256 features, one logit per class."""
    blocks, width_in = [], 1
    for width in WIDTHS:
        blocks += [nn.Conv2d(width_in, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        width_in = width
    trunk = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(WIDTHS[-1] * (SIDE // 8) ** 2, NUM_FEATURES), nn.ReLU())
    return nn.ModuleDict({"trunk": trunk, "head": nn.Sequential(nn.Dropout(0.3), nn.Linear(NUM_FEATURES, num_classes))})


def moved(images: Tensor) -> Tensor:
    """The images (B, 1, H, W), each turned, sheared, scaled and shifted a little."""
    identity = torch.eye(2, 3)
    spread = torch.tensor([[0.08, 0.08, 0.08], [0.08, 0.08, 0.08]])
    grid = F.affine_grid(identity + spread * torch.randn(len(images), 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def fit(images: Tensor, labels: Tensor, num_classes: int, steps: int) -> nn.ModuleDict:
    """The network trained on gray uint8 images (N, 1, SIDE, SIDE), each moved a little; in evaluation mode."""
    torch.manual_seed(0)
    net = layers(num_classes)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        chosen = torch.randint(len(images), (BATCH,))
        logits = net["head"](net["trunk"](moved(images[chosen].float() / 127.5 - 1)))
        loss = F.cross_entropy(logits, labels[chosen], label_smoothing=0.02)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.eval()


@torch.no_grad()
def predict(net: nn.ModuleDict, images: Tensor) -> Tensor:
    """The most likely class of each uint8 image (N, 1, SIDE, SIDE)."""
    parts = [net["head"](net["trunk"](part.float() / 127.5 - 1)).argmax(dim=1) for part in images.split(1000)]
    return torch.cat(parts)


class Classifier(nn.Module):
    """The trained network, frozen: logits, and features as `varlab evaluate` takes them."""

    def __init__(self, weights: str) -> None:
        super().__init__()
        with safe_open(weights, "pt") as file:
            about = file.metadata()
        self.score_name = about["score_name"]
        self.net = layers(int(about["num_classes"]))
        self.net.load_state_dict(load_file(weights))
        frozen(self)

    def pooled(self, images: Tensor) -> Tensor:
        """Features (B, 256) of images (B, 3, H, W) in [-1, 1]."""
        gray = images.mean(dim=1, keepdim=True)
        if gray.shape[-1] != SIDE:
            gray = F.interpolate(gray, size=(SIDE, SIDE), mode="bilinear", antialias=True)
        return self.net["trunk"](gray)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, 3, H, W) in [-1, 1]."""
        return self.net["head"](self.pooled(images))


def gray_images(shards: Path, split: str) -> tuple[Tensor, Tensor]:
    """All images of a split as uint8 (N, 1, SIDE, SIDE), and their labels."""
    reader = ShardReader(shards, split)
    crops = CenterCrops(reader, SIDE, 1.0, None, 1000, torch.device("cpu"))
    images = torch.cat([((batch.mean(dim=1, keepdim=True) + 1) * 127.5).round().to(torch.uint8) for batch in crops])
    return images, torch.from_numpy(reader.labels.astype(np.int64))


def main() -> None:
    shards, out = Path(sys.argv[1]), Path(sys.argv[2])
    names = load_manifest(shards)["class_names"]
    images, labels = gray_images(shards, "train")
    net = fit(images, labels, len(names), steps=max(2000, len(images) // 100))
    images, labels = gray_images(shards, "val")
    accuracy = 100 * (predict(net, images) == labels).float().mean().item()
    about = {
        "score_name": f"{out.parent.name}_classifier",
        "num_classes": str(len(names)),
        "accuracy": f"{accuracy:.2f}",
    }
    save_file(net.state_dict(), out, about)
    print(f"{out}: {accuracy:.2f} % of {len(labels):,} held-out images right")


if __name__ == "__main__":
    main()
