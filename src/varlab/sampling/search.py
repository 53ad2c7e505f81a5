"""Search while sampling: of several candidates per image, the one that a scorer prefers."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from varlab.models import losses, scales
from varlab.models.autocast import autocast_of
from varlab.models.msvqvae import MSVQVAE
from varlab.models.quantizer import ResidualQuantizer
from varlab.models.var import VAR
from varlab.sampling.acceleration import Drawn
from varlab.sampling.generate import draw
from varlab.sampling.token_sampling import SamplingSettings

Scorer = Callable[[Drawn, Tensor], Tensor]  # candidates (images in [0, 1], tokens) and their conditions -> scores (B)
STRIDE = 1_000_003  # between the seeds of an image's candidates; candidate 0 has the image's own


def likelihood(
    var: VAR, quantizer: ResidualQuantizer, sequence: Int[Tensor, "B L"], condition: Tensor
) -> Float[Tensor, " B"]:
    """Log-likelihood of images given conditions, in nats per token."""
    inputs = quantizer.teacher_forcing_inputs(list(sequence.split(scales.lengths(var.patch_nums), dim=1)), var.order)
    with autocast_of(var.head.weight):
        scores = losses.token_scores(var(inputs, condition), sequence, var.patch_nums, var.bases)
        return -losses.over_tokens(scores.loss, var.patch_nums)


def likelihoods(
    var: VAR, quantizer: ResidualQuantizer, sequence: Int[Tensor, "B L"], condition: Tensor
) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
    """Log-likelihood of images given their condition, and given none, in nats per token."""
    without = likelihood(var, quantizer, sequence, var.embedder.null(condition))
    return likelihood(var, quantizer, sequence, condition), without


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
) -> Drawn:
    """For each condition, the one of `best_of` candidates with the largest score; see `generate`. `scorer`: None is
    `ConditionGain`. A score that is no number counts as the smallest. Raises ValueError for scores of another shape than (B)."""
    best = draw(var, tokenizer, condition, settings, seeds, compiled)
    if best_of == 1:
        return best
    scorer = scorer or ConditionGain(var, tokenizer)
    highest = score(scorer, best, condition)
    best = Drawn(best.f_hat.clone(), best.images.clone(), [tokens.clone() for tokens in best.token_maps])
    for number in range(1, best_of):
        candidate = draw(var, tokenizer, condition, settings, [seed + number * STRIDE for seed in seeds], compiled)
        found = score(scorer, candidate, condition)
        wins = found > highest
        highest = torch.where(wins, found, highest)
        best = Drawn(
            torch.where(wins[:, None, None, None], candidate.f_hat, best.f_hat),
            torch.where(wins[:, None, None, None], candidate.images, best.images),
            [torch.where(wins[:, None], a, b) for a, b in zip(candidate.token_maps, best.token_maps, strict=True)],
        )
    return best


def score(scorer: Scorer, drawn: Drawn, condition: Tensor) -> Float[Tensor, " B"]:
    """Scores of candidates."""
    scores = torch.as_tensor(scorer(drawn, condition), device=condition.device).float()
    if scores.shape != (len(condition),):
        raise ValueError(
            f"the scorer returned shape {tuple(scores.shape)}, not one score per image: ({len(condition)},)"
        )
    return scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
