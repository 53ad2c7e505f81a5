"""Training of the tokenizer: reconstruction and VQ loss."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lightning import LightningModule
from torch import Tensor
from torchmetrics import MeanMetric

from varlab import checkpoints, compute, losses, scales
from varlab.data.imagenet import ImageBatch
from varlab.models.msvqvae import MSVQVAE
from varlab.training.optim import Schedule, parameter_groups


class MSVQVAEModule(LightningModule):
    """Weighted L1 and L2 reconstruction on the unclamped output, plus the VQ loss.

    Weights and optimizer are those of the VAR authors' single-scale tokenizer; the recipe of the released one was never
    published. Perceptual and adversarial terms are added to `reconstruction_loss`. The peak learning rate is
    base_lr * global batch / 256.
    """

    def __init__(
        self,
        net: MSVQVAE,
        schedule: Schedule,
        l1_weight: float = 0.2,
        l2_weight: float = 1.0,
        vq_weight: float = 1.0,
        base_lr: float = 1e-4,
        betas: Sequence[float] = (0.5, 0.9),
        weight_decay: float = 0.005,
        init_from: str | None = None,
    ) -> None:
        super().__init__()
        self.net = net
        if init_from is not None:
            start = checkpoints.load_tokenizer(init_from, patch_nums=net.patch_nums)
            checkpoints.check_sizes("tokenizer", start.sizes, net.sizes, init_from)
            net.load_state_dict(start.state_dict())
        self.schedule, self.base_lr, self.betas, self.weight_decay = (
            schedule,
            base_lr,
            (betas[0], betas[1]),
            weight_decay,
        )
        self.l1_weight, self.l2_weight, self.vq_weight = l1_weight, l2_weight, vq_weight
        self.val_loss, self.val_psnr = MeanMetric(), MeanMetric()

    def setup(self, stage: str) -> None:
        resolution = self.trainer.datamodule.resolution  # pyright: ignore[reportAttributeAccessIssue]
        if (resolution, resolution) != self.net.image_size:
            raise ValueError(
                f"data.resolution={resolution}, but the tokenizer codes images of {self.net.image_size} pixels"
            )

    @property
    def peak_lr(self) -> float:
        """Learning rate after warm-up."""
        return self.base_lr * self.trainer.datamodule.global_batch_size / 256  # pyright: ignore[reportAttributeAccessIssue]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        groups = parameter_groups(self.net)
        codebook = self.net.quantizer.codebook.weight  # codes must not shrink
        groups[0]["params"] = [parameter for parameter in groups[0]["params"] if parameter is not codebook]
        groups[1]["params"].append(codebook)
        return torch.optim.AdamW(groups, lr=self.peak_lr, betas=self.betas, fused=self.device.type == "cuda")

    def reconstruction_loss(self, output: Tensor, images: Tensor) -> Tensor:
        """Distance of the unclamped output to the images."""
        return self.l1_weight * F.l1_loss(output, images) + self.l2_weight * F.mse_loss(output, images)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers(use_pl_optimizer=False)
        total = int(self.trainer.estimated_stepping_batches)
        assert isinstance(optimizer, torch.optim.Optimizer)
        self.lr = self.schedule.apply(
            optimizer, self.global_step, total, self.peak_lr, (self.weight_decay, self.weight_decay)
        )

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        output = self.net(batch.images)
        reconstruction = self.reconstruction_loss(output.images, batch.images)
        loss = reconstruction + self.vq_weight * output.vq_loss
        self.net.quantizer.update_hits(output.token_maps)
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:  # pyright: ignore[reportAttributeAccessIssue]
            usage = self.net.quantizer.codebook_usage(len(batch.images) * self.trainer.world_size)
            self.log("train/loss", loss, prog_bar=True)
            self.log("train/reconstruction_loss", reconstruction)
            self.log("train/vq_loss", output.vq_loss)
            self.log_dict({f"train/codebook_usage_scale_{k:02d}": share for k, share in enumerate(usage)})
            self.log("lr", self.lr)
        return loss

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        output = self.net.decode(self.net.encode(batch.images))
        error = (output - batch.images).square().mean(dim=(1, 2, 3))
        self.val_loss.update(error, batch.weight)
        self.val_psnr.update(losses.psnr(output, batch.images), batch.weight)

    def on_validation_epoch_end(self) -> None:
        self.log("val/loss", self.val_loss.compute())
        self.log("val/psnr", self.val_psnr.compute(), prog_bar=True)
        self.val_loss.reset()
        self.val_psnr.reset()

    def run_facts(self) -> dict[str, Any]:
        """What a row of the table of runs says about the network and its cost for one image."""
        return {
            "kind": "tokenizer",
            "params_total": sum(parameter.numel() for parameter in self.net.parameters()),
            "tokens_per_image": scales.num_tokens(self.net.patch_nums),
            "flops_exact_per_image": 3 * sum(compute.tokenizer_flops(self.net.sizes).values()),
            "patch_nums": self.net.patch_nums,
            "codes": self.net.sizes["codebook_size"],
            "lr_peak": self.peak_lr,
            "schedule": self.schedule.shape,
            "warmup": self.schedule.warmup,
            "weight_decay": self.weight_decay,
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["varlab"] = checkpoints.networks_entry(self.net)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoints.check_same_networks(checkpoint, self.net, None)
