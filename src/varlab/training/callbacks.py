"""What happens around training: random state, health, counters and the run's row, averaged weights, pictures."""

import logging
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch.loggers import WandbLogger
from PIL import Image
from torch.distributed.tensor import DTensor

from varlab import pictures
from varlab.data.imagenet import ImageBatch
from varlab.files import save_json
from varlab.models.msvqvae import MSVQVAE
from varlab.models.var import VAR
from varlab.sampling import generate_tokens
from varlab.training.loggers import run_id

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

    The decay rises as (1 + n) / (10 + n) up to `decay`, n being the number of updates.
    """

    def __init__(self, decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"EMA decay={decay}: must lie between 0 and 1")
        self.decay, self.num_updates = decay, 0
        self.average: dict[str, torch.Tensor] = {}
        self.raw: dict[str, torch.Tensor] = {}

    def weights(self, pl_module: LightningModule) -> dict[str, torch.Tensor]:
        """The trained parameters by name."""
        return {name: parameter.data for name, parameter in pl_module.named_parameters() if parameter.requires_grad}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        weights = self.weights(pl_module)
        self.average = {name: self.average.get(name, value).to(value).clone() for name, value in weights.items()}

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
    `train/steps_skipped`. The checkpoints of the run are from before, for no step since was taken.
    """

    def __init__(self, max_in_row: int = 10) -> None:
        self.max_in_row, self.num_skipped, self.in_row = max_in_row, 0, 0

    def state_dict(self) -> dict[str, Any]:
        return {"num_skipped": self.num_skipped, "in_row": self.in_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.num_skipped, self.in_row = state_dict["num_skipped"], state_dict["in_row"]

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        norm = gradient_norm(pl_module)
        if (trainer.global_step + 1) % trainer.log_every_n_steps == 0:  # pyright: ignore[reportAttributeAccessIssue]
            pl_module.log_dict({"train/grad_norm": norm, "train/steps_skipped": float(self.num_skipped)})
        if torch.isfinite(norm):
            self.in_row = 0
            return
        optimizer.zero_grad(set_to_none=True)  # a parameter without gradient is left alone
        self.num_skipped, self.in_row = self.num_skipped + 1, self.in_row + 1
        if trainer.is_global_zero:
            log.warning("step %d: the gradient's norm is %s; the step is skipped", trainer.global_step + 1, float(norm))
        if self.in_row >= self.max_in_row:
            raise ValueError(
                f"the gradient was not finite {self.in_row} steps in a row, the last at step {trainer.global_step + 1}: lower"
                " module.base_lr or look at the data, and continue with ckpt_path=last (no step was taken since)"
            )


def gradient_norm(pl_module: LightningModule) -> torch.Tensor:
    """Euclidean norm of all gradients together, over all shards."""
    gradients = [parameter.grad for parameter in pl_module.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


class RunRecord(Callback):
    """Counts what a run costs and writes its row, `run.json`, at each validation and at the end.

    Counters (images, tokens, FLOPs, device seconds) are part of the checkpoint, so they survive a restart.
    """

    COUNTERS = ("images_seen", "tokens_seen", "flops_exact", "flops_6nd", "flops_tokenizer", "device_seconds")

    def __init__(self, folder: str, seed: int) -> None:
        self.folder, self.seed = Path(folder), seed
        self.counters: dict[str, int | float] = dict.fromkeys(self.COUNTERS, 0)
        self.facts: dict[str, Any] = {}
        self.validated_step = self.total_steps = -1
        self.state = "running"
        self.logged_time = self.batch_time = self.validation_start = 0.0
        self.logged_images = self.logged_flops = 0.0
        self.peak_flops: float | None = None
        self.scores: dict[str, float] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"counters": dict(self.counters), "total_steps": self.total_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.counters, self.total_steps = dict(state_dict["counters"]), state_dict["total_steps"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.facts = pl_module.run_facts()  # pyright: ignore[reportCallIssue]
        self.peak_flops = (
            get_available_flops(pl_module.device, torch.bfloat16) if pl_module.device.type == "cuda" else None
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.total_steps = int(trainer.estimated_stepping_batches)
        self.batch_time = self.logged_time = time.perf_counter()
        self.logged_images, self.logged_flops = self.counters["images_seen"], self.total_flops()

    def total_flops(self) -> int | float:
        """FLOPs so far, network and tokenizer."""
        return self.counters["flops_exact"] + self.counters["flops_tokenizer"]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        images, now = len(batch.labels) * trainer.world_size, time.perf_counter()
        self.counters["images_seen"] += images
        self.counters["tokens_seen"] += images * self.facts["tokens_per_image"]
        for key in ("flops_exact", "flops_6nd", "flops_tokenizer"):
            self.counters[key] += images * self.facts.get(f"{key}_per_image", 0)
        self.counters["device_seconds"] += (now - self.batch_time) * trainer.world_size
        self.batch_time = now
        if trainer.global_step % trainer.log_every_n_steps or trainer.global_step == 0:  # pyright: ignore[reportAttributeAccessIssue]
            return
        seconds = max(now - self.logged_time, 1e-9)
        flops_per_second = (self.total_flops() - self.logged_flops) / seconds
        pl_module.log_dict({f"count/{key}": float(value) for key, value in self.counters.items()})
        pl_module.log(
            "speed/images_per_second", (self.counters["images_seen"] - self.logged_images) / seconds, prog_bar=True
        )
        pl_module.log("speed/flops_per_second", flops_per_second)
        if self.peak_flops:
            pl_module.log("speed/mfu", flops_per_second / trainer.world_size / self.peak_flops, prog_bar=True)
        skipped = float(trainer.datamodule.skipped)  # pyright: ignore[reportAttributeAccessIssue]
        pl_module.log("data/skipped", skipped, sync_dist=True, reduce_fx="sum")
        self.logged_time, self.logged_images, self.logged_flops = now, self.counters["images_seen"], self.total_flops()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.validation_start = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.batch_time = time.perf_counter()  # validation is not training time
        self.logged_time += self.batch_time - self.validation_start
        if trainer.sanity_checking:
            return
        self.validated_step = trainer.global_step
        self.scores = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("val/")}
        self.write(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.state = "stopped"  # unless it is finished
        self.write(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.state = "failed"
        self.write(trainer, pl_module)

    def write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the run's row; units in the README of `experiments/`."""
        if not trainer.is_global_zero or not self.facts:
            return
        data = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        unique = sum(data.shard_counts)
        row = {
            "run_id": run_id(self.folder),
            "name": self.folder.name,
            "state": "finished" if trainer.global_step == self.total_steps else self.state,
            **{key: value for key, value in self.facts.items() if not key.endswith("_per_image")},
            **self.counters,
            "step": trainer.global_step,
            "unique_images": unique,
            "epochs": self.counters["images_seen"] / unique,
            "batch": data.global_batch_size,
            "dataset_id": data.data_fingerprint,
            "class_names": len(data.class_names),
            "seed": self.seed,
            "device": torch.cuda.get_device_name(pl_module.device)
            if pl_module.device.type == "cuda"
            else pl_module.device.type,
            "num_devices": trainer.world_size,
            "precision": str(trainer.precision),
            "torch": torch.__version__,
            "val_images": data.num_val,
            **{key.replace("val/", "val_"): value for key, value in self.scores.items()},
            "git_commit": git_commit(),
            "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        save_json(self.folder / "run.json", row)


def git_commit() -> str | None:
    """Commit of the code that runs, None outside a checkout."""
    answer = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return answer.stdout.strip() or None


class Pictures(Callback):
    """After each validation: reconstructions scale by scale of a tokenizer, or samples of a VAR by class, as PNG in
    `folder` and in W&B. A VAR whose weights are sharded (FSDP2) draws none: rank 0 alone cannot run it."""

    def __init__(self, folder: str, num_images: int = 8, cfg_scale: float = 1.5, seed: int = 0) -> None:
        self.folder, self.num_images, self.cfg_scale, self.seed = Path(folder), num_images, cfg_scale, seed
        self.images: torch.Tensor | None = None

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx == 0 and isinstance(batch, ImageBatch):
            self.images = batch.images[: self.num_images]

    @torch.no_grad()
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero or trainer.sanity_checking:
            return
        net = pl_module.net
        if isinstance(net, MSVQVAE) and self.images is not None:
            strip = net.filmstrip(net.encode(self.images))
            shown = pictures.columns_of(self.images / 2 + 0.5, *(strip / 2 + 0.5))
            self.show(trainer, "reconstructions", pictures.grid(shown, columns=1 + len(strip)))
        elif isinstance(net, VAR) and pl_module.device_mesh is None:
            tokenizer = pl_module.tokenizer
            assert isinstance(tokenizer, MSVQVAE)
            labels = torch.arange(self.num_images, device=pl_module.device) % net.num_classes
            was_training = net.training
            _, token_maps = generate_tokens(net, tokenizer, labels, cfg_scale=self.cfg_scale, seed=self.seed)
            net.train(was_training)
            strip = tokenizer.filmstrip(token_maps) / 2 + 0.5
            self.show(trainer, "samples", pictures.grid(pictures.columns_of(*strip), columns=len(strip)))

    def show(self, trainer: Trainer, name: str, picture: Image.Image) -> None:
        """Saves a picture and mirrors it to W&B."""
        pictures.save(picture, self.folder / f"{name}-{trainer.global_step:07d}.png")
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image(name, [picture])
