"""`varlab sync`: uploads locally logged runs to W&B."""

import os
from pathlib import Path

from varlab.config import argument_command

USAGE = """varlab sync FOLDER [FOLDER ...]: uploads runs, or all runs below a folder, to W&B
The local log is authoritative: metrics.csv, run.json and pictures/ are uploaded under the run's id, each step once. Steps that were
already uploaded or logged online are not sent again. Set WANDB_PROJECT, WANDB_ENTITY and `wandb login` to choose the project."""


def run(arguments: list[str]) -> None:
    """Uploads each run below the given folders."""
    from varlab.training.loggers import has_wandb_login
    from varlab.training.wandb_sync import runs_below, upload

    folders = [folder for argument in arguments for folder in runs_below(Path(argument))]
    if os.environ.get("WANDB_MODE") != "offline" and not has_wandb_login():
        raise ValueError("there is no W&B login: run `wandb login`, or set WANDB_API_KEY")
    for folder in folders:
        print(f"{folder}: {upload(folder)} new steps")


main = argument_command("sync", USAGE, run)

if __name__ == "__main__":
    main()
