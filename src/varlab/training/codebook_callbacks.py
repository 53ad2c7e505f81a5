"""Codebook health in tokenizer training: a warning when a scale collapses, and two remedies, off by default.

The other remedies are settings of the network: model.quantizer.lookup=cosine (angles are compared), model.quantizer.gradient=rotation,
model.quantizer.scale_dropout.
"""

import logging
from typing import Any

import torch
import torch.distributed as dist
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn

from varlab.data.images import ImageBatch
from varlab.models.msvqvae import MSVQVAE
from varlab.models.quantizer import MultiScaleQuantizer, ResidualQuantizer
from varlab.training.ema import EMA

MAX_VECTORS_PER_CODE = 64
log = logging.getLogger(__name__)


def gathered(x: Tensor) -> Tensor:
    """Concatenated rows of all ranks, identical on each; every rank must pass the same number of rows."""
    if not (dist.is_available() and dist.is_initialized()):
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def random_rows(x: Tensor, num_rows: int, seed: int) -> Tensor:
    """Random rows of `x`, without repetition unless there are fewer than `num_rows`."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator)
    return x[order.repeat(-(-num_rows // len(x)))[:num_rows].to(x.device)]


@torch.no_grad()
def lookup_vectors(net: MSVQVAE, images: Tensor, seed: int) -> Tensor:
    """Vectors (N, C) that are looked up for these images, over all scales and all ranks."""
    vectors = torch.cat([z.flatten(0, 1) for z in net.quantizer.lookup_vectors(net.features(images))])
    return gathered(random_rows(vectors, min(len(vectors), MAX_VECTORS_PER_CODE * net.quantizer.codebook_size), seed))


def has_table(quantizer: ResidualQuantizer) -> bool:
    """Whether a quantizer learns one table of codes."""
    codebook = getattr(quantizer, "codebook", None)
    return isinstance(codebook, nn.Embedding) and codebook.weight.requires_grad


def learns_table(quantizer: ResidualQuantizer, callback: str) -> MultiScaleQuantizer:
    """A quantizer that learns one table of codes. Raises ValueError for any other."""
    if not has_table(quantizer):
        raise ValueError(f"{type(quantizer).__name__} learns no table of codes: set callbacks.{callback}=null")
    assert isinstance(quantizer, MultiScaleQuantizer)
    return quantizer


class ResetDeadCodes(Callback):
    """Every `every` steps moves rarely used codes to random vectors that are looked up for the current batch.

    A code is dead if its hits over all scales are less than `min_share` times the mean. All ranks make the same choice.
    """

    def __init__(self, every: int = 200, min_share: float = 0.02, seed: int = 0) -> None:
        if every < 1 or not 0 < min_share < 1:
            raise ValueError(f"every={every} must be positive and min_share={min_share} between 0 and 1")
        self.every, self.min_share, self.seed = every, min_share, seed
        self.last_step = 0

    def state_dict(self) -> dict[str, Any]:
        return {"last_step": self.last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.last_step = state_dict["last_step"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        learns_table(pl_module.net.quantizer, "reset_dead_codes")  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: ImageBatch, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self.last_step or step % self.every:
            return
        self.last_step = step
        net = pl_module.net
        assert isinstance(net, MSVQVAE)
        codebook = learns_table(net.quantizer, "reset_dead_codes").codebook.weight
        hits = net.quantizer.hits.sum(dim=0)
        dead = (hits < self.min_share * hits.mean()).nonzero().flatten()
        pl_module.log("train/codes_reset", float(len(dead)))
        if len(dead) == 0:
            return
        vectors = random_rows(lookup_vectors(net, batch.images, self.seed + step), len(dead), self.seed + step)
        codebook[dead] = vectors.to(codebook.dtype)
        net.quantizer.hits[:, dead] = net.quantizer.hits.mean(
            dim=1, keepdim=True
        )  # so that they are not reset again before new hits accumulate
        for optimizer in trainer.optimizers:
            for value in optimizer.state.get(codebook, {}).values():
                if isinstance(value, Tensor) and value.shape == codebook.shape:
                    value[dead] = 0
        for callback in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]
            if isinstance(callback, EMA):
                callback.average["net.quantizer.codebook.weight"][dead] = codebook[dead]


class KMeansInit(Callback):
    """Before the first step, initializes the codes to k-means centers of the vectors that the first batch looks up.

    Two rounds of `num_iterations`: the second uses the residuals left by the codes of the first.
    """

    def __init__(self, num_iterations: int = 10, seed: int = 0) -> None:
        self.num_iterations, self.seed = num_iterations, seed

    @torch.no_grad()
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: ImageBatch, batch_idx: int
    ) -> None:
        if trainer.global_step or batch_idx:
            return
        net = pl_module.net
        assert isinstance(net, MSVQVAE)
        quantizer = learns_table(net.quantizer, "kmeans")
        for round_ in range(2):
            vectors = lookup_vectors(net, batch.images, self.seed + round_)
            if len(vectors) < net.quantizer.codebook_size:
                log.warning(
                    "the first batch gives %d vectors for %d codes: some codes start with equal values",
                    len(vectors),
                    net.quantizer.codebook_size,
                )
            fit_codes(quantizer, vectors, self.num_iterations, self.seed)


@torch.no_grad()
def fit_codes(quantizer: MultiScaleQuantizer, vectors: Tensor, num_iterations: int, seed: int) -> None:
    """k-means (Lloyd) with the quantizer's lookup; a center without vectors moves to a random one."""
    codebook = quantizer.codebook.weight
    codebook.copy_(random_rows(vectors, len(codebook), seed))
    for i in range(num_iterations):
        nearest = quantizer.nearest(vectors[None])[0]
        counts = torch.bincount(nearest, minlength=len(codebook))
        sums = torch.zeros_like(codebook).index_add_(0, nearest, vectors.to(codebook.dtype))
        empty = counts == 0
        codebook.copy_(sums / counts.clamp(min=1)[:, None])
        if empty.any():
            codebook[empty] = random_rows(vectors, int(empty.sum()), seed + i + 1).to(codebook.dtype)


class CollapseAlarm(Callback):
    """After `patience` steps, warns once per scale when its perplexity falls below 1/`factor` of its maximum or below
    `minimum` codes (of more than two), and logs when it has recovered."""

    def __init__(self, factor: float = 4.0, minimum: float = 2.0, patience: int = 100) -> None:
        self.factor, self.minimum, self.patience = factor, minimum, patience
        self.best: Tensor | None = None
        self.collapsed: set[int] = set()

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "collapsed": sorted(self.collapsed)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self.collapsed = state_dict["best"], set(state_dict["collapsed"])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        net, step = pl_module.net, trainer.global_step
        if not isinstance(net, MSVQVAE) or step < self.patience or step % trainer.log_every_n_steps:  # pyright: ignore[reportAttributeAccessIssue]
            return
        messages = self.check(net.quantizer.perplexity().cpu(), step, net.quantizer)
        pl_module.log("train/collapsed_scales", float(len(self.collapsed)))
        if trainer.is_global_zero:
            for message in messages:
                log.warning(message)

    def check(self, perplexity: Tensor, step: int, quantizer: ResidualQuantizer) -> list[str]:
        """Messages about the perplexities (K) of this step."""
        patch_nums = quantizer.patch_nums
        sizes = [quantizer.size_of(k) for k in range(quantizer.num_scales)]
        least = torch.tensor([self.minimum if size > 2 else 1.0 for size in sizes])
        remedies = "callbacks.reset_dead_codes, callbacks.kmeans, model.quantizer.lookup=cosine, " * has_table(
            quantizer
        )
        self.best = perplexity if self.best is None else torch.maximum(self.best, perplexity)
        is_low = (perplexity < least) | (perplexity < self.best / self.factor)
        low = set(is_low.nonzero().flatten().tolist())
        messages = [
            f"step {step}: the codebook collapses at scale {k} ({patch_nums[k]}): {perplexity[k]:.1f} codes in use,"
            f" at most {self.best[k]:.1f} before. Remedies: {remedies}model.quantizer.gradient=rotation,"
            " model.quantizer.scale_dropout=0.1"
            for k in sorted(low - self.collapsed)
        ]
        messages += [
            f"step {step}: scale {k} ({patch_nums[k]}) has recovered: {perplexity[k]:.1f} codes in use"
            for k in sorted(self.collapsed - low)
        ]
        self.collapsed = low
        return messages
