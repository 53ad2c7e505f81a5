"""Tuning a trained VAR: objectives other than likelihood, and adapters that train few parameters."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils import parametrize

from varlab.models.digits import over_digits
from varlab.models.losses import cross_entropy
from varlab.models.var import VAR
from varlab.training.initial_weights import matching


class Objective(nn.Module):
    """A loss of whole images that replaces the likelihood of their tokens. `cost`: FLOPs of a step relative to those of
    likelihood."""

    cost: float = 1.0

    def prepare(self, net: VAR) -> None:
        """Called once, with the network before tuning. Raises ValueError for a network that it cannot tune."""

    def forward(
        self, net: VAR, inputs: Float[Tensor, "B l C"], sequence: Int[Tensor, "B L"], condition: Tensor
    ) -> tuple[Tensor, Float[Tensor, "B L V"], dict[str, Tensor]]:
        """(loss, logits under the images' own conditions, values to log)."""
        raise NotImplementedError


class ConditionContrast(Objective):
    """Condition contrastive alignment (Chen et al. 2024, arXiv 2410.09347): raises the likelihood of an image under its own
    condition and lowers it under that of another image of the batch, both relative to the network before tuning. The
    aim is samples that need no guidance, at half the cost.

    `beta`: how fast a likelihood ratio saturates. `weight`: of the lowered likelihoods; larger values favor fidelity over
    variety. The network before tuning is part of checkpoints, so that a run continues without the file it came from.
    """

    cost = 8 / 3  # forward and backward under two conditions, and forward by the network before tuning
    reference: VAR

    def __init__(self, beta: float = 0.1, weight: float = 10.0) -> None:
        super().__init__()
        if beta <= 0 or weight < 0:
            raise ValueError(f"module.objective: beta={beta} must be above 0, and weight={weight} not below")
        self.beta, self.weight = beta, weight

    def prepare(self, net: VAR) -> None:
        if net.embedder.dropout or net.drop_path:
            raise ValueError(
                "module.objective compares likelihoods, which dropout would blur: set model.label_dropout=0 model.drop_path=0"
            )
        self.reference = copy.deepcopy(net).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "ConditionContrast":
        return super().train(False)

    def forward(
        self, net: VAR, inputs: Float[Tensor, "B l C"], sequence: Int[Tensor, "B L"], condition: Tensor
    ) -> tuple[Tensor, Float[Tensor, "B L V"], dict[str, Tensor]]:
        num, others = len(condition), condition.roll(1, dims=0)
        conditions, inputs, tokens = torch.cat([condition, others]), inputs.repeat(2, 1, 1), sequence.repeat(2, 1)
        logits = net(inputs, conditions)
        with torch.no_grad():
            before = over_digits(cross_entropy, self.reference(inputs, conditions), tokens, net.bases).sum(dim=1)
        own, other = (before - over_digits(cross_entropy, logits, tokens, net.bases).sum(dim=1)).split(
            num
        )  # log-likelihood ratios
        differs = (condition != others).view(num, -1).any(dim=1).float()
        num_others = differs.sum().clamp(min=1)
        raised = -F.logsigmoid(self.beta * own).mean()
        lowered = -(F.logsigmoid(-self.beta * other) * differs).sum() / num_others
        values = {"train/ratio_own": own.mean(), "train/ratio_other": (other * differs).sum() / num_others}
        return raised + self.weight * lowered, logits[:num], values


class LowRank(nn.Module):
    """A weight plus the product of two thin matrices, of which the second begins at 0."""

    scale: Tensor

    def __init__(self, weight: Float[Tensor, "out in"], rank: int, alpha: float) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, weight.shape[1]) / weight.shape[1] ** 0.5)
        self.up = nn.Parameter(torch.zeros(weight.shape[0], rank))
        self.register_buffer("scale", torch.tensor(alpha / rank))

    def forward(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        return weight + self.scale * (self.up @ self.down)


class LoRA:
    """Low-rank adaptation (Hu et al. 2021, arXiv 2106.09685): the network is frozen but for thin matrices beside those whose
    names match `targets`. A checkpoint keeps them apart; whatever loads it gets the merged network."""

    def __init__(
        self,
        rank: int = 4,
        alpha: float | None = None,
        targets: Sequence[str] = ("blocks.*.attention.qkv", "blocks.*.attention.proj"),
        trained: Sequence[str] = ("embedder.*",),
    ) -> None:
        """`alpha`: the product is multiplied by alpha / rank; None is `rank`. `trained`: patterns of parameters that are
        trained as a whole, such as the embeddings of new classes."""
        if rank < 1:
            raise ValueError(f"module.adapter.rank={rank}: give 1 or more")
        self.rank, self.alpha = rank, float(rank if alpha is None else alpha)
        self.targets, self.trained = list(targets), list(trained)

    def apply(self, net: nn.Module) -> None:
        """Freezes the network and adds the matrices. Raises ValueError for a target that matches no matrix."""
        linears: dict[str, Any] = {name: part for name, part in net.named_modules() if isinstance(part, nn.Linear)}
        parameters = dict(net.named_parameters())
        trained = matching(list(parameters), self.trained, "module.adapter.trained")
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in trained)
        for name in sorted(matching(list(linears), self.targets, "module.adapter.targets")):
            low_rank = LowRank(linears[name].weight, self.rank, self.alpha)
            parametrize.register_parametrization(linears[name], "weight", low_rank)
