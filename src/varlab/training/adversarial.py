"""The discriminator of tokenizer training: when it trains, when its loss is added to the tokenizer's, and its
optimizer.

It is not part of the LightningModule, which thus has a single optimizer: steps are counted once, automatic optimization
accumulates and clips gradients, and DDP wraps one network. This file does the same for the discriminator.
"""

from collections.abc import Sequence
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from varlab.models import losses
from varlab.models.discriminator import DiffAugment
from varlab.models.losses import AdversarialLoss
from varlab.training.gradients import clip_or_skip, gradient_norm, keep_implementation
from varlab.training.optimizers import parameter_groups
from varlab.training.schedules import Schedule, set_step


class DiscriminatorTrainer:
    """A discriminator with its optimizer and schedule.

    `discriminator_start`: fraction of the run after which the discriminator trains. `adversarial_start`: fraction after
    which the adversarial loss is added to the tokenizer's, ramped up over `warmup` (a fraction). `weight`: weight of
    the adversarial loss, times the adaptive ratio clamped to `bounds` (1 with is_adaptive=False). `r1_weight`: weight
    of the gradient penalty at real images, applied every `r1_every` steps with `r1_every` times the weight.
    `lecam_weight`: regularizes logits toward the moving average of the other class, real or fake (Tseng et al. 2021).
    The learning rate is base_lr * global batch / 256 on a schedule that begins at `discriminator_start`.
    """

    def __init__(
        self,
        discriminator: nn.Module,
        schedule: Schedule,
        augment: DiffAugment | None = None,
        loss: AdversarialLoss = "hinge",
        weight: float = 0.4,
        is_adaptive: bool = True,
        bounds: Sequence[float] = (0.015, 1e4),
        discriminator_start: float = 0.18,
        adversarial_start: float = 0.2,
        warmup: float = 0.02,
        r1_weight: float = 0.0,
        r1_every: int = 16,
        lecam_weight: float = 0.0,
        base_lr: float = 1e-4,
        betas: Sequence[float] = (0.5, 0.9),
        weight_decay: float = 5e-4,
        clip: float = 10.0,
    ) -> None:
        if not 0 <= discriminator_start <= adversarial_start < 1:
            raise ValueError(
                f"adversarial.discriminator_start={discriminator_start} and adversarial_start={adversarial_start}: the discriminator"
                " must train before its loss is used, and both must be fractions of the run below 1"
            )
        if loss not in get_args(AdversarialLoss):
            raise ValueError(f"adversarial.loss={loss!r}: choose one of {', '.join(get_args(AdversarialLoss))}")
        self.net = discriminator
        self.schedule = schedule
        self.augment = augment or nn.Identity()
        self.loss: AdversarialLoss = loss
        self.weight = weight
        self.is_adaptive = is_adaptive
        self.bounds = (bounds[0], bounds[1])
        self.discriminator_start = discriminator_start
        self.adversarial_start = adversarial_start
        self.warmup = warmup
        self.r1_weight = r1_weight
        self.r1_every = r1_every
        self.lecam_weight = lecam_weight
        self.base_lr = base_lr
        self.weight_decay = weight_decay
        self.clip = clip
        groups = parameter_groups(self.net)
        self.optimizer = torch.optim.AdamW(groups, lr=base_lr, betas=(betas[0], betas[1]), fused=True)
        keep_implementation(self.optimizer)
        self.logit_means = torch.zeros(2)  # moving averages, real and fake
        self.num_steps = 0

    def to(self, device: torch.device) -> None:
        """Moves network, optimizer state and averages."""
        self.net.to(device)
        self.logit_means = self.logit_means.to(device)
        self.optimizer.load_state_dict(self.optimizer.state_dict())  # moves its state to the device of the weights

    def is_training(self, progress: float) -> bool:
        """Whether the discriminator is trained at this fraction of the run."""
        return progress >= self.discriminator_start

    def ramp(self, progress: float) -> float:
        """Factor of the adversarial weight at this fraction of the run, 0 to 1."""
        if progress < self.adversarial_start:
            return 0.0
        return min(1.0, (progress - self.adversarial_start) / self.warmup) if self.warmup > 0 else 1.0

    def generator_loss(self, fake: Tensor) -> Tensor:
        """The generator's loss for reconstructions; the discriminator's weights get no gradient."""
        self.net.eval().requires_grad_(False)
        logits = self.net(self.augment(fake))
        self.net.train().requires_grad_(True)
        return losses.generator_loss(logits, self.loss)

    def accumulate(self, real: Tensor, fake: Tensor, share: float) -> dict[str, Tensor]:
        """Adds the gradient of one batch, times `share`; returns values for the log."""
        is_penalized = self.r1_weight > 0 and self.num_steps % self.r1_every == 0
        shown = self.augment(real.detach().requires_grad_(is_penalized)), self.augment(fake.detach())
        net = self.net.forward if is_penalized else self.net  # a compiled network does not support double backward
        real_logits, fake_logits = (net(images) for images in shown)
        loss = own = losses.discriminator_loss(real_logits, fake_logits, self.loss)
        if is_penalized:
            loss = loss + self.r1_weight * self.r1_every * losses.gradient_penalty(real_logits, shown[0])
        if self.lecam_weight > 0:
            real_mean, fake_mean = self.logit_means
            gap = (real_logits - fake_mean).relu().square().mean() + (real_mean - fake_logits).relu().square().mean()
            loss = loss + self.lecam_weight * gap
            means = torch.stack([real_logits.detach().float().mean(), fake_logits.detach().float().mean()])
            if dist.is_available() and dist.is_initialized():
                dist.all_reduce(means)
                means /= dist.get_world_size()
            self.logit_means.lerp_(means, 0.1)
        (share * loss).backward()
        right = (real_logits > 0).float().mean() / 2 + (fake_logits < 0).float().mean() / 2
        return {
            "train/discriminator_loss": own.detach(),
            "train/logits_real": real_logits.detach().mean(),
            "train/logits_fake": fake_logits.detach().mean(),
            "train/discriminator_right": 100 * right.detach(),
        }

    def step(self, progress: float, total_steps: int, global_batch_size: int) -> None:
        """One optimizer step, skipped if the gradient is not finite; gradients are averaged over ranks first."""
        parameters = [parameter for parameter in self.net.parameters() if parameter.grad is not None]
        if dist.is_available() and dist.is_initialized():
            flat = torch.cat([parameter.grad.flatten() for parameter in parameters])  # pyright: ignore[reportOptionalMemberAccess]
            dist.all_reduce(flat)
            flat /= dist.get_world_size()
            for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
                parameter.grad = part.view_as(parameter)
        clip_or_skip(self.optimizer, gradient_norm(parameters), self.clip)
        first = int(self.discriminator_start * total_steps)
        step, peak_lr = round(progress * total_steps) - first, self.base_lr * global_batch_size / 256
        decay = (self.weight_decay, self.weight_decay)
        set_step(self.optimizer, max(step, 0), total_steps - first, self.schedule, peak_lr, decay)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.num_steps += 1

    def state_dict(self) -> dict[str, Any]:
        return {
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "logit_means": self.logit_means,
            "num_steps": self.num_steps,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.net.load_state_dict(state_dict["net"])
        self.optimizer.load_state_dict(state_dict["optimizer"])
        self.logit_means.copy_(state_dict["logit_means"])
        self.num_steps = state_dict["num_steps"]
