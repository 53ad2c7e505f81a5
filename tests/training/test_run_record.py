"""The record of a run, and its last words."""

import csv
import json

import pytest
import torch
from support.runs import (
    fit,
)

from varlab.checkpoints.load import load
from varlab.sampling.generate import generate
from varlab.training.run_record import summary


def test_the_run_leaves_log_row_pictures_and_a_checkpoint_that_samples(tmp_path, var_overrides):
    overrides = [override for override in var_overrides if override != "logger=csv"]
    fit(tmp_path, *overrides, "logger=default", "logger.wandb.mode=offline")
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    logged = {key for row in rows for key, value in row.items() if value}
    wanted = [
        "train/loss",
        "train/loss_last",
        "train/err",
        "train/err_last",
        "train/loss_scale_03",
        "train/grad_norm",
        "lr",
    ]
    wanted += [
        "val/loss",
        "val/loss_scale_00",
        "val/err",
        "val/loss_se",
        "count/images_seen",
        "count/tokens_seen",
        "count/flops_exact",
    ]
    wanted += ["count/flops_6nd", "speed/images_per_second", "data/skipped"]
    assert set(wanted) <= logged
    row = json.loads((tmp_path / "run.json").read_text())
    assert row["state"] == "finished" and row["step"] == 9 and row["tokens_seen"] == 72 * 30
    assert row["val_loss"] == pytest.approx(
        sum(row[f"val_loss_scale_{k:02d}"] * n for k, n in enumerate([1, 4, 9, 16])) / 30, rel=1e-5
    )
    assert list((tmp_path / "pictures").glob("samples-*.png"))
    assert list(tmp_path.rglob("offline-run-*/*.wandb"))
    tokenizer, var, names = load(tmp_path / "checkpoints/last.ckpt")
    assert names == [str(digit) for digit in range(10)]
    assert generate(var, tokenizer, torch.tensor([3]), cfg_scale=1.0).shape == (1, 3, 16, 16)


def test_resuming_a_finished_run_changes_nothing(tmp_path, var_overrides):
    fit(tmp_path, *var_overrides)
    first = json.loads((tmp_path / "run.json").read_text())
    fit(tmp_path, *var_overrides, "ckpt_path=last")
    second = json.loads((tmp_path / "run.json").read_text())
    assert {**second, "created": None, "device_seconds": None} == {**first, "created": None, "device_seconds": None}
    assert second["state"] == "finished"


def test_the_last_words_name_checkpoint_and_curves(resumed):
    said = summary(resumed)
    assert "finished at step 9" in said and "72 images" in said and "val_loss" in said
    assert str(resumed / "checkpoints/last.ckpt") in said and str(resumed / "curves.png") in said
    assert (resumed / "curves.png").read_bytes()[:4] == b"\x89PNG"
