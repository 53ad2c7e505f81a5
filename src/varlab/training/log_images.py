"""Logs the images of a run, and sends W&B what is not a curve."""

import json
from pathlib import Path
from typing import Any

import torch
import wandb
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from PIL import Image

from varlab import image_grid
from varlab.data.images import ImageBatch
from varlab.files import load_json
from varlab.models import scales
from varlab.models.conditioning import ClassEmbedder
from varlab.models.custom_classes import describe
from varlab.models.msvqvae import MSVQVAE
from varlab.models.var import VAR
from varlab.sampling.generate import generate_tokens
from varlab.sampling.token_sampling import SamplingSettings


class LogImages(Callback):
    """After each validation, writes a tokenizer's reconstructions after each scale, or a VAR's samples by class, as PNG
    to `folder` and to W&B. With sharded weights (FSDP2) all ranks generate the same samples, since one alone cannot."""

    def __init__(self, folder: str, num_images: int = 8, cfg_scale: float = 1.5, seed: int = 0) -> None:
        self.folder, self.num_images, self.cfg_scale, self.seed = Path(folder), num_images, cfg_scale, seed
        self.images: torch.Tensor | None = None
        self.condition: torch.Tensor | None = None

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx == 0:
            self.condition = batch.condition[: self.num_images]
        if batch_idx == 0 and isinstance(batch, ImageBatch):
            self.images = batch.images[: self.num_images]

    @torch.no_grad()
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        is_sharded = pl_module.device_mesh is not None
        if trainer.sanity_checking or not (trainer.is_global_zero or is_sharded):
            return
        net = pl_module.net
        if isinstance(net, MSVQVAE) and self.images is not None:
            strip = net.filmstrip(net.encode(self.images))
            shown = image_grid.columns_of(self.images / 2 + 0.5, *(strip / 2 + 0.5))
            self.show(trainer, "reconstructions", image_grid.grid(shown, columns=1 + len(strip)))
        elif isinstance(net, VAR):
            tokenizer = pl_module.tokenizer
            assert isinstance(tokenizer, MSVQVAE)
            condition = self.conditions(net, pl_module.device)
            was_training = net.training
            with trainer.precision_plugin.forward_context():
                _, token_maps = generate_tokens(
                    net, tokenizer, condition, SamplingSettings(self.cfg_scale), seed=self.seed
                )
            net.train(was_training)
            strip = tokenizer.filmstrip(token_maps) / 2 + 0.5
            self.show(trainer, "samples", image_grid.grid(image_grid.columns_of(*strip), columns=len(strip)))

    def conditions(self, net: VAR, device: torch.device) -> torch.Tensor:
        """The classes in turn; for other kinds of conditions, those of the first validation images."""
        if isinstance(net.embedder, ClassEmbedder):
            return torch.arange(self.num_images, device=device) % net.num_classes
        assert self.condition is not None
        return self.condition

    def show(self, trainer: Trainer, name: str, image: Image.Image) -> None:
        """Saves an image and logs it to W&B."""
        if not trainer.is_global_zero:
            return
        image_grid.save(image, self.folder / f"{name}-{trainer.global_step:07d}.png")
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image(name, [image])


class WandbArtifacts(Callback):
    """Sends W&B what is not a curve: data and tokenizer as artifacts (manifest and path), a table of the loss by scale,
    and `run.json` as the summary."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def loggers(self, trainer: Trainer) -> list[WandbLogger]:
        """The W&B loggers; none except on rank 0."""
        if not trainer.is_global_zero:
            return []
        return [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        for logger in self.loggers(trainer):
            self.log_artifact(logger, "dataset", data.data_fingerprint, str(data.path), data.manifest)
            tokenizer = getattr(pl_module, "tokenizer", None)
            if isinstance(tokenizer, MSVQVAE):
                path = str(getattr(pl_module, "tokenizer_path", ""))
                identity = str(getattr(pl_module, "tokenizer_fingerprint", ""))
                self.log_artifact(logger, "tokenizer", identity, path, describe(tokenizer))

    def log_artifact(self, logger: WandbLogger, kind: str, identity: str, path: str, manifest: dict[str, Any]) -> None:
        """Logs a small artifact with fingerprint, path and manifest; the data itself is not uploaded."""
        artifact = wandb.Artifact(f"{kind}-{identity}", type=kind, metadata={"path": path, "fingerprint": identity})
        with artifact.new_file("manifest.json", mode="w") as file:
            json.dump(manifest, file, indent=2)
        logger.experiment.log_artifact(artifact)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.send_row(trainer)

    def send_row(self, trainer: Trainer) -> None:
        """Sends `run.json` as the run's summary, so that `varlab scaling` can read it from W&B as well."""
        file = self.folder / "run.json"
        for logger in self.loggers(trainer):
            if file.is_file():
                logger.experiment.summary.update(load_json(file, "varlab train"))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.send_row(trainer)
        if not isinstance(pl_module.net, VAR):
            return
        found = trainer.callback_metrics
        sides, rows = scales.sides(pl_module.net.patch_nums), []
        for k, (h, w) in enumerate(sides):
            if f"val/loss_scale_{k:02d}" in found:
                figures = [float(found[f"val/{name}_scale_{k:02d}"]) for name in ("loss", "err")]
                rows.append([k, f"{h}x{w}", h * w, *figures])
        for logger in self.loggers(trainer):
            logger.log_table(
                "val/by_scale", columns=["scale", "map", "tokens", "loss", "err"], data=rows, step=trainer.global_step
            )
