"""Means over images of batches of different sizes."""

import torch

from varlab.training.image_mean import ImageMean


def test_each_image_counts_once_and_padding_not_at_all():
    mean = ImageMean(2)
    mean.update(torch.tensor([[1.0, 10], [2, 20], [99, 99]]), torch.tensor([1.0, 1, 0]))
    mean.update(torch.tensor([[6.0, 60]]), torch.tensor([1.0]))
    assert mean.compute().tolist() == [3, 30]
    mean.reset()
    mean.update(torch.tensor([[5.0, 7]]), torch.tensor([1.0]))
    assert mean.compute().tolist() == [5, 7]
