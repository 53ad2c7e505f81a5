"""Tiny training runs through the real configs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from PIL import Image

from support import warm
from varlab.commands import evaluate, sample, train
from varlab.config import conf_dir

TOKENIZER = [
    "experiment=tokenizer_tiny", "model.channels=8", "model.num_groups=4", "model.quantizer.codebook_size=12",
    "model.quantizer.codebook_dim=6",
    "model.num_blocks=1",
]  # fmt: skip
VAR = ["experiment=var_digits", "model.depth=2", "+model.width=32", "+model.num_heads=2", "model.drop_path=0.2"]
VAR = [override.lstrip("+") for override in VAR]
EXPORTED = ["callbacks.ema={_target_: varlab.training.ema.EMA, decay: 0.5}"]
SHORT = [
    "data.global_batch_size=8",
    "steps=9",
    "val_every=9",
    "save_every=3",
    "log_every=1",
    "logger=csv",
    "callbacks.progress=null",
    "+trainer.enable_progress_bar=false",
]


def config(folder: Path, *overrides: str, verb: str = "train") -> DictConfig:
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        named = [f"run_dir={folder}", "name=test"] if verb == "train" else []
        return compose(verb, overrides=[*named, *overrides])


def fit(folder: Path, *overrides: str) -> float | None:
    return train.run(config(folder, *overrides))


def command(
    folder: Path, *overrides: str, processes: int = 1, verb: str = "train", **variables: str
) -> subprocess.CompletedProcess:
    """The same as a user would start it, in processes of its own."""
    start = [sys.executable, "-m"]
    if processes > 1:
        start += [
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={processes}",
            "-m",
            "varlab",
            verb,
        ]
    else:
        start += ["varlab", verb]
    environment = {**os.environ, "WANDB_MODE": "offline", **variables}
    environment.pop("WANDB_SERVICE", None)  # of the tests' own process
    hydra = [f"run_dir={folder}", "name=test", f"hydra.run.dir={folder}"]
    return warm.run([*start, *hydra, *overrides], env=environment)


def log_to(file: Path) -> list[str]:
    return ["+callbacks.losses._target_=support.fault_callbacks.LossLog", f"+callbacks.losses.file={file}"]


def kill_at(batch: int) -> list[str]:
    return ["+callbacks.kill._target_=support.fault_callbacks.Kill", f"+callbacks.kill.batch={batch}"]


def logged_losses(file: Path, rank: int = 0) -> dict[int, str]:
    """Loss (hex) by batch; a batch that was repeated after a kill must repeat its loss."""
    losses: dict[int, str] = {}
    for line in Path(f"{file}.{rank}").read_text(encoding="utf-8").splitlines():
        step, loss = line.split()
        assert losses.setdefault(int(step), loss) == loss, f"batch {step} differs after the restart"
    return losses


def mean_of_ranks(file: Path) -> list[float]:
    """Losses by batch, averaged over two processes."""
    ranks = [[float.fromhex(loss) for loss in logged_losses(file, rank).values()] for rank in (0, 1)]
    return [sum(pair) / 2 for pair in zip(*ranks, strict=True)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


def images_overrides(digits_folder):
    return [*TOKENIZER, *SHORT, f"data.path={digits_folder}", "data.resize_ratio=1.25", "data.random_flip=true"]


def sample_settings(export_folder, out, *more):
    return [f"checkpoint={export_folder}", f"out={out}", "num=7", "top_p=0.9", "film_rows=2", *more]


def draw(export_folder, out, *more):
    sample.run(config(out, *sample_settings(export_folder, out, *more), verb="sample"))
    return {file.name: np.asarray(Image.open(file)).astype(int) for file in sorted((out / "images").glob("*.png"))}


def wandb_records(folder: Path) -> list[dict]:
    """All that W&B wrote for the runs in a folder, by its own reader."""
    found = []
    for run in sorted(folder.glob("offline-run-*")):
        answer = subprocess.run(
            ["wandb", "leet", "inspect", str(run), "--json"], capture_output=True, text=True, check=True,
            env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        )  # fmt: skip
        found += [json.loads(line) for line in answer.stdout.splitlines() if line.strip()]
    return found


def score(tmp_path, *settings):
    evaluate.run(config(tmp_path, f"out={tmp_path / 'scores'}", "batch_size=8", *settings, verb="evaluate"))


def ledger(tmp_path):
    return {path.parent.name: json.loads(path.read_text()) for path in sorted(tmp_path.glob("runs/sweep/*/job.json"))}
