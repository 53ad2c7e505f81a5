"""Tiny training runs through the real configs."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from varlab.commands import train
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


def command(folder: Path, *overrides: str, processes: int = 1, **variables: str) -> subprocess.CompletedProcess:
    """The same as a user would start it, in processes of its own."""
    start = [sys.executable, "-m"]
    if processes > 1:
        start += [
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={processes}",
            "-m",
            "varlab",
            "train",
        ]
    else:
        start += ["varlab", "train"]
    environment = {**os.environ, "WANDB_MODE": "offline", **variables}
    environment.pop("WANDB_SERVICE", None)  # of the tests' own process
    hydra = [f"run_dir={folder}", "name=test", f"hydra.run.dir={folder}"]
    return subprocess.run(
        [*start, *hydra, *overrides],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def log_to(file: Path) -> list[str]:
    return ["+callbacks.losses._target_=support.fault_callbacks.LossLog", f"+callbacks.losses.file={file}"]


def kill_at(step: int) -> list[str]:
    return ["+callbacks.kill._target_=support.fault_callbacks.Kill", f"+callbacks.kill.step={step}"]


def logged_losses(file: Path, rank: int = 0) -> dict[int, str]:
    """Loss (hex) by step; a step that was repeated after a kill must repeat its loss."""
    losses: dict[int, str] = {}
    for line in Path(f"{file}.{rank}").read_text().splitlines():
        step, loss = line.split()
        assert losses.setdefault(int(step), loss) == loss, f"step {step} differs after the restart"
    return losses


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


def images_overrides(digits_folder):
    return [*TOKENIZER, *SHORT, f"data.path={digits_folder}", "data.resize_ratio=1.25", "data.random_flip=true"]
