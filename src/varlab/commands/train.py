"""`varlab train`: fits a tokenizer or a VAR."""

import logging
import sys
import warnings
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from varlab.config import check_types, is_sweep, report_user_errors, verb
from varlab.sweeps.jobs import STOPPED, run_job


def run(cfg: DictConfig) -> float | None:
    """One run, or, as part of a sweep, one run in a process of its own; returns the last validation loss, so that a sweeper
    can minimize it."""
    if cfg.plan:
        from varlab.cost.plan import plan

        set_steps(cfg)
        return plan(cfg)
    return run_job(cfg, "varlab.commands.train") if is_sweep() else fit(cfg)


def fit(cfg: DictConfig) -> float | None:
    """Seed, build, fit."""
    from hydra.utils import instantiate
    from lightning import seed_everything

    from varlab import __version__
    from varlab.checkpoints.load import latest_checkpoint
    from varlab.training.run_record import git_commit, summary

    silence_warnings()
    check_types(cfg)
    set_steps(cfg)
    folder = Path(cfg.run_dir) / "checkpoints"
    check_fresh(folder, cfg.ckpt_path)
    start = latest_checkpoint(folder) if cfg.ckpt_path == "last" else cfg.ckpt_path
    if start is None and cfg.branch < 1:
        start = branch_point(cfg)
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    seed_everything(cfg.seed, workers=True, verbose=False)
    data, module = instantiate(cfg.data, _convert_="all"), instantiate(cfg.module, _convert_="all")
    callbacks = {name: instantiate(callback) for name, callback in cfg.callbacks.items() if callback is not None}
    loggers = [instantiate(logger) for logger in cfg.logger.values() if logger is not None]
    code = {"varlab": __version__, "git_commit": git_commit()}
    for logger in loggers:
        logger.log_hyperparams({**plain, "code": code})
    trainer = make_trainer(cfg, list(callbacks.values()), loggers)
    try:
        trainer.fit(module, data, ckpt_path=start, weights_only=True)
        if getattr(callbacks.get("signals"), "has_stopped", False):
            raise SystemExit(STOPPED)
        if not any(getattr(callback, "validated_step", None) == trainer.global_step for callback in callbacks.values()):
            trainer.validate(module, data, verbose=False)
        if trainer.global_step % cfg.save_every:
            trainer.save_checkpoint(folder / "last.ckpt")
    finally:
        if "wandb" in sys.modules:  # the next run in this process starts one of its own
            has_failed = isinstance(sys.exc_info()[1], Exception)  # a run that was told to stop has not
            sys.modules["wandb"].finish(exit_code=int(has_failed))
        if trainer.is_global_zero and (Path(cfg.run_dir) / "run.json").is_file():
            print(summary(Path(cfg.run_dir)))
    loss = trainer.callback_metrics.get("val/loss")
    return None if loss is None else float(loss)


def make_trainer(cfg: DictConfig, callbacks: list, loggers: list):
    """The Trainer of the config, with our own way of writing files and, for bf16-true, of holding weights."""
    from hydra.utils import instantiate

    from varlab.training.strategies import AtomicCheckpointIO, BF16Weights

    plugins, precision = [AtomicCheckpointIO()], cfg.trainer.precision
    if precision == "bf16-true":
        plugins, precision = [*plugins, BF16Weights("cpu" if cfg.trainer.accelerator == "cpu" else "cuda")], None
    settings: dict[str, Any] = {"callbacks": callbacks, "logger": loggers, "plugins": plugins, "precision": precision}
    return instantiate(cfg.trainer, _convert_="all", max_steps=steps_of_branch(cfg), **settings)


def set_steps(cfg: DictConfig) -> None:
    """Fills in `steps` where `compute` says how long to train. Raises ValueError for a run without an end, or a branch of a
    run whose steps would depend on its length."""
    if cfg.compute is not None:
        from varlab.cost.plan import affordable_steps

        cfg.steps = affordable_steps(cfg)
    for name in ("epochs", "steps"):
        if not isinstance(cfg[name], int):
            raise ValueError(f"{name}={cfg[name]}: give a whole number; -1 leaves it to the other of epochs and steps")
    if cfg.epochs < 0 and cfg.steps < 0:
        raise ValueError("the run has no end: give epochs=N or steps=N")
    if not 0 < cfg.branch <= 1:
        raise ValueError(
            f"branch={cfg.branch}: give the share of the run that this branch trains, above 0 and at most 1"
        )
    if cfg.branch < 1:
        schedule, decay_end = cfg.module.schedule, cfg.module.get("weight_decay_end")
        by_length = schedule.shape != "wsd" or decay_end not in (None, cfg.module.weight_decay)
        by_length |= cfg.steps < 0 or (schedule.warmup < 1 and cfg.module.get("warmup_tokens") is None)
        if by_length:
            raise ValueError(
                f"branch={cfg.branch}: a branch shares its first steps with the whole run, so it needs steps=N, module.schedule.shape=wsd,"
                " a warm-up in steps (module.warmup_tokens, or module.schedule.warmup from 1 on) and constant weight decay"
            )


def steps_of_branch(cfg: DictConfig) -> int:
    """Optimizer steps of this run; -1 where epochs end it."""
    return cfg.steps if cfg.steps < 0 else max(1, round(cfg.steps * cfg.branch))


def branch_point(cfg: DictConfig) -> Path | None:
    """The checkpoint of the whole run (`trunk`) at the step where this branch begins to cool down. None where there is none: the
    branch then trains its first steps itself, with the same result."""
    found = sorted(Path(cfg.trunk or "").glob(f"checkpoints/branch-{cfg.branch:g}-*.ckpt")) if cfg.trunk else []
    if found:
        print(f"branches from {found[-1]}", flush=True)
        return found[-1]
    print(f"trunk={cfg.trunk} has saved nothing for branch={cfg.branch}: all steps are trained here", flush=True)
    return None


def silence_warnings() -> None:
    """Turns off what Lightning says about things that are as they should be here."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in (
        r"Found \d+ module\(s\) in eval mode",  # the frozen tokenizer
        r".*isinstance\(treespec, LeafSpec\)",
        r"Checkpoint directory .* exists and is not empty",  # that of the run being continued
        r".*does not have many workers",
        r"The number of training batches",
        r"The dirpath has changed from",  # a branch starts from the checkpoint of another run
        r"You're resuming from a checkpoint that ended before the epoch ended",
    ):
        warnings.filterwarnings("ignore", message=message)


def check_fresh(folder: Path, ckpt_path: str | None) -> None:
    """Raises ValueError before a new run would write among the checkpoints of an old one."""
    if ckpt_path is None and any(folder.glob("*.ckpt")):
        raise ValueError(
            f"{folder} already holds checkpoints: continue that run with ckpt_path=last, or choose another name=..."
        )
    if ckpt_path not in (None, "last") and not Path(ckpt_path).exists():
        raise ValueError(f"ckpt_path={ckpt_path} does not exist; `last` takes the newest checkpoint of this run")


main = verb("train")(run)


def main_of_job(file: str) -> None:
    """A job of a sweep (see `jobs.run_job`), and each process that it starts, from its composed config."""
    logging.basicConfig(level=logging.INFO, format="[%(asctime)s][%(levelname)s] %(message)s", stream=sys.stdout)
    config = OmegaConf.load(file)
    assert isinstance(config, DictConfig)
    with report_user_errors("train"):
        fit(config)


if __name__ == "__main__":
    main_of_job(sys.argv[2]) if sys.argv[1:2] == ["--job"] else main()
