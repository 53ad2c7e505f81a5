"""Encoder and decoder."""

import pytest
from support.networks import make_tokenizer


def test_widths_that_do_not_divide_into_norm_groups_are_refused():
    with pytest.raises(ValueError, match="num_groups=3"):
        make_tokenizer(num_groups=3)
