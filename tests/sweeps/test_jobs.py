"""Sweeps: each job a process of its own, a ledger that survives, one failure that sinks nothing."""

import json
import re
from pathlib import Path

import pytest
import yaml
from support.runs import SHORT, VAR, ledger

from varlab.sweeps.jobs import reason_to_skip


def test_two_jobs_of_two_ranks_each_and_again_without_repeating(tmp_path, sweep):
    settings = [*sweep.settings, "model.depth=1,2", "trainer.devices=2", "trainer.strategy=ddp"]
    code, said = sweep(*settings)
    assert code == 0, said[-3000:]
    jobs = ledger(tmp_path)
    assert [job["state"] for job in jobs.values()] == ["finished"] * 2
    rows = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("runs/sweep/*/run.json"))]
    assert [(row["depth"], row["num_devices"], row["state"]) for row in rows] == [
        (1, 2, "finished"),
        (2, 2, "finished"),
    ]
    assert [job["value"] for job in jobs.values()] == [row["val_loss"] for row in rows]
    assert "sweep runs/sweep: 2 finished" in said
    code, said = sweep(*settings)
    assert code == 0 and said.count("already finished") == 2
    assert ledger(tmp_path) == jobs
    code, said = sweep(*settings, "module.base_lr=1e-5")
    assert code == 1 and "holds a job with other settings (module.base_lr: 0.002 -> 1e-05)" in said


def test_joblib_runs_jobs_side_by_side(tmp_path, sweep):
    code, said = sweep(*sweep.settings, "model.depth=1,2", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    assert code == 0, said[-3000:]
    jobs = ledger(tmp_path)
    assert [job["state"] for job in jobs.values()] == ["finished"] * 2
    first, second = jobs.values()
    assert first["started"] < second["ended"] and second["started"] < first["ended"]


def test_submitit_puts_a_warned_job_back_into_its_queue(tmp_path, sweep):
    """USR2, the warning before the time limit, goes to submitit's process: the run saves, the job is started anew and ends."""
    warn = [
        "+callbacks.warn={_target_: support.fault_callbacks.Signal, step: 4, name: SIGUSR2, to_parent: true}",
        "save_every=1000",
    ]
    code, said = sweep(
        *sweep.settings, "hydra/launcher=submitit_local", "hydra.launcher.timeout_min=60", *warn, "model.depth=1,2"
    )
    logs = "".join(path.read_text() for path in tmp_path.rglob("*_log.*"))
    assert code == 0, said[-2000:] + logs[-3000:]
    assert [job["state"] for job in ledger(tmp_path).values()] == ["finished"] * 2
    assert "this job is preempted" in logs
    for output in tmp_path.glob("runs/sweep/*/output.log"):
        assert "stopped at step 5" in output.read_text() and "finished at step 9" in output.read_text()


def test_an_agent_of_a_wandb_sweep_runs_the_same_command(tmp_path, sweep, tokenizer_run, token_cache):
    """The command of the sweep file, filled in as W&B's agent does."""
    root = Path(__file__).parents[2]
    file = yaml.safe_load((root / "experiments/depth_scaling/sweep.yaml").read_text())
    assert file["metric"]["name"] == "val/loss" and file["parameters"]["model.depth"]["values"]
    environment = {"TOKENIZER": str(tokenizer_run / "checkpoints/last.ckpt"), "TOKENS": str(token_cache)}
    environment |= {"WANDB_RUN_ID": "agent123", "WANDB_SWEEP_ID": "sweep7", "WANDB_MODE": "offline"}
    command = []
    for part in file["command"]:
        if part == "${args_no_hyphens}":
            command += ["model.depth=1", "seed=0"]
        elif part not in ("${env}",):
            command.append(re.sub(r"\$\{envvar:(\w+)\}", lambda found: environment[found[1]], part))
    assert command[0] == "varlab" and command[1] == "train"
    tiny = [setting for setting in (*VAR, *SHORT) if not setting.startswith(("experiment", "model.depth", "logger"))]
    code, said = sweep(*command[2:], *tiny, **environment)
    assert code == 0, said[-2000:]
    (row,) = [json.loads(path.read_text()) for path in tmp_path.rglob("run.json")]
    assert row["run_id"] == "agent123" and row["depth"] == 1


@pytest.mark.parametrize(
    ("state", "choice", "task", "runs"),
    [
        ("pending", None, 0, True),
        ("finished", None, 0, False),
        ("finished", None, 3, False),
        ("failed", None, 0, True),
        ("failed", "resume", 0, False),
        ("failed", "retry-failed", 0, True),
        ("stopped", "retry-failed", 0, False),
        ("running", "retry-failed", 3, True),  # the first task of the same SLURM job has begun
        ("running", None, 3, True),
    ],
)
def test_which_jobs_run_again(state, choice, task, runs, monkeypatch):
    monkeypatch.delenv("VARLAB_SWEEP", raising=False)
    if choice:
        monkeypatch.setenv("VARLAB_SWEEP", choice)
    known = None if state == "pending" else {"state": state}
    assert (reason_to_skip(known, task) is None) == runs
