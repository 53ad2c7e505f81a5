"""Jobs of a sweep: each runs in its own process and is recorded in the sweep's ledger.

    runs/NAME/JOB/job.yaml      composed config, which all processes of the job load
    runs/NAME/JOB/output.log    output

Rerunning the sweep's command skips finished jobs and continues the rest.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from omegaconf import DictConfig, OmegaConf

from varlab.files import atomic_write, flat, json_hash, load_json, save_json
from varlab.sweeps.ledger import CHOICE, entry, is_alive, task_overrides
from varlab.training import signals


def run_job(cfg: DictConfig, module: str) -> float | None:
    """Runs one job of a sweep with `python -m MODULE --job FILE`; returns its last validation loss.

    Raises CompactHydraException if it fails, so that the sweep continues with the next job; SystemExit if it was
    stopped by a signal.
    """
    folder = Path(HydraConfig.get().runtime.output_dir)
    config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # pyright: ignore[reportAssignmentType]
    config["ckpt_path"] = "last"
    fingerprint, overrides = json_hash(config), task_overrides(HydraConfig.get())
    known = entry(folder)
    if known and known["fingerprint"] != fingerprint:
        raise CompactHydraException(
            f"{folder} holds a job with other settings ({', '.join(changed(folder, config))}): choose another name=..., or, if"
            " several jobs of one sweep share a folder, hydra.sweep.subdir='${hydra:job.override_dirname}'"
        )
    task = int(os.environ.get("SLURM_PROCID", 0))  # only the first task of a SLURM job writes the ledger
    if task == 0 and known and is_alive(known, folder):
        job = f" (SLURM job {known['slurm_job']})" if known.get("slurm_job") else ""
        raise CompactHydraException(f"{folder} is being run by process {known['pid']} on {known['host']}{job}")
    if skipped := reason_to_skip(known, task):
        print(f"{folder}: {skipped}")
        return known.get("value") if known else None
    with atomic_write(folder / "job.yaml") as partial:
        OmegaConf.save(OmegaConf.create(config), partial)
    facts = {"overrides": overrides, "fingerprint": fingerprint, "host": socket.gethostname(), "started": time.time()}
    facts["slurm_job"] = os.environ.get("SLURM_JOB_ID")
    command = [sys.executable, "-m", module, "--job", str(folder / "job.yaml")]
    signal.pthread_sigmask(signal.SIG_BLOCK, signals.SIGNALS)  # until the job has its handlers
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process,
        forwarding(process) as got,
    ):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals.SIGNALS)
        if task == 0:
            save_json(folder / "job.json", {"state": "running", "pid": process.pid, **facts})
        last_line = relay(process, folder / (f"output-{task}.log" if task else "output.log"))
        code = process.wait()
    state = "finished" if code == 0 else "stopped" if code == signals.STOPPED or code < 0 else "failed"
    value = load_json(folder / "run.json", "varlab train").get("val_loss") if state == "finished" else None
    ending = {"state": state, "exit_code": code, "value": value, "ended": time.time(), "last_line": last_line}
    if task == 0:
        save_json(folder / "job.json", {**facts, **ending})
    if state == "stopped":
        got.pass_on()
    if state == "failed":
        raise CompactHydraException(f"{folder} failed: {last_line} (log: {folder / 'output.log'})")
    return value


def changed(folder: Path, config: dict[str, Any]) -> list[str]:
    """Settings in which a job differs from the job that its folder already holds."""
    before, now = flat(OmegaConf.to_container(OmegaConf.load(folder / "job.yaml"))), flat(config)
    return [
        f"{key}: {before.get(key)} -> {now.get(key)}"
        for key in before.keys() | now.keys()
        if before.get(key) != now.get(key)
    ]


def reason_to_skip(known: dict[str, Any] | None, task: int = 0) -> str | None:
    """Why a job is skipped; None if it is to be run. Other tasks of a SLURM job run if the first is already running."""
    state, choice = known["state"] if known else "pending", os.environ.get(CHOICE)
    if task and state == "running":
        return None
    if state == "finished":
        return "already finished"
    if choice == "resume" and state == "failed":
        return "failed before, skipped: run `varlab sweep retry-failed`"
    if choice == "retry-failed" and state != "failed":
        return f"{state}, not failed, skipped: run `varlab sweep resume`"
    return None


def relay(process: subprocess.Popen, log: Path) -> str:
    """Copies the output of a process to its log and to stdout; returns the last line."""
    tail = b""
    assert process.stdout is not None
    with open(log, "ab") as file:
        while chunk := os.read(process.stdout.fileno(), 1 << 16):
            file.write(chunk)
            file.flush()
            sys.stdout.buffer.write(chunk)
            sys.stdout.flush()
            tail = (tail + chunk)[-4096:]
    lines = [line.strip() for line in tail.decode(errors="replace").replace("\r", "\n").splitlines() if line.strip()]
    return lines[-1] if lines else ""


class Received:
    """The last signal received while a job ran, and the original handlers."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.previous: dict[int, Any] = {}

    def pass_on(self) -> None:
        """Calls the original handler of the signal after the job has saved; submitit's handler requeues the job."""
        if self.number is None:
            raise signals.Stopped
        handler = self.previous.get(self.number)
        if callable(handler) and handler is not signal.default_int_handler:
            handler(self.number, None)
            return
        raise SystemExit(128 + self.number)


@contextmanager
def forwarding(process: subprocess.Popen) -> Iterator[Received]:
    """Forwards signals of this process to the job as SIGTERM, which makes it save and stop."""
    received = Received()

    def forward(number: int, frame: Any) -> None:
        received.number = number
        process.send_signal(signal.SIGTERM)

    if threading.current_thread() is threading.main_thread():
        received.previous = {number: signal.signal(number, forward) for number in signals.SIGNALS}
    try:
        yield received
    finally:
        for number, handler in received.previous.items():
            signal.signal(number, handler)
