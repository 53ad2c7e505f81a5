"""Scores of generated images from the features of a frozen network: Frechet distances, Inception score, kernel
distance, precision, recall, density and coverage. Pure math: the caller reports the network, the images and their number
with each score.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float

from varlab.evaluation.frechet import FeatureStatistics, frechet_distance, statistics

NEIGHBORS, MOST_RADII = 5, 20
RADII: dict[tuple[str, int], torch.Tensor] = {}  # by content of the set and number of the neighbor
MOST_IMAGES = 20_000  # whose distances are computed again for an interval


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
        x, y = (z[random.choice(len(z), size, replace=False)] for z in (a, b))
        found.append(squared_mmd(x, y))
    return float(np.mean(found)), float(np.std(found))


def squared_mmd(a: Float[np.ndarray, "N c"], b: Float[np.ndarray, "M c"]) -> float:
    """Unbiased squared maximum mean discrepancy with the kernel (x.y / c + 1)^3."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    xx, yy, xy = ((p @ q.T / a.shape[1] + 1) ** 3 for p, q in ((x, x), (y, y), (x, y)))
    within = [(k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in (xx, yy)]
    return float(sum(within) - 2 * xy.mean())


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
    """Distance of each row to its k-th nearest other row (N). Kept for the last few sets: of real images they are needed again
    for each score, for the floor, and for each point of a grid."""
    key = (hashlib.sha256(x.numpy().tobytes()).hexdigest(), k)
    if key not in RADII:
        most = min(max(k, NEIGHBORS), len(x) - 1)
        parts = [
            torch.cdist(rows, x, compute_mode="donot_use_mm_for_euclid_dist")
            .topk(most + 1, dim=1, largest=False)
            .values
            for rows in x.split(chunk)
        ]
        found = torch.cat(parts)
        while len(RADII) >= MOST_RADII:
            RADII.pop(next(iter(RADII)))
        RADII.update({(key[0], n): found[:, n].clone() for n in range(1, most + 1)})  # number 0 is the row itself
    return RADII[key]


def share_within(x: torch.Tensor, centers: torch.Tensor, reach: torch.Tensor, chunk: int) -> float:
    """Fraction of the rows of x that are within the radius `reach` of some center."""
    hits = [
        (torch.cdist(rows, centers, compute_mode="donot_use_mm_for_euclid_dist") <= reach).any(dim=1)
        for rows in x.split(chunk)
    ]
    return float(torch.cat(hits).float().mean())


def frechet_infinity(
    made: Float[np.ndarray, "N c"], real: FeatureStatistics, seed: int = 0, num_sizes: int = 10
) -> float:
    """The Frechet distance of infinitely many generated images to real ones of these statistics (Chong & Forsyth 2020): distances of
    random subsets of N/4 to N images, extrapolated along a line in 1/N. Raises ValueError for fewer than 40 images."""
    if len(made) < 40:
        raise ValueError(f"the distance at infinite sample size needs at least 40 images, not {len(made)}")
    random = np.random.default_rng(seed)
    sizes = np.linspace(len(made) / 4, len(made), num_sizes).round().astype(int)
    found = [frechet_distance(statistics(made[random.choice(len(made), n, replace=False)]), real) for n in sizes]
    return float(np.polyfit(1 / sizes, found, 1)[1])


def resampled_distances(
    made: Float[np.ndarray, "N c"], real: Float[np.ndarray, "M c"], repeats: int, seed: int = 0
) -> list[float]:
    """Frechet distances of both sets resampled with replacement; none for fewer than two images. Repetition r draws the same
    images for all sets of the same sizes, so that the distances of two settings can be compared pair by pair."""
    random = np.random.default_rng(seed)
    if min(len(made), len(real)) < 2:
        return []
    return [
        frechet_distance(*(statistics(x[random.integers(len(x), size=len(x))]) for x in (made, real)))
        for _ in range(repeats)
    ]


def frechet_interval(measured: float, resampled: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the Frechet distance between two distributions, from the measured one and `resampled_distances`.

    A resampled distance exceeds the measured one about as much as that exceeds the true one, so the center lies below the
    measured distance, which few images bias upward. The interval is symmetric for the root of this squared distance, whose spread
    does not depend on its size, or for the distance itself where it is near 0.
    """
    center, half = 2 * measured - float(np.mean(resampled)), 1.96 * float(np.std(resampled, ddof=1))
    if center <= half:
        return max(center - half, 0.0), max(center + half, 0.0)
    root = center**0.5
    return (root - half / (2 * root)) ** 2, (root + half / (2 * root)) ** 2


def half_sample_intervals(
    made: Features, real: Features, measured: dict[str, float], repeats: int, seed: int = 0
) -> dict[str, float]:
    """95 % intervals `.../low` and `.../high` of all scores but Frechet distances, over other images of both distributions
    in the same numbers.

    Half of each set, drawn without replacement, spreads a mean over images as much as new sets of full size do; resampling
    with replacement would not do, as an image and its copy are nearest neighbors at distance 0.
    """
    random = np.random.default_rng(seed)

    def half(features: Features) -> Features:
        rows = random.choice(len(features.pooled), len(features.pooled) // 2, replace=False)
        parts = (features.pooled, features.spatial, features.probabilities)
        return Features(*(None if part is None else part[rows] for part in parts))  # pyright: ignore[reportArgumentType]

    ranges = {"kernel_distance": (-np.inf, np.inf), "inception_score": (1.0, np.inf), "density": (0.0, np.inf)}
    drawn: dict[str, list[float]] = {}
    kept = dict(RADII)
    for _ in range(repeats):
        a, b = half(made), half(real)
        found = {
            "kernel_distance": squared_mmd(a.pooled, b.pooled),
            **dict(zip(("precision", "recall"), precision_recall(b.pooled, a.pooled), strict=True)),
            **dict(zip(("density", "coverage"), density_coverage(b.pooled, a.pooled), strict=True)),
        }
        if a.probabilities is not None:
            found["inception_score"] = inception_score(a.probabilities)[0]
        for name, value in found.items():
            drawn.setdefault(name, []).append(value)
    RADII.clear()
    RADII.update(kept)  # those of the halves are not needed again
    ends: dict[str, float] = {}
    for name, values in drawn.items():
        (lowest, highest), half_width = ranges.get(name, (0.0, 1.0)), 1.96 * float(np.std(values, ddof=1))
        ends[f"{name}/low"] = max(measured[name] - half_width, lowest)
        ends[f"{name}/high"] = min(measured[name] + half_width, highest)
    return ends


def scores(
    made: Features, real: Features, seed: int = 0, resampled: Sequence[float] = (), half_samples: int = 0
) -> tuple[dict[str, float], list[str]]:
    """(scores that the features allow, reasons for those that are missing): `frechet_distance`, `frechet_distance_infinity`,
    `spatial_frechet_distance`, `inception_score`, `kernel_distance`, `precision`, `recall`, `density`, `coverage`, and
    standard deviations `.../std`. Also the ends `.../low` and `.../high` of 95 % intervals: of the Frechet distance from
    `resampled_distances`, of the other scores from so many `half_samples`, for at most 20,000 images together."""
    found: dict[str, float] = {}
    reasons: list[str] = []

    def add(compute: Callable[[], tuple[float, ...]], *names: str) -> None:
        try:
            found.update(zip(names, compute(), strict=True))
        except ValueError as error:
            reasons.append(str(error))

    a, b = made.pooled, real.pooled
    add(lambda: (frechet_distance(statistics(a), statistics(b)),), "frechet_distance")
    if len(resampled) > 1:
        ends = frechet_interval(found["frechet_distance"], resampled)
        found |= zip(("frechet_distance/low", "frechet_distance/high"), ends, strict=True)
    add(lambda: (frechet_infinity(a, statistics(b), seed),), "frechet_distance_infinity")
    if (x := made.spatial) is not None and (y := real.spatial) is not None:
        add(lambda: (frechet_distance(statistics(x), statistics(y)),), "spatial_frechet_distance")
    if (probabilities := made.probabilities) is not None:
        add(lambda: inception_score(probabilities), "inception_score", "inception_score/std")
    add(lambda: kernel_distance(a, b, seed=seed), "kernel_distance", "kernel_distance/std")
    add(lambda: precision_recall(b, a), "precision", "recall")
    add(lambda: density_coverage(b, a), "density", "coverage")
    if half_samples > 1 and len(a) + len(b) <= MOST_IMAGES and min(len(a), len(b)) // 2 > 5:
        found |= half_sample_intervals(made, real, found, half_samples, seed)
    return found, reasons
