"""Which of several conditions an image belongs to, by likelihood: whether a network uses what it is conditioned on."""

from collections.abc import Iterable
from typing import Any

import torch
from scipy.stats import binomtest
from torch import Tensor
from tqdm.auto import tqdm

from varlab.models.quantizer import ResidualQuantizer
from varlab.models.var import VAR
from varlab.sampling.search import likelihood

MAX_IMAGES = 1024


def groups_of(conditions: Tensor, size: int) -> list[Tensor]:
    """Images in groups of `size` with distinct conditions, drawn at random with seed 0: at most 1,024 images, or one group.
    Raises ValueError if there are fewer distinct conditions."""
    kinds = torch.unique(conditions.cpu(), dim=0, return_inverse=True)[1]
    if size < 2 or int(kinds.max()) + 1 < size:
        raise ValueError(
            f"retrieval={size}: give a number from 2 to {int(kinds.max()) + 1}, the number of distinct conditions"
        )
    order = torch.randperm(len(kinds), generator=torch.Generator().manual_seed(0))
    turn: dict[int, int] = {}
    rounds: dict[int, list[int]] = {}  # the first image of each condition, the second, ...
    for i in order.tolist():
        kind = int(kinds[i])
        rounds.setdefault(turn.setdefault(kind, 0), []).append(i)
        turn[kind] += 1
    groups = [group for members in rounds.values() for group in torch.tensor(members).split(size) if len(group) == size]
    return groups[: max(1, MAX_IMAGES // size)]


@torch.no_grad()
def retrieval_scores(
    var: VAR, quantizer: ResidualQuantizer, batches: Iterable[tuple[Tensor, Tensor]], candidates: int
) -> dict[str, Any]:
    """How often, in percent, an image's own condition is the likeliest among `candidates`, its own and those of other images,
    with a 95 % interval (Wilson). Chance is 100 / candidates. `batches`: (sequences B L, conditions B)."""
    var.eval()
    sequences, conditions = (torch.cat(parts) for parts in zip(*batches, strict=True))
    groups, right = groups_of(conditions, candidates), 0
    for group in tqdm(groups, desc="retrieval", unit="group"):
        group = group.to(sequences.device)
        found = [
            likelihood(var, quantizer, sequences[i].expand(candidates, -1), conditions[group]).argmax() for i in group
        ]
        right += sum(int(best) == i for i, best in enumerate(found))
    num = len(groups) * candidates
    low, high = binomtest(right, num).proportion_ci(method="wilson")
    return {
        "retrieval": 100 * right / num,
        "retrieval_low": 100 * float(low),
        "retrieval_high": 100 * float(high),
        "retrieval_candidates": candidates,
        "retrieval_images": num,
    }
