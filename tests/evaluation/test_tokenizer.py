"""Evaluation of a tokenizer."""

import json

import numpy as np
import pytest
from PIL import Image
from support.runs import config

from varlab.commands import evaluate


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
