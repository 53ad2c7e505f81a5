"""Training of the tokenizer: reconstruction, perceptual, adversarial and VQ loss."""

import logging
from collections.abc import Callable
from typing import Any

import torch
import torch._functorch.config as functorch_config
from torch import Tensor, nn

from varlab.checkpoints.load import check_same_arguments, check_same_networks, load_tokenizer, networks_entry
from varlab.data.images import ImageBatch
from varlab.data.resolutions import height_and_width
from varlab.models import losses
from varlab.models.custom_classes import describe
from varlab.models.msvqvae import MSVQVAE
from varlab.training.adversarial import DiscriminatorTrainer
from varlab.training.image_mean import ImageMean
from varlab.training.optimizers import parameter_groups
from varlab.training.scheduled_module import FUSED_ADAMW, OptimizerFactory, ScheduledModule
from varlab.training.schedules import Schedule

log = logging.getLogger(__name__)
PairLoss = Callable[[Tensor, Tensor], Tensor]


class MSVQVAEModule(ScheduledModule):
    """Reconstruction losses on the unclamped output, perceptual and adversarial loss, plus the VQ loss.

    Loss weights and optimizer are those of the VAR authors' single-scale tokenizer; the recipe of the released one was
    never published. `reconstruction_losses`: by name, functions of output and images (B 3 H W), logged as
    `train/NAME_loss`. `perceptual`: returns one distance per image pair (models/feature_networks.py); frozen, not part
    of checkpoints. `adversarial`: trains the discriminator (training/adversarial.py); saved in checkpoints.
    """

    def __init__(
        self,
        net: MSVQVAE,
        schedule: Schedule,
        optimizer: OptimizerFactory = FUSED_ADAMW,
        reconstruction_losses: dict[str, PairLoss] | None = None,
        vq_weight: float = 1.0,
        perceptual: nn.Module | None = None,
        perceptual_weight: float = 1.0,
        adversarial: DiscriminatorTrainer | None = None,
        base_lr: float = 1e-4,
        weight_decay: float = 0.005,
        gradient_clip_val: float = 2.0,
        init_from: str | None = None,
        is_compiled: bool | None = None,
        trust_code: bool = False,
    ) -> None:
        super().__init__(optimizer, schedule, base_lr, (weight_decay, weight_decay), gradient_clip_val, num_scores=3)
        describe(net)  # raises if a checkpoint could not rebuild the network
        self.net = net
        if init_from is not None:
            start = load_tokenizer(init_from, patch_nums=net.patch_nums, trust_code=trust_code)
            check_same_arguments("tokenizer", describe(start), net, init_from)
            net.load_state_dict(start.state_dict())
            self.init_from = init_from
        self.reconstruction_losses = reconstruction_losses or {"l1": losses.L1(0.2), "l2": losses.L2(1.0)}
        self.vq_weight = vq_weight
        self.perceptual = perceptual
        self.perceptual_weight = perceptual_weight
        self.adversarial = adversarial
        self.pair: tuple[Tensor, Tensor] | None = None  # images and reconstructions to train the discriminator with
        self.is_compiled = is_compiled

    def setup(self, stage: str) -> None:
        if self.trainer.precision == "bf16-true":
            raise ValueError("trainer.precision=bf16-true supports a VAR only; train a tokenizer with bf16-mixed")
        if self.device_mesh is not None:
            raise ValueError("trainer=fsdp and hsdp shard the blocks of a VAR; train a tokenizer with trainer=ddp")
        if height_and_width(self.data.resolution) != self.net.image_size:
            raise ValueError(
                f"data.resolution={self.data.resolution}, but the tokenizer encodes images of {self.net.image_size} pixels: its"
                f" finest map of {self.net.patch_nums[-1]} times {self.net.downsample} (set patch_nums)"
            )

    def parameter_groups(self) -> list[dict[str, Any]]:
        decayed, others = parameter_groups(self.net)
        codes = {id(parameter): parameter for parameter in self.net.quantizer.undecayed() if parameter.requires_grad}
        decayed["params"] = [p for p in decayed["params"] if id(p) not in codes]
        others["params"] = [p for p in others["params"] if id(p) not in codes] + list(codes.values())
        return [decayed, others]

    def on_fit_start(self) -> None:
        if self.perceptual is None and self.trainer.is_global_zero:
            log.warning("perceptual=none: L1 and L2 alone reward blur; reconstructions will be soft")
        if self.adversarial is not None:
            if self.trainer.precision == "16-mixed":
                raise ValueError("trainer.precision=16-mixed scales only one loss: use bf16-mixed with a discriminator")
            self.adversarial.to(self.device)
        if self.compiles:
            self.compile_networks()

    def compile_networks(self) -> None:
        """Compiles the levels of encoder and decoder, which dominate the cost, and the discriminator.

        The quantizer is not compiled: it is under 1 % of the cost, and its resizing causes graph breaks. Neither is the
        decoder's last layer: the adaptive weight needs the gradient there, without a backward pass through the whole
        decoder.
        """
        for half in (self.net.encoder, self.net.decoder):
            for part in (*half.levels, half.middle):
                part.compile()
        if self.adversarial is not None:
            functorch_config.donated_buffer = False  # its backward runs twice: for the adaptive weight and for the loss
            self.adversarial.net.compile()

    @property
    def progress(self) -> float:
        """Completed fraction of the run."""
        return self.global_step / self.total_steps

    def weighted_losses(self, output: Tensor, images: Tensor) -> dict[str, Tensor]:
        """Reconstruction losses of the unclamped output, with their weights."""
        found = {name: loss(output, images) for name, loss in self.reconstruction_losses.items()}
        if self.perceptual is not None:
            found["perceptual"] = self.perceptual_weight * self.perceptual(output, images).mean()
        return found

    def adversarial_loss(
        self, fake: Tensor, reconstruction: Tensor, adversarial: DiscriminatorTrainer
    ) -> tuple[Tensor, Tensor]:
        """(adversarial loss times all of its weights, adaptive ratio)."""
        loss = adversarial.generator_loss(fake)
        ratio = torch.ones_like(loss)
        if adversarial.is_adaptive:
            last_layer = self.net.decoder.conv_out.weight
            ratio = losses.adaptive_weight(reconstruction, loss, last_layer, adversarial.bounds)
        return adversarial.weight * adversarial.ramp(self.progress) * ratio * loss, ratio

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        output = self.net(batch.images)
        parts = self.weighted_losses(output.images, batch.images)
        reconstruction = torch.stack(list(parts.values())).sum()
        loss = reconstruction + self.vq_weight * output.vq_loss
        values: dict[str, Tensor] = {}
        if self.adversarial is not None:
            if self.adversarial.ramp(self.progress) > 0:
                adversarial, ratio = self.adversarial_loss(output.images, reconstruction, self.adversarial)
                loss = loss + adversarial
                values |= {"train/adversarial_loss": adversarial, "train/adaptive_weight": ratio}
            if self.adversarial.is_training(self.progress):
                self.pair = batch.images, output.images.detach()
        self.net.quantizer.update_hits(output.token_maps)
        if self.is_logged:
            values |= {"train/loss": loss, "train/reconstruction_loss": reconstruction, "train/vq_loss": output.vq_loss}
            values |= {f"train/{name}_loss": part for name, part in parts.items()}
            values |= {f"train/vq_loss_scale_{k:02d}": part for k, part in enumerate(output.vq_losses)}
            self.log_means(values, prog_bar=("train/loss",))
            self.log_codebook(len(batch.images) * self.trainer.world_size)
            self.log("lr", self.lr)
        return loss

    def log_codebook(self, global_batch_size: int) -> None:
        """Usage (percent) and perplexity (codes) per scale and over all scales; hits are summed over all ranks."""
        quantizer = self.net.quantizer
        by_scale = zip(quantizer.codebook_usage(global_batch_size), quantizer.perplexity(), strict=True)
        for k, (usage, perplexity) in enumerate(by_scale):
            self.log_dict({f"train/codebook_usage_scale_{k:02d}": usage, f"train/perplexity_scale_{k:02d}": perplexity})
        overall = quantizer.overall()
        self.log_dict({"train/codebook_usage": overall.usage, "train/perplexity": overall.perplexity})

    def on_after_backward(self) -> None:
        """Trains the discriminator on the same batch, after the tokenizer's gradient is computed."""
        if self.adversarial is None or self.pair is None:
            return
        with self.trainer.precision_plugin.forward_context():
            scores = self.adversarial.accumulate(*self.pair, share=1 / self.trainer.accumulate_grad_batches)
        self.pair = None
        if self.is_logged:
            self.log_means(scores)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """The tokenizer's step, then the discriminator's; together they count as one step of the run."""
        progress = self.progress
        super().optimizer_step(*args, **kwargs)
        if self.adversarial is not None and self.adversarial.is_training(progress):
            self.adversarial.step(progress, self.total_steps, self.data.global_batch_size)

    def score(self, batch: ImageBatch, scores: ImageMean) -> None:
        """Adds squared error, PSNR and perceptual distance of a batch's reconstructions."""
        output = self.net.decode(self.net.quantizer.encode(self.net.features(batch.images)))
        error = (output - batch.images).square().mean(dim=(1, 2, 3))
        distance = torch.zeros_like(error) if self.perceptual is None else self.perceptual(output, batch.images)
        scores.update(torch.stack([error, losses.psnr(output, batch.images), distance], dim=1), batch.weight)

    def log_validation(self, split: str, means: Tensor) -> None:
        error, psnr, distance = means
        self.log(f"{split}/loss", error)
        self.log(f"{split}/psnr", psnr, prog_bar=True)
        if self.perceptual is not None:
            self.log(f"{split}/perceptual", distance)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["varlab"] = networks_entry(self.net)
        if self.adversarial is not None:
            checkpoint["discriminator"] = self.adversarial.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        check_same_networks(checkpoint, self.net, None)
        if self.adversarial is not None:
            if "discriminator" not in checkpoint:
                raise ValueError(
                    "the checkpoint has no discriminator: continue with adversarial=none, or start a new run"
                    " with module.init_from=CHECKPOINT"
                )
            self.adversarial.load_state_dict(checkpoint["discriminator"])
