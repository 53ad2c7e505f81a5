"""`make gpu` works: rehearsed at tiny sizes on the CPU."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "experiments/performance/gpu.py"
NEEDS_GPU = {"gpu_tests", "host_syncs", "full_memory"}


def run(*arguments, **variables):
    command = [sys.executable, SCRIPT, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **variables}, timeout=900
    )


@pytest.mark.slow
def test_a_rehearsal_runs_every_part_and_continues(tmp_path):
    begun = run("--rehearse", "--out", tmp_path, "--only", "machine", "attention")
    assert begun.returncode == 0, begun.stdout + begun.stderr
    made = json.loads((tmp_path / "results.json").read_text())
    whole = run("--rehearse", "--out", tmp_path)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["machine"] == made["machine"] and results["attention"] == made["attention"]  # not repeated
    assert {name for name, result in results.items() if result["state"] == "skipped"} == NEEDS_GPU
    assert all(result["state"] == "done" for name, result in results.items() if name not in NEEDS_GPU)
    assert all(result["why"] == "needs a GPU" for name, result in results.items() if name in NEEDS_GPU)
    cases = results["training_works"]["rows"]
    assert len(cases) == 6 and all(row["passed"] and "within 0" in row["value"] for row in cases), cases
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert {row["part"] for row in rows} == set(results) - NEEDS_GPU - {"kernels"}
    assert "### Sampling speed: done" in (tmp_path / "section.md").read_text()


def test_without_a_gpu_it_says_so(tmp_path):
    answer = run("--out", tmp_path, CUDA_VISIBLE_DEVICES="")
    assert answer.returncode == 1 and "no GPU that torch can use: --rehearse" in answer.stderr
    assert not list(tmp_path.iterdir())


def test_what_fails_is_recorded_and_repeated(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps({"machine": {"state": "failed", "why": "x", "rows": []}}))
    late = run("--rehearse", "--out", tmp_path, "--only", "machine", "deeper", "--minutes", "0")
    assert late.returncode == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert {result["state"] for result in results.values()} == {"skipped"}
    assert all("no time was left" in result["why"] for result in results.values())
