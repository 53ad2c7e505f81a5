"""Base class of both LightningModules: optimizer and schedule, logging, validation of averaged and raw weights."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from lightning import LightningModule
from torch import Tensor

from varlab.training import loop_progress
from varlab.training.gradients import clip_or_skip, gradient_norm, is_fused, keep_implementation
from varlab.training.image_mean import ImageMean
from varlab.training.schedules import Schedule, set_step

OptimizerFactory = Callable[..., torch.optim.Optimizer]
FUSED_ADAMW: OptimizerFactory = partial(torch.optim.AdamW, fused=True)


class ScheduledModule(LightningModule):
    """Trains `net` with one optimizer and a schedule that is a function of the step.

    `optimizer`: called with parameter groups and `lr`. The peak learning rate is base_lr * global batch / 256.
    `weight_decay`: values at the start and end of the run. `gradient_clip_val`: largest norm of the gradient, 0 for no
    limit. A step whose gradient is not finite is skipped, on all ranks alike, since gradients are already averaged.
    `num_scores`: values per image that `score` averages in validation.
    """

    grad_norm: Tensor | None = None  # of the last step, before clipping
    is_compiled: bool | None = None
    init_from: str | None = None  # whose weights the run started from

    def __init__(
        self,
        optimizer: OptimizerFactory,
        schedule: Schedule,
        base_lr: float,
        weight_decay: tuple[float, float],
        gradient_clip_val: float,
        num_scores: int,
    ) -> None:
        super().__init__()
        if gradient_clip_val < 0:
            raise ValueError(f"module.gradient_clip_val={gradient_clip_val}: give a norm, or 0 for no limit")
        self.make_optimizer = optimizer
        self.schedule = schedule
        self.base_lr = base_lr
        self.weight_decay = weight_decay
        self.gradient_clip_val = gradient_clip_val
        self.val_scores = ImageMean(num_scores)
        self.val_scores_raw = ImageMean(num_scores)

    @property
    def data(self) -> Any:
        """The data module of the running trainer."""
        return self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        return int(self.trainer.estimated_stepping_batches)

    @property
    def peak_lr(self) -> float:
        """Learning rate after the warm-up."""
        return self.base_lr * self.data.global_batch_size / 256

    @property
    def compiles(self) -> bool:
        """Whether networks are compiled: as `is_compiled` says, by default on a GPU."""
        return self.trainer.strategy.root_device.type == "cuda" if self.is_compiled is None else self.is_compiled

    @property
    def is_logged(self) -> bool:
        """Whether this step is logged."""
        return (self.global_step + 1) % self.trainer.log_every_n_steps == 0  # pyright: ignore[reportAttributeAccessIssue]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["init_from"] = self.init_from

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Continues in the batches of this run, which may accumulate another number of them per step."""
        self.init_from = checkpoint.get("init_from")
        now = self.trainer.accumulate_grad_batches
        before = checkpoint.get(type(self.data).__qualname__, {}).get("accumulate", now)
        loop_progress.rescale(checkpoint, before, now)
        interval = self.trainer.val_check_interval
        if isinstance(interval, int):
            loop_progress.repeat_validation(checkpoint, interval)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups for the optimizer, each with the key `is_decayed`."""
        raise NotImplementedError

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.trainer.gradient_clip_val:
            raise ValueError("trainer.gradient_clip_val clips on the host: use module.gradient_clip_val")
        optimizer = self.make_optimizer(self.parameter_groups(), lr=self.peak_lr)
        keep_implementation(optimizer)
        return optimizer

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, torch.optim.Optimizer)
        self.lr = set_step(
            optimizer, self.global_step, self.total_steps, self.schedule, self.peak_lr, self.weight_decay
        )

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        scaler: Any = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None and is_fused(optimizer):
            scaler.unscale_(optimizer)  # Lightning leaves it to the optimizer's step, after clipping
        self.grad_norm = gradient_norm(self.parameters())
        clip_or_skip(optimizer, self.grad_norm, self.gradient_clip_val)

    def log_means(self, values: dict[str, Tensor], prog_bar: Sequence[str] = ()) -> None:
        """Logs means over all ranks, in one reduction."""
        means = torch.stack([value.detach().float() for value in values.values()])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(means)
            means /= dist.get_world_size()
        for name, mean in zip(values, means, strict=True):
            self.log(name, mean, prog_bar=name in prog_bar)

    def score(self, batch: Any, scores: ImageMean) -> None:
        """Adds the scores of a validation batch."""
        raise NotImplementedError

    def log_validation(self, split: str, means: Tensor) -> None:
        """Logs the means of `score` over the validation images, as `split/...`."""
        raise NotImplementedError

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.score(batch, self.val_scores)

    def validation_step_raw(self, batch: Any) -> None:
        """The same for the raw weights, when averaged weights are validated (see `EMA`)."""
        self.score(batch, self.val_scores_raw)

    def on_validation_epoch_end(self) -> None:
        for split, scores in [("val", self.val_scores), ("val_raw", self.val_scores_raw)]:
            if scores.update_called:
                self.log_validation(split, scores.compute())
                scores.reset()
