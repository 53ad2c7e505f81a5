"""Means over the validation images."""

import torch
from torch import Tensor
from torchmetrics import Metric


class ImageMean(Metric):
    """Mean of `num` values over all images of all ranks; images of weight 0 (padding) are ignored."""

    total: Tensor
    count: Tensor

    def __init__(self, num: int) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(num), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, values: Tensor, weight: Tensor) -> None:
        """Adds values (B num) of a batch with weights (B)."""
        self.total += weight @ values
        self.count += weight.sum()

    def compute(self) -> Tensor:
        """The means (num)."""
        return self.total / self.count
