"""Checkpoints lie between optimizer steps, whatever saves them, and a resumed run equals an uninterrupted one."""

import json

import pytest
import torch
from support.runs import command, fit, images_overrides, kill_at, log_to, logged_losses

from varlab.files import read_curves

EVERYTHING = [
    "callbacks.ema={_target_: varlab.training.ema.EMA, decay: 0.9}",
    "callbacks.best.save_top_k=-1",
    "callbacks.branches={_target_: varlab.training.callbacks.BranchPoints, folder: '${run_dir}', shares: [0.3, 0.6]}",
    "schedule@module.schedule=wsd",
    "module.schedule.warmup=1.0",
    "save_every=2",
    "val_every=3",
    "steps=10",
]
KILL_IN_VALIDATION = "+callbacks.late={_target_: support.fault_callbacks.KillInValidation, step: 6}"


def state(file):
    return torch.load(file, weights_only=True)


def assert_equal(a, b, where=""):
    """Bit-equal tensors and equal values; paths, times and records of Lightning's own are left out, and so are the settings,
    which name the callback that killed the run."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            if key not in ("device_seconds", "stretches"):
                assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


@pytest.mark.parametrize(
    ("kind", "accumulate", "minutes"),
    [
        ("var", 2, 0.0),
        ("tokenizer", 3, 30.0),
        pytest.param("var", 3, 30.0, marks=pytest.mark.slow),
        pytest.param("tokenizer", 2, 0.0, marks=pytest.mark.slow),
        pytest.param("tokenizer", 1, 30.0, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_accumulates_killed_three_times_is_the_uninterrupted_one(
    kind, accumulate, minutes, tmp_path, digits_folder, var_overrides
):
    """`minutes=0`: the checkpoint by time, tried after every batch. Kills: within an accumulation, in a validation."""
    settings = var_overrides if kind == "var" else images_overrides(digits_folder)
    settings = [*settings, "data.global_batch_size=12", f"accumulate={accumulate}", f"callbacks.last.minutes={minutes}"]
    settings = [override for override in settings if not override.startswith(("steps", "val_every", "save_every"))]
    settings += EVERYTHING
    fit(tmp_path / "whole", *settings, *log_to(tmp_path / "whole.log"))
    again = [tmp_path / "killed", *settings, *log_to(tmp_path / "killed.log"), "ckpt_path=last"]
    for kill in (kill_at(5 * accumulate - 1), [KILL_IN_VALIDATION], kill_at(8 * accumulate + 1)):
        assert command(*again, *kill).returncode == -9
    fit(*again)
    assert logged_losses(tmp_path / "whole.log") == logged_losses(tmp_path / "killed.log")
    assert len(logged_losses(tmp_path / "whole.log")) == 10 * accumulate
    files = sorted(file.name for file in (tmp_path / "whole/checkpoints").glob("*.ckpt"))
    assert sum(file.startswith("best") for file in files) == 3 and sum(file.startswith("branch") for file in files) == 2
    assert sorted(file.name for file in (tmp_path / "killed/checkpoints").glob("*.ckpt")) == files
    for name in files:
        whole, killed = (state(tmp_path / run / "checkpoints" / name) for run in ("whole", "killed"))
        module = "TokenDataModule" if kind == "var" else "ImageDataModule"
        for saved in (whole, killed):
            assert saved[module]["consumed"] == accumulate * saved["global_step"], name
        for key in ("state_dict", "ema", "ema_updates", "optimizer_states", module):
            assert_equal(whole[key], killed[key], f"{name}: {key}")
        assert_equal(whole["callbacks"]["RunRecord"], killed["callbacks"]["RunRecord"], name)
    curves = [read_curves(tmp_path / run / "metrics.csv") for run in ("whole", "killed")]
    names = [name for name in curves[0] if name.startswith(("train/", "val/"))]
    assert {name: curves[0][name] for name in names} == {name: curves[1].get(name) for name in names}
    assert "val/loss" in names and len(curves[0]["val/loss"]) == 4
    rows = [json.loads((tmp_path / run / "run.json").read_text()) for run in ("whole", "killed")]
    assert rows[0]["val_loss"] == rows[1]["val_loss"] and rows[1]["state"] == "finished"


def test_a_run_continues_with_another_number_of_accumulated_batches(tmp_path, still):
    """As on a machine with fewer devices: the same images in the same steps."""
    settings = [*still, "data.global_batch_size=12", "data.window=3", "data.lanes=2", "save_every=3", "val_every=2"]
    fit(tmp_path / "whole", *settings)
    assert command(tmp_path / "moved", *settings, *kill_at(4)).returncode == -9
    fit(tmp_path / "moved", *settings, "accumulate=3", "ckpt_path=last")
    whole, moved = (state(tmp_path / run / "checkpoints/last.ckpt") for run in ("whole", "moved"))
    assert whole["global_step"] == moved["global_step"] == 9
    assert (whole["TokenDataModule"]["consumed"], moved["TokenDataModule"]["consumed"]) == (9, 27)
    moments = [saved["optimizer_states"][0]["state"] for saved in (whole, moved)]
    for number, moment in moments[0].items():
        torch.testing.assert_close(moments[1][number]["exp_avg"], moment["exp_avg"], rtol=1e-3, atol=1e-6)
    losses = [json.loads((tmp_path / run / "run.json").read_text())["val_loss"] for run in ("whole", "moved")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
