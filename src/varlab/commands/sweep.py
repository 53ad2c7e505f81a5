"""`varlab sweep`: shows the state of a multirun from its ledger, and continues it."""

import os
import subprocess
import sys
from pathlib import Path

from varlab.config import argument_command
from varlab.files import load_json

USAGE = """varlab sweep ACTION FOLDER: a multirun's ledger
  status         how many jobs are finished, running, failed, stopped, pending; each failure with its log
  resume         continue stopped jobs and start pending ones
  retry-failed   run failed jobs again, from their last checkpoint
  table          one row per job, as CSV: FOLDER/runs.csv"""


def status(folder: Path) -> None:
    """Prints the ledger."""
    from varlab.sweeps.ledger import report

    print(report(folder))


def rerun(folder: Path, choice: str) -> None:
    """Reruns the sweep's command for the jobs that `choice` selects, and exits."""
    from varlab.sweeps.ledger import CHOICE

    plan = load_json(folder / "sweep.json", "varlab train --multirun")
    command = [sys.executable, "-m", "varlab.commands.train", *plan["argv"]]
    answer = subprocess.run(command, cwd=plan["cwd"], env={**os.environ, CHOICE: choice}, check=False)
    raise SystemExit(answer.returncode)


def table(folder: Path) -> None:
    """Writes one row per job: its state and its run.json."""
    from varlab.scaling.tables import write_csv
    from varlab.sweeps.ledger import states

    rows = []
    for overrides, state, known in states(folder):
        file = Path(known.get("folder", "")) / "run.json"
        row = load_json(file, "varlab train") if known and file.is_file() else {}
        rows.append({"job": " ".join(overrides), "job_state": state, **row})
    write_csv(rows, folder / "runs.csv")
    print(f"{len(rows)} jobs: {folder / 'runs.csv'}")


def run(arguments: list[str]) -> None:
    """Runs one action on one folder."""
    actions = {
        "status": status,
        "resume": lambda folder: rerun(folder, "resume"),
        "retry-failed": lambda folder: rerun(folder, "retry-failed"),
        "table": table,
    }
    if len(arguments) != 2 or arguments[0] not in actions:
        raise ValueError(f"{' '.join(arguments)!r} is not ACTION FOLDER\n\n{USAGE}")
    actions[arguments[0]](Path(arguments[1]))


main = argument_command("sweep", USAGE, run)

if __name__ == "__main__":
    main()
