"""The ledger of a sweep: its planned jobs, and the state of each.

runs/NAME/sweep.json        the command, its folder, the overrides of each job
runs/NAME/JOB/job.json      state of a job (running, finished, failed, stopped), fingerprint of its config, host, SLURM job, times
"""

import atexit
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from varlab.config import is_sweep
from varlab.files import FolderLock, load_json, lock_holder, process_start, save_json
from varlab.sweeps.slurm import check, is_slurm, slurm_script, watch

CHOICE = "VARLAB_SWEEP"  # environment variable: which jobs `varlab sweep` reruns


class Ledger(Callback):
    """Hydra callback of a sweep: records the planned jobs, and reports their states at the end."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        self.planned: list[dict[str, float]] = []
        HydraConfig.instance().set_config(config)  # so that the sweep's folder can be resolved
        if config.get("plan"):
            return  # nothing is started
        folder = Path(config.hydra.sweep.dir)
        jobs = job_overrides(config)
        if config.get("dry_run"):
            print(f"{len(jobs)} jobs in {folder}:")
            for overrides in jobs:
                print("  " + " ".join(overrides))
            print(slurm_script(config) if is_slurm(config) else "each runs in its own process on this machine")
            raise SystemExit(0)
        if is_slurm(config):
            try:
                check(config)
            except ValueError as error:
                sys.exit(f"varlab train: {error}")
            watch(config.hydra.launcher.name)
            print(
                f"{len(jobs)} SLURM jobs called {config.hydra.launcher.name}; logs: {folder}/JOB/output.log", flush=True
            )
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

        total = {name: sum(job[name] for job in self.planned) for name in self.planned[0]}
        flops = total.pop("flops")
        print(f"all {len(self.planned)} jobs: {flops:.3g} FLOP")
        print_time(flops, 1, total, config.planned_flops)


def task_overrides(hydra: Any) -> list[str]:
    """The overrides as given: `${...}` in them is part of the text."""
    return OmegaConf.to_container(hydra.overrides.task, resolve=False)  # pyright: ignore[reportReturnType]


def job_overrides(config: DictConfig) -> list[list[str]]:
    """The overrides of each job of a sweep, computed by Hydra's sweeper."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    given: Any = OmegaConf.to_container(config.hydra.sweeper, resolve=False)
    params = [f"{key}={value}" for key, value in (given.get("params") or {}).items()]
    parsed = OverridesParser.create().parse_overrides([*params, *task_overrides(config.hydra)])
    return [list(overrides) for batch in BasicSweeper.split_arguments(parsed, None) for overrides in batch]


def entry(folder: Path) -> dict[str, Any] | None:
    """The ledger entry of the job in a folder, or None."""
    file = folder / "job.json"
    return load_json(file, "varlab train --multirun") if file.is_file() else None


def is_alive(known: dict[str, Any], folder: Path) -> bool:
    """Whether a job that is marked as running still runs, here or on another host."""
    job = os.environ.get("SLURM_JOB_ID")
    if known["state"] != "running" or (job is not None and known.get("slurm_job") == job):
        return False  # a SLURM job that starts again has ended before
    if lock_holder(folder) is not None:
        return True
    if known["host"] == socket.gethostname():
        return process_start(known["pid"]) is not None
    return time.time() - known["started"] < FolderLock.STALE  # it may not have come to its lock yet


def states(folder: Path) -> list[tuple[list[str], str, dict[str, Any]]]:
    """(overrides, state, ledger entry) of each job of a sweep; jobs that never started are `pending`, those whose
    process no longer exists are `stopped`. Raises ValueError if the folder holds no sweep."""
    plan = load_json(folder / "sweep.json", "varlab train --multirun")
    entries = {}
    for file in sorted(folder.rglob("job.json")):
        known = load_json(file, "varlab train --multirun")
        entries[tuple(known["overrides"])] = {**known, "folder": str(file.parent)}
    found = []
    for overrides in plan["jobs"]:
        known = entries.get(tuple(overrides), {})
        state = known.get("state", "pending")
        if state == "running" and not is_alive(known, Path(known["folder"])):
            state = "stopped"
        found.append((overrides, state, known))
    return found


def report(folder: Path) -> str:
    """The ledger as text: the number of jobs in each state, the jobs, and each failure with its log."""
    found = states(folder)
    counts = {state: sum(s == state for _, s, _ in found) for state in dict.fromkeys(s for _, s, _ in found)}
    lines = [f"sweep {folder}: {', '.join(f'{n} {state}' for state, n in counts.items())}"]
    for overrides, state, known in found:
        varied = " ".join(o for o in overrides if sum(o in others for others, _, _ in found) < len(found)) or "the job"
        note = f"  val_loss {known['value']:.4f}" if known.get("value") is not None else ""
        if state == "failed":
            note = f"  {known['last_line']}  (log: {known['folder']}/output.log)"
        lines.append(f"  {state:9} {varied}{note}")
    if counts.get("failed") or counts.get("stopped") or counts.get("pending"):
        lines.append(f"  continue with: varlab sweep resume {folder}   or: varlab sweep retry-failed {folder}")
    return "\n".join(lines)
