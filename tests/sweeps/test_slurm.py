"""A real SLURM: warned, canceled, preempted and requeued jobs lose nothing; a sweep's ledger tells what happened."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from support.runs import command, log_to, logged_losses, sample_settings
from support.slurm import Slurm, reason_to_skip

from varlab import image_grid
from varlab.sweeps import slurm as sweep_slurm

pytestmark = pytest.mark.skipif(reason_to_skip() is not None, reason=str(reason_to_skip()))
PYTHON = sys.executable
STARTS = {
    "srun": f"srun {PYTHON} -m varlab train",
    "two tasks": f"srun {PYTHON} -m varlab train trainer.devices=2 trainer.strategy=ddp",
    "two nodes": f"srun {PYTHON} -m varlab train trainer.devices=1 nodes=2 trainer.strategy=ddp",
    "torchrun": f"srun {PYTHON} -m torch.distributed.run --standalone --nproc-per-node=2 -m varlab train"
    " trainer.devices=2 trainer.strategy=ddp",
}


@pytest.fixture(scope="module")
def slurm():
    with tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as folder:
        running = Slurm(Path(folder))
        yield running
        running.stop()


@pytest.fixture
def slow_run(still):
    """A run of 40 steps that take six seconds."""
    kept = [setting for setting in still if not setting.startswith(("steps", "val_every", "save_every"))]
    pace = ["+callbacks.slow._target_=support.fault_callbacks.Slow", "+callbacks.slow.seconds=0.15"]
    return [*kept, *pace, "steps=40", "val_every=20", "save_every=1000"]


def num_steps(log: Path) -> int:
    return len(log.read_text(encoding="utf-8").splitlines()) if log.is_file() else 0


def submit(slurm, folder, slow_run, start, *options):
    """A job that trains in folder/run; its id, once it has done ten steps."""
    given = [f"run_dir={folder / 'run'}", "name=test", f"hydra.run.dir={folder / 'run'}", *slow_run, "ckpt_path=last"]
    words = " ".join(f"'{word}'" for word in [*given, *log_to(folder / "log")])
    tasks = "--ntasks-per-node=2" if start == "two tasks" else "--ntasks-per-node=1"
    nodes = "--nodes=2" if start == "two nodes" else "--nodes=1"
    options = ("--requeue", "--time=10", "--open-mode=append", "-o", "job.txt", tasks, nodes, *options)
    job = slurm.submit(f"{STARTS[start]} {words}", folder, *options)
    slurm.wait(lambda: num_steps(folder / "log.0") >= 10, 120)
    return job


@pytest.mark.parametrize(
    ("start", "event"),
    [
        ("srun", "warning"),
        pytest.param("two tasks", "warning", marks=pytest.mark.slow),
        pytest.param("two nodes", "warning", marks=pytest.mark.slow),
        pytest.param("torchrun", "warning", marks=pytest.mark.slow),
        pytest.param("two nodes", "requeue", marks=pytest.mark.slow),
        pytest.param("srun", "preemption", marks=pytest.mark.slow),
    ],
)
def test_a_job_that_is_interrupted_ends_as_an_uninterrupted_run(start, event, slurm, tmp_path, slow_run):
    single = [word for word in slow_run if "callbacks.slow" not in word]
    job = submit(slurm, tmp_path, slow_run, start)
    if event == "warning":
        slurm.call("scancel", "--signal=USR2", job)
    elif event == "requeue":
        slurm.call("scontrol", "requeue", job)
    else:
        slurm.submit("sleep 2", tmp_path, "-p", "high", "--nodes=2", "--exclusive", "-o", "/dev/null")
    slurm.wait(lambda: slurm.state(job) == "PENDING", 60)
    assert json.loads((tmp_path / "run/run.json").read_text())["state"] == "stopped"
    slurm.wait(lambda: slurm.state(job) == "COMPLETED", 180)
    row = json.loads((tmp_path / "run/run.json").read_text())
    assert row["state"] == "finished" and row["step"] == 40, (tmp_path / "job.txt").read_text()[-3000:]
    assert sorted(logged_losses(tmp_path / "log")) == list(range(1, 41))
    if start in ("srun",):
        assert command(tmp_path / "whole", *single, *log_to(tmp_path / "whole.log")).returncode == 0
        assert logged_losses(tmp_path / "whole.log") == logged_losses(tmp_path / "log")


@pytest.mark.slow
def test_a_run_longer_than_its_time_limit_takes_two_legs(slurm, tmp_path, slow_run):
    longer = [word for word in slow_run if not word.startswith("steps")] + ["steps=400"]
    job = submit(slurm, tmp_path, longer, "srun", "--time=1", "--signal=USR2@20")
    slurm.wait(lambda: slurm.state(job) == "COMPLETED", 300)
    assert json.loads((tmp_path / "run/run.json").read_text())["state"] == "finished"
    assert "SIGUSR2 received" in (tmp_path / "job.txt").read_text()
    assert sorted(logged_losses(tmp_path / "log")) == list(range(1, 401))


@pytest.mark.slow
def test_a_job_whose_node_died_goes_on_from_its_checkpoint_on_another(slurm, tmp_path, slow_run):
    saved_often = [word for word in slow_run if not word.startswith(("steps", "save_every"))] + [
        "save_every=5",
        "steps=60",
    ]
    job = submit(slurm, tmp_path, saved_often, "srun")
    holder = json.loads((tmp_path / "run/.lock").read_text())
    node = holder["host"].partition("/")[0]
    os.kill(int((slurm.folder / f"slurmd-{node}.pid").read_text()), signal.SIGKILL)
    subprocess.run(["pkill", "-9", "-f", f"slurmstepd: .{job}"], check=False)
    os.kill(holder["pid"], signal.SIGKILL)
    slurm.wait(lambda: slurm.state(job) in ("PENDING", "COMPLETED"), 180)
    slurm.wait(lambda: slurm.state(job) == "COMPLETED", 240)
    assert json.loads((tmp_path / "run/run.json").read_text())["step"] == 60
    assert sorted(logged_losses(tmp_path / "log")) == list(range(1, 61))
    slurm.start_node(node)
    slurm.wait(lambda: slurm.call("sinfo", "-h", "-N", "-p", "cpu", "-o", "%T").split() == ["idle"] * 2, 60)


@pytest.mark.slow
def test_tokens_and_samples_of_four_tasks_on_two_nodes_equal_those_of_one_process(
    slurm, tmp_path, digits_folder, export_folder
):
    """`srun` alone sets ranks: each task does its part, the first puts them together."""
    encode = f"tokenize shards={digits_folder} tokenizer={export_folder} resize_ratio=1.0 part_images=4 out={{}}"
    sample = " ".join(["sample", *sample_settings(export_folder, "{}")])
    for verb in (encode, sample):
        name = verb.partition(" ")[0]
        one, four = tmp_path / f"{name}-one", tmp_path / f"{name}-four"
        words = [PYTHON, "-m", "varlab", *verb.format(one).split()]
        subprocess.run(words, check=True, cwd=tmp_path, capture_output=True)
        started = f"srun {PYTHON} -m varlab {verb.format(four)}"
        job = slurm.submit(started, tmp_path, "--nodes=2", "--ntasks-per-node=2", "--time=10", "-o", f"{name}.txt")
        slurm.wait(lambda job=job: slurm.state(job) not in ("PENDING", "RUNNING"), 240)
        assert slurm.state(job) == "COMPLETED", (tmp_path / f"{name}.txt").read_text()[-3000:]
        read, own = {"sample": (image_grid.read_pixels, "images/*.png"), "tokenize": (np.load, "*.npy")}[name]
        files = sorted(file.relative_to(one) for file in one.glob(own))
        assert files and sorted(file.relative_to(four) for file in four.glob(own)) == files
        for file in files:  # batches of other sizes add up in another order: one level at most
            difference = np.abs(read(one / file).astype(int) - read(four / file).astype(int))
            assert difference.max() <= (name == "sample")


def test_a_canceled_job_has_saved_and_is_not_started_again(slurm, tmp_path, slow_run):
    job = submit(slurm, tmp_path, slow_run, "srun")
    slurm.call("scancel", job)
    slurm.wait(lambda: slurm.state(job) == "CANCELLED", 60)
    row = json.loads((tmp_path / "run/run.json").read_text())
    assert row["state"] == "stopped" and 10 <= row["step"] < 40
    assert (tmp_path / "run/checkpoints/last.ckpt").is_file() and not (tmp_path / "run/.lock").exists()


def test_a_sweep_of_warned_and_failing_jobs(slurm, tmp_path, slow_run):
    kept = [word for word in slow_run if not word.startswith("model.depth")]
    launcher = {
        "partition": "cpu",
        "gpus_per_node": 0,
        "cpus_per_task": 1,
        "mem_gb": 1,
        "timeout_min": 3,
        "signal_delay_s": 60,
    }
    settings = [f"hydra.launcher.{key}={value}" for key, value in launcher.items()]
    started = [
        PYTHON,
        "-m",
        "varlab",
        "train",
        "--multirun",
        *kept,
        "name=sweep",
        "model.depth=2,0",
        "hydra/launcher=slurm",
    ]
    process = subprocess.Popen(
        [*started, *settings, "callbacks.pictures=null"], cwd=tmp_path, env={**os.environ, **slurm.environment}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    curves = tmp_path / "runs/sweep/d2-seed0-share1/metrics.csv"
    slurm.wait(lambda: num_steps(curves) > 8 or process.poll() is not None, 120)
    job = json.loads((curves.parent / "job.json").read_text())
    assert job["state"] == "running" and job["host"] in ("n1", "n2") and job["slurm_job"].isdigit()
    assert "sweep" in slurm.call("squeue", "-h", "-o", "%j")
    slurm.call("scancel", "--signal=USR2", job["slurm_job"])
    said = process.communicate(timeout=240)[0]
    assert process.returncode == 1 and "2 SLURM jobs called sweep; logs: runs/sweep/JOB/output.log" in said
    entries = [json.loads((tmp_path / f"runs/sweep/d{d}-seed0-share1/job.json").read_text()) for d in (2, 0)]
    assert [entry["state"] for entry in entries] == ["finished", "failed"]
    assert "continues at step" in (curves.parent / "output.log").read_text()
    assert json.loads((curves.parent / "run.json").read_text())["step"] == 40


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("partition=nope", "Invalid partition name specified"),
        ("nodes=5", "Requested node configuration is not available"),
    ],
)
def test_what_slurm_would_refuse_is_said_in_a_sentence(setting, reason, slurm, tmp_path, still):
    started = [PYTHON, "-m", "varlab", "train", "--multirun", *still, "name=sweep", "seed=0,1", "hydra/launcher=slurm"]
    given = ["hydra.launcher.gpus_per_node=0", "hydra.launcher.cpus_per_task=1", f"hydra.launcher.{setting}"]
    environment = {**os.environ, **slurm.environment}
    answer = subprocess.run([*started, *given], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert answer.returncode == 1 and "Traceback" not in answer.stderr
    assert answer.stderr.strip().splitlines()[-1].startswith(f"varlab train: SLURM refuses the jobs: {reason} (hydra")
    assert f"hydra.launcher.{setting}" in answer.stderr


def test_a_machine_without_sbatch_is_told(monkeypatch):
    monkeypatch.setattr(sweep_slurm.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="needs sbatch, which is not on this machine"):
        sweep_slurm.check(OmegaConf.create({}))
