"""Runs read from W&B, online and offline, are those that their trainer wrote down; reports go back."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import warm
from support.runs import command
from support.scaling_runs import make_runs
from support.servers import WandbRuns, wandb_server

from varlab.files import read_curves
from varlab.scaling.runs import collect


def varlab(home: Path, url: str, *arguments: str, key: bool = True) -> subprocess.CompletedProcess:
    """A verb as a user starts it, with the W&B server at `url`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment = {**kept, "HOME": str(home), "WANDB_BASE_URL": url, **({"WANDB_API_KEY": "a" * 40} if key else {})}
    return warm.run([sys.executable, "-m", "varlab", *arguments], env=environment)


def uploaded(folder: Path) -> dict[str, tuple[dict, list[dict]]]:
    """Runs of a folder as the trainer's mirror gives them to W&B: the row as summary, one entry a logged step."""
    runs = {}
    for file in sorted(folder.rglob("run.json")):
        row = json.loads(file.read_text())
        curves = read_curves(file.parent / "metrics.csv")
        steps = sorted({step for curve in curves.values() for step in curve})
        history = [
            {"_step": i, "trainer/global_step": step, **{name: c[step] for name, c in curves.items() if step in c}}
            for i, step in enumerate(steps)
        ]
        runs[row["run_id"]] = ({**row, "val/loss": row["val_loss"], "_runtime": 5}, history)
    return runs


@pytest.mark.parametrize("place", ["me/varlab", "me/varlab/sweeps/s1"])
def test_runs_on_a_server_are_those_of_the_folder(place, tmp_path):
    make_runs(tmp_path / "sweep")
    with wandb_server(WandbRuns(uploaded(tmp_path / "sweep"))) as url:
        answer = varlab(tmp_path, url, "scaling", f"source=wandb:{place}", f"out={tmp_path / 'a'}", "bootstraps=20")
    assert answer.returncode == 0, answer.stderr
    there = varlab(tmp_path, "", "scaling", f"source={tmp_path / 'sweep'}", f"out={tmp_path / 'b'}", "bootstraps=20")
    assert there.returncode == 0, there.stderr
    for name in ("runs.csv", "curves.csv", "fits.json"):
        assert (tmp_path / "a" / name).read_text() == (tmp_path / "b" / name).read_text(), name


def test_other_runs_of_a_project_are_passed_over_and_a_crashed_one_is_named(tmp_path):
    make_runs(tmp_path / "sweep")
    runs = uploaded(tmp_path / "sweep")
    runs["other"] = ({"accuracy": 0.5}, [])
    next(iter(runs.values()))[0]["state"] = "running"  # its process died before it could say so
    with wandb_server(WandbRuns(runs, state="crashed")) as url:
        answer = varlab(tmp_path, url, "scaling", "source=wandb:me/varlab", f"out={tmp_path / 'a'}", "bootstraps=20")
    assert answer.returncode == 0, answer.stderr
    assert "d1-38400 (depth 1, failed at step 10): left out" in answer.stdout
    assert "3 runs, depths [2, 3, 4]" in answer.stdout


def test_no_server_no_login_and_an_empty_project_are_said_in_a_line(tmp_path):
    with wandb_server(WandbRuns({})) as url:
        answer = varlab(tmp_path, url, "scaling", "source=wandb:me/varlab", f"out={tmp_path / 'a'}")
        assert answer.returncode == 1 and "source=wandb:me/varlab holds no VAR runs" in answer.stdout
        answer = varlab(tmp_path, url, "scaling", "source=wandb:me/varlab", f"out={tmp_path / 'a'}", key=False)
    assert answer.returncode == 1 and "source=wandb:me/varlab cannot be read" in answer.stdout
    assert "Traceback" not in answer.stderr


def test_a_report_and_a_workspace_are_saved(tmp_path):
    make_runs(tmp_path / "sweep")
    server = WandbRuns(uploaded(tmp_path / "sweep"))
    given = [f"source={tmp_path / 'sweep'}", f"out={tmp_path / 'a'}", "bootstraps=20", "report=wandb"]
    with wandb_server(server) as url:
        answer = varlab(tmp_path, url, "scaling", *given, "project=me/varlab")
        refused = varlab(tmp_path, url, "scaling", *given)
    assert answer.returncode == 0, answer.stderr
    assert "W&B report: " in answer.stdout and "W&B workspace: " in answer.stdout
    report, workspace = (json.dumps(view) for view in server.views)
    assert "val_loss       against params_main" in report
    for name in ("count/flops_exact", "val/loss", "params_main"):
        assert name in report and name in workspace, name
    assert refused.returncode == 1 and "needs project=ENTITY/PROJECT" in refused.stdout
    alone = varlab(tmp_path, "http://127.0.0.1:9", "scaling", *given, key=False)
    assert alone.returncode == 0 and "there is no W&B login" in alone.stdout and (tmp_path / "a/report.html").is_file()


def test_offline_runs_are_those_of_the_folder(tmp_path, still):
    """A real run logged offline: its row and curve without and with the local log."""
    settings = [setting for setting in still if setting != "logger=csv"]
    for depth in (1, 2):
        done = command(
            tmp_path / f"runs/d{depth}", *settings, "logger=default", "logger.wandb.mode=offline", f"model.depth={depth}"
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    local = collect([str(tmp_path / "runs")])
    shutil.copytree(tmp_path / "runs", tmp_path / "offline")
    for name in ("run.json", "metrics.csv"):
        for file in (tmp_path / "offline").rglob(name):
            file.unlink()
    offline = collect([str(tmp_path / "offline")])
    assert len(offline.rows) == len(local.rows) == 2
    for a, b in zip(offline.rows, local.rows, strict=True):
        assert differing(a, b) == {}
    assert [point["step"] for point in offline.curves] == [point["step"] for point in local.curves]
    for a, b in zip(offline.curves, local.curves, strict=True):
        for key in ("images", "flops_exact", "val_loss", "train_loss"):
            assert a[key] == b[key] or math.isclose(a[key], b[key], rel_tol=1e-5), (key, a, b)


def differing(a: dict, b: dict) -> dict:
    """Columns in which two rows differ by more than the rounding of W&B's files."""

    def same(x: object, y: object) -> bool:
        if isinstance(x, float | int) and isinstance(y, float | int):
            return math.isclose(x, y, rel_tol=1e-6)
        return x == y

    return {key: (a.get(key), b[key]) for key in b if not same(a.get(key), b[key])}
