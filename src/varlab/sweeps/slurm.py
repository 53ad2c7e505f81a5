"""Sweeps on SLURM, through submitit: the script that is submitted, what is wrong with it, why a job waits."""

import os
import shutil
import subprocess
import sys
import threading
import time
from typing import Any

from omegaconf import DictConfig, OmegaConf

POLL_SECONDS = 20


def is_slurm(config: DictConfig) -> bool:
    """Whether the jobs of a sweep go to SLURM."""
    return str(config.hydra.launcher.get("_target_")).endswith("SlurmLauncher")


def slurm_script(config: DictConfig) -> str:
    """The batch script that submitit submits."""
    from submitit.slurm.slurm import SlurmExecutor, _make_sbatch_string

    settings: dict[str, Any] = OmegaConf.to_container(config.hydra.launcher, resolve=True)  # pyright: ignore[reportAssignmentType]
    own = {"_target_", "submitit_folder", "max_num_timeout"}
    given = {key: value for key, value in settings.items() if key not in own and value is not None}
    executor = object.__new__(SlurmExecutor)  # its constructor looks for srun
    given = executor._convert_parameters(given)
    command = f"{sys.executable} -m submitit.core._submit {settings['submitit_folder']}"
    return _make_sbatch_string(command=command, folder=settings["submitit_folder"], **given)


def check(config: DictConfig) -> None:
    """Asks SLURM whether it would take the jobs. Raises ValueError with its answer if not."""
    if shutil.which("sbatch") is None:
        raise ValueError(
            "hydra/launcher=slurm needs sbatch, which is not on this machine: start the sweep on a login node"
        )
    answer = subprocess.run(
        ["sbatch", "--test-only"], input=slurm_script(config), capture_output=True, text=True, check=False
    )
    if answer.returncode:
        reason = (
            answer.stderr.strip().splitlines()[-1].removeprefix("sbatch: error: ").removeprefix("allocation failure: ")
        )
        launcher = config.hydra.launcher
        wanted = {
            name: launcher.get(name) for name in ("partition", "account", "nodes", "gpus_per_node", "cpus_per_task")
        }
        given = ", ".join(f"hydra.launcher.{name}={value}" for name, value in wanted.items() if value is not None)
        raise ValueError(f"SLURM refuses the jobs: {reason} ({given})")


def watch(name: str) -> None:
    """Prints, while this process waits for the jobs of that name, when one starts and why another waits."""
    threading.Thread(target=report_changes, args=(name,), daemon=True).start()


def report_changes(name: str) -> None:
    """Prints the lines of squeue that are new, from time to time."""
    command = ["squeue", "-h", "-u", str(os.getuid()), "-n", name, "-o", "%i %T %r"]
    known: set[str] = set()
    while True:
        time.sleep(POLL_SECONDS)
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = set(answer.stdout.splitlines()) if answer.returncode == 0 else known
        for line in sorted(lines - known):
            job, state, reason = line.split(maxsplit=2)
            waits = f", waiting for: {reason}" if state == "PENDING" else ""
            print(f"SLURM job {job}: {state.lower()}{waits}", flush=True)
        known = lines
