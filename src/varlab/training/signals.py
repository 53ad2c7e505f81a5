"""Signals that ask a run to stop, at any moment of its process: SIGTERM, SIGUSR1 and SIGUSR2 (a cluster's warning
before the time limit), Ctrl-C.

While a run is watched (`StopOnSignal`), a signal is only recorded: the run saves after its step and stops. Before that
there is nothing to save, and the process ends at once. Signals may arrive many times; only a second Ctrl-C kills.
"""

import atexit
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import FrameType

STOPPED = 75  # exit code of a run that saved and stopped on a signal (EX_TEMPFAIL)
WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)  # sent before the time limit of a job, which is then requeued
SIGNALS = (signal.SIGINT, signal.SIGTERM, *WARNINGS)


class Stopped(SystemExit):
    """Ends a run that has saved after a signal."""

    def __init__(self) -> None:
        super().__init__(STOPPED)


class StopRequest:
    """The signal that this process received, and whether a run looks at it."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.is_watched = False


request = StopRequest()


def install() -> None:
    """Installs the handlers in this process; to be called first of all, in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        return
    for number in SIGNALS:
        signal.signal(number, handle)
    atexit.register(ignore_warnings)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # a sweep starts its jobs with signals blocked


def ignore_warnings() -> None:
    """Ignores warnings of the time limit from now on: while the interpreter shuts down, it would give them their default action,
    which kills, and the job of a run that has finished would count as failed."""
    for number in WARNINGS:
        signal.signal(number, signal.SIG_IGN)


def handle(number: int, frame: FrameType | None) -> None:
    """Records a signal, or ends the process if no run is watched."""
    if number == signal.SIGINT and request.received == signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    if request.received is None:
        request.received = number
    name = signal.Signals(number).name
    if request.is_watched:
        os.write(2, f"{name} received: saving after this step, then stopping\n".encode())
        return
    os.write(2, f"{name} received: stopped before the training began\n".encode())
    for pid in child_processes():
        os.kill(pid, signal.SIGTERM)
    if is_first_process():
        requeue(request.received)
    os._exit(STOPPED)


def child_processes() -> list[int]:
    """Processes that this one started."""
    tasks = Path("/proc/self/task")
    files = [task / "children" for task in tasks.iterdir()] if tasks.is_dir() else []
    return [int(pid) for file in files if file.is_file() for pid in file.read_text(encoding="utf-8").split()]


def is_first_process() -> bool:
    """Whether this is rank 0, as far as the environment says."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))


def requeue(number: int | None) -> None:
    """Requeues this SLURM job after a warning; does nothing outside of SLURM, or if submitit does so. SIGTERM alone is no
    warning: it also comes from `scancel`, and SLURM itself requeues a job that it preempts."""
    job = os.environ.get("SLURM_JOB_ID")
    if number not in WARNINGS or job is None or "SUBMITIT_EXECUTOR" in os.environ:
        return
    if shutil.which("scontrol") is None:
        print(f"job {job} cannot be requeued: scontrol is not available on this machine", file=sys.stderr)
        return
    subprocess.run(["scontrol", "requeue", job], check=False)
