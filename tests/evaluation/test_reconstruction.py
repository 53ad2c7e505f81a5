"""Scores of reconstructions."""

import pytest
import torch
from support.networks import make_tokenizer

from varlab.evaluation.reconstruction import reconstruction_scores, ssim
from varlab.models import losses


def test_ssim_is_one_for_the_same_image_and_falls_with_noise():
    images = torch.rand(3, 3, 32, 32) * 2 - 1
    assert ssim(images, images).tolist() == pytest.approx([1, 1, 1])
    noisy = [ssim((images + sd * torch.randn_like(images)).clamp(-1, 1), images).mean() for sd in (0.1, 0.5)]
    assert 1 > noisy[0] > noisy[1] > 0


def test_ssim_of_constant_images_follows_the_formula():
    a, b = torch.full((1, 3, 16, 16), -0.2), torch.full((1, 3, 16, 16), 0.4)
    x, y, c = 0.4, 0.7, 0.01**2
    assert float(ssim(a, b)) == pytest.approx((2 * x * y + c) / (x * x + y * y + c), rel=1e-3)


def test_scores_by_scale_end_at_the_score_and_do_not_depend_on_batches():
    tokenizer, images = make_tokenizer().eval(), torch.rand(10, 3, 16, 16) * 2 - 1
    one = reconstruction_scores(tokenizer, images.split(10), {}, num_curve=10)
    many = reconstruction_scores(tokenizer, images.split(3), {}, num_curve=10)
    assert one["psnr"] == pytest.approx(many["psnr"]) and one["usage_by_scale"] == many["usage_by_scale"]
    assert one["by_scale"]["psnr"][-1] == pytest.approx(one["psnr"]) and len(one["by_scale"]["ssim"]) == 4
    output = tokenizer.decode(tokenizer.encode(images))
    assert one["psnr"] == pytest.approx(float(losses.psnr(output, images).mean()), rel=1e-5)
    token_maps = tokenizer.encode(images)
    assert one["usage_by_scale"][1] == pytest.approx(100 * len(token_maps[1].unique()) / 12)
    assert one["usage"] == pytest.approx(100 * len(torch.cat([t.flatten() for t in token_maps]).unique()) / 12)
