"""Networks for images of other shapes."""

import pytest
import torch
from support.networks import PATCH_NUMS, make_tokenizer, make_var

from varlab import generate
from varlab.sampling.shapes import at_size, trained_sizes

WIDE = [1, [2, 3], [2, 5], [3, 6]]


def test_a_trained_size_has_the_pyramid_it_was_trained_with():
    """That of 12 x 24 pixels is not what fitting the first one to it would give."""
    tokenizer, var = make_tokenizer().eval(), make_var(position="coordinates", pyramids=[PATCH_NUMS, WIDE]).eval()
    assert trained_sizes(tokenizer, var) == [(16, 16), (12, 24)]
    pair = at_size(tokenizer, var, (12, 24))
    assert [network.patch_nums for network in pair] == [WIDE, WIDE]
    images = generate(pair[1], pair[0], torch.tensor([0, 1]), seed=0)
    assert isinstance(images, torch.Tensor) and images.shape == (2, 3, 12, 24)


@pytest.mark.parametrize(
    ("size", "pyramid"),
    [
        ((16, 20), [1, [2, 2], [3, 4], [4, 5]]),  # near to the square
        ((12, 28), [1, [2, 4], [2, 6], [3, 7]]),  # near to the wide one
        ((24, 48), [1, [4, 6], [4, 10], [6, 12]]),
    ],
)
def test_other_sizes_have_the_pyramid_of_the_nearest_one(size, pyramid):
    tokenizer, var = make_tokenizer().eval(), make_var(position="coordinates", pyramids=[PATCH_NUMS, WIDE]).eval()
    found = at_size(tokenizer, var, size)[1].patch_nums
    assert [[side, side] if isinstance(side, int) else side for side in found[1:]] == pyramid[1:] and found[0] == 1


def test_the_default_is_the_network_as_it_is():
    tokenizer, var = make_tokenizer(), make_var()
    for size in (None, 16, [16, 16]):
        assert at_size(tokenizer, var, size) == (tokenizer, var)
    with pytest.raises(ValueError, match="images of 18 x 18 pixels: this tokenizer needs multiples of 4"):
        at_size(tokenizer, var, 18)
    with pytest.raises(ValueError, match=r"image_size=\[16\]: give the side of a square"):
        at_size(tokenizer, var, [16])
    with pytest.raises(ValueError, match="knows the positions of"):
        at_size(tokenizer, var, [16, 24])
