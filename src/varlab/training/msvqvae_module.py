"""Training of the tokenizer: reconstruction, perceptual, adversarial and VQ loss."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch._functorch.config as functorch_config
import torch.nn.functional as F
from lightning import LightningModule
from torch import Tensor, nn

from varlab.checkpoints.load import check_same_networks, check_sizes, load_tokenizer, networks_entry
from varlab.cost.flops import tokenizer_flops
from varlab.data.images import ImageBatch
from varlab.models import losses, scales
from varlab.models.msvqvae import MSVQVAE
from varlab.training.adversarial import DiscriminatorTrainer
from varlab.training.image_mean import ImageMean
from varlab.training.schedules import Schedule, parameter_groups

log = logging.getLogger(__name__)


class MSVQVAEModule(LightningModule):
    """Weighted L1 and L2 reconstruction on the unclamped output, perceptual and adversarial loss, plus the VQ loss.

    Weights and optimizer are those of the VAR authors' single-scale tokenizer; the recipe of the released one was never
    published. The peak learning rate is base_lr * global batch / 256. `perceptual`: a distance of image pairs, one a pair
    (models/features.py); `adversary`: the discriminator's side (training/adversary.py). Both lie outside of the module: the
    frozen network is not saved, the discriminator saves itself.
    """

    def __init__(
        self,
        net: MSVQVAE,
        schedule: Schedule,
        l1_weight: float = 0.2,
        l2_weight: float = 1.0,
        vq_weight: float = 1.0,
        perceptual: nn.Module | None = None,
        perceptual_weight: float = 1.0,
        adversary: DiscriminatorTrainer | None = None,
        base_lr: float = 1e-4,
        betas: Sequence[float] = (0.5, 0.9),
        weight_decay: float = 0.005,
        init_from: str | None = None,
        is_compiled: bool = False,
    ) -> None:
        super().__init__()
        self.net = net
        if init_from is not None:
            start = load_tokenizer(init_from, patch_nums=net.patch_nums)
            check_sizes("tokenizer", start.sizes, net.sizes, init_from)
            net.load_state_dict(start.state_dict())
        self.schedule, self.base_lr, self.betas, self.weight_decay = (
            schedule,
            base_lr,
            (betas[0], betas[1]),
            weight_decay,
        )
        self.l1_weight, self.l2_weight, self.vq_weight = l1_weight, l2_weight, vq_weight
        self.outside, self.perceptual_weight = (perceptual,), perceptual_weight  # a tuple: not part of the state dict
        self.adversary = adversary
        self.pair: tuple[Tensor, Tensor] | None = None  # images and reconstructions that the discriminator learns from
        self.is_compiled = is_compiled
        self.val_scores, self.val_scores_raw = ImageMean(3), ImageMean(3)

    @property
    def perceptual(self) -> nn.Module | None:
        """The perceptual distance, if there is one."""
        return self.outside[0]

    def setup(self, stage: str) -> None:
        if self.trainer.precision == "bf16-true":
            raise ValueError("trainer.precision=bf16-true is for a VAR; train a tokenizer with bf16-mixed")
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

    def on_fit_start(self) -> None:
        if self.perceptual is not None:
            self.perceptual.to(self.device)
        elif self.trainer.is_global_zero:
            log.warning("perceptual=none: L1 and L2 alone reward blur; reconstructions will be soft")
        if self.adversary is not None:
            if self.trainer.precision == "16-mixed":
                raise ValueError("trainer.precision=16-mixed scales one loss only: with a discriminator use bf16-mixed")
            self.adversary.to(self.device)
        if self.is_compiled:
            self.compile_networks()

    def compile_networks(self) -> None:
        """Compiles the levels of encoder and decoder, where the work is, and the discriminator.

        The quantizer stays as it is: it is under 1 % of the work and resizes in ways that compilers stumble over. So does the
        decoder's last layer: the adaptive weight asks for the gradient there, which must not run through all of the decoder.
        """
        for half in (self.net.encoder, self.net.decoder):
            for part in (*half.levels, half.middle):
                part.compile()
        if self.adversary is not None:
            functorch_config.donated_buffer = False  # its backward runs twice: for the adaptive weight and for the loss
            self.adversary.net.compile()

    @property
    def progress(self) -> float:
        """Share of the run that is done."""
        return self.global_step / int(self.trainer.estimated_stepping_batches)

    def reconstruction_losses(self, output: Tensor, images: Tensor) -> dict[str, Tensor]:
        """Distances of the unclamped output to the images, weighted."""
        found = {"l1": self.l1_weight * F.l1_loss(output, images), "l2": self.l2_weight * F.mse_loss(output, images)}
        if self.perceptual is not None:
            found["perceptual"] = self.perceptual_weight * self.perceptual(output, images).mean()
        return found

    def adversarial_loss(
        self, fake: Tensor, reconstruction: Tensor, adversary: DiscriminatorTrainer
    ) -> tuple[Tensor, Tensor]:
        """(the adversarial loss with its weights, the adaptive ratio among them)."""
        against = adversary.against(fake)
        ratio = torch.ones_like(against)
        if adversary.is_adaptive:
            last_layer = self.net.decoder.conv_out.weight
            ratio = losses.adaptive_weight(reconstruction, against, last_layer, adversary.bounds)
        return adversary.weight * adversary.share(self.progress) * ratio * against, ratio

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers(use_pl_optimizer=False)
        total = int(self.trainer.estimated_stepping_batches)
        assert isinstance(optimizer, torch.optim.Optimizer)
        self.lr = self.schedule.apply(
            optimizer, self.global_step, total, self.peak_lr, (self.weight_decay, self.weight_decay)
        )

    @property
    def is_logged(self) -> bool:
        """Whether this step goes to the log."""
        return (self.global_step + 1) % self.trainer.log_every_n_steps == 0  # pyright: ignore[reportAttributeAccessIssue]

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        output = self.net(batch.images)
        parts = self.reconstruction_losses(output.images, batch.images)
        reconstruction = torch.stack(list(parts.values())).sum()
        loss = reconstruction + self.vq_weight * output.vq_loss
        if self.adversary is not None:
            if self.adversary.share(self.progress) > 0:
                adversarial, ratio = self.adversarial_loss(output.images, reconstruction, self.adversary)
                loss = loss + adversarial
                if self.is_logged:
                    self.log_dict({"train/adversarial_loss": adversarial, "train/adaptive_weight": ratio})
            if self.adversary.learns(self.progress):
                self.pair = batch.images, output.images.detach()
        self.net.quantizer.update_hits(output.token_maps)
        if self.is_logged:
            self.log("train/loss", loss, prog_bar=True)
            self.log("train/reconstruction_loss", reconstruction)
            self.log_dict({f"train/{name}_loss": part for name, part in parts.items()})
            self.log("train/vq_loss", output.vq_loss)
            self.log_dict({f"train/vq_loss_scale_{k:02d}": part for k, part in enumerate(output.vq_losses)})
            self.log_codebook(len(batch.images) * self.trainer.world_size)
            self.log("lr", self.lr)
        return loss

    def log_codebook(self, global_batch_size: int) -> None:
        """Usage (percent) and perplexity (codes) by scale and of all scales together."""
        quantizer = self.net.quantizer
        by_scale = zip(quantizer.codebook_usage(global_batch_size), quantizer.perplexity(), strict=True)
        for k, (usage, perplexity) in enumerate(by_scale):
            self.log_dict({f"train/codebook_usage_scale_{k:02d}": usage, f"train/perplexity_scale_{k:02d}": perplexity})
        overall = quantizer.overall()
        self.log_dict({"train/codebook_usage": overall.usage, "train/perplexity": overall.perplexity})

    def on_after_backward(self) -> None:
        """The discriminator learns from the same batch, after the tokenizer's gradient is there."""
        if self.adversary is None or self.pair is None:
            return
        with self.trainer.precision_plugin.forward_context():
            facts = self.adversary.accumulate(*self.pair, share=1 / self.trainer.accumulate_grad_batches)
        self.pair = None
        if self.is_logged:
            self.log_dict(facts)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """The tokenizer's step, then the discriminator's: one step in the count of the run."""
        progress, total = self.progress, int(self.trainer.estimated_stepping_batches)
        super().optimizer_step(*args, **kwargs)
        if self.adversary is not None and self.adversary.learns(progress):
            self.adversary.step(progress, total, self.trainer.datamodule.global_batch_size)  # pyright: ignore[reportAttributeAccessIssue]

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        self.score(batch, self.val_scores)

    def validation_step_raw(self, batch: ImageBatch) -> None:
        """The same for the weights as trained, where an average of them is validated (see `EMA`)."""
        self.score(batch, self.val_scores_raw)

    def score(self, batch: ImageBatch, scores: ImageMean) -> None:
        """Adds squared error, PSNR and perceptual distance of a batch's reconstructions."""
        output = self.net.decode(self.net.encode(batch.images))
        error = (output - batch.images).square().mean(dim=(1, 2, 3))
        distance = torch.zeros_like(error) if self.perceptual is None else self.perceptual(output, batch.images)
        scores.update(torch.stack([error, losses.psnr(output, batch.images), distance], dim=1), batch.weight)

    def on_validation_epoch_end(self) -> None:
        for split, scores in [("val", self.val_scores), ("val_raw", self.val_scores_raw)]:
            if not scores.update_called:
                continue
            error, psnr, distance = scores.compute()
            self.log(f"{split}/loss", error)
            self.log(f"{split}/psnr", psnr, prog_bar=True)
            if self.perceptual is not None:
                self.log(f"{split}/perceptual", distance)
            scores.reset()

    def run_facts(self) -> dict[str, Any]:
        """What a row of the table of runs says about the network and its cost for one image."""
        return {
            "kind": "tokenizer",
            "params_total": sum(parameter.numel() for parameter in self.net.parameters()),
            "tokens_per_image": scales.num_tokens(self.net.patch_nums),
            "flops_exact_per_image": 3 * sum(tokenizer_flops(self.net.sizes).values()),
            "patch_nums": self.net.patch_nums,
            "codes": self.net.sizes["codebook_size"],
            "lr_peak": self.peak_lr,
            "schedule": self.schedule.shape,
            "warmup": self.schedule.warmup,
            "weight_decay": self.weight_decay,
        }

    def step_facts(self) -> dict[str, int]:
        """What of `run_facts` was different in this step: nothing."""
        return {}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["varlab"] = networks_entry(self.net)
        if self.adversary is not None:
            checkpoint["adversary"] = self.adversary.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_same_networks(checkpoint, self.net, None)
        if self.adversary is not None:
            if "adversary" not in checkpoint:
                raise ValueError(
                    "the checkpoint was made without a discriminator: continue with adversarial=none, or start a new run"
                    " with module.init_from=CHECKPOINT"
                )
            self.adversary.load_state_dict(checkpoint["adversary"])
