"""The released layout: strict, with the first key that does not fit in the message."""

import pytest
import torch
from omegaconf import OmegaConf
from support.networks import PATCH_NUMS, make_tokenizer, make_var

from varlab.checkpoints.released_layout import load_released, to_released, tokenizer_from_released, var_from_released
from varlab.models.custom_classes import describe


@pytest.mark.parametrize("num_phis", [4, 1, None])
@pytest.mark.parametrize("phi_ratio", [0.5, 0.0])
@torch.no_grad()
def test_tokenizer_round_trip_for_every_way_of_sharing(num_phis, phi_ratio):
    tokenizer = make_tokenizer(num_phis=num_phis, phi_ratio=phi_ratio).eval()
    back = tokenizer_from_released(to_released(tokenizer), PATCH_NUMS, num_groups=4).eval()
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    assert all(torch.equal(a, b) for a, b in zip(tokenizer.encode(images), back.encode(images), strict=True))
    assert torch.equal(tokenizer(images).images, back(images).images)


@pytest.mark.parametrize("form", [{}, {"shared_adaln": True}, {"qk_norm": False}])
@torch.no_grad()
def test_var_round_trip(form, labels):
    var, inputs = make_var(**form).eval(), torch.randn(2, 29, 6)
    back = var_from_released(to_released(var), PATCH_NUMS, num_heads=2).eval()
    assert torch.equal(var(inputs, labels), back(inputs, labels))


def test_keys_that_do_not_fit_are_named(var):
    state = to_released(var)
    with pytest.raises(ValueError, match=r"missing, first 'blocks\.1\.ffn\.fc1\.bias'"):
        var_from_released({key: value for key, value in state.items() if key != "blocks.1.ffn.fc1.bias"}, PATCH_NUMS, 2)
    with pytest.raises(ValueError, match="unknown, first 'extra'"):
        var_from_released({**state, "extra": torch.zeros(1)}, PATCH_NUMS, 2)
    with pytest.raises(ValueError, match="'head.bias' has shape"):
        var_from_released({**state, "head.bias": torch.zeros(3)}, PATCH_NUMS, 2)
    with pytest.raises(ValueError, match="not a file of the expected kind"):
        tokenizer_from_released(state, PATCH_NUMS)


def test_another_pyramid_is_refused(var):
    with pytest.raises(ValueError, match=r"patch_nums \[1, 2, 4, 4\] do not fit.*\[1, 2, 3, 4\]"):
        var_from_released(to_released(var), [1, 2, 4, 4], 2)


def test_a_changed_buffer_is_refused(var):
    state = to_released(var)
    state["attn_bias_for_masking"] = torch.zeros_like(state["attn_bias_for_masking"])
    with pytest.raises(ValueError, match="attn_bias_for_masking"):
        var_from_released(state, PATCH_NUMS, 2)


def test_another_number_of_heads_is_refused(var):
    with pytest.raises(ValueError, match="num_heads=4.*2 heads"):
        var_from_released(to_released(var), PATCH_NUMS, 4)


def test_usage_counts_of_another_pyramid_are_ignored_and_the_given_state_is_left_alone(tokenizer):
    state = to_released(tokenizer)
    state["quantize.ema_vocab_hit_SV"] = torch.ones(9, 12)
    tokenizer_from_released(state, PATCH_NUMS, num_groups=4)
    assert state["quantize.ema_vocab_hit_SV"].shape == (9, 12)


def test_patch_nums_of_a_config_are_recorded_as_plain_numbers():
    tokenizer = make_tokenizer(channels=32, channel_mult=(1, 2, 2), num_groups=32, num_blocks=1)
    patch_nums = OmegaConf.create(list(PATCH_NUMS))
    assert describe(load_released(to_released(tokenizer), patch_nums))["quantizer"]["patch_nums"] == list(PATCH_NUMS)


def test_a_head_of_digits_has_no_place_in_it():
    with pytest.raises(ValueError, match="digit"):
        to_released(make_var(codebook_size=16, bases=[2] * 4))
