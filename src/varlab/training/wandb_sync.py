"""Uploads locally logged runs to W&B; a resumed run becomes one curve."""

import os
from pathlib import Path
from typing import Any

from varlab.files import load_json, read_curves, save_json
from varlab.training.loggers import run_id


def runs_below(folder: Path) -> list[Path]:
    """Folders of runs below `folder`. Raises ValueError if there are none."""
    found = [file.parent for file in sorted(folder.rglob("run_id"))]
    if not found:
        raise ValueError(f"{folder} holds no run (a folder with metrics.csv and run_id)")
    return found


def settings(folder: Path) -> dict[str, Any]:
    """The run's config, or {} if its folder has none."""
    from omegaconf import OmegaConf

    for file in (folder / "job.yaml", folder / ".hydra/config.yaml"):
        if file.is_file():
            return OmegaConf.to_container(OmegaConf.load(file), resolve=False)  # pyright: ignore[reportReturnType]
    return {}


def upload(folder: Path) -> int:
    """Uploads one run; returns the number of new steps."""
    import wandb

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
