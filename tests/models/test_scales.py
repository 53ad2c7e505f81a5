"""Arithmetic of the token pyramid."""

import pytest

from varlab.models import scales


def test_the_released_pyramids_have_the_papers_numbers_of_tokens():
    assert scales.num_tokens(scales.RELEASED_256) == 680 and scales.num_tokens(scales.RELEASED_512) == 2240


def test_bounds_and_scales_of_a_pyramid_that_is_not_square():
    patch_nums = [1, (1, 2), (2, 3)]
    assert scales.sides(patch_nums) == [(1, 1), (1, 2), (2, 3)]
    assert scales.lengths(patch_nums) == [1, 2, 6] and scales.num_tokens(patch_nums) == 9
    assert scales.scale_bounds(patch_nums) == [(0, 1), (1, 3), (3, 9)]
    assert scales.scale_of_token(patch_nums) == [0, 1, 1, 2, 2, 2, 2, 2, 2]
    assert scales.step_bounds(patch_nums, "scales") == scales.scale_bounds(patch_nums)
    assert scales.step_bounds(patch_nums, "raster") == [(i, i + 1) for i in range(9)]
    assert scales.plain(((1, 2), 3)) == [[1, 2], 3]


def test_progress_runs_from_coarsest_to_finest():
    assert [scales.progress(k, 5) for k in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert scales.progress(0, 1) == 0


@pytest.mark.parametrize("patch_nums", [[0], [2, 1], [-1], [(2, 3), (3, 2)]])
def test_sides_must_be_positive_and_must_not_shrink(patch_nums):
    with pytest.raises(ValueError, match="sides must be positive and must not shrink"):
        scales.sides(patch_nums)


def test_an_empty_pyramid_is_refused():
    with pytest.raises(ValueError, match="patch_nums is empty"):
        scales.sides([])
