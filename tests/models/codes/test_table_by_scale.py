"""A table for each scale."""

import pytest
import torch

from varlab.models.codes.table_by_scale import TableByScaleQuantizer


def test_each_scale_looks_up_its_own_table():
    quantizer = TableByScaleQuantizer([1, 2, 4], codebook_sizes=[2, 16, 4], codebook_dim=3)
    quantizer.init_weights()
    assert [quantizer.size_of(k) for k in range(3)] == [2, 16, 4] and quantizer.codebook_size == 16
    for k in range(3):
        assert torch.equal(quantizer.embed(torch.tensor([1]), k)[0], quantizer.codebook[k][1])
        assert quantizer.nearest(torch.randn(1, 100, 3), k).max() < quantizer.size_of(k)


@pytest.mark.parametrize("sizes", [[2, 16], [2, 0, 4]])
def test_a_size_for_each_scale_is_required(sizes):
    with pytest.raises(ValueError, match="give a positive size for each of 3 scales"):
        TableByScaleQuantizer([1, 2, 4], codebook_sizes=sizes)
