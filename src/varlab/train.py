"""`varlab train`: fits a tokenizer or a VAR."""

import logging
import sys
import warnings
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from varlab.config import check_types, is_sweep, said, verb
from varlab.jobs import STOPPED, run_job


def run(cfg: DictConfig) -> float | None:
    """One run, or, as part of a sweep, one run in a process of its own; returns the last validation loss, so that a sweeper
    can minimize it."""
    if cfg.plan:
        from varlab.planning import plan

        return plan(cfg)
    return run_job(cfg, "varlab.train") if is_sweep() else fit(cfg)


def fit(cfg: DictConfig) -> float | None:
    """Seed, build, fit."""
    from hydra.utils import instantiate
    from lightning import seed_everything

    from varlab import __version__, checkpoints
    from varlab.training.record import git_commit, summary

    quieten()
    check_types(cfg)
    if cfg.epochs < 0 and cfg.steps < 0:
        raise ValueError("the run has no end: give epochs=N or steps=N")
    folder = Path(cfg.run_dir) / "checkpoints"
    check_fresh(folder, cfg.ckpt_path)
    start = checkpoints.newest(folder) if cfg.ckpt_path == "last" else cfg.ckpt_path
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

    from varlab.training.strategies import BF16Weights, WholeFiles

    plugins, precision = [WholeFiles()], cfg.trainer.precision
    if precision == "bf16-true":
        plugins, precision = [*plugins, BF16Weights("cpu" if cfg.trainer.accelerator == "cpu" else "cuda")], None
    return instantiate(
        cfg.trainer, _convert_="all", callbacks=callbacks, logger=loggers, plugins=plugins, precision=precision
    )


def quieten() -> None:
    """Turns off what Lightning says about things that are as they should be here."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in (
        r"Found \d+ module\(s\) in eval mode",  # the frozen tokenizer
        r".*isinstance\(treespec, LeafSpec\)",
        r"Checkpoint directory .* exists and is not empty",  # that of the run being continued
        r".*does not have many workers",
        r"The number of training batches",
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
    with said("train"):
        fit(config)


if __name__ == "__main__":
    main_of_job(sys.argv[2]) if sys.argv[1:2] == ["--job"] else main()
