"""Callbacks of every run: random state, gradient checks, branch points, signals."""

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
from torch.distributed.tensor import DTensor

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
    """Skips optimizer steps whose gradient is not finite, and ends the run after `max_in_row` of them in a row.

    A skipped step applies neither an update nor weight decay and leaves the moments unchanged, on all ranks alike,
    since gradients are already averaged. It is counted in `train/steps_skipped`. A norm above `spike` times its running
    mean is counted in `train/grad_norm_spikes` and logged as a warning. The last checkpoint holds the weights from
    before the first skipped step. With 16-mixed, the run ends before the scale of the gradient scaler reaches zero.
    """

    STATE = ("num_skipped", "in_row", "num_spikes", "usual_norm")
    SMALLEST_SCALE = 2.0**-10

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
        self.check_grad_scaler(trainer, pl_module)
        if math.isfinite(norm):
            self.in_row = 0
            self.note_spike(norm, step, trainer.is_global_zero)
        if step % trainer.log_every_n_steps == 0:  # pyright: ignore[reportAttributeAccessIssue]
            counts = {"steps_skipped": self.num_skipped, "grad_norm_spikes": self.num_spikes}
            pl_module.log_dict({"train/grad_norm": norm, **{f"train/{key}": float(n) for key, n in counts.items()}})
        if math.isfinite(norm):
            return
        optimizer.zero_grad(set_to_none=True)  # the optimizer skips parameters without a gradient
        self.num_skipped, self.in_row = self.num_skipped + 1, self.in_row + 1
        if trainer.is_global_zero:
            log.warning("step %d: the gradient norm is %s; the step is skipped", step, norm)
        if self.in_row >= self.max_in_row:
            raise ValueError(
                f"the gradient was not finite {self.in_row} steps in a row, the last at step {step}: lower"
                " module.base_lr or check the data, and continue with ckpt_path=last (none of these steps changed the weights)"
            )

    def note_spike(self, norm: float, step: int, is_logged: bool) -> None:
        """Counts a norm above the limit, then adds it, clipped to the limit, to the running mean (of about the last
        hundred)."""
        limit = self.spike * self.usual_norm
        if self.usual_norm and norm > limit:
            self.num_spikes += 1
            if is_logged:
                log.warning("step %d: the gradient norm is %.3g, usually %.3g", step, norm, self.usual_norm)
            norm = limit
        self.usual_norm = norm if not self.usual_norm else 0.99 * self.usual_norm + 0.01 * norm

    def check_grad_scaler(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs the scale of 16-mixed's gradient scaler. Raises ValueError if it is so small that gradients vanish."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is None:
            return
        scale = scaler.get_scale()
        if (trainer.global_step + 1) % trainer.log_every_n_steps == 0:  # pyright: ignore[reportAttributeAccessIssue]
            pl_module.log("train/grad_scaler_scale", scale)
        if scale < self.SMALLEST_SCALE:
            raise ValueError(
                f"the scale of 16-mixed's gradient scaler fell to {scale:.3g}: gradients overflow at any scale;"
                " use trainer.precision=bf16-mixed"
            )


def gradient_norm(pl_module: LightningModule) -> torch.Tensor:
    """Euclidean norm over all gradients and all shards."""
    gradients = [parameter.grad for parameter in pl_module.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


class BranchPoints(Callback):
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
        file = self.points.pop(trainer.global_step, None)
        if file is not None:
            trainer.save_checkpoint(file)


class StopOnSignal(Callback):
    """On SIGTERM, SIGUSR1 or Ctrl-C, finishes the step, saves and stops; `ckpt_path=last` continues from there. A
    second signal kills the process.

    A signal to one rank stops all ranks within `check_every` steps. On SIGUSR1, sent by SLURM before the time limit
    (`#SBATCH --signal=USR1@120`), the job is requeued.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self, folder: str, check_every: int = 10) -> None:
        self.folder, self.check_every = Path(folder), check_every
        self.received: int | None = None
        self.has_stopped = False
        self.previous: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (
            threading.current_thread() is threading.main_thread()
        ):  # replaces Lightning's handlers, which are installed earlier
            self.previous = {number: signal.signal(number, self.note) for number in self.SIGNALS}

    def note(self, number: int, frame: FrameType | None) -> None:
        """Records the signal and restores its default handler."""
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
    """Requeues this SLURM job; does nothing outside of SLURM, or if submitit does so."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None or "SUBMITIT_EXECUTOR" in os.environ or os.environ.get("SLURM_PROCID", "0") != "0":
        return
    if shutil.which("scontrol") is None:
        log.error("job %s cannot be requeued: scontrol is not available on this machine", job)
        return
    subprocess.run(["scontrol", "requeue", job], check=False)
