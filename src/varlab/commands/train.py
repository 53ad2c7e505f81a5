"""`varlab train`: trains a tokenizer or a VAR."""

# a signal may arrive while the rest is imported
from varlab.training import signals

if __name__ == "__main__":
    signals.install()

import logging
import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from varlab.config import check_types, hydra_command, is_sweep, report_user_errors
from varlab.files import FolderLock
from varlab.sweeps.jobs import run_job


def run(cfg: DictConfig) -> Any:
    """Trains one run, in a separate process if it is part of a sweep; returns the last validation loss, so that a
    sweeper can minimize it. With `plan`, returns the cost."""
    if cfg.plan:
        from varlab.cost.plan import print_plan
        from varlab.training.run_setup import check_precision

        check_precision(cfg)
        set_steps(cfg)
        return print_plan(planned(cfg), cfg.planned_gpu, cfg.planned_mfu, cfg.planned_flops)
    return run_job(cfg, "varlab.commands.train") if is_sweep() else fit(cfg)


def fit(cfg: DictConfig) -> float | None:
    """Trains one run in this process, alone in its folder; returns the last validation loss."""
    from varlab.training.run_setup import check_precision, silence_warnings

    silence_warnings()
    check_precision(cfg)
    check_types(cfg)
    set_steps(cfg)
    with FolderLock(Path(cfg.run_dir), "varlab train", rank=0 if signals.is_first_process() else 1):
        return fit_locked(cfg)


def fit_locked(cfg: DictConfig) -> float | None:
    """Seeds, builds and fits."""
    from hydra.utils import instantiate
    from lightning import seed_everything

    from varlab import __version__
    from varlab.checkpoints.checkpoint_files import latest_checkpoint
    from varlab.distributed import use_exact_fp32
    from varlab.training.run_record import RunRecord, git_commit, summary
    from varlab.training.run_settings import deciding
    from varlab.training.run_setup import branch_point, check_new_run, check_start

    folder = Path(cfg.run_dir) / "checkpoints"
    check_new_run(folder, cfg.ckpt_path)
    start = latest_checkpoint(folder) if cfg.ckpt_path == "last" else cfg.ckpt_path
    if start is None and cfg.branch < 1:
        start = branch_point(cfg)
    if start is not None:
        check_start(Path(start))
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    if start is not None and cfg.module.get("init_from") is not None:
        cfg.module.init_from = None  # the checkpoint holds what became of those weights
    use_exact_fp32()  # the frozen tokenizer's; what is trained runs in bf16
    seed_everything(cfg.seed, workers=True, verbose=False)
    data, module = instantiate(cfg.data, _convert_="all"), instantiate(cfg.module, _convert_="all")
    callbacks = {name: instantiate(callback) for name, callback in cfg.callbacks.items() if callback is not None}
    for callback in callbacks.values():
        if isinstance(callback, RunRecord):
            callback.settings = deciding(plain)
    loggers = [instantiate(logger) for logger in cfg.logger.values() if logger is not None]
    code = {"varlab": __version__, "git_commit": git_commit()}
    for logger in loggers:
        logger.log_hyperparams({**plain, "code": code})
    trainer = make_trainer(cfg, list(callbacks.values()), loggers)
    try:
        trainer.fit(module, data, ckpt_path=start, weights_only=True)
        if trainer.global_step % cfg.save_every:
            trainer.save_checkpoint(folder / "last.ckpt")
        if not any(getattr(callback, "validated_step", None) == trainer.global_step for callback in callbacks.values()):
            trainer.validate(module, data, verbose=False)
    finally:
        if "wandb" in sys.modules:  # the next run in this process starts its own W&B run
            has_failed = isinstance(sys.exc_info()[1], Exception)  # a run that was stopped by a signal has not failed
            sys.modules["wandb"].finish(exit_code=int(has_failed))
        if trainer.is_global_zero and (Path(cfg.run_dir) / "run.json").is_file():
            print(summary(Path(cfg.run_dir)))
    loss = trainer.callback_metrics.get("val/loss")
    return None if loss is None else float(loss)


def make_trainer(cfg: DictConfig, callbacks: list, loggers: list):
    """The Trainer of the config, with atomic checkpoint files and the precisions of `precision_plugin`."""
    from hydra.utils import instantiate

    from varlab.training.run_setup import steps_of_branch
    from varlab.training.strategies import AtomicCheckpointIO, precision_plugin

    precision = precision_plugin(cfg.trainer.precision, "cpu" if cfg.trainer.accelerator == "cpu" else "cuda")
    settings: dict[str, Any] = {"callbacks": callbacks, "logger": loggers, "plugins": [AtomicCheckpointIO()]}
    if precision is not None:
        settings |= {"plugins": [*settings["plugins"], precision], "precision": None}
    settings |= {"max_steps": steps_of_branch(cfg), "val_check_interval": cfg.val_every * cfg.accumulate}
    return instantiate(cfg.trainer, _convert_="all", **settings)


def set_steps(cfg: DictConfig) -> None:
    """Sets `steps` from `compute` if it is given. Raises ValueError for a run without a length, or for a branch of a
    run whose first steps depend on its length."""
    from hydra.utils import instantiate

    from varlab.training.run_setup import check_branch, check_devices, check_length

    if cfg.compute is not None:
        from varlab.training.planned_run import affordable_steps

        cfg.steps = 1
        cfg.steps = affordable_steps(cfg.compute, planned(cfg))
    check_length(cfg)
    check_devices(cfg)
    check_branch(cfg, instantiate(cfg.module.schedule))


def planned(cfg: DictConfig):
    """The `PlannedRun` of a config. Raises ValueError for a tokenizer, whose cost is not computed."""
    from hydra.utils import get_class, instantiate

    from varlab.training.planned_run import planned_run
    from varlab.training.var_module import VARModule

    if not issubclass(get_class(cfg.module._target_), VARModule):
        raise ValueError(
            "plan=true and compute=... support VARs only: give a tokenizer's length in steps or epochs; its cost is in"
            " experiments/performance"
        )
    has_data = not OmegaConf.is_missing(cfg.data, "path")
    data = instantiate(cfg.data, _convert_="all", path=cfg.data.path if has_data else "")
    strategy = cfg.trainer.strategy if isinstance(cfg.trainer.strategy, str) else instantiate(cfg.trainer.strategy)
    schedule, make_net = instantiate(cfg.module.schedule), instantiate(cfg.model, _convert_="all")
    return planned_run(cfg, make_net, data, has_data, schedule, strategy)


main = hydra_command("train")(run)


def main_of_job(file: str) -> None:
    """Runs a job of a sweep (see `jobs.run_job`) from its composed config, in each of the job's processes."""
    logging.basicConfig(level=logging.INFO, format="[%(asctime)s][%(levelname)s] %(message)s", stream=sys.stdout)
    config = OmegaConf.load(file)
    assert isinstance(config, DictConfig)
    with report_user_errors("train"):
        fit(config)


if __name__ == "__main__":
    main_of_job(sys.argv[2]) if sys.argv[1:2] == ["--job"] else main()
