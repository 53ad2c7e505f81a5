"""A run that was logged offline in two parts goes up as one curve."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.runs import command, fit, kill_at

from varlab.files import read_curves
from varlab.training.run_record import summary


@pytest.fixture(scope="module")
def resumed_once(tmp_path_factory, var_overrides):
    """Killed after step 5, continued from step 3, with W&B offline beside the local log."""
    tmp_path = tmp_path_factory.mktemp("resumed")
    settings = [override for override in var_overrides if override != "logger=csv"]
    settings += ["logger=default", "logger.wandb.mode=offline", "ckpt_path=last"]
    command(tmp_path / "run", *settings, *kill_at(5))
    fit(tmp_path / "run", *settings)
    return tmp_path / "run"


@pytest.fixture
def resumed(tmp_path, resumed_once):
    """A copy of that run."""
    return Path(shutil.copytree(resumed_once, tmp_path / "run"))


def records(folder: Path) -> list[dict]:
    """All that W&B wrote for the runs in a folder, by its own reader."""
    found = []
    for run in sorted(folder.glob("offline-run-*")):
        answer = subprocess.run(
            ["wandb", "leet", "inspect", str(run), "--json"], capture_output=True, text=True, check=True,
            env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        )  # fmt: skip
        found += [json.loads(line) for line in answer.stdout.splitlines() if line.strip()]
    return found


def sync(folder: Path, **variables: str) -> subprocess.CompletedProcess:
    environment = {
        **{k: v for k, v in os.environ.items() if k not in ("WANDB_API_KEY", "WANDB_SERVICE")},
        "HOME": str(folder),
        **variables,
    }
    command = [sys.executable, "-m", "varlab", "sync", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


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
    text = json.dumps(records(resumed / "wandb"))
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


def test_the_last_words_name_checkpoint_and_curves(resumed):
    said = summary(resumed)
    assert "finished at step 9" in said and "72 images" in said and "val_loss" in said
    assert str(resumed / "checkpoints/last.ckpt") in said and str(resumed / "curves.png") in said
    assert (resumed / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_wandb_gets_config_artifacts_and_the_loss_by_scale(resumed):
    text = json.dumps(records(resumed / "wandb"))
    assert "global_batch_size" in text and "git_commit" in text  # the config tree, the code's version
    assert "dataset-" in text and "tokenizer-" in text and "val/by_scale" in text
