"""Callbacks of every run: random state, gradient checks, branch points, signals."""

import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.callbacks import Checkpoint  # Lightning calls these after all others
from lightning.pytorch.trainer.states import TrainerFn

from varlab.training import loop_progress, signals
from varlab.training.gradients import HostCopy

log = logging.getLogger(__name__)


class Reseed(Callback):
    """Seeds torch before each training batch from (seed, rank, batch), so that dropout needs no saved state and a
    resumed run uses the same random numbers as an uninterrupted one."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        batches = trainer.fit_loop.epoch_loop.total_batch_idx
        torch.manual_seed((self.seed * 1_000_003 + batches) * 4099 + trainer.global_rank)


class Health(Callback):
    """Counts the optimizer steps that `ScheduledModule` skips because their gradient is not finite, and ends the run
    after `max_in_row` of them in a row.

    Skipped steps are counted in `train/steps_skipped`. A norm above `spike` times its running mean is counted in
    `train/grad_norm_spikes` and logged as a warning. The last checkpoint holds the weights from before the first
    skipped step. With 16-mixed, the run ends before the scale of the gradient scaler reaches zero. The norm is read one
    step late, except on logged steps, so that the host does not wait for the device.
    """

    STATE = ("num_skipped", "in_row", "num_spikes", "usual_norm")
    SMALLEST_SCALE = 2.0**-10

    def __init__(self, max_in_row: int = 10, spike: float = 10.0) -> None:
        self.max_in_row, self.spike = max_in_row, spike
        self.num_skipped = self.in_row = self.num_spikes = 0
        self.usual_norm = 0.0
        self.last_skipped = 0
        self.unread: tuple[int, HostCopy] | None = None

    def state_dict(self) -> dict[str, Any]:
        self.read()
        return {name: getattr(self, name) for name in self.STATE}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name in self.STATE:
            setattr(self, name, state_dict[name])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        norm, step = pl_module.grad_norm, trainer.global_step
        if is_between_steps(trainer) or not isinstance(norm, torch.Tensor):
            return
        self.read()
        scaler: Any = getattr(trainer.precision_plugin, "scaler", None)
        values = [norm] if scaler is None else [norm, torch.as_tensor(scaler._scale, device=norm.device)]
        self.unread = step, HostCopy(torch.stack(values))
        if step % trainer.log_every_n_steps == 0:  # pyright: ignore[reportAttributeAccessIssue]
            names = ["train/grad_norm", "train/grad_scaler_scale"]
            logged = dict(zip(names, self.read(), strict=False))
            counts = {"steps_skipped": self.num_skipped, "grad_norm_spikes": self.num_spikes}
            pl_module.log_dict({**logged, **{f"train/{key}": float(n) for key, n in counts.items()}})
        if self.in_row >= self.max_in_row and step - self.last_skipped <= 1:  # not those from before a resume
            raise ValueError(
                f"the gradient was not finite {self.in_row} steps in a row, the last at step {self.last_skipped}: lower"
                " module.base_lr or check the data, and continue with ckpt_path=last (none of these steps changed the weights)"
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.read()

    @rank_zero_only
    def warn(self, message: str, *values: Any) -> None:
        """Logs a warning on rank 0."""
        log.warning(message, *values)

    def read(self) -> list[float]:
        """Takes the norm of the last step into account, and the scale of 16-mixed's gradient scaler if there is one;
        returns both. Raises ValueError if the scale is so small that gradients vanish."""
        if self.unread is None:
            return []
        step, copy = self.unread
        self.unread = None
        norm, *scale = values = copy.read()
        if scale and scale[0] < self.SMALLEST_SCALE:
            raise ValueError(
                f"the scale of 16-mixed's gradient scaler fell to {scale[0]:.3g}: gradients overflow at any scale;"
                " use trainer.precision=bf16-mixed"
            )
        if math.isfinite(norm):
            self.in_row = 0
            self.note_spike(norm, step)
        else:
            self.num_skipped, self.in_row, self.last_skipped = self.num_skipped + 1, self.in_row + 1, step
            self.warn("step %d: the gradient norm is %s; the step is skipped", step, norm)
        return values

    def note_spike(self, norm: float, step: int) -> None:
        """Counts a norm above the limit, then adds it, clipped to the limit, to the running mean (of about the last
        hundred)."""
        limit = self.spike * self.usual_norm
        if self.usual_norm and norm > limit:
            self.num_spikes += 1
            self.warn("step %d: the gradient norm is %.3g, usually %.3g", step, norm, self.usual_norm)
            norm = limit
        self.usual_norm = norm if not self.usual_norm else 0.99 * self.usual_norm + 0.01 * norm


def is_between_steps(trainer: Trainer) -> bool:
    """Whether gradients are being accumulated: a checkpoint made now would lose those of the batches so far."""
    return trainer.fit_loop._should_accumulate()


class SaveLast(Checkpoint):
    """Saves `last.ckpt` every `every_steps` optimizer steps and, for slow steps, every `minutes`.

    With several devices, the time is checked every `check_every` steps.
    """

    def __init__(self, folder: str, every_steps: int, minutes: float = 30.0, check_every: int = 10) -> None:
        self.file, self.every_steps = Path(folder) / "checkpoints/last.ckpt", every_steps
        self.minutes, self.check_every = minutes, check_every
        self.saved = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.saved = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if is_between_steps(trainer):
            return
        step = trainer.global_step
        if step % self.every_steps == 0 or self.is_time(trainer):
            trainer.save_checkpoint(self.file)
            self.saved = time.monotonic()

    def is_time(self, trainer: Trainer) -> bool:
        """Whether the last checkpoint is old, according to rank 0."""
        if trainer.world_size > 1 and trainer.global_step % self.check_every:
            return False
        return bool(trainer.strategy.broadcast(time.monotonic() - self.saved >= 60 * self.minutes))


class BranchPoints(Checkpoint):
    """Saves a checkpoint at each step where a shorter run of the same schedule diverges from this one, so that the
    shorter run can branch off instead of training from scratch: `branch-SHARE-STEP.ckpt` for each of `shares` of the
    run. Only for schedules with a `branch_share`; a branch itself saves none."""

    def __init__(self, folder: str, shares: Sequence[float], branch: float | int = 1) -> None:
        self.folder, self.shares = Path(folder), list(shares) if branch == 1 else []
        self.points: dict[int, Path] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        schedule: Any = pl_module.schedule
        for share in self.shares if trainer.max_steps > 0 else []:
            step = schedule.branch_step(round(trainer.max_steps * share))
            if step is not None:
                self.points[step] = self.folder / f"checkpoints/branch-{share:g}-{step:07d}.ckpt"

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not is_between_steps(trainer) and (file := self.points.pop(trainer.global_step, None)) is not None:
            trainer.save_checkpoint(file)


class StopOnSignal(Checkpoint):
    """On SIGTERM, SIGUSR1, SIGUSR2 or Ctrl-C, finishes the step, saves and stops, also in the middle of a validation;
    `ckpt_path=last` continues from there. A second Ctrl-C kills the process.

    A signal to one rank stops all ranks within `check_every` steps or validation batches. After SIGUSR1 or SIGUSR2, sent
    by SLURM before the time limit (`#SBATCH --signal=USR1@120`), the job is requeued.
    """

    def __init__(self, folder: str, check_every: int = 10) -> None:
        self.file, self.check_every = Path(folder) / "checkpoints/last.ckpt", check_every
        self.stopping = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        trainer._signal_connector.register_signal_handlers = lambda: None  # Lightning's kill the other ranks

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        signals.request.is_watched = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not is_between_steps(trainer) and (number := self.agreed(trainer, trainer.global_step)):
            trainer.save_checkpoint(self.file)
            trainer.should_stop = True
            self.stopping = number

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.stopping:  # Lightning would validate before it stops
            self.stop(trainer, self.stopping)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.stopping:
            self.stop(trainer, self.stopping)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not trainer.sanity_checking and (number := self.agreed(trainer, batch_idx)):
            if trainer.state.fn == TrainerFn.FITTING:  # the run saves before its last validation
                trainer.save_checkpoint(self.file)
            self.stop(trainer, number)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        is_broken_off = trainer.validating and trainer.state.fn == TrainerFn.FITTING and signals.request.received
        if is_broken_off:
            loop_progress.forget_validation(checkpoint)

    def agreed(self, trainer: Trainer, count: int) -> int:
        """The signal that any rank received, a warning before others; 0 for none."""
        received = signals.request.received or 0
        if trainer.world_size == 1 or count % self.check_every:
            return received if trainer.world_size == 1 else 0
        order = torch.tensor(
            signals.SIGNALS.index(received) + 1 if received else 0, device=trainer.strategy.root_device
        )
        dist.all_reduce(order, dist.ReduceOp.MAX)
        return signals.SIGNALS[int(order) - 1] if order else 0

    def stop(self, trainer: Trainer, number: int) -> None:
        """Requeues the job after a warning, and ends the process."""
        if trainer.is_global_zero:
            signals.requeue(number)
        raise signals.Stopped
