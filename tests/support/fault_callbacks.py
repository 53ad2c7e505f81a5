"""A callback that ends its process the hard way."""

import hashlib
import multiprocessing
import os
import signal
import time
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch.distributed.tensor import DTensor


def num_batches(trainer: Trainer) -> int:
    """Batches since the run began; with accumulation several per step."""
    return trainer.fit_loop.epoch_loop.total_batch_idx + 1


class Kill(Callback):
    """SIGKILL after a batch, before anything is saved for it; of one rank, or of all."""

    def __init__(self, batch: int, rank: int | None = None) -> None:
        self.batch, self.rank = batch, rank

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if num_batches(trainer) == self.batch and self.rank in (None, trainer.global_rank):
            os.kill(os.getpid(), signal.SIGKILL)


class Break(Callback):
    """Fails after a batch."""

    MESSAGE = "broken on purpose"

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if num_batches(trainer) == self.batch:
            raise RuntimeError(self.MESSAGE)


class Hang(Callback):
    """One rank stops working after a batch."""

    def __init__(self, batch: int, rank: int) -> None:
        self.batch, self.rank = batch, rank

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if num_batches(trainer) == self.batch and trainer.global_rank == self.rank:
            time.sleep(3600)


class KillInValidation(Callback):
    """SIGKILL in the validation after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class KillWhileSaving(Callback):
    """SIGKILL when half of a checkpoint is written, the n-th of the run."""

    def __init__(self, nth: int) -> None:
        self.left, self.save = nth, torch.save

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        torch.save = self.half

    def half(self, checkpoint: Any, path: Any) -> None:
        self.left -= 1
        self.save(checkpoint, path)
        if self.left == 0:
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)


class Signal(Callback):
    """Signals after a step, to this process or to the one that started it; only where no checkpoint was loaded.

    `where`: `batch`, before the next batch, or `validation`, in the validation after the step.
    """

    def __init__(self, step: int, name: str, to_parent: bool = False, times: int = 1, where: str = "batch") -> None:
        self.step, self.number, self.to_parent, self.is_fresh = step, signal.Signals[name], to_parent, True
        self.times, self.where = times, where

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.is_fresh = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.send(trainer, "batch")

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.send(trainer, "validation")

    def send(self, trainer: Trainer, where: str) -> None:
        """Sends the signals, once."""
        if self.is_fresh and trainer.global_step == self.step and trainer.is_global_zero and where == self.where:
            self.is_fresh = False
            for _ in range(self.times):
                os.kill(os.getppid() if self.to_parent else os.getpid(), self.number)
                time.sleep(0.3)


class GraphLog(Callback):
    """Writes after each step how many graphs torch.compile has made."""

    def __init__(self, file: str) -> None:
        self.file = file

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        with open(self.file, "a", encoding="utf-8") as log:
            log.write(f"{torch._dynamo.utils.counters['stats']['unique_graphs']}\n")


class Poison(Callback):
    """Makes a gradient infinite in some steps; of a sharded gradient, the first shard."""

    def __init__(self, steps: list[int]) -> None:
        self.steps = steps

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step + 1 in self.steps:
            gradient = next(p.grad for p in pl_module.parameters() if p.grad is not None)
            if not isinstance(gradient, DTensor):
                gradient.fill_(float("inf"))
            elif gradient.device_mesh.get_coordinate()[-1] == 0:
                gradient.to_local().fill_(float("inf"))


class Grow(Callback):
    """Multiplies the gradients of one step."""

    def __init__(self, step: int, factor: float) -> None:
        self.step, self.factor = step, factor

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step + 1 == self.step:
            for parameter in pl_module.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(self.factor)


class KillWorker(Callback):
    """SIGKILL for one of the data workers after the second step."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == 2:
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)


class CodebookLog(Callback):
    """Writes the hash of the codebook at the end, one file a rank."""

    def __init__(self, file: str) -> None:
        self.file = file

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        content = pl_module.net.quantizer.codebook.weight.detach().numpy().tobytes()
        with open(f"{self.file}.{trainer.global_rank}", "w", encoding="utf-8") as log:
            log.write(hashlib.sha256(content).hexdigest())


class LossLog(Callback):
    """Appends (number of batches, loss as hex) to a file, one a rank."""

    def __init__(self, file: str) -> None:
        self.file = file

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        with open(f"{self.file}.{trainer.global_rank}", "a", encoding="utf-8") as log:
            log.write(f"{num_batches(trainer)} {float(outputs['loss']).hex()}\n")


class Slow(Callback):
    """Makes each batch take at least some time."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        time.sleep(self.seconds)
