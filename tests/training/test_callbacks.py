"""Callbacks that stop, skip and warn."""

import csv
import json

import pytest
import torch
from support.runs import (
    command,
    fit,
    kill_at,
    log_to,
    logged_losses,
    weights,
)

from varlab.training.callbacks import Health
from varlab.training.gradients import HostCopy


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
    fit(tmp_path / "fine", *still, "trainer.precision=16-mixed")
    rows = list(csv.DictReader((tmp_path / "fine/metrics.csv").open()))
    assert {row["train/grad_scaler_scale"] for row in rows} - {""} == {"65536.0"}
    monkeypatch.setattr(Health, "SMALLEST_SCALE", 1e5)
    with pytest.raises(ValueError, match=r"the scale of 16-mixed's gradient scaler fell to 6.55e\+04"):
        fit(tmp_path / "vanished", *still, "trainer.precision=16-mixed")


def test_the_norm_is_read_a_step_late_but_in_time_for_log_and_checkpoint(tmp_path, still, monkeypatch):
    """Every second step is logged; the last but one and the last are skipped, the last before anything reads it."""
    reads = []
    original = HostCopy.read
    monkeypatch.setattr(HostCopy, "read", lambda copy: reads.append(1) or original(copy))
    fit(tmp_path, *still, *poison([3, 6, 7]), "steps=7", "save_every=100", "log_every=2")
    saved = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["callbacks"]["Health"]
    assert (saved["num_skipped"], saved["in_row"], len(reads)) == (3, 2, 7)
    rows = [row for row in csv.DictReader((tmp_path / "metrics.csv").open()) if row["train/grad_norm"]]
    assert [row["train/steps_skipped"] for row in rows] == ["0.0", "1.0", "2.0"]
    assert rows[2]["train/grad_norm"] == "inf" != rows[1]["train/grad_norm"]


def test_failing_steps_from_before_a_resume_do_not_end_the_next_run(tmp_path, still):
    late = [*still, "callbacks.health.max_in_row=3", "save_every=3", "log_every=100"]
    with pytest.raises(ValueError, match="not finite 3 steps in a row, the last at step 6"):
        fit(tmp_path, *late, *poison([4, 5, 6]))
    saved = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert (saved["global_step"], saved["callbacks"]["Health"]["in_row"]) == (6, 3)
    fit(tmp_path, *late, "ckpt_path=last")
