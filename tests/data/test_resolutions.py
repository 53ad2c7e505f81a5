"""Sizes of images in pixels."""

from itertools import pairwise

import pytest

from varlab.data.resolutions import different_shapes, nearest_shape

SHAPES = [(24, 40), (32, 32), (40, 24)]


@pytest.mark.parametrize(
    ("size", "shape"),
    [((24, 40), (24, 40)), ((100, 101), (32, 32)), ((1000, 10), (40, 24)), ((3, 900), (24, 40)), ((48, 80), (24, 40))],
)
def test_an_image_gets_the_shape_of_the_nearest_aspect_ratio(size, shape):
    assert nearest_shape(size, SHAPES) == shape


def test_the_ratio_is_compared_as_a_ratio():
    """Between 1 and 5/3 the border is their geometric mean, 1.291."""
    chosen = [nearest_shape((1000, width), SHAPES) for width in (1290, 1292)]
    assert chosen == [(32, 32), (24, 40)]
    assert all(a != b for a, b in pairwise(chosen))


def test_shapes_are_pairs_of_different_aspect_ratios():
    assert different_shapes([[24, 40], [32, 32]]) == [(24, 40), (32, 32)] and different_shapes([]) == []
    for wrong in (16, [16, 24], ["16x24"]):
        with pytest.raises(ValueError, match=r"give a list of \[height, width\]"):
            different_shapes(wrong)
    for wrong in ([16.0, 24], [16], [None, 24], [0, 24]):
        with pytest.raises(ValueError, match=r"shapes=\[.*give the side of a square, or \[height, width\]"):
            different_shapes([wrong])
    with pytest.raises(ValueError, match="give each aspect ratio once"):
        different_shapes([[16, 24], [24, 16], [32, 48]])
