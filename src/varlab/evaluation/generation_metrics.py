"""Scores of generated images from the features of a frozen network: Frechet distances, Inception score, kernel
distance, precision, recall, density and coverage. Pure math: the caller reports the network, the images and their number
with each score.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float

from varlab.evaluation.frechet import frechet_distance, statistics


@dataclass(frozen=True)
class Features:
    """Features of N images: pooled, and, if available, spatial features (for sFID) and class probabilities."""

    pooled: Float[np.ndarray, "N c"]
    spatial: Float[np.ndarray, "N s"] | None = None
    probabilities: Float[np.ndarray, "N k"] | None = None


def inception_score(probabilities: Float[np.ndarray, "N k"], split: int = 5000) -> tuple[float, float]:
    """exp(mean KL(p(y|x) || p(y))) (Salimans et al. 2016): mean and standard deviation over consecutive splits of
    `split` images, as in the ADM evaluator; a shorter remainder counts as a split."""
    scores = []
    for first in range(0, len(probabilities), split):
        part = probabilities[first : first + split].astype(np.float64)
        marginal = part.mean(axis=0, keepdims=True)
        divergence = np.where(part > 0, part * (np.log(part.clip(min=1e-300)) - np.log(marginal.clip(min=1e-300))), 0.0)
        scores.append(float(np.exp(divergence.sum(axis=1).mean())))
    return float(np.mean(scores)), float(np.std(scores))


def kernel_distance(
    a: Float[np.ndarray, "N c"], b: Float[np.ndarray, "M c"], subset: int = 1000, num_subsets: int = 100, seed: int = 0
) -> tuple[float, float]:
    """KID (Binkowski et al. 2018): unbiased squared MMD with the kernel (x.y / c + 1)^3, mean and standard deviation
    over random subsets of the size of the smaller set, at most `subset`.
    """
    random = np.random.default_rng(seed)
    size = min(subset, len(a), len(b))
    if size < 2:
        raise ValueError(f"a kernel distance needs at least 2 images, not {size}")
    found = []
    for _ in range(num_subsets):
        x = a[random.choice(len(a), size, replace=False)].astype(np.float64)
        y = b[random.choice(len(b), size, replace=False)].astype(np.float64)
        xx, yy, xy = ((p @ q.T / a.shape[1] + 1) ** 3 for p, q in ((x, x), (y, y), (x, y)))
        within = (xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)) / (size * (size - 1))
        found.append(within - 2 * xy.mean())
    return float(np.mean(found)), float(np.std(found))


def precision_recall(
    real: Float[np.ndarray, "N c"], made: Float[np.ndarray, "M c"], k: int = 3, chunk: int = 2048
) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019), in [0, 1]: the fraction of generated images within the
    radius of a real one, and vice versa. The radius of an image is the distance to its k-th nearest neighbor in its own
    set."""
    if min(len(real), len(made)) <= k:
        raise ValueError(f"precision and recall with k={k} need more than {k} images in each set")
    a, b = torch.from_numpy(real.astype(np.float32)), torch.from_numpy(made.astype(np.float32))
    return share_within(b, a, radii(a, k, chunk), chunk), share_within(a, b, radii(b, k, chunk), chunk)


def density_coverage(
    real: Float[np.ndarray, "N c"], made: Float[np.ndarray, "M c"], k: int = 5, chunk: int = 2048
) -> tuple[float, float]:
    """Density and coverage (Naeem et al. 2020), where the radius of a real image is the distance to its k-th nearest
    neighbor. Density: the mean number of real images within whose radius a generated one lies, divided by k; 1 on average
    for images of the same distribution. Coverage, in [0, 1]: the fraction of real images with a generated one within their radius."""
    if len(real) <= k or not len(made):
        raise ValueError(f"density and coverage with k={k} need more than {k} real images and a generated one")
    a, b = torch.from_numpy(real.astype(np.float32)), torch.from_numpy(made.astype(np.float32))
    reach = radii(a, k, chunk)
    hits = torch.zeros(len(a))
    for rows in b.split(chunk):
        hits += (torch.cdist(rows, a, compute_mode="donot_use_mm_for_euclid_dist") <= reach).sum(dim=0)
    return float(hits.sum() / (k * len(b))), float((hits > 0).float().mean())


def radii(x: torch.Tensor, k: int, chunk: int) -> torch.Tensor:
    """Distance of each row to its k-th nearest other row (N)."""
    parts = [torch.cdist(rows, x, compute_mode="donot_use_mm_for_euclid_dist") for rows in x.split(chunk)]
    return torch.cat([part.topk(k + 1, dim=1, largest=False).values[:, -1] for part in parts])  # the nearest is itself


def share_within(x: torch.Tensor, centers: torch.Tensor, reach: torch.Tensor, chunk: int) -> float:
    """Fraction of the rows of x that are within the radius `reach` of some center."""
    hits = [
        (torch.cdist(rows, centers, compute_mode="donot_use_mm_for_euclid_dist") <= reach).any(dim=1)
        for rows in x.split(chunk)
    ]
    return float(torch.cat(hits).float().mean())


def scores(made: Features, real: Features, seed: int = 0) -> dict[str, float]:
    """All scores that the features allow: `frechet_distance`, `spatial_frechet_distance`, `inception_score`,
    `kernel_distance`, `precision`, `recall`, `density`, `coverage`, and standard deviations as `.../std`."""
    found = {"frechet_distance": frechet_distance(statistics(made.pooled), statistics(real.pooled))}
    if made.spatial is not None and real.spatial is not None:
        found["spatial_frechet_distance"] = frechet_distance(statistics(made.spatial), statistics(real.spatial))
    if made.probabilities is not None:
        found["inception_score"], found["inception_score/std"] = inception_score(made.probabilities)
    found["kernel_distance"], found["kernel_distance/std"] = kernel_distance(made.pooled, real.pooled, seed=seed)
    found["precision"], found["recall"] = precision_recall(real.pooled, made.pooled)
    found["density"], found["coverage"] = density_coverage(real.pooled, made.pooled)
    return found
