"""Search while sampling: of several candidates per image, the one that a scorer prefers."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from varlab.models import losses, scales
from varlab.models.msvqvae import MSVQVAE
from varlab.models.quantizer import ResidualQuantizer
from varlab.models.var import VAR
from varlab.sampling.acceleration import Drawn
from varlab.sampling.generate import draw
from varlab.sampling.token_sampling import SamplingSettings

Scorer = Callable[[Drawn, Tensor], Tensor]  # candidates (images in [0, 1], tokens) and their conditions -> scores (B)
STRIDE = 1_000_003  # between the seeds of an image's candidates; candidate 0 has the image's own


def likelihoods(
    var: VAR, quantizer: ResidualQuantizer, sequence: Int[Tensor, "B L"], condition: Tensor
) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
    """Log-likelihood of images given their condition, and given none, in nats per token."""
    inputs = quantizer.teacher_forcing_inputs(list(sequence.split(scales.lengths(var.patch_nums), dim=1)), var.order)
    with_condition, without = (
        -losses.over_tokens(losses.token_scores(var(inputs, c), sequence, var.patch_nums).loss, var.patch_nums)
        for c in (condition, var.embedder.null(condition))
    )
    return with_condition, without


class ConditionGain:
    """How much more likely an image is given its condition than without, in nats per token: what the network knows about
    p(condition | image), by Bayes' rule. Needs no further network; costs two forward passes."""

    def __init__(self, var: VAR, tokenizer: MSVQVAE) -> None:
        self.var, self.quantizer = var, tokenizer.quantizer

    def __call__(self, drawn: Drawn, condition: Tensor) -> Float[Tensor, " B"]:
        with_condition, without = likelihoods(
            self.var, self.quantizer, torch.cat(list(drawn.token_maps), dim=1), condition
        )
        return with_condition - without


def name_of(scorer: Scorer | None) -> str:
    """The name of a scorer's class or function, for records."""
    function = getattr(scorer or ConditionGain, "func", scorer or ConditionGain)  # inside a partial
    return getattr(function, "__name__", type(function).__name__)


@torch.no_grad()
def draw_best(
    var: VAR,
    tokenizer: MSVQVAE,
    condition: Tensor,
    settings: SamplingSettings,
    seeds: Sequence[int],
    compiled: str,
    best_of: int,
    scorer: Scorer | None,
) -> Float[Tensor, "B 3 H W"]:
    """For each condition, the image of `best_of` candidates with the largest score; see `generate`. `scorer`: None is
    `ConditionGain`. Raises ValueError for scores of another shape than (B)."""
    if best_of == 1:
        return draw(var, tokenizer, condition, settings, seeds, compiled).images
    scorer = scorer or ConditionGain(var, tokenizer)
    best, images = torch.full((len(condition),), -torch.inf, device=condition.device), torch.empty(0)
    for candidate in range(best_of):
        drawn = draw(var, tokenizer, condition, settings, [seed + candidate * STRIDE for seed in seeds], compiled)
        scores = scorer(drawn, condition)
        if scores.shape != best.shape:
            raise ValueError(
                f"the scorer returned shape {tuple(scores.shape)}, not one score per image: ({len(best)},)"
            )
        is_better = scores.float() > best
        best = torch.where(is_better, scores.float(), best)
        shown = is_better[:, None, None, None]
        images = drawn.images.clone() if candidate == 0 else torch.where(shown, drawn.images, images)
    return images
