"""Attention of a block."""

import math

import torch

from varlab.models.transformer import Attention


def test_the_temperature_of_a_head_is_at_most_100():
    attention, x = Attention(8, 2, qk_norm=True), torch.randn(1, 5, 8)
    assert attention.log_scale is not None
    attention.log_scale.data.fill_(math.log(100))
    expected = attention(x)
    attention.log_scale.data.fill_(math.log(500))
    assert torch.equal(attention(x), expected)
    attention.log_scale.data.fill_(math.log(50))
    assert not torch.equal(attention(x), expected)
