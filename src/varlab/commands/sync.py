"""`varlab sync`: uploads to W&B what runs wrote down locally, the parts of a resumed run as one curve."""

import os
from pathlib import Path
from typing import Any

from varlab.config import argument_command
from varlab.files import load_json, save_json

USAGE = """varlab sync FOLDER [FOLDER ...]: uploads runs, or all runs below a folder, to W&B
The local log is the truth: metrics.csv, run.json and pictures/ go up under the run's own id, each step once. What was uploaded
before, or logged online, is not sent again. WANDB_PROJECT, WANDB_ENTITY and `wandb login` say where to."""


def runs_below(folder: Path) -> list[Path]:
    """Folders of runs. Raises ValueError when there are none."""
    found = [file.parent for file in sorted(folder.rglob("run_id"))]
    if not found:
        raise ValueError(f"{folder} holds no run (a folder with metrics.csv and run_id)")
    return found


def settings(folder: Path) -> dict[str, Any]:
    """The run's config, where it lies beside it."""
    from omegaconf import OmegaConf

    for file in (folder / "job.yaml", folder / ".hydra/config.yaml"):
        if file.is_file():
            return OmegaConf.to_container(OmegaConf.load(file), resolve=False)  # pyright: ignore[reportReturnType]
    return {}


def upload(folder: Path) -> int:
    """Sends one run; returns the number of steps that were new."""
    import wandb

    from varlab.files import read_curves
    from varlab.training.loggers import run_id

    curves, config = read_curves(folder / "metrics.csv"), settings(folder)
    logger = (config.get("logger") or {}).get("wandb") or {}
    marker = folder / "synced.json"
    sent = load_json(marker, "varlab sync")["step"] if marker.is_file() else -1
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT") or logger.get("project") or "varlab",
        id=run_id(folder),
        name=folder.name,
        group=folder.parent.name,
        dir=folder,
        config=config,
        resume="allow",
    )
    run.define_metric("*", step_metric="trainer/global_step")
    sent = max(sent, int(run.summary.get("trainer/global_step", -1)))  # what was logged online
    pictures: dict[int, dict[str, wandb.Image]] = {}
    for file in sorted((folder / "pictures").glob("*-*.png")):
        name, _, step = file.stem.rpartition("-")
        pictures.setdefault(int(step), {})[name] = wandb.Image(str(file))
    logged = {step for curve in curves.values() for step in curve}
    steps = sorted(step for step in logged | pictures.keys() if step > sent)
    for step in steps:
        row = {name: curve[step] for name, curve in curves.items() if step in curve and name != "time"}
        run.log({**row, **pictures.get(step, {}), "trainer/global_step": step})
    if (folder / "run.json").is_file():
        run.summary.update(load_json(folder / "run.json", "varlab train"))
    run.finish()
    if steps:
        save_json(marker, {"step": steps[-1]})
    return len(steps)


def run(arguments: list[str]) -> None:
    """Uploads each run below the given folders."""
    from varlab.training.loggers import has_wandb_login

    folders = [folder for argument in arguments for folder in runs_below(Path(argument))]
    if os.environ.get("WANDB_MODE") != "offline" and not has_wandb_login():
        raise ValueError("there is no W&B login: run `wandb login`, or set WANDB_API_KEY")
    for folder in folders:
        print(f"{folder}: {upload(folder)} new steps")


main = argument_command("sync", USAGE, run)

if __name__ == "__main__":
    main()
