"""Scores of a tokenizer: right by definition, with their protocol, and never under another name."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from support.networks import make_tokenizer
from support.runs import config

from varlab.commands import evaluate
from varlab.data.images import CenterCrops
from varlab.data.shards import ShardReader
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


def test_images_are_spread_evenly_over_the_split(digits_folder):
    reader = ShardReader(digits_folder, "val")
    assert CenterCrops(reader, 16, 1.0, None, 4, torch.device("cpu")).samples == list(range(11))
    few = CenterCrops(reader, 16, 1.0, 3, 2, torch.device("cpu"))
    assert few.samples == [0, 5, 10] and [len(batch) for batch in few] == [2, 1] and len(few) == 2
    assert torch.equal(torch.cat(list(few)), few.read([0, 5, 10]))


@pytest.mark.parametrize("network", ["efficientnet_lite0", "inception"])
def test_a_tokenizer_is_evaluated_with_one_command(network, tmp_path, digits_folder, tokenizer_run, monkeypatch):
    settings = [
        f"checkpoint={tokenizer_run / 'checkpoints/last.ckpt'}",
        f"shards={digits_folder}",
        f"out={tmp_path}",
        f"features={network}",
        "perceptual=efficientnet_lite0",
        "batch_size=4",
    ]
    if network == "inception":  # its weights are not at hand: any will do to see under which name the score goes
        settings += ["+features.is_random=true"]
    evaluate.run(config(tmp_path, *settings, verb="evaluate"))
    found = json.loads((tmp_path / "evaluation.json").read_text())
    name = {"inception": "rfid"}.get(network, "frechet_distance/efficientnet_lite0")
    assert found[name] > 0 and found[f"{name}/real_against_real"] > 0
    assert found[f"{name}/num_images"] == found[f"{name}/num_other"] == found["num_images"] == 11
    assert ("rfid" in found) == (network == "inception")
    assert found["efficientnet_lite0"] > 0 and len(found["by_scale"]["efficientnet_lite0"]) == 4
    assert found["protocol"]["split"] == "val" and found["protocol"]["resolution"] == 16
    picture = np.asarray(Image.open(tmp_path / "reconstructions.png"))
    assert picture.shape == (8 * 66 - 2, 5 * 66 - 2, 3)
    assert Image.open(tmp_path / "by_scale.png").width > 900


def test_only_the_scores_that_were_asked_for(tmp_path, digits_folder, tokenizer_run, capsys):
    settings = [f"checkpoint={tokenizer_run / 'checkpoints/last.ckpt'}", f"shards={digits_folder}", f"out={tmp_path}"]
    evaluate.run(config(tmp_path, *settings, "num_images=5", verb="evaluate"))
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert found["num_images"] == 5 and not any("frechet" in name or "lpips" in name for name in found)
    assert "psnr" in capsys.readouterr().out
