"""Signals at any moment of a run's life: saved and stopped, put back into the queue, or finished; never lost."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from support.runs import command, fit, log_to, logged_losses

from varlab.training import signals


@pytest.fixture
def queue(tmp_path):
    """The environment of a SLURM job whose `scontrol` writes down what it is told."""
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path / "said"}\n')
    (tmp_path / "scontrol").chmod(0o755)
    return {"SLURM_JOB_ID": "4711", "PATH": f"{tmp_path}:{os.environ['PATH']}"}


def send(step: int, name: str, times: int = 1, where: str = "batch") -> str:
    given = f"step: {step}, name: {name}, times: {times}, where: {where}"
    return f"+callbacks.sender={{_target_: support.fault_callbacks.Signal, {given}}}"


@pytest.mark.parametrize(
    ("name", "times", "where", "is_requeued"),
    [("SIGUSR1", 2, "batch", True), ("SIGUSR2", 1, "validation", True), ("SIGTERM", 3, "batch", False)],
)
def test_a_warned_job_is_saved_and_queued_again(name, times, where, is_requeued, tmp_path, still, queue):
    """The signal may come several times; a validation does not stand between it and the save."""
    runs = [*still, "val_every=3", "callbacks.ema={_target_: varlab.training.ema.EMA, decay: 0.9}"]
    fit(tmp_path / "whole", *runs, *log_to(tmp_path / "whole.log"))
    step = 3 if where == "validation" else 4
    warned = [tmp_path / "run", *runs, "save_every=1000", "ckpt_path=last", *log_to(tmp_path / "log")]
    answer = command(*warned, send(step, name, times, where), **queue)
    assert answer.returncode == signals.STOPPED, answer.stderr[-3000:]
    assert (tmp_path / "said").is_file() == is_requeued
    saved = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == (3 if where == "validation" else 5)
    assert json.loads((tmp_path / "run/run.json").read_text())["state"] == "stopped"
    assert command(*warned).returncode == 0
    assert logged_losses(tmp_path / "whole.log") == logged_losses(tmp_path / "log")
    ends = [torch.load(tmp_path / run / "checkpoints/last.ckpt", weights_only=True) for run in ("whole", "run")]
    for key in ("state_dict", "ema"):
        for name, value in ends[0][key].items():
            assert torch.equal(value, ends[1][key][name]), name
    rows = [(tmp_path / run / "metrics.csv").read_text() for run in ("whole", "run")]
    assert [row.count("\n") for row in rows] == [rows[0].count("\n")] * 2


def test_a_warning_in_the_last_validation_leads_to_a_finished_run(tmp_path, still, queue):
    settings = [tmp_path / "run", *still, "val_every=1000", "save_every=1000", "ckpt_path=last"]
    answer = command(*settings, send(9, "SIGUSR1", where="validation"), **queue)
    assert answer.returncode == signals.STOPPED and (tmp_path / "said").read_text() == "requeue 4711\n"
    assert json.loads((tmp_path / "run/run.json").read_text())["state"] == "stopped"
    assert command(*settings).returncode == 0
    row = json.loads((tmp_path / "run/run.json").read_text())
    assert row["state"] == "finished" and row["step"] == 9 and row["val_loss"] > 0


@pytest.mark.parametrize("delay", [0.3, 1.0, 3.0])
def test_a_signal_while_starting_ends_the_run_at_once_and_queues_it_again(delay, tmp_path, still, queue):
    settings = [f"run_dir={tmp_path / 'run'}", "name=test", f"hydra.run.dir={tmp_path / 'run'}", *still]
    started = [sys.executable, "-m", "varlab", "train", *settings, "steps=100000"]
    process = subprocess.Popen(started, env={**os.environ, **queue}, stderr=subprocess.PIPE, text=True)
    time.sleep(delay)
    process.send_signal(signal.SIGUSR2)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == signals.STOPPED, said
    assert (tmp_path / "said").read_text() == "requeue 4711\n"


def test_a_second_ctrl_c_kills(tmp_path):
    script = """
import os, signal, time
from varlab.training import signals
signals.install()
signals.request.is_watched = True
for _ in range(2):
    os.kill(os.getpid(), signal.SIGINT)
    print("alive", flush=True)
"""
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert answer.returncode == -signal.SIGINT and answer.stdout == "alive\n"


def test_only_a_warning_to_the_first_process_queues_the_job_again(monkeypatch):
    calls = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: calls.append(command))
    monkeypatch.setattr(signals.shutil, "which", lambda name: name)
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID", "SUBMITIT_EXECUTOR", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    signals.requeue(signal.SIGUSR1)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    signals.requeue(signal.SIGTERM)
    assert not calls and signals.is_first_process()
    signals.requeue(signal.SIGUSR2)
    assert calls == [["scontrol", "requeue", "12"]]
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    signals.requeue(signal.SIGUSR2)
    assert len(calls) == 1
    monkeypatch.setenv("RANK", "1")
    assert not signals.is_first_process()


def test_a_warning_while_the_process_ends_does_not_kill_it():
    """Functions of atexit run in reverse order, so the one registered first sees what the interpreter shuts down with."""
    look = "import atexit, signal; atexit.register(lambda: print(signal.getsignal(signal.SIGUSR2) == signal.SIG_IGN))"
    program = f"{look}; from varlab.training.signals import install; install(); print(signal.getsignal(signal.SIGUSR2))"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    during, after = answer.stdout.splitlines()
    assert "handle" in during and after == "True"
