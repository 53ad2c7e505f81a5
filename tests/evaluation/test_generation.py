"""Scores of generated images: the mathematics against independent references; names and protocols that cannot mislead."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from support.networks import make_var
from support.runs import config
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from varlab.checkpoints.export_folder import save_pretrained
from varlab.commands import evaluate, sample
from varlab.distributed import WorkSplit
from varlab.evaluation.frechet import frechet_distance, statistics
from varlab.evaluation.generation import inception_score, kernel_distance, precision_recall
from varlab.evaluation.image_sets import ImageSet, extract
from varlab.evaluation.likelihood import likelihood_scores
from varlab.evaluation.published_scores import PRESETS, compare
from varlab.models import losses, scales
from varlab.models.inception import Inception

RANDOM = np.random.default_rng(0)
REAL = RANDOM.standard_normal((300, 16)).astype(np.float32)
MADE = (0.8 * RANDOM.standard_normal((260, 16)) + 0.3).astype(np.float32)


class Given(torch.nn.Module):
    """Hands features through: torchmetrics wants a network."""

    num_features = 16

    def forward(self, x):
        return x


def through(metric):
    """A torchmetrics score of the two sets of features."""
    metric.update(torch.from_numpy(REAL), real=True)
    metric.update(torch.from_numpy(MADE), real=False)
    return metric.compute()


def test_frechet_distance_is_that_of_torchmetrics():
    expected = float(through(FrechetInceptionDistance(feature=Given(), normalize=True)))
    assert frechet_distance(statistics(MADE), statistics(REAL)) == pytest.approx(expected, rel=1e-3)


def test_kernel_distance_is_that_of_torchmetrics():
    """With subsets as large as the smaller set, ours and theirs differ in nothing but which real images are left out."""
    expected, _ = through(KernelInceptionDistance(feature=Given(), subsets=300, subset_size=260, normalize=True))
    found, spread = kernel_distance(REAL, MADE, subset=260, num_subsets=300)
    assert found == pytest.approx(float(expected), rel=0.02) and spread > 0
    assert abs(kernel_distance(REAL[:150], REAL[150:], subset=150, num_subsets=1)[0]) < 0.1 * found  # unbiased: about 0


def test_inception_score_is_that_of_torchmetrics_and_of_the_definition():
    logits = 3 * RANDOM.standard_normal((200, 10)).astype(np.float32)
    probabilities = torch.from_numpy(logits).softmax(dim=1).numpy()
    metric = InceptionScore(feature=Given(), splits=1)
    metric.update(torch.from_numpy(logits))
    assert inception_score(probabilities)[0] == pytest.approx(float(metric.compute()[0]), rel=1e-4)
    halves = [inception_score(part)[0] for part in (probabilities[:100], probabilities[100:])]
    assert inception_score(probabilities, split=100) == pytest.approx((np.mean(halves), np.std(halves)))
    assert inception_score(np.full((5, 4), 0.25))[0] == pytest.approx(1.0)
    assert inception_score(np.eye(4).repeat(3, axis=0))[0] == pytest.approx(4.0)


def test_precision_and_recall_against_plain_loops():
    real, made, k = REAL[:40], MADE[:30], 3

    def share(points, centers):
        radius = [sorted(np.linalg.norm(c - o) for o in centers)[k] for c in centers]
        return np.mean([any(np.linalg.norm(p - c) <= r for c, r in zip(centers, radius, strict=True)) for p in points])

    assert precision_recall(real, made, k, chunk=7) == pytest.approx((share(made, real), share(real, made)))
    assert precision_recall(real, real) == (1.0, 1.0)
    assert precision_recall(real, real + 100) == (0.0, 0.0)
    with pytest.raises(ValueError, match="need more than 3 images"):
        precision_recall(real[:3], made)


def test_the_inceptions_three_outputs():
    network, images = Inception(is_random=True).eval(), torch.rand(2, 3, 32, 32) * 2 - 1
    pooled, spatial, probabilities = network.everything(images)
    assert pooled.shape == (2, 2048) and spatial.shape == (2, 7 * 17 * 17) and (spatial >= 0).all()
    torch.testing.assert_close(pooled, network.pooled(images))
    torch.testing.assert_close(probabilities, (pooled @ network.fc.weight.T).softmax(dim=1))


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
    from support.networks import make_tokenizer

    tokenizer, sequence = make_tokenizer().eval(), torch.arange(12).repeat(50)[:600].view(20, 30)
    found = likelihood_scores(var, tokenizer.quantizer, [(sequence, torch.zeros(20, dtype=torch.long))])
    assert found["loss"] == pytest.approx(math.log(12), rel=1e-4) and found["calibration_error"] < 0.5
    assert found["perplexity"] == pytest.approx(12, rel=1e-3) and found["class_gap"] == pytest.approx(0, abs=1e-6)


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


def score(tmp_path, *settings):
    evaluate.run(config(tmp_path, f"out={tmp_path / 'scores'}", "batch_size=8", *settings, verb="evaluate"))


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
    settings = [f"samples={tmp_path / 'samples.npz'}", "features=inception", "features.weights=given"]
    score(tmp_path, *settings, f"reference={tmp_path / 'reference.npz'}")
    told = json.loads((tmp_path / "scores/generation.json").read_text())
    assert told["fid"] > 1000 and told["sfid"] > 100 and told["precision"] == told["recall"] == 1.0
    assert told["protocol"]["reference_statistics"] == "stored" and told["inception_score"] >= 1
    np.savez(tmp_path / "images.npz", arr_0=images)
    score(tmp_path, *settings, f"reference={tmp_path / 'images.npz'}")
    assert json.loads((tmp_path / "scores/generation.json").read_text())["fid"] == pytest.approx(0, abs=0.5)


def test_processes_share_the_images_out(tmp_path):
    images = torch.rand(11, 3, 8, 8)

    class Mean(torch.nn.Module):
        def pooled(self, batch):
            return batch.mean(dim=(2, 3))

    def run(cache, rank, num_ranks):
        return extract(Mean(), 11, lambda indices: images[list(indices)], 2, cache, "x", WorkSplit(rank, num_ranks))

    alone = run(tmp_path / "alone.npz", 0, 1)
    run(tmp_path / "three.npz", 2, 3)
    run(tmp_path / "three.npz", 1, 3)
    together = run(tmp_path / "three.npz", 0, 3)
    np.testing.assert_allclose(alone.pooled, together.pooled)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["alone.npz", "three.npz"]


def test_a_var_is_evaluated_on_images_and_on_tokens_alike(
    tmp_path, var_overrides, digits_folder, token_cache, tokenizer_run
):
    from support.runs import fit

    fit(tmp_path / "run", *var_overrides)
    checkpoint = f"checkpoint={tmp_path / 'run/checkpoints/last.ckpt'}"
    found = []
    for data in (token_cache, digits_folder):
        score(tmp_path, checkpoint, f"shards={data}")
        found.append(json.loads((tmp_path / "scores/likelihood.json").read_text()))
    row = json.loads((tmp_path / "run/run.json").read_text())
    assert found[0]["loss"] == pytest.approx(row["val_loss"], rel=1e-4)
    assert found[0]["error"] == pytest.approx(row["val_err"], rel=1e-4) and found[0]["num_images"] == 11
    assert found[1]["loss"] == pytest.approx(found[0]["loss"], rel=0.05)  # images: another resize, so other tokens
    assert (tmp_path / "scores/likelihood.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["samples={out}"], "reference=... is missing"),
        (["samples={out}", "reference={digits}"], "features=... is missing: inception"),
        (
            ["samples=nowhere", "reference={digits}", "features=efficientnet_lite0"],
            "nowhere is neither a folder of images",
        ),
        (["checkpoint=x"], "give checkpoint=FILE shards=FOLDER"),
        (
            ["samples={out}", "reference={digits}", "features=efficientnet_lite0", "preset=var_d99"],
            "preset='var_d99': choose one of",
        ),
        (["samples={mixed}", "reference={digits}", "features=efficientnet_lite0"], "scores need images of one size"),
    ],
)
def test_wrong_settings_are_named(settings, message, tmp_path, digits_folder, monkeypatch):
    monkeypatch.setenv("VARLAB_CACHE", str(tmp_path / "cache"))
    for name, sides in [("out", [16] * 5), ("mixed", [16, 8, 16, 16, 16])]:
        (tmp_path / name).mkdir()
        for i, side in enumerate(sides):
            Image.new("RGB", (side, side), (i, 2 * i, 0)).save(tmp_path / name / f"{i}.png")
    places = {"out": tmp_path / "out", "digits": digits_folder, "mixed": tmp_path / "mixed"}
    with pytest.raises(ValueError, match=message):
        score(tmp_path, *(setting.format(**places) for setting in settings))


def test_the_same_protocol_is_called_so():
    drawn = {"cfg_scale": 1.5, "top_k": 900, "top_p": 0.96, "smooth": False}
    protocol = {"features": "inception", "num_samples": 50_000, "resolution": 256, "reference_statistics": "stored"}
    (line,) = compare("var_d30_256", {**protocol, "sampling": drawn})
    assert "FID 1.97" in line and line.endswith("same protocol")
    assert all(preset.num_samples == 50_000 for preset in PRESETS.values())
    with pytest.raises(ValueError, match=r"arr_0 is float64 of shape \(2,\), not uint8"):
        import tempfile
        from pathlib import Path

        with tempfile.TemporaryDirectory() as folder:
            np.savez(Path(folder) / "x.npz", arr_0=np.zeros(2))
            ImageSet(Path(folder) / "x.npz")
