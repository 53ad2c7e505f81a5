"""The 5,000 digits."""

import io
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from varlab.data.sources.mnist5k import mnist5k_source


def test_500_digits_of_each_class_are_split_by_share_and_seed():
    source = mnist5k_source(0.1, seed=3)
    for split, count in (("train", 450), ("val", 50)):
        assert Counter(item.label for item in source.splits[split]) == {label: count for label in range(10)}
    contents = {split: {item.load() for item in items} for split, items in source.splits.items()}
    assert not contents["train"] & contents["val"]
    same, other = mnist5k_source(0.1, seed=3), mnist5k_source(0.1, seed=4)
    val = [item.load() for item in source.splits["val"]]
    assert [item.load() for item in same.splits["val"]] == val != [item.load() for item in other.splits["val"]]


def test_a_digit_is_a_gray_image_with_a_dark_border():
    image = Image.open(io.BytesIO(mnist5k_source().splits["train"][0].load()))
    pixels = np.asarray(image)
    assert image.size == (28, 28) and pixels[0].max() == 0 and pixels.max() > 200


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_share_out_of_range_is_named(share):
    with pytest.raises(ValueError, match=f"val_share={share}"):
        mnist5k_source(share)
