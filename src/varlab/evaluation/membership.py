"""How much a VAR tells about the images it was trained on: membership inference from likelihoods, and samples that are
nearly training images.

Image autoregressive models leak more than diffusion models of the same quality (Kowalczuk et al. 2025, arXiv 2502.02514);
their strongest signal is the likelihood with the condition compared with that without.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from varlab.models.quantizer import ResidualQuantizer
from varlab.models.var import VAR
from varlab.sampling.search import likelihoods

BOOTSTRAPS = 500
FALSE_POSITIVES = 0.01


@torch.no_grad()
def signals(
    var: VAR, quantizer: ResidualQuantizer, batches: Iterable[tuple[Int[Tensor, "B L"], Tensor]], desc: str
) -> dict[str, Float[np.ndarray, " N"]]:
    """Per image, in nats per token, larger for an image that the network knows better: `likelihood`, and `condition_gain`,
    the likelihood with the condition minus that with none."""
    found: dict[str, list[Tensor]] = {"likelihood": [], "condition_gain": []}
    for sequence, condition in tqdm(batches, desc=desc, unit="batch"):
        with_condition, without = likelihoods(var, quantizer, sequence, condition)
        found["likelihood"].append(with_condition.cpu())
        found["condition_gain"].append((with_condition - without).cpu())
    return {name: torch.cat(values).double().numpy() for name, values in found.items()}


def code_likelihood(
    sequences: Int[np.ndarray, "N L"], reference: Int[np.ndarray, "M L"], codebook_size: int
) -> Float[np.ndarray, " N"]:
    """Log-likelihood per token if codes were drawn independently with the frequencies of `reference`: a control that knows no
    network. Members and others that it can tell apart do not come from the same distribution."""
    codes, counts = np.unique(reference, return_counts=True)
    place = np.searchsorted(codes, sequences).clip(max=len(codes) - 1)
    hits = np.where(codes[place] == sequences, counts[place], 0)
    return np.log((hits + 1.0) / (reference.size + codebook_size)).mean(axis=1)


def auc(members: Float[np.ndarray, " N"], others: Float[np.ndarray, " M"]) -> float:
    """Probability that a member has the larger signal, ties counting half: 0.5 is chance."""
    ordered = np.sort(others)
    below, upto = np.searchsorted(ordered, members, "left"), np.searchsorted(ordered, members, "right")
    return float((below + upto).mean() / (2 * len(others)))


def true_positives(
    members: Float[np.ndarray, " N"], others: Float[np.ndarray, " M"], rate: float = FALSE_POSITIVES
) -> float:
    """Share of members above the threshold that at most `rate` of the others exceed."""
    allowed = int(rate * len(others))
    threshold = np.sort(others)[len(others) - allowed - 1]
    return float((members > threshold).mean())


@dataclass(frozen=True)
class Attack:
    """Success of telling members from others by one signal, with 95 % intervals over images. The true positives at 1 % false
    positives are None with fewer than 100 others."""

    auc: float
    auc_interval: tuple[float, float]
    tpr: float | None
    tpr_interval: tuple[float, float] | None


def attack(members: Float[np.ndarray, " N"], others: Float[np.ndarray, " M"], seed: int = 0) -> Attack:
    """Scores one signal."""
    random = np.random.default_rng(seed)
    resampled = [[x[random.integers(len(x), size=len(x))] for x in (members, others)] for _ in range(BOOTSTRAPS)]

    def interval(score: Callable[..., float]) -> tuple[float, float]:
        low, high = np.quantile([score(*pair) for pair in resampled], [0.025, 0.975])
        return float(low), float(high)

    if len(others) * FALSE_POSITIVES < 1:
        return Attack(auc(members, others), interval(auc), None, None)
    return Attack(auc(members, others), interval(auc), true_positives(members, others), interval(true_positives))


def nearest(
    queries: Float[Tensor, "N c"], images: Iterable[Float[Tensor, "_ c"]]
) -> tuple[Float[Tensor, " N"], Int[Tensor, " N"]]:
    """(distance to the nearest image, its number) for each query; the images come in batches."""
    best, number, first = torch.full((len(queries),), torch.inf), torch.zeros(len(queries), dtype=torch.long), 0
    for batch in images:
        distance, place = torch.cdist(queries, batch).min(dim=1)
        nearer = distance < best
        best, number = torch.where(nearer, distance, best), torch.where(nearer, first + place, number)
        first += len(batch)
    return best, number


def copied(samples: Float[Tensor, " N"], held_out: Float[Tensor, " M"]) -> dict[str, Any]:
    """Samples that are nearer to a training image than 99 % of held-out images are: their share, 1 % by chance."""
    threshold = held_out.quantile(FALSE_POSITIVES).item()
    return {
        "share_of_samples_nearer_than_1_percent_of_held_out": (samples < threshold).float().mean().item(),
        "median_distance_samples": samples.median().item(),
        "median_distance_held_out": held_out.median().item(),
    }
