"""Pictures of a run, and what W&B is given besides curves."""

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
from varlab.models.msvqvae import MSVQVAE
from varlab.models.var import VAR
from varlab.sampling.generate import generate_tokens
from varlab.sampling.token_sampling import SamplingSettings


class Pictures(Callback):
    """After each validation: reconstructions scale by scale of a tokenizer, or samples of a VAR by class, as PNG in
    `folder` and in W&B. Where weights are sharded (FSDP2) all ranks draw the same samples: one alone cannot."""

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
            labels = torch.arange(self.num_images, device=pl_module.device) % net.num_classes
            was_training = net.training
            with trainer.precision_plugin.forward_context():
                _, token_maps = generate_tokens(
                    net, tokenizer, labels, SamplingSettings(self.cfg_scale), seed=self.seed
                )
            net.train(was_training)
            strip = tokenizer.filmstrip(token_maps) / 2 + 0.5
            self.show(trainer, "samples", image_grid.grid(image_grid.columns_of(*strip), columns=len(strip)))

    def show(self, trainer: Trainer, name: str, picture: Image.Image) -> None:
        """Saves a picture and mirrors it to W&B."""
        if not trainer.is_global_zero:
            return
        image_grid.save(picture, self.folder / f"{name}-{trainer.global_step:07d}.png")
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image(name, [picture])


class Mirror(Callback):
    """Gives W&B what its curves lack: data and tokenizer as artifacts (manifest and place), a table of the loss by scale, the run's
    row of the table of runs."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def loggers(self, trainer: Trainer) -> list[WandbLogger]:
        """W&B's loggers; none on the other ranks."""
        if not trainer.is_global_zero:
            return []
        return [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        for logger in self.loggers(trainer):
            self.log_artifact(logger, "dataset", data.data_fingerprint, str(data.path), data.manifest)
            tokenizer = getattr(pl_module, "tokenizer", None)
            if isinstance(tokenizer, MSVQVAE):
                place = str(getattr(pl_module, "tokenizer_path", ""))
                identity = str(getattr(pl_module, "tokenizer_fingerprint", ""))
                self.log_artifact(logger, "tokenizer", identity, place, tokenizer.sizes)

    def log_artifact(self, logger: WandbLogger, kind: str, identity: str, place: str, manifest: dict[str, Any]) -> None:
        """A small artifact that says what was used and where it lies; the data itself stays there."""
        artifact = wandb.Artifact(f"{kind}-{identity}", type=kind, metadata={"path": place, "fingerprint": identity})
        with artifact.new_file("manifest.json", mode="w") as file:
            json.dump(manifest, file, indent=2)
        logger.experiment.log_artifact(artifact)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.send_row(trainer)

    def send_row(self, trainer: Trainer) -> None:
        """The run's row of the table of runs, as its summary: what `varlab scaling` reads is the same wherever it reads it."""
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
