"""The ledger of a sweep."""

import csv
import json
import re
import signal
import time

import pytest
from support.runs import command, ledger


def test_a_planned_sweep_says_what_all_its_jobs_cost(tmp_path, study):
    answer = command(tmp_path, *study, "plan=true", "branch=1,0.5", "seed=0,1", "planned_flops=1e9", "--multirun")
    assert answer.returncode == 0, answer.stderr
    assert "all 4 jobs:" in answer.stdout
    var = json.loads(json.dumps(answer.stdout.split("all 4 jobs: ")[1].split(" FLOP")[0]))
    single = [
        float(line.split(" FLOP in total")[0].split()[-1])
        for line in answer.stdout.splitlines()
        if "FLOP in total" in line
    ]
    assert float(var) == pytest.approx(sum(single), rel=0.01) and len(single) == 4
    assert min(single) == pytest.approx(max(single) * 4 / 40, rel=0.01)  # a branch costs its cooldown alone


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
