"""Positions from coordinates."""

import pytest
import torch
from support.networks import PATCH_NUMS, make_tokenizer, make_var

from varlab.cost.flops import parameter_counts
from varlab.models import scales
from varlab.models.custom_classes import describe
from varlab.models.positions import CoordinatePositions, coordinates

WIDE = [1, [2, 3], [2, 5], [3, 6]]


def test_a_pixel_is_as_large_in_images_of_all_shapes():
    """(y, x) of the finest map of a square of 4 and of 3 x 6: steps of one token in units of the root of the area."""
    square, wide = coordinates(PATCH_NUMS)[-16:].view(4, 4, 2), coordinates(WIDE)[-18:].view(3, 6, 2)
    assert torch.allclose(square[1, 1] - square[0, 0], torch.tensor([1 / 4, 1 / 4]))
    assert torch.allclose(wide[1, 1] - wide[0, 0], torch.tensor([18**-0.5, 18**-0.5]))
    for place in (square, wide):
        assert place.flatten(0, 1).mean(dim=0).abs().max() < 1e-6  # the center of the image is the origin
    assert torch.allclose(coordinates(WIDE)[0], torch.zeros(2))


def test_the_waves_tell_neighbors_apart_and_do_not_favor_any():
    positions = CoordinatePositions([[1, 2, 4, 8]], 16)
    waves = positions.features([1, 2, 4, 8])
    assert waves.shape == (85, 16)
    assert torch.allclose(waves.square().sum(dim=1), torch.ones(85), atol=1e-5)
    finest = waves[-64:]
    assert (finest[:, None] - finest[None]).norm(dim=-1)[~torch.eye(64, dtype=torch.bool)].min() > 0.5


@torch.no_grad()
def test_a_network_of_another_shape_has_the_same_weights_and_changes_nothing():
    var = make_var(position="coordinates").eval()
    other, label = var.at(WIDE), torch.tensor([1])
    inputs = torch.randn(1, scales.num_tokens(PATCH_NUMS) - 1, 6)
    before = var(inputs, label)
    wide = torch.randn(1, scales.num_tokens(WIDE) - 1, 6)
    assert other(wide, label).shape == (1, 35, 12)
    assert torch.equal(var(inputs, label), before) and var.patch_nums == PATCH_NUMS
    assert dict(other.named_parameters()).keys() == dict(var.named_parameters()).keys()
    assert all(a is b for a, b in zip(other.parameters(), var.parameters(), strict=True))
    var.head.weight.add_(1)
    assert not torch.equal(other(wide, label), other.at(PATCH_NUMS)(inputs, label)[:, :0]) and other.at(WIDE) is other
    assert torch.equal(other.at(PATCH_NUMS)(inputs, label), var(inputs, label))
    assert describe(other) == {**describe(var), "patch_nums": WIDE}


@torch.no_grad()
def test_the_cache_of_a_shape_gives_the_logits_of_teacher_forcing():
    var, tokenizer = make_var(position="coordinates").eval().at(WIDE), make_tokenizer().eval().at(WIDE)
    token_maps = [torch.randint(12, (2, length)) for length in scales.lengths(WIDE)]
    inputs, labels = tokenizer.quantizer.teacher_forcing_inputs(token_maps), torch.tensor([0, 2])
    whole, cache = var(inputs, labels), var.start_cache(labels)
    for k, (first, last) in enumerate(var.step_bounds):
        own = None if k == 0 else inputs[:, first - 1 : last - 1]
        assert torch.allclose(var.predict_scale(k, own, cache), whole[:, first:last], atol=1e-5)


def test_position_depends_on_the_place_alone():
    """Two shapes of the same place on the image have the same embedding there, whatever their pyramid."""
    positions = CoordinatePositions([[1, 2, 4, 8]], 16)
    small, large = positions(positions.features([1, 2, 4]))[0], positions(positions.features([1, 4, 12]))[0]
    assert torch.allclose(small[0], large[0])
    corner = small[-16:].view(4, 4, 16)[0, 0]  # at 1/8 of the side, as the token 1, 1 of 12
    assert torch.allclose(corner, large[-144:].view(12, 12, 16)[1, 1], atol=1e-5)


def test_networks_that_cannot_change_their_shape_say_so():
    with pytest.raises(
        ValueError, match=r"knows the positions of patch_nums \[1, 2, 3, 4\] only.*position=coordinates"
    ):
        make_var().at(WIDE)
    var = make_var(position="coordinates")
    for wrong in ([1, 2, 3], [2, 3, 4, 5]):
        with pytest.raises(ValueError, match=r"give as many scales as \[1, 2, 3, 4\], and the same coarsest one"):
            var.at(wrong)
    with pytest.raises(ValueError, match="give as many scales"):
        make_tokenizer().at([1, 2])
    with pytest.raises(ValueError, match="position='rotary': choose one of 'learned', 'coordinates'"):
        make_var(position="rotary")


@pytest.mark.parametrize("patch_nums", [PATCH_NUMS, WIDE, [1, 3, 17]])
def test_parameters_are_counted(patch_nums):
    var = make_var(position="coordinates", patch_nums=patch_nums)
    assert make_var(position="coordinates", pyramids=[patch_nums, [1, 2, [2, 40]]]).position.num_waves == 7
    assert parameter_counts(var.sizes)["params_total"] == sum(parameter.numel() for parameter in var.parameters())


def test_a_pyramid_is_fitted_to_a_shape():
    assert scales.fitted([1, 2, 3, 4, 6, 8], (6, 10)) == [1, 2, [2, 4], [3, 5], [4, 8], [6, 10]]
    assert scales.fitted([1, 2, 4], (4, 4)) == [1, 2, 4]
    assert scales.fitted([1, [2, 3], [4, 6]], (4, 6)) == [1, [2, 3], [4, 6]]
    assert scales.fitted([1, 2, 16], (1, 40)) == [1, [1, 5], [1, 40]]
    assert scales.fitted([4], (2, 3)) == [[2, 3]]
    with pytest.raises(ValueError, match="must be positive"):
        scales.fitted([1, 2, 4], (0, 4))
