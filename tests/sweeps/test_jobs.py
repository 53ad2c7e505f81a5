"""Sweeps: each job a process of its own, a ledger that survives, one failure that sinks nothing."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from support.runs import SHORT, VAR

from varlab.sweeps.jobs import reason_to_skip


@pytest.fixture
def sweep(tmp_path, var_overrides):
    """Starts `varlab VERB ...` in a folder of its own."""

    def start(*arguments, verb="train", **variables) -> subprocess.Popen:
        environment = {**os.environ, **variables}
        command = [sys.executable, "-m", "varlab", verb, *arguments]
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path
        )

    def run(*arguments, verb="train", **variables) -> tuple[int, str]:
        process = start(*arguments, verb=verb, **variables)
        said = process.communicate(timeout=280)[0]
        return process.returncode, said

    run.start = start
    run.settings = ["--multirun", *var_overrides, "name=sweep", "callbacks.pictures=null"]
    return run


def ledger(tmp_path):
    return {path.parent.name: json.loads(path.read_text()) for path in sorted(tmp_path.glob("runs/sweep/*/job.json"))}


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


def test_one_failing_job_does_not_sink_the_others(tmp_path, sweep):
    """Depth 2 cannot be divided among three heads; afterwards the ledger tells, and the failed one alone is tried again."""
    code, said = sweep(*sweep.settings, "model.num_heads=2,3,1", "hydra.sweep.subdir=${hydra:job.num}")
    assert code == 1
    assert [job["state"] for job in ledger(tmp_path).values()] == ["finished", "failed", "finished"]
    assert "width 32 is not divisible by num_heads=3" in said
    code, told = sweep("status", "runs/sweep", verb="sweep")
    assert code == 0 and "2 finished, 1 failed" in told
    assert re.search(r"failed +model.num_heads=3 .*width 32 is not divisible.*\(log: runs/sweep/.*/output.log\)", told)
    code, said = sweep("resume", "runs/sweep", verb="sweep")
    assert "failed before, skipped: run `varlab sweep retry-failed`" in said and said.count("already finished") == 2
    before = {name: job["ended"] for name, job in ledger(tmp_path).items()}
    code, said = sweep("retry-failed", "runs/sweep", verb="sweep")
    after = {name: job["ended"] for name, job in ledger(tmp_path).items()}
    assert code == 1 and [before[name] == after[name] for name in before] == [True, False, True]
    code, said = sweep("table", "runs/sweep", verb="sweep")
    rows = list(csv.DictReader((tmp_path / "runs/sweep/runs.csv").open()))
    assert [row["job_state"] for row in rows] == ["finished", "failed", "finished"]
    assert float(rows[0]["val_loss [nat/token]"]) > 0


def test_a_stopped_sweep_continues_where_it_stopped(tmp_path, sweep):
    settings = [*sweep.settings, "model.depth=1,2,3"]
    stop = ["+callbacks.stop={_target_: support.fault_callbacks.Signal, step: 4, name: SIGTERM, to_parent: true}"]
    process = sweep.start(*settings, *stop)
    said = process.communicate(timeout=200)[0]
    assert process.returncode not in (0, None), said[-2000:]
    jobs = ledger(tmp_path)
    assert [job["state"] for job in jobs.values()] == ["stopped"]
    code, told = sweep("status", "runs/sweep", verb="sweep")
    assert "1 stopped, 2 pending" in told
    code, said = sweep("resume", "runs/sweep", verb="sweep")  # its Signal is for fresh runs: the other two stop once
    assert "stopped" in said
    for _ in range(2):
        code, said = sweep("resume", "runs/sweep", verb="sweep")
    assert code == 0, said[-2000:]
    rows = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("runs/sweep/*/run.json"))]
    assert [(row["depth"], row["state"], row["images_seen"]) for row in rows] == [
        (depth, "finished", 72) for depth in (1, 2, 3)
    ]


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


def test_a_dry_run_shows_the_jobs_and_the_script_for_slurm(tmp_path, sweep):
    code, said = sweep(
        *sweep.settings, "model.depth=1,2", "hydra/launcher=slurm", "nodes=4", "trainer=multinode", "dry_run=true"
    )
    assert code == 0, said[-2000:]
    assert "2 jobs in runs/sweep" in said and "model.depth=2" in said
    for line in (
        "#SBATCH --nodes=4",
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --ntasks-per-node=8",
        "#SBATCH --signal=USR2@300",
    ):
        assert line in said, said
    assert not (tmp_path / "runs").exists()


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


def test_a_running_job_is_not_started_twice(tmp_path, sweep):
    settings = [*sweep.settings, "model.depth=1", "steps=400", "val_every=400"]
    process = sweep.start(*settings)
    deadline = time.time() + 60
    while not ledger(tmp_path) and time.time() < deadline:
        time.sleep(0.1)
    code, said = sweep(*settings)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert code == 1 and "is being run by process" in said


def test_a_planned_sweep_says_what_each_job_costs_and_starts_none(tmp_path, sweep):
    code, said = sweep(*sweep.settings, "model.depth=1,2", "plan=true")
    assert code == 0, said[-2000:]
    assert "VAR of depth 1" in said and "VAR of depth 2" in said and said.count("memory of each of 1 devices") == 2
    assert not list(tmp_path.rglob("sweep.json")) and not list(tmp_path.rglob("checkpoints"))


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
