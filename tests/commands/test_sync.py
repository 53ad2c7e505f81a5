"""A run that was logged offline in two parts goes up as one curve."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

from support import warm
from support.runs import wandb_records

from varlab.files import read_curves


def sync(folder: Path, **variables: str) -> subprocess.CompletedProcess:
    environment = {
        **{k: v for k, v in os.environ.items() if k not in ("WANDB_API_KEY", "WANDB_SERVICE")},
        "HOME": str(folder),
        **variables,
    }
    command = [sys.executable, "-m", "varlab", "sync", str(folder)]
    return warm.run(command, env=environment)


def test_each_step_goes_up_once_under_the_runs_own_id(resumed):
    rows = list(csv.DictReader((resumed / "metrics.csv").open()))
    assert len(rows) > len({row["step"] for row in rows})  # steps 4 and 5 were made twice
    before = {run.name for run in (resumed / "wandb").glob("offline-run-*")}
    assert len(before) == 2
    answer = sync(resumed, WANDB_MODE="offline")
    assert answer.returncode == 0 and f"{resumed}: 10 new steps" in answer.stdout, answer.stderr
    (upload,) = {run for run in (resumed / "wandb").glob("offline-run-*") if run.name not in before}
    assert upload.name.endswith((resumed / "run_id").read_text())
    for run in (resumed / "wandb").glob("offline-run-*"):
        if run.name in before:
            run.rename(resumed / run.name)
    text = json.dumps(wandb_records(resumed / "wandb"))
    curves = read_curves(resumed / "metrics.csv")
    assert list(curves["train/loss"]) == list(range(9))
    for value in curves["train/loss"].values():
        assert f"{value:.12g}"[:8] in text
    assert "samples" in text and "val/loss" in text
    again = sync(resumed, WANDB_MODE="offline")
    assert f"{resumed}: 0 new steps" in again.stdout


def test_without_a_login_nothing_is_sent_and_a_sentence_says_why(resumed, tmp_path):
    answer = sync(resumed, WANDB_MODE="online")
    assert answer.returncode == 1
    assert answer.stderr.strip() == "varlab sync: there is no W&B login: run `wandb login`, or set WANDB_API_KEY"
    (tmp_path / "empty").mkdir()
    answer = sync(tmp_path / "empty", WANDB_MODE="offline")
    assert "holds no run (a folder with metrics.csv and run_id)" in answer.stderr
