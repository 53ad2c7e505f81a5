"""Callbacks that stop, skip and warn."""

import csv
import json
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.plugins import Precision
from support.runs import (
    command,
    fit,
    kill_at,
    log_to,
    logged_losses,
    weights,
)


def poison(steps):
    return [
        "+callbacks.poison._target_=support.fault_callbacks.Poison",
        f"+callbacks.poison.steps={steps}",
        "callbacks.ema=null",
    ]


def test_a_step_with_an_infinite_gradient_is_skipped_and_counted(tmp_path, var_overrides):
    constant = [
        *var_overrides,
        "schedule@module.schedule=constant",
        "module.schedule.warmup=0.0",
        "model.drop_path=0.0",
    ]
    fit(tmp_path / "before", *constant, "callbacks.ema=null", "steps=2")
    fit(tmp_path / "skipped", *constant, *poison([3]), "steps=3")
    saved = torch.load(tmp_path / "skipped/checkpoints/last.ckpt", weights_only=True)
    health = saved["callbacks"]["Health"]
    assert (health["num_skipped"], health["in_row"], saved["global_step"]) == (1, 1, 3)
    for (name, a), b in zip(weights(tmp_path / "before").items(), weights(tmp_path / "skipped").values(), strict=True):
        assert torch.equal(a, b), name  # the third step changed nothing


def test_skipped_steps_in_a_row_end_the_run_which_goes_on_from_before(tmp_path, var_overrides):
    with pytest.raises(ValueError, match="not finite 3 steps in a row, the last at step 6: lower module.base_lr"):
        fit(tmp_path, *var_overrides, *poison([4, 5, 6]), "callbacks.health.max_in_row=3")
    assert json.loads((tmp_path / "run.json").read_text())["state"] == "failed"
    fit(tmp_path, *var_overrides, "ckpt_path=last")
    assert json.loads((tmp_path / "run.json").read_text())["state"] == "finished"


def test_a_checkpoint_every_few_minutes_serves_as_well(tmp_path, var_overrides):
    """An interval of nothing: after every step."""
    timed = [*var_overrides, "save_every=1000", "callbacks.last.minutes=0.0"]
    fit(tmp_path / "whole", *timed, *log_to(tmp_path / "whole.log"))
    killed = command(tmp_path / "killed", *timed, *log_to(tmp_path / "killed.log"), *kill_at(5), "ckpt_path=last")
    assert killed.returncode == -9
    assert torch.load(tmp_path / "killed/checkpoints/last.ckpt", weights_only=True)["global_step"] == 4
    fit(tmp_path / "killed", *timed, *log_to(tmp_path / "killed.log"), "ckpt_path=last")
    assert logged_losses(tmp_path / "whole.log") == logged_losses(tmp_path / "killed.log")
    assert sorted(file.name for file in (tmp_path / "killed/checkpoints").iterdir()) == [
        "best-0000009.ckpt",
        "last.ckpt",
    ]


def test_the_best_checkpoints_are_kept_by_validation_loss(tmp_path, still):
    fit(tmp_path, *still, "val_every=2", "callbacks.best.save_top_k=3")
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["best-0000004.ckpt", "best-0000006.ckpt", "best-0000008.ckpt", "last.ckpt"]  # the loss falls


def test_a_gradient_far_above_the_usual_is_named(tmp_path, still, caplog):
    spike = "+callbacks.poison={_target_: support.fault_callbacks.Grow, step: 7, factor: 1000.0}"
    fit(tmp_path, *still, spike)
    assert any(
        "step 7: the gradient norm is" in record.message and "usually" in record.message for record in caplog.records
    )
    saved = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["callbacks"]["Health"]
    assert saved["num_spikes"] == 1


def test_a_loss_scale_that_vanishes_ends_the_run(tmp_path, still, monkeypatch):
    """16-mixed needs a GPU: here a scaler is put beside the precision of a CPU run."""
    scale = [1024.0]
    monkeypatch.setattr(Precision, "scaler", SimpleNamespace(get_scale=lambda: scale[0]), raising=False)
    fit(tmp_path / "fine", *still)
    rows = list(csv.DictReader((tmp_path / "fine/metrics.csv").open()))
    assert {row["train/grad_scaler_scale"] for row in rows} - {""} == {"1024.0"}
    scale[0] = 1e-6
    with pytest.raises(ValueError, match="the scale of 16-mixed's gradient scaler fell to 1e-06"):
        fit(tmp_path / "vanished", *still)
