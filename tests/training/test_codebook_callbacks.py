"""Health of the codebook: measures, remedies, the alarm."""

import csv
from itertools import pairwise

import pytest
import torch
from support.networks import make_tokenizer
from support.runs import SHORT, TOKENIZER, command, fit, images_overrides

from varlab.models.quantizer import MultiScaleQuantizer
from varlab.training import codebook_callbacks
from varlab.training.codebook_callbacks import CollapseAlarm, KMeansInit, ResetDeadCodes, fit_codes


def test_k_means_brings_codes_to_the_vectors():
    quantizer, vectors = make_tokenizer().quantizer, torch.randn(600, 6)
    errors = []
    for num_iterations in (0, 1, 3, 10):
        fit_codes(quantizer, vectors, num_iterations, seed=0)
        errors.append(float((vectors - quantizer.codebook.weight[quantizer.nearest(vectors[None])[0]]).square().mean()))
    assert all(b < a for a, b in pairwise(errors))
    assert errors[-1] < 0.8 * errors[0]
    fit_codes(quantizer, vectors, 200, seed=0)  # converged: every code is the mean of its vectors
    nearest, codes = quantizer.nearest(vectors[None])[0], quantizer.codebook.weight
    for code in range(12):
        torch.testing.assert_close(codes[code], vectors[nearest == code].mean(dim=0))
    fit_codes(quantizer, vectors[:3], num_iterations=2, seed=0)  # fewer vectors than codes
    assert torch.isfinite(quantizer.codebook.weight).all()


def logged(folder, name) -> list[float]:
    return [float(row[name]) for row in csv.DictReader((folder / "metrics.csv").open()) if row.get(name)]


def test_k_means_begins_with_a_smaller_loss(tmp_path, digits_folder):
    overrides = images_overrides(digits_folder)
    fit(tmp_path / "plain", *overrides)
    fit(tmp_path / "kmeans", *overrides, f"callbacks.kmeans={{_target_: {KMeansInit.__module__}.KMeansInit}}")
    plain, kmeans = (logged(tmp_path / name, "train/vq_loss")[0] for name in ("plain", "kmeans"))
    assert kmeans < 0.9 * plain
    assert logged(tmp_path / "kmeans", "train/perplexity")[0] > 0.8 * logged(tmp_path / "plain", "train/perplexity")[0]


def test_dead_codes_are_revived(tmp_path, digits_folder):
    revive = (
        f"callbacks.reset_dead_codes={{_target_: {ResetDeadCodes.__module__}.ResetDeadCodes, every: 3, min_share: 0.5}}"
    )
    ema = "callbacks.ema={_target_: varlab.training.ema.EMA, decay: 0.99}"
    settings = [*images_overrides(digits_folder), "model.quantizer.codebook_size=64", "save_every=9"]
    fit(tmp_path / "plain", *settings, ema)
    fit(tmp_path / "revived", *settings, revive, ema)
    assert logged(tmp_path / "revived", "train/codes_reset")[0] > 10
    both = [torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True) for name in ("plain", "revived")]
    name = "net.quantizer.codebook.weight"
    moved = (both[0]["state_dict"][name] - both[1]["state_dict"][name]).abs().sum(dim=1) > 0.02
    assert moved.sum() > 10
    near = both[1]["ema"][name] - both[1]["state_dict"][name]
    assert near[moved].abs().max() < 0.02  # the averaged codes moved along


def test_remedies_choose_alike_on_all_ranks(tmp_path, digits_folder):
    remedies = [
        f"callbacks.reset_dead_codes={{_target_: {ResetDeadCodes.__module__}.ResetDeadCodes, every: 2, min_share: 0.5}}",
        f"callbacks.kmeans={{_target_: {KMeansInit.__module__}.KMeansInit}}",
        "model.quantizer.gradient=rotation",
        "model.quantizer.scale_dropout=0.3",
    ]
    logs = [
        "+callbacks.codebook._target_=support.fault_callbacks.CodebookLog",
        f"+callbacks.codebook.file={tmp_path / 'hash'}",
    ]
    ddp = ["trainer.devices=2", "trainer.strategy=ddp", "model.quantizer.codebook_size=64"]
    finished = command(tmp_path, *images_overrides(digits_folder), *remedies, *logs, *ddp, processes=2)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert sum(logged(tmp_path, "train/codes_reset")) > 0
    assert (tmp_path / "hash.0").read_text() == (tmp_path / "hash.1").read_text()


def test_the_alarm_rings_once_for_a_scale_and_says_when_it_is_over():
    alarm, good, bad = CollapseAlarm(factor=4.0, minimum=2.0), torch.tensor([3.0, 12.0]), torch.tensor([3.0, 2.5])
    net = MultiScaleQuantizer([1, 2], 12, 4)
    assert alarm.check(good, 200, net) == []
    (message,) = alarm.check(bad, 300, net)
    assert message.startswith(
        "step 300: the codebook collapses at scale 1 (2): 2.5 codes in use, at most 12.0 before. Remedies: callb"
    )
    assert alarm.check(bad, 400, net) == []
    again = CollapseAlarm()
    again.load_state_dict(alarm.state_dict())
    assert again.check(bad, 500, net) == []
    assert again.check(good, 600, net) == ["step 600: scale 1 (2) has recovered: 12.0 codes in use"]
    assert (
        len(again.check(torch.tensor([1.5, 12.0]), 700, net)) == 1
    )  # fewer than two codes, though once there were three


def test_a_run_whose_codes_collapse_says_so(tmp_path, digits_folder, caplog):
    settings = ["callbacks.collapse.patience=2", "callbacks.collapse.minimum=13.0"]  # more than there are codes
    fit(tmp_path, *images_overrides(digits_folder), *settings)
    assert caplog.text.count("the codebook collapses at scale") == 4
    assert set(logged(tmp_path, "train/collapsed_scales")) == {4}


def test_random_rows_repeat_only_where_there_are_too_few():
    rows = codebook_callbacks.random_rows(torch.arange(4.0)[:, None], 10, seed=0)
    assert rows.shape == (10, 1) and set(rows.flatten().tolist()) == {0, 1, 2, 3}


def test_dead_codes_are_not_looked_for_where_there_is_no_table(tmp_path, digits_folder):
    plain = [setting for setting in TOKENIZER if not setting.startswith("model.quantizer.")]
    reset = "{_target_: varlab.training.codebook_callbacks.ResetDeadCodes, every: 500}"
    settings = ["quantizer@model.quantizer=bsq", f"+callbacks.reset_dead_codes={reset}"]
    with pytest.raises(
        ValueError, match="BinarySphericalQuantizer learns no table .* set callbacks.reset_dead_codes=null"
    ):
        fit(tmp_path, *plain, *SHORT, *settings, f"data.path={digits_folder}")
