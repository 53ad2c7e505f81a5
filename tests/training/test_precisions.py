"""Every precision with every strategy, accumulation, averages and discriminator: trains, skips, stops and continues as
on a GPU, with the fused optimizer's path for clipping and skipping."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from support.fault_callbacks import Break
from support.runs import SHORT, TOKENIZER, fit, log_to, logged_losses

from varlab.checkpoints.load import read_checkpoint

AVERAGED = "callbacks.ema={_target_: varlab.training.ema.EMA, decay: 0.9}"
ADVERSARIAL = [
    "adversarial=patch", "adversarial.discriminator.num_layers=1", "adversarial.discriminator.channels=8",
    "adversarial.discriminator_start=0.0", "adversarial.adversarial_start=0.0", "adversarial.augment=null",
]  # fmt: skip
LENGTH = ["steps=5", "save_every=3", "val_every=5", "accumulate=2", "data.global_batch_size=16", AVERAGED]
CPU = ["trainer.accelerator=cpu", "trainer.devices=2"]
STRATEGIES = {
    "ddp": ["trainer=ddp", *CPU],
    "fsdp": ["trainer=fsdp", *CPU, "trainer.strategy.process_group_backend=gloo"],
    "hsdp": ["trainer=hsdp", *CPU, "trainer.strategy.num_replicas=2", "trainer.strategy.process_group_backend=gloo"],
}
BREAK = "+callbacks.broken={_target_: support.fault_callbacks.Break, batch: 7}"
PRECISIONS = ["32-true", "bf16-mixed", "bf16-true", "16-mixed"]


def poison(step):
    return ["+callbacks.poison._target_=support.fault_callbacks.Poison", f"+callbacks.poison.steps=[{step}]"]


def interrupted(folder, overrides):
    """A whole run, and the same run broken in its fourth step and continued after the third; the second step is not
    finite."""
    whole = [str(folder / "whole"), *overrides, *poison(2), *log_to(folder / "whole.log")]
    stopped = [str(folder / "moved"), *overrides, *poison(2), *log_to(folder / "moved.log")]
    return [whole, [*stopped, BREAK], [*stopped, "ckpt_path=last"]]


def make(runs):
    """Makes the runs in this process."""
    for folder, *overrides in runs:
        with pytest.raises(RuntimeError, match=Break.MESSAGE) if BREAK in overrides else nullcontext():
            fit(Path(folder), *overrides)


def check(folder, num_ranks=1):
    """Same losses, one step skipped, weights that moved and are equal."""
    for rank in range(num_ranks):
        whole = logged_losses(folder / "whole.log", rank)
        assert len(whole) == 10 and whole == logged_losses(folder / "moved.log", rank)
    a, b = (read_checkpoint(folder / name / "checkpoints/last.ckpt") for name in ("whole", "moved"))
    skipped = a["callbacks"]["Health"]["num_skipped"]
    assert skipped == b["callbacks"]["Health"]["num_skipped"]
    assert skipped == 1 or (1 < skipped < 5 and "16-mixed" in str(folder))  # its first scale may be too large
    for part in ("state_dict", "ema"):
        for name, value in a[part].items():
            assert torch.isfinite(value.float()).all(), name
            assert torch.equal(value, b[part][name]), f"{part} {name}"


def tokenizer_overrides(digits_folder, precision):
    adversarial = [] if precision == "16-mixed" else ADVERSARIAL
    return [*TOKENIZER, *SHORT, f"data.path={digits_folder}", "data.num_workers=0", *adversarial, *LENGTH]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_var_trains_and_continues_in_every_precision(precision, tmp_path, var_overrides):
    make(interrupted(tmp_path / precision, [*var_overrides, *LENGTH, f"trainer.precision={precision}"]))
    check(tmp_path / precision)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_tokenizer_trains_and_continues_in_every_precision(precision, tmp_path, digits_folder):
    overrides = [*tokenizer_overrides(digits_folder, precision), f"trainer.precision={precision}"]
    if precision == "bf16-true":
        with pytest.raises(ValueError, match="bf16-true supports a VAR only"):
            fit(tmp_path, *overrides)
        return
    make(interrupted(tmp_path / precision, overrides))
    check(tmp_path / precision)


@pytest.mark.slow
def test_all_strategies_in_all_precisions(tmp_path, var_overrides, digits_folder):
    jobs = {}
    for strategy, distributed in STRATEGIES.items():
        for precision in PRECISIONS:
            settings = [*LENGTH, *distributed, f"trainer.precision={precision}"]
            jobs[f"var-{strategy}-{precision}"] = [*var_overrides, *settings]
            if strategy == "ddp" and precision != "bf16-true":
                jobs[f"tok-{strategy}-{precision}"] = [*tokenizer_overrides(digits_folder, precision), *settings]
    runs = [run for name, overrides in jobs.items() for run in interrupted(tmp_path / name, overrides)]
    file = tmp_path / "runs.json"
    file.write_text(json.dumps(runs))
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    ended = subprocess.run(
        [*start, "-m", "support.many_runs", file], env={**os.environ}, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    for rank in range(2):
        outcomes = json.loads((tmp_path / f"runs.json.{rank}").read_text())
        pairs = zip(runs, outcomes, strict=True)
        failed = {run[0]: outcome for run, outcome in pairs if (Break.MESSAGE in (outcome or "")) != (BREAK in run)}
        assert not failed, "\n".join(f"{name}: {outcome}" for name, outcome in failed.items())
    for name in jobs:
        check(tmp_path / name, num_ranks=2)
    for precision in PRECISIONS:  # a step skipped on one rank only would leave other moments there
        ddp = moments(tmp_path / f"var-ddp-{precision}")
        for strategy in ("fsdp", "hsdp"):
            sharded = moments(tmp_path / f"var-{strategy}-{precision}")
            for i, moment in ddp.items():
                distance = (sharded[i] - moment).norm() / moment.norm()
                assert distance < 0.05, (precision, strategy, i, distance)


def moments(folder):
    state = read_checkpoint(folder / "whole/checkpoints/last.ckpt")["optimizer_states"][0]["state"]
    return {i: entry["exp_avg"].float() for i, entry in state.items()}
