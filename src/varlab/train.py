"""`varlab train`: fits a tokenizer or a VAR."""

import logging
import sys
import warnings
from pathlib import Path

from omegaconf import DictConfig

from varlab.config import check_types, verb


def run(cfg: DictConfig) -> float | None:
    """Seed, build, fit; returns the last validation loss, so that a sweeper can minimize it."""
    from hydra.utils import instantiate
    from lightning import seed_everything

    quieten()
    check_types(cfg)
    if cfg.epochs < 0 and cfg.steps < 0:
        raise ValueError("the run has no end: give epochs=N or steps=N")
    check_fresh(Path(cfg.run_dir) / "checkpoints", cfg.ckpt_path)
    seed_everything(cfg.seed, workers=True, verbose=False)
    data, module = instantiate(cfg.data, _convert_="all"), instantiate(cfg.module, _convert_="all")
    callbacks = [instantiate(callback) for callback in cfg.callbacks.values() if callback is not None]
    loggers = [instantiate(logger) for logger in cfg.logger.values() if logger is not None]
    trainer = instantiate(cfg.trainer, _convert_="all", callbacks=callbacks, logger=loggers)
    try:
        trainer.fit(module, data, ckpt_path=cfg.ckpt_path, weights_only=True)
        if not any(getattr(callback, "validated_step", None) == trainer.global_step for callback in callbacks):
            trainer.validate(module, data, verbose=False)
        if trainer.global_step % cfg.save_every:
            trainer.save_checkpoint(Path(cfg.run_dir) / "checkpoints" / "last.ckpt")
    finally:
        if "wandb" in sys.modules:  # the next job of a sweep starts a run of its own
            sys.modules["wandb"].finish(exit_code=1 if sys.exc_info()[0] else 0)
    if trainer.is_global_zero:
        print(f"run: {cfg.run_dir}  (metrics.csv, run.json, pictures/, checkpoints/)")
    loss = trainer.callback_metrics.get("val/loss")
    return None if loss is None else float(loss)


def quieten() -> None:
    """Turns off what Lightning says about things that are as they should be here."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in (
        r".*is set, but there is no last checkpoint",  # ckpt_path=last starts what was never started
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

if __name__ == "__main__":
    main()
