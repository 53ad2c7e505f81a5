"""A callback that ends its process the hard way."""

import hashlib
import multiprocessing
import os
import signal
from typing import Any

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


class Poison(Callback):
    """Makes a gradient infinite in some steps."""

    def __init__(self, steps: list[int]) -> None:
        self.steps = steps

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step + 1 in self.steps:
            next(p for p in pl_module.parameters() if p.grad is not None).grad.fill_(float("inf"))


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
