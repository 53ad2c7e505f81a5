"""A callback that ends its process the hard way."""

import hashlib
import multiprocessing
import os
import signal
import time
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer


class Kill(Callback):
    """SIGKILL after an optimizer step, before anything is saved for it."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
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
    """A signal after a step, to this process or to the one that started it; only where no checkpoint was loaded."""

    def __init__(self, step: int, name: str, to_parent: bool = False) -> None:
        self.step, self.number, self.to_parent, self.is_fresh = step, signal.Signals[name], to_parent, True

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.is_fresh = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.is_fresh and trainer.global_step == self.step and trainer.is_global_zero:
            os.kill(os.getppid() if self.to_parent else os.getpid(), self.number)
            time.sleep(0.5)


class GraphLog(Callback):
    """Writes after each step how many graphs torch.compile has made."""

    def __init__(self, file: str) -> None:
        self.file = file

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        with open(self.file, "a") as log:
            log.write(f"{torch._dynamo.utils.counters['stats']['unique_graphs']}\n")


class Poison(Callback):
    """Makes a gradient infinite in some steps."""

    def __init__(self, steps: list[int]) -> None:
        self.steps = steps

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step + 1 in self.steps:
            next(p for p in pl_module.parameters() if p.grad is not None).grad.fill_(float("inf"))


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
        with open(f"{self.file}.{trainer.global_rank}", "w") as log:
            log.write(hashlib.sha256(content).hexdigest())


class LossLog(Callback):
    """Appends (global step, loss as hex) to a file, one a rank."""

    def __init__(self, file: str) -> None:
        self.file = file

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        with open(f"{self.file}.{trainer.global_rank}", "a") as log:
            log.write(f"{trainer.global_step} {float(outputs['loss']).hex()}\n")
