"""Codes of bits: entropies against sums over all codes."""

import pytest
import torch
import torch.nn.functional as F

from varlab.models.codes.binary import BinarySphericalQuantizer, LookupFreeQuantizer

PATCH_NUMS = [1, 2, 3]


def all_codes(bits):
    return 2.0 * (torch.arange(2**bits)[:, None] >> torch.arange(bits) & 1) - 1


def test_bit_i_of_a_token_is_the_sign_of_dim_i():
    quantizer = LookupFreeQuantizer(PATCH_NUMS, bits=3)
    quantizer.init_weights()
    z = torch.tensor([[[0.1, -2.0, 3.0], [-1.0, -1.0, -1.0]]])
    assert quantizer.nearest(z, 0).tolist() == [[0b101, 0]]
    vector = quantizer.embed(torch.tensor([0b101]), 1)[0]
    assert torch.equal(vector.sign(), torch.tensor([1.0, -1.0, 1.0])) and vector.abs().std() == 0


def test_codes_of_the_coarsest_scale_lie_on_the_unit_sphere_at_first_and_fine_ones_are_shorter():
    quantizer = BinarySphericalQuantizer(PATCH_NUMS, bits=5)
    quantizer.init_weights()
    lengths = [quantizer.embed(torch.tensor([7]), k).norm().item() for k in range(3)]
    assert lengths == pytest.approx([1.0, 0.5**0.5, 0.5])


@torch.no_grad()
def test_the_certainty_of_a_vector_is_the_entropy_over_all_codes():
    """E[H(p)] over the 2^bits codes, with p of a softmax over squared distances; no sum over codes in the quantizer."""
    quantizer = LookupFreeQuantizer(PATCH_NUMS, bits=4, entropy_weight=1.0, temperature=2.0)
    quantizer.init_weights()
    z, length = 0.3 * torch.randn(1, 1, 4), quantizer.log_length[1].exp()
    p = (-(z[0] / length - all_codes(4)).square().sum(dim=1) / 2.0).softmax(dim=0)
    expected = -(p * p.log()).sum()
    bits = quantizer.logits_of_bits(z, 1).sigmoid()
    torch.testing.assert_close(F.binary_cross_entropy(bits, bits, reduction="sum"), expected, atol=1e-4, rtol=1e-4)
    assert quantizer.regularizer(z, 1).abs() < 1e-5  # of a single vector, both entropies are the same


@torch.no_grad()
def test_on_the_sphere_the_probability_of_a_corner_falls_with_its_distance():
    quantizer = BinarySphericalQuantizer(PATCH_NUMS, bits=4, temperature=0.5)
    quantizer.init_weights()
    z = torch.randn(1, 1, 4)
    unit, corners = F.normalize(z[0, 0], dim=0), all_codes(4) / 4**0.5
    p = (-(unit - corners).square().sum(dim=1) / 0.5).softmax(dim=0)
    bits = quantizer.logits_of_bits(z, 0).sigmoid()[0, 0]
    both = torch.where(all_codes(4) > 0, bits, 1 - bits).prod(dim=1)
    torch.testing.assert_close(both, p, atol=1e-5, rtol=1e-5)


def test_the_regularizer_makes_codes_certain_and_even():
    torch.manual_seed(0)
    quantizer = BinarySphericalQuantizer(PATCH_NUMS, bits=3, entropy_weight=1.0, temperature=0.2)
    quantizer.init_weights()
    z = (0.2 * torch.randn(1, 64, 3) + 1).requires_grad_()  # all have the same code
    optimizer = torch.optim.Adam([z], lr=0.05)
    before = quantizer.nearest(z, 0).unique().numel()
    for _ in range(200):
        optimizer.zero_grad()
        quantizer.regularizer(z, 0).backward()
        optimizer.step()
    assert before == 1 and quantizer.nearest(z, 0).unique().numel() >= 4
    assert quantizer.regularizer(z, 0) < -1.0
    assert BinarySphericalQuantizer(PATCH_NUMS, bits=3, entropy_weight=0.0).regularizer(z, 0) is None


def test_more_bits_than_a_token_holds_are_refused():
    with pytest.raises(ValueError, match="bits=33: give 1 to 32"):
        BinarySphericalQuantizer(PATCH_NUMS, bits=33)


def test_the_regularizer_is_part_of_the_loss_while_training():
    quantizer = LookupFreeQuantizer(PATCH_NUMS, bits=3, entropy_weight=0.5)
    quantizer.init_weights()
    f = torch.randn(2, 3, 3, 3, requires_grad=True)
    quantized, penalties, f_hat = quantizer.train()(f), [], torch.zeros_like(f)
    for k, after in enumerate(quantizer.partial_sums(quantized.token_maps)):
        penalties.append(quantizer.regularizer(quantizer.at_scale(f - f_hat, k), k))
        f_hat = after.detach()
    expected = quantized.vq_losses.mean() + torch.stack(penalties).mean()
    torch.testing.assert_close(quantized.vq_loss, expected)
    gradients = [torch.autograd.grad(loss, f, retain_graph=True)[0] for loss in (quantized.vq_loss, expected)]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)
    validated = quantizer.eval()(f)
    torch.testing.assert_close(validated.vq_loss, validated.vq_losses.mean())


@pytest.mark.parametrize("wrong", [{"entropy_weight": -1.0}, {"temperature": 0.0}])
def test_weights_and_temperatures_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError, match="give a weight of at least 0 and a temperature above 0"):
        BinarySphericalQuantizer([1, 2], bits=4, **wrong)
