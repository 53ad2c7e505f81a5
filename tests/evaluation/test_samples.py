"""Scores of samples under honest names, with their protocol."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image
from support.features import RANDOM
from support.networks import make_var
from support.runs import config, score

from varlab.checkpoints.export_folder import save_pretrained
from varlab.commands import sample
from varlab.data.shards import ShardReader
from varlab.evaluation.samples import class_mix
from varlab.models.inception import Inception
from varlab.sampling.sample_folder import labels_like


@pytest.fixture
def model(tmp_path, tokenizer_run):
    from varlab.checkpoints.load import load_tokenizer

    tokenizer = load_tokenizer(tokenizer_run / "checkpoints/last.ckpt")
    var = make_var(
        num_classes=10,
        **{key: getattr(tokenizer.quantizer, key) for key in ("patch_nums", "codebook_size", "codebook_dim")},
    )
    save_pretrained(tmp_path / "model", tokenizer, var.eval(), [str(digit) for digit in range(10)], {})
    return tmp_path / "model"


def test_samples_are_scored_under_honest_names_with_their_protocol(tmp_path, model, digits_folder, monkeypatch, capsys):
    monkeypatch.setenv("VARLAB_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "samples"
    sample.run(config(tmp_path, f"checkpoint={model}", f"out={out}", "num=12", "cfg_scale=2", verb="sample"))
    settings = [f"samples={out}", f"reference={digits_folder}", "features=efficientnet_lite0", "preset=var_d16_256"]
    score(tmp_path, *settings)
    told = json.loads((tmp_path / "scores/generation.json").read_text())
    assert (
        told["frechet_distance/efficientnet_lite0"] > 0
        and told["frechet_distance/efficientnet_lite0/real_against_real"] > 0
    )
    assert not any(name.startswith(("fid", "sfid", "kid", "inception")) for name in told)
    assert told["protocol"]["sampling"]["cfg_scale"] == 2 and told["protocol"]["num_samples"] == 12
    said = " ".join(told["warnings"])
    for part in (
        "not FID",
        "12 samples: fewer than the 50,000",
        "cfg_scale=2, but var_d16_256 uses 1.5",
        "FID 3.55",
        "not comparable",
    ):
        assert part in said
    assert len(list((tmp_path / "cache/features").glob("*.npz"))) == 3  # samples, train, val
    calls = []
    monkeypatch.setattr("varlab.models.feature_networks.EfficientNetLite0.pooled", lambda *_: calls.append(1))
    score(tmp_path, *settings)
    assert not calls and json.loads((tmp_path / "scores/generation.json").read_text()) == told


def test_what_makes_scores_incomparable_is_said(tmp_path, digits_folder, monkeypatch):
    """Another mix of classes, lossy files, too few images; and how many images the floor has."""
    monkeypatch.setenv("VARLAB_CACHE", str(tmp_path / "cache"))
    samples = tmp_path / "samples"
    (samples / "images").mkdir(parents=True)
    for i in range(30):
        Image.fromarray(RANDOM.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(samples / f"images/{i:02d}.jpg")
    (samples / "samples.json").write_text(json.dumps({"labels": [3] * 30, "class_names": []}))
    settings = [f"samples={samples}", f"reference={digits_folder}", "features={_target_: support.features.Corner}"]
    score(tmp_path, *settings, "+also={pixels: {_target_: support.features.Corner, side: 2}}", "bootstraps=20")
    told = json.loads((tmp_path / "scores/generation.json").read_text())
    said = " ".join(told["warnings"])
    assert "classes of the samples are in other proportions" in said and "classes=data" in said
    assert "30 images are in a lossy format" in said and "at least 40 images, not 30" in said
    assert told["protocol"]["floor_images"] == 11 and told["protocol"]["bootstraps"] == 20
    low, high = (told[f"frechet_distance/corner/{end}"] for end in ("low", "high"))
    assert 0 <= low < high
    other = json.loads((tmp_path / "scores/pixels/generation.json").read_text())
    assert other["frechet_distance/corner"] != told["frechet_distance/corner"]


def test_classes_in_the_proportions_of_the_data(digits_folder, token_cache):
    real = np.bincount(ShardReader(digits_folder, "train").labels, minlength=10)
    drawn = np.bincount(labels_like(str(digits_folder), "train", 4800, 10), minlength=10)
    assert np.array_equal(drawn, 100 * real)
    assert labels_like(str(token_cache), "train", 20, 10) == labels_like(str(digits_folder), "train", 20, 10)
    assert class_mix(np.repeat(np.arange(10), 10 * real), ShardReader(digits_folder, "train").labels.astype(int)) == []
    with pytest.raises(ValueError, match="has class 9, but the network has 5 classes"):
        labels_like(str(digits_folder), "train", 20, 5)


def test_one_resampling_is_refused(tmp_path, digits_folder):
    settings = ["samples=none", f"reference={digits_folder}", "features={_target_: support.features.Corner}"]
    for bootstraps in (1, -1):
        with pytest.raises(ValueError, match=f"bootstraps={bootstraps}: give 2 or more, or 0"):
            score(tmp_path, *settings, f"bootstraps={bootstraps}")


def test_a_grid_of_sampling_settings_is_one_command(tmp_path, model, digits_folder, monkeypatch):
    monkeypatch.setenv("VARLAB_CACHE", str(tmp_path / "cache"))
    grid = ["grid.cfg_scale=[0.0,2.0]", "grid.top_k=[0,4]", "grid.num=6"]
    score(tmp_path, f"checkpoint={model}", f"reference={digits_folder}", "features=efficientnet_lite0", *grid)
    rows = list(csv.DictReader((tmp_path / "scores/grid.csv").open()))
    assert [(row["cfg_scale"], row["top_k"]) for row in rows] == [
        ("0.0", "0"),
        ("0.0", "4"),
        ("2.0", "0"),
        ("2.0", "4"),
    ]
    assert len({row["frechet_distance/efficientnet_lite0"] for row in rows}) == 4
    assert len({row["frechet_distance/efficientnet_lite0/real_against_real"] for row in rows}) == 1
    assert (tmp_path / "scores/grid.png").read_bytes()[:4] == b"\x89PNG"


def test_an_adm_reference_with_stored_statistics(tmp_path, monkeypatch):
    """The published numbers are against mu and sigma of the file, not against its images."""
    monkeypatch.setenv("VARLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("varlab.models.inception.locate", lambda *_: tmp_path / "weights.pth")
    torch.manual_seed(0)
    torch.save(dict(Inception(is_random=True).named_buffers()), tmp_path / "weights.pth")
    images = RANDOM.integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "samples.npz", arr_0=images)
    stored = {"mu": np.zeros(2048), "sigma": np.eye(2048), "mu_s": np.zeros(2023), "sigma_s": np.eye(2023)}
    np.savez(tmp_path / "reference.npz", arr_0=images, **stored)
    settings = [f"samples={tmp_path / 'samples.npz'}", "features=inception", "features.weights=given", "bootstraps=2"]
    score(tmp_path, *settings, f"reference={tmp_path / 'reference.npz'}")
    told = json.loads((tmp_path / "scores/generation.json").read_text())
    assert told["fid"] > 1000 and told["sfid"] > 100 and told["precision"] == told["recall"] == 1.0
    assert told["protocol"]["reference_statistics"] == "stored" and told["inception_score"] >= 1
    assert not {"fid/low", "fid/high", "fid_infinity"} & told.keys(), (
        "those of the images are not those of the statistics"
    )
    np.savez(tmp_path / "images.npz", arr_0=images)
    score(tmp_path, *settings, f"reference={tmp_path / 'images.npz'}")
    assert json.loads((tmp_path / "scores/generation.json").read_text())["fid"] == pytest.approx(0, abs=0.5)
