"""Two sets of random features, and what torchmetrics says of them."""

import numpy as np
import torch

RANDOM = np.random.default_rng(0)


REAL = RANDOM.standard_normal((300, 16)).astype(np.float32)


MADE = (0.8 * RANDOM.standard_normal((260, 16)) + 0.3).astype(np.float32)


class Given(torch.nn.Module):
    """Hands features through: torchmetrics wants a network."""

    num_features = 16

    def forward(self, x):
        return x


def through(metric):
    """A torchmetrics score of the two sets of features."""
    metric.update(torch.from_numpy(REAL), real=True)
    metric.update(torch.from_numpy(MADE), real=False)
    return metric.compute()


class Corner(torch.nn.Module):
    """A feature network of a user's own: the pixels of a corner."""

    def __init__(self, side: int = 1) -> None:
        super().__init__()
        self.side = side
        self.register_buffer("size", torch.tensor(side))  # what identifies the network, as weights would

    def pooled(self, images):
        return images[:, :, : self.side, : self.side].flatten(1)
