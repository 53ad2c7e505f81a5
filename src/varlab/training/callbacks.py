"""What happens around a training step: random state, averaged weights, health, signals."""

import logging
import math
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

log = logging.getLogger(__name__)


class Reseed(Callback):
    """Seeds torch before each training batch from (seed, rank, batch), so that dropout needs no saved state and a
    resumed run draws what the uninterrupted one would have."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        batches = trainer.fit_loop.epoch_loop.total_batch_idx
        torch.manual_seed((self.seed * 1_000_003 + batches) * 4099 + trainer.global_rank)


class EMA(Callback):
    """Exponential moving average of the trainable weights of `net`, used in validation and saved beside the raw ones.

    The decay rises as (1 + n) / (10 + n) up to `decay`, n being the number of updates. With `is_raw_validated` the raw
    weights are validated as well, as `val_raw/...`.
    """

    def __init__(self, decay: float, is_raw_validated: bool = False) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"EMA decay={decay}: must lie between 0 and 1")
        self.decay, self.is_raw_validated, self.num_updates = decay, is_raw_validated, 0
        self.average: dict[str, torch.Tensor] = {}
        self.raw: dict[str, torch.Tensor] = {}

    def weights(self, pl_module: LightningModule) -> dict[str, torch.Tensor]:
        """The trained parameters by name; of sharded ones this rank's share."""
        for module in pl_module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # after validation the outermost one is left whole
        return {name: parameter.data for name, parameter in pl_module.named_parameters() if parameter.requires_grad}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for name, value in self.weights(pl_module).items():
            start = self.average.get(name, value)
            if isinstance(value, DTensor) and not isinstance(start, DTensor):  # from a checkpoint of an unsharded run
                start = distribute_tensor(start.to(value.device), value.device_mesh, value.placements)
            self.average[name] = start.to(value).clone()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step <= self.num_updates:
            return  # still accumulating
        self.num_updates = trainer.global_step
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        for name, value in self.weights(pl_module).items():
            self.average[name].lerp_(value, 1 - decay)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.average:
            self.raw = {name: value.clone() for name, value in self.weights(pl_module).items()}
            self.copy(self.average, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.raw:
            self.copy(self.raw, pl_module)
            self.raw = {}

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self.raw and self.is_raw_validated:
            self.copy(self.raw, pl_module)
            with trainer.precision_plugin.forward_context():
                pl_module.validation_step_raw(batch)  # pyright: ignore[reportCallIssue]
            self.copy(self.average, pl_module)

    def copy(self, source: dict[str, torch.Tensor], pl_module: LightningModule) -> None:
        """Puts weights into the module."""
        for name, value in self.weights(pl_module).items():
            value.copy_(source[name])

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["ema"] = dict(self.average)
        checkpoint["ema_updates"] = self.num_updates
        if self.raw:  # saved during validation, while the averages stand in for the weights
            checkpoint["state_dict"].update(self.raw)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.average, self.num_updates = checkpoint.get("ema", {}), checkpoint.get("ema_updates", 0)


class Health(Callback):
    """Skips optimizer steps whose gradient is not finite, and ends the run when too many come in a row.

    A skipped step leaves weights, decay and moments as they are, on all ranks alike: gradients are averaged before. Counted as
    `train/steps_skipped`. The checkpoints of the run are from before, for no step since was taken. A norm above `spike` times
    its running mean is counted as `train/grad_norm_spikes` and named in the log; the loss scale of 16-mixed ends the run
    before it reaches zero.
    """

    STATE = ("num_skipped", "in_row", "num_spikes", "usual_norm")
    SMALLEST_LOSS_SCALE = 2.0**-10

    def __init__(self, max_in_row: int = 10, spike: float = 10.0) -> None:
        self.max_in_row, self.spike = max_in_row, spike
        self.num_skipped = self.in_row = self.num_spikes = 0
        self.usual_norm = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.STATE}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name in self.STATE:
            setattr(self, name, state_dict[name])

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        norm, step = float(gradient_norm(pl_module)), trainer.global_step + 1
        self.check_loss_scale(trainer, pl_module)
        if math.isfinite(norm):
            self.in_row = 0
            self.note_spike(norm, step, trainer.is_global_zero)
        if step % trainer.log_every_n_steps == 0:  # pyright: ignore[reportAttributeAccessIssue]
            counts = {"steps_skipped": self.num_skipped, "grad_norm_spikes": self.num_spikes}
            pl_module.log_dict({"train/grad_norm": norm, **{f"train/{key}": float(n) for key, n in counts.items()}})
        if math.isfinite(norm):
            return
        optimizer.zero_grad(set_to_none=True)  # a parameter without gradient is left alone
        self.num_skipped, self.in_row = self.num_skipped + 1, self.in_row + 1
        if trainer.is_global_zero:
            log.warning("step %d: the gradient's norm is %s; the step is skipped", step, norm)
        if self.in_row >= self.max_in_row:
            raise ValueError(
                f"the gradient was not finite {self.in_row} steps in a row, the last at step {step}: lower"
                " module.base_lr or look at the data, and continue with ckpt_path=last (no step was taken since)"
            )

    def note_spike(self, norm: float, step: int, is_told: bool) -> None:
        """Compares a norm to the mean of about a hundred before, which it then joins at no more than the spike's height."""
        limit = self.spike * self.usual_norm
        if self.usual_norm and norm > limit:
            self.num_spikes += 1
            if is_told:
                log.warning("step %d: the gradient's norm is %.3g, usually %.3g", step, norm, self.usual_norm)
            norm = limit
        self.usual_norm = norm if not self.usual_norm else 0.99 * self.usual_norm + 0.01 * norm

    def check_loss_scale(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs the loss scale of 16-mixed. Raises ValueError when it has fallen so far that gradients vanish."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is None:
            return
        scale = scaler.get_scale()
        if (trainer.global_step + 1) % trainer.log_every_n_steps == 0:  # pyright: ignore[reportAttributeAccessIssue]
            pl_module.log("train/loss_scale", scale)
        if scale < self.SMALLEST_LOSS_SCALE:
            raise ValueError(
                f"the loss scale of 16-mixed fell to {scale:.3g}: gradients overflow whatever it is; use trainer.precision=bf16-mixed"
            )


def gradient_norm(pl_module: LightningModule) -> torch.Tensor:
    """Euclidean norm of all gradients together, over all shards."""
    gradients = [parameter.grad for parameter in pl_module.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


class BranchPoints(Callback):
    """Saves where shorter runs of the same schedule begin to cool down, so that they can be branched off instead of trained
    from the start: `branch-SHARE-STEP.ckpt` for each of `shares` of the run (wsd only; none of a branch itself)."""

    def __init__(self, folder: str, shares: Sequence[float], branch: float | int = 1) -> None:
        self.folder, self.shares = Path(folder), list(shares) if branch == 1 else []
        self.points: dict[int, Path] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        schedule: Any = pl_module.schedule
        total = trainer.max_steps
        if schedule.shape == "wsd" and total > 0:
            points = {share: schedule.cooldown_start(round(total * share)) for share in self.shares}
            self.points = {
                step: self.folder / f"checkpoints/branch-{share:g}-{step:07d}.ckpt" for share, step in points.items()
            }

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        file = self.points.pop(trainer.global_step, None)
        if file is not None:
            trainer.save_checkpoint(file)


class StopOnSignal(Callback):
    """SIGTERM, SIGUSR1 or Ctrl-C: finish the step, save, stop; `ckpt_path=last` goes on from there. A second one kills.

    One rank that is signalled stops all, within `check_every` steps. On SIGUSR1, sent by SLURM before the time runs out
    (`#SBATCH --signal=USR1@120`), the job is put back into the queue.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self, folder: str, check_every: int = 10) -> None:
        self.folder, self.check_every = Path(folder), check_every
        self.received: int | None = None
        self.has_stopped = False
        self.previous: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if threading.current_thread() is threading.main_thread():  # after Lightning's own handlers, in their place
            self.previous = {number: signal.signal(number, self.note) for number in self.SIGNALS}

    def note(self, number: int, frame: FrameType | None) -> None:
        """Remembers the signal; the next of its kind has its default effect."""
        self.received = number
        signal.signal(number, signal.SIG_DFL)
        log.warning("%s received: saving after this step, then stopping", signal.Signals(number).name)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        wants_stop = self.received is not None
        if trainer.world_size > 1:
            if trainer.global_step % self.check_every:
                return
            wants_stop = trainer.strategy.reduce_boolean_decision(wants_stop, all=False)
        if wants_stop:
            trainer.save_checkpoint(self.folder / "checkpoints/last.ckpt")
            trainer.should_stop = self.has_stopped = True
            if self.received == signal.SIGUSR1:
                requeue()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous = {}


def requeue() -> None:
    """Puts this SLURM job back into the queue; does nothing outside of SLURM, or where submitit does it."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None or "SUBMITIT_EXECUTOR" in os.environ or os.environ.get("SLURM_PROCID", "0") != "0":
        return
    if shutil.which("scontrol") is None:
        log.error("job %s cannot be put back into the queue: there is no scontrol here", job)
        return
    subprocess.run(["scontrol", "requeue", job], check=False)
