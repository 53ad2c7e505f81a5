"""Losses, by their definitions."""

import math
from functools import partial

import pytest
import torch
from support.networks import make_var
from torch import nn

from varlab.models import losses


@pytest.mark.parametrize("num_chunks", [1, 4, 7])
def test_loss_in_chunks_has_the_same_gradients_and_keeps_fewer_logits(num_chunks, labels):
    """7 does not divide 30 tokens. What is kept for the backward pass is counted."""
    var, inputs, sequence = make_var().eval(), torch.randn(2, 29, 6), torch.randint(12, (2, 30))
    expected = losses.cross_entropy(var(inputs, labels), sequence)
    expected.mean().backward()
    gradients = {name: p.grad.clone() for name, p in var.named_parameters() if p.grad is not None}
    var.zero_grad()
    seen, kept = [], []

    def loss_fn(logits, token_slice):
        seen.append(logits.shape[1])
        return losses.cross_entropy(logits, sequence[:, token_slice])

    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        x, vector = var(inputs, labels, returns_hidden=True)
        found = losses.in_chunks(partial(var.predict, vector=vector), x, loss_fn, num_chunks)
    assert len(seen) == num_chunks and sum(seen) == 30 and max(seen) - min(seen) <= 1
    assert any(x.shape[-1] == 12 for x in kept) == (num_chunks == 1)
    torch.testing.assert_close(found, expected)
    found.mean().backward()
    for name, gradient in gradients.items():
        torch.testing.assert_close(var.get_parameter(name).grad, gradient, rtol=1e-5, atol=1e-8, msg=name)


def test_losses_follow_their_definitions():
    real, fake = torch.tensor([[2.0, 0.5]]), torch.tensor([[-2.0, 0.25]])
    assert losses.discriminator_loss(real, fake) == pytest.approx((0 + 0.5) / 2 + (0 + 1.25) / 2)
    assert losses.generator_loss(fake) == pytest.approx(0.875)
    expected = -torch.log(torch.sigmoid(real)).mean() - torch.log(1 - torch.sigmoid(fake)).mean()
    assert losses.discriminator_loss(real, fake, "nonsaturating") == pytest.approx(float(expected))
    assert losses.generator_loss(fake, "nonsaturating") == pytest.approx(float(-torch.log(torch.sigmoid(fake)).mean()))


def test_the_adaptive_weight_makes_both_losses_pull_alike():
    layer, x = nn.Linear(3, 2), torch.randn(5, 3)
    output = layer(x)
    one, other = output.square().mean(), 100 * output.sin().mean()
    ratio = losses.adaptive_weight(one, other, layer.weight)
    pulls = [torch.autograd.grad(loss, layer.weight, retain_graph=True)[0].norm() for loss in (one, ratio * other)]
    assert pulls[0] == pytest.approx(float(pulls[1]), rel=1e-4)
    assert losses.adaptive_weight(one, other, layer.weight, (0.5, 1e4)) == 0.5
    assert losses.adaptive_weight(one, 0 * other, layer.weight, (0.0, 7.0)) == 7


def test_the_gradient_penalty_of_a_linear_discriminator_is_half_the_square_of_its_weights():
    weights_, images = torch.randn(3 * 16), torch.randn(4, 3, 4, 4, requires_grad=True)
    penalty = losses.gradient_penalty((images.flatten(1) @ weights_)[:, None], images)
    assert penalty == pytest.approx(float(weights_.square().sum() / 2), rel=1e-5)


def test_reconstruction_losses_and_psnr_follow_their_formulas():
    images, output = torch.zeros(2, 3, 2, 2), torch.zeros(2, 3, 2, 2)
    output[0], output[1] = 0.5, -1.0
    assert float(losses.L1(weight=0.2)(output, images)) == pytest.approx(0.2 * 0.75)
    assert float(losses.L2(weight=3.0)(output, images)) == pytest.approx(3 * (0.25 + 1) / 2)
    expected = [10 * math.log10(4 / 0.25), 10 * math.log10(4)]
    assert losses.psnr(output, images).tolist() == pytest.approx(expected)
    assert losses.psnr(images, images).tolist() == pytest.approx([10 * math.log10(4 / 1e-10)] * 2)
