"""Scores of generated images: the mathematics against independent references; names and protocols that cannot mislead."""

import numpy as np
import pytest
import torch
from support.features import MADE, RANDOM, REAL, Given, through
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from varlab.evaluation.generation_metrics import density_coverage, inception_score, kernel_distance, precision_recall


def test_kernel_distance_is_that_of_torchmetrics():
    """With subsets as large as the smaller set, ours and theirs differ in nothing but which real images are left out."""
    expected, _ = through(KernelInceptionDistance(feature=Given(), subsets=300, subset_size=260, normalize=True))
    found, spread = kernel_distance(REAL, MADE, subset=260, num_subsets=300)
    assert found == pytest.approx(float(expected), rel=0.02) and spread > 0
    assert abs(kernel_distance(REAL[:150], REAL[150:], subset=150, num_subsets=1)[0]) < 0.1 * found  # unbiased: about 0


def test_inception_score_is_that_of_torchmetrics_and_of_the_definition():
    logits = 3 * RANDOM.standard_normal((200, 10)).astype(np.float32)
    probabilities = torch.from_numpy(logits).softmax(dim=1).numpy()
    metric = InceptionScore(feature=Given(), splits=1)
    metric.update(torch.from_numpy(logits))
    assert inception_score(probabilities)[0] == pytest.approx(float(metric.compute()[0]), rel=1e-4)
    halves = [inception_score(part)[0] for part in (probabilities[:100], probabilities[100:])]
    assert inception_score(probabilities, split=100) == pytest.approx((np.mean(halves), np.std(halves)))
    assert inception_score(np.full((5, 4), 0.25))[0] == pytest.approx(1.0)
    assert inception_score(np.eye(4).repeat(3, axis=0))[0] == pytest.approx(4.0)


def test_precision_and_recall_against_plain_loops():
    real, made, k = REAL[:40], MADE[:30], 3

    def share(points, centers):
        radius = [sorted(np.linalg.norm(c - o) for o in centers)[k] for c in centers]
        return np.mean([any(np.linalg.norm(p - c) <= r for c, r in zip(centers, radius, strict=True)) for p in points])

    assert precision_recall(real, made, k, chunk=7) == pytest.approx((share(made, real), share(real, made)))
    assert precision_recall(real, real) == (1.0, 1.0)
    assert precision_recall(real, real + 100) == (0.0, 0.0)
    with pytest.raises(ValueError, match="need more than 3 images"):
        precision_recall(real[:3], made)


def test_density_and_coverage_against_plain_loops():
    rng = np.random.default_rng(3)
    real, made, k = rng.standard_normal((40, 5)), 0.5 * rng.standard_normal((25, 5)), 3
    reach = [np.sort([np.linalg.norm(x - y) for y in real])[k] for x in real]
    within = np.array([[np.linalg.norm(x - y) <= r for x, r in zip(real, reach, strict=True)] for y in made])
    expected = within.sum() / (k * len(made)), within.any(axis=0).mean()
    assert density_coverage(real, made, k, chunk=7) == pytest.approx(expected)
    assert density_coverage(real, real + 100) == (0.0, 0.0)
    assert density_coverage(real, real)[1] == 1.0
    with pytest.raises(ValueError, match="more than 5"):
        density_coverage(real[:5], made)
