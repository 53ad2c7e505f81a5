"""Weights held in bf16."""

import torch
from support.networks import make_var

from varlab.models.autocast import autocast_of, hold_in_bf16


@torch.no_grad()
def test_logits_are_those_of_autocast(var, labels):
    inputs = torch.randn(2, 29, 6)
    with torch.autocast("cpu", torch.bfloat16):
        expected = var(inputs, labels)
    hold_in_bf16(var)
    with autocast_of(var.head.weight):
        assert torch.equal(var(inputs, labels), expected)


def test_only_what_autocast_converts_is_held_in_bf16():
    var = make_var(shared_adaln=True)
    hold_in_bf16(var)
    kinds = {name: parameter.dtype for name, parameter in var.named_parameters()}
    assert kinds["head.weight"] == kinds["blocks.0.feed_forward.up.bias"] == torch.bfloat16
    fp32 = (
        "position",
        "start_position",
        "scale_embedding.weight",
        "blocks.0.attention.log_scale",
        "blocks.0.attention.q_bias",
    )
    assert all(kinds[name] == torch.float32 for name in fp32)


def test_fp32_weights_leave_autocast_as_it_is(var):
    with autocast_of(var.head.weight):
        assert not torch.is_autocast_enabled("cpu")
    with torch.autocast("cpu", torch.bfloat16), autocast_of(var.head.weight):
        assert torch.is_autocast_enabled("cpu")
