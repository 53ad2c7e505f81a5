"""Levels of each dim, and tokens as numbers with these digits."""

import pytest
import torch

from varlab.models.codes.finite_scalar import FiniteScalarQuantizer


def test_levels_are_even_and_tokens_count_them():
    quantizer = FiniteScalarQuantizer([1, 2], levels=[3, 2, 5])
    quantizer.init_weights()
    vectors = quantizer.embed(torch.arange(30), 0)
    assert vectors[:, 0].unique().tolist() == [-1, 0, 1] and vectors[:, 1].unique().tolist() == [-1, 1]
    assert vectors[:, 2].unique().tolist() == [-1, -0.5, 0, 0.5, 1] and len(vectors.unique(dim=0)) == 30
    assert vectors[1].tolist() == [0, -1, -1] and vectors[3].tolist() == [-1, 1, -1]
    assert quantizer.embed(torch.tensor([29]), 1)[0].tolist() == [0.5, 0.5, 0.5]
    far = quantizer.nearest(torch.tensor([[[9.0, -9.0, 0.26]]]), 0)
    assert quantizer.embed(far, 0)[0, 0].tolist() == [1, -1, 0.5]


@pytest.mark.parametrize("levels", [[], [1, 4], [2] * 33])
def test_impossible_levels_are_refused(levels):
    with pytest.raises(ValueError, match=r"levels=\["):
        FiniteScalarQuantizer([1, 2], levels=levels)
