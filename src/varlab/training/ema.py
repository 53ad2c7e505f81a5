"""Averaged weights."""

from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def local(value: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a sharded tensor, or the tensor itself."""
    return value.to_local() if isinstance(value, DTensor) else value


class EMA(Callback):
    """Exponential moving average of the trainable weights, used in validation and saved in addition to the raw ones.

    The decay is min(`decay`, (1 + n) / (10 + n)) after n updates. With `is_raw_validated` the raw weights are validated
    as well, as `val_raw/...`.
    """

    def __init__(self, decay: float, is_raw_validated: bool = False) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"EMA decay={decay}: must be between 0 and 1")
        self.decay, self.is_raw_validated, self.num_updates = decay, is_raw_validated, 0
        self.average: dict[str, torch.Tensor] = {}
        self.raw: dict[str, torch.Tensor] = {}

    def weights(self, pl_module: LightningModule) -> dict[str, torch.Tensor]:
        """The trained parameters by name; this rank's shards if they are sharded."""
        for module in pl_module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # after validation the outermost one is still unsharded
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
        weights = self.weights(pl_module)
        averages = [local(self.average[name]) for name in weights]
        torch._foreach_lerp_(averages, [local(value) for value in weights.values()], 1 - decay)  # pyright: ignore[reportPrivateImportUsage]

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
        """Copies weights into the module."""
        for name, value in self.weights(pl_module).items():
            value.copy_(source[name])

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["ema"] = dict(self.average)
        checkpoint["ema_updates"] = self.num_updates
        if self.raw:  # saved during validation, while the module holds the averages
            checkpoint["state_dict"].update(self.raw)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.average, self.num_updates = checkpoint.get("ema", {}), checkpoint.get("ema_updates", 0)
