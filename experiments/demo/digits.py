"""A classifier of 16x16 digits, trained on real ones, that measures how many samples show the requested digit."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varlab.data.decoding import open_image
from varlab.data.images import Crop, preprocess
from varlab.data.shards import ShardReader


def load(shards: str, split: str) -> tuple[Tensor, Tensor]:
    """Real digits as (N, 1, 16, 16) in [0, 1], and their labels."""
    reader = ShardReader(shards, split)
    pixels = [preprocess(open_image(reader.read(i)), 16, 1.0, Crop()) for i in range(len(reader))]
    return torch.from_numpy(np.stack(pixels)[:, None, :, :, 0]).float() / 255, torch.from_numpy(
        reader.labels.astype(np.int64)
    )


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * 16, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip


def train(shards: str, epochs: int = 15) -> tuple[nn.Sequential, float]:
    """The classifier and its accuracy (percent) on held-out real digits."""
    torch.manual_seed(0)
    images, labels = load(shards, "train")
    net = network()
    steps = epochs * (len(images) // 100)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for step in range(steps):
        if step % (len(images) // 100) == 0:
            order = torch.randperm(len(images))
        chosen = order[(step * 100) % (len(images) // 100 * 100) :][:100]
        shift = torch.randint(-1, 2, (2,)).tolist()
        loss = F.cross_entropy(net(images[chosen].roll(shift, (2, 3))), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.eval(), agreement(net.eval(), *load(shards, "val"))


@torch.no_grad()
def agreement(net: nn.Module, images: Tensor, labels: Tensor | Sequence[int]) -> float:
    """Percent of images (N, 1, 16, 16) in [0, 1] that the classifier assigns to the digit in `labels`."""
    return 100 * (net(images).argmax(dim=1) == torch.as_tensor(labels)).float().mean().item()
