"""Frechet distance between two sets of images in the feature space of a frozen network (Heusel et al. 2017).

It is called FID (or rFID, for reconstructions) only with the Inception of 2015; with other networks it is named after
them.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm


@dataclass(frozen=True)
class FeatureStatistics:
    """Mean and covariance of features, in float64."""

    mean: np.ndarray
    covariance: np.ndarray
    num_images: int


@torch.no_grad()
def features_of(network: nn.Module, batches: Iterable[Tensor], desc: str = "features") -> Float[np.ndarray, "N c"]:
    """Pooled features of batches of images in [-1, 1]."""
    pooled = network.pooled
    return np.concatenate([pooled(images).float().cpu().numpy() for images in tqdm(batches, desc=desc, unit="batch")])  # pyright: ignore[reportCallIssue]


def statistics(features: Float[np.ndarray, "N c"]) -> FeatureStatistics:
    """Mean and covariance. Raises ValueError for fewer than two images."""
    if len(features) < 2:
        raise ValueError(f"a Frechet distance needs at least 2 images, not {len(features)}")
    features = features.astype(np.float64)
    return FeatureStatistics(features.mean(axis=0), np.cov(features, rowvar=False), len(features))


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """|mean_a - mean_b|^2 + trace(C_a + C_b - 2 (C_a C_b)^(1/2)), using only eigenvalues of symmetric matrices."""
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ b.covariance @ root).clip(min=0)).sum()
    gap = np.square(a.mean - b.mean).sum()
    return float(max(gap + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross, 0.0))
