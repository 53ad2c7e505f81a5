"""Sizes of images in pixels."""

from itertools import pairwise

import pytest

from varlab.data.resolutions import nearest_shape

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
