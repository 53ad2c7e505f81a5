"""Jobs of a sweep: each a process of its own, entered in the sweep's ledger.

    runs/NAME/sweep.json        the command, its folder, the overrides of each job
    runs/NAME/JOB/job.json      state of a job (running, finished, failed, stopped), fingerprint of its config, host, times
    runs/NAME/JOB/job.yaml      its composed config, from which all its processes start
    runs/NAME/JOB/output.log    all it said

The same command again skips what is finished and continues the rest.
"""

import atexit
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
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import CompactHydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from varlab.config import is_sweep
from varlab.files import atomic_write, flat, json_hash, load_json, save_json

STOPPED = 75  # exit code of a run that was told to stop, and saved (EX_TEMPFAIL)
FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
CHOICE = "VARLAB_SWEEP"  # environment: which jobs `varlab sweep` wants run again


class Ledger(Callback):
    """Hydra's callback around a sweep: writes down what it will run, and says at the end what became of it."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        self.planned: list[float] = []
        HydraConfig.instance().set_config(config)  # so that the sweep's folder can be resolved
        if config.get("plan"):
            return  # nothing is started
        folder = Path(config.hydra.sweep.dir)
        jobs = job_overrides(config)
        if config.get("dry_run"):
            print(f"{len(jobs)} jobs in {folder}:")
            for overrides in jobs:
                print("  " + " ".join(overrides))
            print(slurm_script(config) or "each in a process of its own on this machine")
            raise SystemExit(0)
        if os.environ.get(CHOICE) is None:
            save_json(folder / "sweep.json", {"argv": sys.argv[1:], "cwd": os.getcwd(), "jobs": jobs})
        atexit.register(lambda: print(report(folder)))

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        if config.get("plan") and job_return.status == JobStatus.COMPLETED and is_sweep():
            self.planned.append(job_return.return_value)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        if not self.planned:
            return
        from varlab.cost.plan import print_time

        print(f"all {len(self.planned)} jobs together: {sum(self.planned):.3g} FLOP")
        print_time(config, sum(self.planned), 1)


def job_overrides(config: DictConfig) -> list[list[str]]:
    """The overrides of each job of a sweep, as Hydra's sweeper deals them out."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    params = [f"{key}={value}" for key, value in (config.hydra.sweeper.get("params") or {}).items()]
    parsed = OverridesParser.create().parse_overrides([*params, *config.hydra.overrides.task])
    return [list(overrides) for batch in BasicSweeper.split_arguments(parsed, None) for overrides in batch]


def slurm_script(config: DictConfig) -> str | None:
    """The batch script that submitit would hand to SLURM; None for another launcher."""
    if not str(config.hydra.launcher.get("_target_")).endswith("SlurmLauncher"):
        return None
    from submitit.slurm.slurm import SlurmExecutor, _make_sbatch_string

    settings: dict[str, Any] = OmegaConf.to_container(config.hydra.launcher, resolve=True)  # pyright: ignore[reportAssignmentType]
    own = {"_target_", "submitit_folder", "max_num_timeout"}
    given = {key: value for key, value in settings.items() if key not in own and value is not None}
    executor = object.__new__(SlurmExecutor)  # its constructor wants to see srun
    given = executor._convert_parameters(given)
    command = f"{sys.executable} -m submitit.core._submit {settings['submitit_folder']}"
    return _make_sbatch_string(command=command, folder=settings["submitit_folder"], **given)


def run_job(cfg: DictConfig, module: str) -> float | None:
    """Runs one job of a sweep by `python -m MODULE --job FILE`; returns its last validation loss.

    Raises CompactHydraException when it fails, so that the sweep goes on to the next; SystemExit when it was told to stop.
    """
    folder = Path(HydraConfig.get().runtime.output_dir)
    config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # pyright: ignore[reportAssignmentType]
    config["ckpt_path"] = "last"
    fingerprint, overrides = json_hash(config), list(HydraConfig.get().overrides.task)
    known = entry(folder)
    if known and known["fingerprint"] != fingerprint:
        raise CompactHydraException(
            f"{folder} holds a job with other settings ({', '.join(changed(folder, config))}): choose another name=..., or, where"
            " jobs of one sweep meet in a folder, hydra.sweep.subdir='${hydra:job.override_dirname}'"
        )
    task = int(os.environ.get("SLURM_PROCID", 0))  # of the tasks of a SLURM job the first keeps the books
    if task == 0 and known and is_alive(known):
        raise CompactHydraException(f"{folder} is being run by process {known['pid']} on {known['host']}")
    if skipped := reason_to_skip(known, task):
        print(f"{folder}: {skipped}")
        return known.get("value") if known else None
    with atomic_write(folder / "job.yaml") as partial:
        OmegaConf.save(OmegaConf.create(config), partial)
    facts = {"overrides": overrides, "fingerprint": fingerprint, "host": socket.gethostname(), "started": time.time()}
    command = [sys.executable, "-m", module, "--job", str(folder / "job.yaml")]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process,
        forwarding(process) as got,
    ):
        if task == 0:
            save_json(folder / "job.json", {"state": "running", "pid": process.pid, **facts})
        last_line = relay(process, folder / (f"output-{task}.log" if task else "output.log"))
        code = process.wait()
    state = {0: "finished", STOPPED: "stopped"}.get(code, "failed")
    value = load_json(folder / "run.json", "varlab train").get("val_loss") if state == "finished" else None
    ending = {"state": state, "exit_code": code, "value": value, "ended": time.time(), "last_line": last_line}
    if task == 0:
        save_json(folder / "job.json", {**facts, **ending})
    if state == "stopped":
        got.pass_on()
    if state == "failed":
        raise CompactHydraException(f"{folder} failed: {last_line} (log: {folder / 'output.log'})")
    return value


def entry(folder: Path) -> dict[str, Any] | None:
    """What the ledger knows of the job in a folder."""
    file = folder / "job.json"
    return load_json(file, "varlab train --multirun") if file.is_file() else None


def changed(folder: Path, config: dict[str, Any]) -> list[str]:
    """Settings in which a job differs from the one that was run in its folder."""
    before, now = flat(OmegaConf.to_container(OmegaConf.load(folder / "job.yaml"))), flat(config)
    return [
        f"{key}: {before.get(key)} -> {now.get(key)}"
        for key in before.keys() | now.keys()
        if before.get(key) != now.get(key)
    ]


def is_alive(known: dict[str, Any]) -> bool:
    """Whether the process of a job that the ledger calls running is still there."""
    if known["state"] != "running" or known["host"] != socket.gethostname():
        return False
    try:
        os.kill(known["pid"], 0)
    except ProcessLookupError:
        return False
    return True


def reason_to_skip(known: dict[str, Any] | None, task: int = 0) -> str | None:
    """Why a job is not run (again); None when it is. Further tasks of a SLURM job follow the first, which may have begun."""
    state, choice = known["state"] if known else "pending", os.environ.get(CHOICE)
    if task and state == "running":
        return None
    if state == "finished":
        return "finished before, kept"
    if choice == "resume" and state == "failed":
        return "failed before, left for `varlab sweep retry-failed`"
    if choice == "retry-failed" and state != "failed":
        return f"{state}, not failed: left for `varlab sweep resume`"
    return None


def relay(process: subprocess.Popen, log: Path) -> str:
    """Copies what a process says to its log and to the screen; returns the last line."""
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
    """Signals that came while a job ran."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.previous: dict[int, Any] = {}

    def pass_on(self) -> None:
        """What the signal would have done without us, now that the job has saved: submitit puts it back into its queue."""
        if self.number is None:
            raise SystemExit(STOPPED)
        handler = self.previous.get(self.number)
        if callable(handler) and handler is not signal.default_int_handler:
            handler(self.number, None)
            return
        raise SystemExit(128 + self.number)


@contextmanager
def forwarding(process: subprocess.Popen) -> Iterator[Received]:
    """Signals to us go to the job as SIGTERM, which makes it save and stop."""
    received = Received()

    def forward(number: int, frame: Any) -> None:
        received.number = number
        process.send_signal(signal.SIGTERM)

    if threading.current_thread() is threading.main_thread():
        received.previous = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        yield received
    finally:
        for number, handler in received.previous.items():
            signal.signal(number, handler)


def states(folder: Path) -> list[tuple[list[str], str, dict[str, Any]]]:
    """(overrides, state, ledger entry) of each job of a sweep; those never begun are `pending`, those whose process is gone
    `stopped`. Raises ValueError when the folder holds no sweep."""
    plan = load_json(folder / "sweep.json", "varlab train --multirun")
    entries = {}
    for file in sorted(folder.rglob("job.json")):
        known = load_json(file, "varlab train --multirun")
        entries[tuple(known["overrides"])] = {**known, "folder": str(file.parent)}
    found = []
    for overrides in plan["jobs"]:
        known = entries.get(tuple(overrides), {})
        state = known.get("state", "pending")
        if state == "running" and known["host"] == socket.gethostname() and not is_alive(known):
            state = "stopped"
        found.append((overrides, state, known))
    return found


def report(folder: Path) -> str:
    """The ledger in words: how many jobs are in which state, and each failure with its log."""
    found = states(folder)
    counts = {state: sum(s == state for _, s, _ in found) for state in dict.fromkeys(s for _, s, _ in found)}
    lines = [f"sweep {folder}: {', '.join(f'{n} {state}' for state, n in counts.items())}"]
    for overrides, state, known in found:
        varied = " ".join(o for o in overrides if sum(o in others for others, _, _ in found) < len(found)) or "the job"
        told = f"  val_loss {known['value']:.4f}" if known.get("value") is not None else ""
        if state == "failed":
            told = f"  {known['last_line']}  (log: {known['folder']}/output.log)"
        lines.append(f"  {state:9} {varied}{told}")
    if counts.get("failed") or counts.get("stopped") or counts.get("pending"):
        lines.append(f"  go on with: varlab sweep resume {folder}   or: varlab sweep retry-failed {folder}")
    return "\n".join(lines)
