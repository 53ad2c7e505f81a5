"""Likelihood of images."""

import math

import numpy as np
import pytest
import torch
from support.networks import make_pair, make_tokenizer, make_var

from varlab.evaluation.likelihood import Calibration, likelihood_scores
from varlab.models import losses, scales
from varlab.models.codes.finite_scalar import FiniteScalarQuantizer


@torch.no_grad()
def test_likelihood_of_a_raster_network_is_that_of_its_forward(tokenizer, token_maps):
    raster, labels = make_var(order="raster").eval(), torch.tensor([0, 1])
    sequence = torch.cat(token_maps, dim=1)
    found = likelihood_scores(raster, tokenizer.quantizer, [(sequence, labels)])
    logits = raster(tokenizer.quantizer.codebook(sequence[:, :-1]), labels)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), sequence.flatten())
    assert found["loss"] == pytest.approx(float(expected), rel=1e-5)


def test_likelihood_adds_up_and_does_not_depend_on_batches(var, tokenizer):
    sequence, labels = torch.randint(12, (10, 30)), torch.randint(3, (10,))
    one = likelihood_scores(var, tokenizer.quantizer, [(sequence, labels)])
    many = likelihood_scores(var, tokenizer.quantizer, zip(sequence.split(3), labels.split(3), strict=True))
    assert one["loss"] == pytest.approx(many["loss"]) and one["calibration_error"] == pytest.approx(
        many["calibration_error"]
    )
    inputs = tokenizer.quantizer.teacher_forcing_inputs(list(sequence.split([1, 4, 9, 16], dim=1)))
    with torch.no_grad():
        loss = losses.cross_entropy(var(inputs, labels), sequence).mean()
    assert one["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert one["bits_per_image"] == pytest.approx(30 * float(loss) / math.log(2), rel=1e-5)
    by_scale = np.average(one["by_scale"]["loss"], weights=scales.lengths(var.patch_nums))
    assert one["loss"] == pytest.approx(by_scale) and one["num_images"] == 10
    assert one["class_gap"] == pytest.approx(one["unconditional_loss"] - one["loss"])


def test_calibration_of_a_network_that_knows_nothing_is_right():
    """Equal logits: confidence 1/12, right one time in twelve."""
    var = make_var(init_head=0.0).eval()

    tokenizer, sequence = make_tokenizer().eval(), torch.arange(12).repeat(50)[:600].view(20, 30)
    found = likelihood_scores(var, tokenizer.quantizer, [(sequence, torch.zeros(20, dtype=torch.long))])
    assert found["loss"] == pytest.approx(math.log(12), rel=1e-4) and found["calibration_error"] < 0.5
    assert found["perplexity"] == pytest.approx(12, rel=1e-3) and found["class_gap"] == pytest.approx(0, abs=1e-6)


@torch.no_grad()
def test_calibration_of_digits_is_that_of_whole_tokens():
    tokenizer, var = make_pair(FiniteScalarQuantizer([1, 2, 3, 4], levels=[3, 2]))
    sequence, labels = torch.randint(6, (10, 30)), torch.randint(3, (10,))
    found = likelihood_scores(var, tokenizer.quantizer, [(sequence, labels)])
    logits = var(tokenizer.quantizer.teacher_forcing_inputs(list(sequence.split([1, 4, 9, 16], dim=1))), labels)
    one, two = (part.log_softmax(-1) for part in logits.split([3, 2], dim=-1))
    whole = (one[..., None, :] + two[..., :, None]).flatten(2)  # token = first digit + 3 * second digit
    expected = Calibration(1)
    expected.add(0, whole, sequence, [6])
    assert found["calibration_error"] == pytest.approx(expected.error(), abs=1e-4)
