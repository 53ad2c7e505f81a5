"""A length for each scale."""

import pytest

from varlab.models.codes.lengths import LengthByScaleQuantizer


def test_lengths_fall_by_half_at_first_and_are_trained_without_decay():
    quantizer = LengthByScaleQuantizer([1, 2, 3], codebook_size=4, codebook_dim=2)
    quantizer.first_length = 3.0
    quantizer.init_weights()
    assert [quantizer.length(k).item() for k in range(3)] == pytest.approx([3.0, 3 * 0.5**0.5, 1.5])
    assert quantizer.undecayed() == [quantizer.log_length] and quantizer.log_length.requires_grad
