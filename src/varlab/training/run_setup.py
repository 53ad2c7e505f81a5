"""Checks and derived settings of a training run, before anything is built."""

import logging
import warnings
from contextlib import suppress
from pathlib import Path

from lightning.fabric.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig

from varlab.checkpoints.checkpoint_files import META_FILE, check_sharded, read_file
from varlab.training.schedules import Schedule

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "bf16-true")


def check_length(cfg: DictConfig) -> None:
    """Raises ValueError for a run without a length, or with an invalid length or branch."""
    for name in ("epochs", "steps"):
        if not isinstance(cfg[name], int):
            raise ValueError(
                f"{name}={cfg[name]}: give an integer, or -1 if the other of epochs and steps sets the length"
            )
    if cfg.epochs < 0 and cfg.steps < 0:
        raise ValueError("the run has no length: give epochs=N or steps=N")
    if not 0 < cfg.branch <= 1:
        raise ValueError(
            f"branch={cfg.branch}: give the length of the branch as a fraction of the run, above 0 and at most 1"
        )


def check_devices(cfg: DictConfig) -> None:
    """Raises ValueError for several devices with a trainer that uses one."""
    if cfg.devices not in ("auto", 1) and cfg.trainer.devices == 1:
        raise ValueError(
            f"devices={cfg.devices}: this trainer uses one device; choose trainer=ddp, fsdp, hsdp or multinode"
        )


def check_precision(cfg: DictConfig) -> None:
    """Raises ValueError for a precision in which nothing is trained here: weights in fp16 (16-true) round Adam's updates
    to zero, and nothing gains from fp64."""
    if cfg.trainer.precision not in PRECISIONS:
        raise ValueError(f"trainer.precision={cfg.trainer.precision}: choose one of {', '.join(PRECISIONS)}")


def check_branch(cfg: DictConfig, schedule: Schedule) -> None:
    """Raises ValueError for a branch of a run whose first steps depend on the run's length."""
    if cfg.branch == 1:
        return
    depends_on_length = schedule.branch_share is None or cfg.steps < 0
    depends_on_length |= cfg.module.get("weight_decay_end") not in (None, cfg.module.weight_decay)
    depends_on_length |= schedule.warmup < 1 and cfg.module.get("warmup_tokens") is None
    if depends_on_length:
        raise ValueError(
            f"branch={cfg.branch}: a branch shares its first steps with the whole run, so it needs steps=N, a schedule that can be"
            " branched (schedule@module.schedule=wsd), a warm-up in steps (module.warmup_tokens, or module.schedule.warmup of at"
            " least 1) and constant weight decay"
        )


def steps_of_branch(cfg: DictConfig) -> int:
    """Optimizer steps of this run; -1 if `epochs` sets its length."""
    return cfg.steps if cfg.steps < 0 else max(1, round(cfg.steps * cfg.branch))


def branch_point(cfg: DictConfig) -> Path | None:
    """The checkpoint of the whole run (`trunk`) at the step where this branch begins its cooldown. If there is none,
    None: the branch then trains its first steps itself, with the same result."""
    found = sorted(Path(cfg.trunk or "").glob(f"checkpoints/branch-{cfg.branch:g}-*.ckpt")) if cfg.trunk else []
    if found:
        print(f"branching from {found[-1]}", flush=True)
        return found[-1]
    print(f"trunk={cfg.trunk} has no checkpoint for branch={cfg.branch}: training all steps", flush=True)
    return None


def check_new_run(folder: Path, ckpt_path: str | None) -> None:
    """Raises ValueError if a new run would write into a folder with checkpoints, or if `ckpt_path` does not exist."""
    if ckpt_path is None and any(folder.glob("*.ckpt")):
        raise ValueError(
            f"{folder} already holds checkpoints: continue that run with ckpt_path=last, or choose another name=..."
        )
    if ckpt_path not in (None, "last") and not Path(ckpt_path).exists():
        raise ValueError(f"ckpt_path={ckpt_path} does not exist; `last` means the newest checkpoint of this run")


def check_start(start: Path) -> None:
    """Raises ValueError if the checkpoint to continue from is damaged, naming the newest whole one beside it. Only the first
    process looks."""
    if rank_zero_only.rank:  # pyright: ignore[reportFunctionMemberAccess]
        return
    try:
        step_of(start)
    except ValueError as error:
        others = sorted(start.parent.glob("*.ckpt"), key=lambda file: file.stat().st_mtime, reverse=True)
        for other in others:
            step = None
            with suppress(ValueError):
                step = step_of(other) if other != start else None
            if step is not None:
                raise ValueError(f"{error}; {other} (step {step}) is whole: continue with ckpt_path={other}") from None
        raise ValueError(f"{error}; no other checkpoint in {start.parent} is whole") from None


def step_of(checkpoint: Path) -> int | None:
    """The optimizer step of a whole checkpoint. Raises ValueError if it is damaged."""
    if checkpoint.is_dir():
        check_sharded(checkpoint, is_verified=True)
    return read_file(checkpoint / META_FILE if checkpoint.is_dir() else checkpoint).get("global_step")


def silence_warnings() -> None:
    """Turns off Lightning's warnings about settings that are intended here."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in (
        r"Found \d+ module\(s\) in eval mode",  # the frozen tokenizer
        r".*isinstance\(treespec, LeafSpec\)",
        r"Checkpoint directory .* exists and is not empty",  # the folder of the run being continued
        r".*does not have many workers",
        r"`broadcast_buffers` is deprecated",  # its successor is unknown to torch 2.9
        r"The `srun` command is available",
        r"It is recommended to use `self.log\('val.*sync_dist=True",  # scores are already means over all ranks
        r"Be aware that when using `ckpt_path`",  # callbacks of 0.1.0 that have another name now
        r"The number of training batches",
        r"The dirpath has changed from",  # a branch starts from the checkpoint of another run
        r"You're resuming from a checkpoint that ended before the epoch ended",
    ):
        warnings.filterwarnings("ignore", message=message)
