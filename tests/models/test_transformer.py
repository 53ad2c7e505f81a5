"""Attention of a block."""

import math

import pytest
import torch
from support.networks import make_var

import varlab.models.var as models_var
from varlab.models.transformer import Attention, BlockCache, DropPath, Split


def test_the_temperature_of_a_head_is_at_most_100():
    attention, x = Attention(8, 2, qk_norm=True), torch.randn(1, 5, 8)
    assert attention.log_scale is not None
    attention.log_scale.data.fill_(math.log(100))
    expected = attention(x)
    attention.log_scale.data.fill_(math.log(500))
    assert torch.equal(attention(x), expected)
    attention.log_scale.data.fill_(math.log(50))
    assert not torch.equal(attention(x), expected)


FORMS = [{}, {"shared_adaln": True}, {"qk_norm": False}, {"shared_adaln": True, "qk_norm": False}]


def test_block_zero_never_drops_and_kept_branches_are_scaled():
    torch.manual_seed(1)
    drop, x = DropPath(0.25).train(), torch.ones(4000, 1, 3)
    y = drop(x)
    assert sorted(set(y.flatten().tolist())) == pytest.approx([0, 4 / 3])
    assert y.mean().item() == pytest.approx(1, abs=0.05)
    assert (y.flatten(1).std(dim=1) == 0).all()  # the whole sample at once
    assert torch.equal(DropPath(0.25).eval()(x), x)


@pytest.mark.parametrize("form", FORMS)
def test_split_attention_gives_the_same_logits_and_gradients(form, labels, monkeypatch):
    """Scales of four tokens and more in calls of their own; a sequence cut short as well."""
    monkeypatch.setattr(models_var, "MIN_SPLIT_TOKENS", 4)
    var = make_var(**form).eval()
    inputs = torch.randn(2, 29, 6)
    found = {}
    for attention in ("masked", "split"):
        var.attention = attention
        var.zero_grad()
        logits = var(inputs, labels)
        logits.square().mean().backward()
        gradients = {name: p.grad.clone() for name, p in var.named_parameters() if p.grad is not None}
        found[attention] = (logits, var(inputs[:, :13], labels), gradients)
    assert isinstance(var.visible(30), Split) and var.visible(30).bounds == ((1, 5), (5, 14), (14, 30))
    for a, b in zip(found["masked"][:2], found["split"][:2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    for name, gradient in found["masked"][2].items():
        torch.testing.assert_close(gradient, found["split"][2][name], rtol=1e-4, atol=1e-7, msg=name)
    monkeypatch.undo()
    assert isinstance(var.visible(30), torch.Tensor)  # scales as small as these are not worth a call


def test_the_cache_grows_scale_by_scale():
    cache = BlockCache(torch.zeros(1, 1, 5, 2), torch.zeros(1, 1, 5, 2))
    cache.append(torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2))
    keys, values = cache.append(2 * torch.ones(1, 1, 4, 2), 3 * torch.ones(1, 1, 4, 2))
    assert keys[0, 0, :, 0].tolist() == [1, 2, 2, 2, 2]
    assert values[0, 0, :, 0].tolist() == [1, 3, 3, 3, 3]
