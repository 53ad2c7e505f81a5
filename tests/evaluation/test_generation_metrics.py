"""Scores of generated images: the mathematics against independent references; names and protocols that cannot mislead."""

import numpy as np
import pytest
import torch
from support.features import MADE, RANDOM, REAL, Given, through
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from varlab.evaluation.frechet import frechet_distance, statistics
from varlab.evaluation.generation_metrics import (
    Features,
    density_coverage,
    frechet_infinity,
    frechet_interval,
    inception_score,
    kernel_distance,
    precision_recall,
    scores,
)


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


def test_the_interval_of_a_distance_contains_the_true_one_as_often_as_it_says():
    """Two Gaussians whose distance is known: |m|^2 + sum (1 - s)^2. In 200 repetitions, 95 % gives 180 to 199."""
    random, sigma, mean = np.random.default_rng(0), np.linspace(0.6, 1.4, 6), np.full(6, 0.2)
    truth, hits, widths = float(np.square(mean).sum() + np.square(1 - sigma).sum()), 0, []
    for repeat in range(200):
        real, made = random.standard_normal((300, 6)), mean + sigma * random.standard_normal((250, 6))
        low, high = frechet_interval(made, real, 60, seed=repeat)
        hits += low <= truth <= high
        widths.append(high - low)
    assert 180 <= hits <= 199
    assert np.mean(widths) < truth, "and it is not merely wide"


def test_the_interval_of_equal_distributions_begins_near_zero():
    random = np.random.default_rng(0)
    low, high = frechet_interval(random.standard_normal((400, 6)), random.standard_normal((400, 6)), 60)
    assert low == 0 < high < 0.2


def test_the_distance_at_infinite_sample_size_has_no_bias_of_the_number_of_samples():
    random, real = np.random.default_rng(0), np.random.default_rng(1).standard_normal((20_000, 8))
    plain, infinite = [], []
    for repeat in range(20):
        made = random.standard_normal((200, 8))
        plain.append(frechet_distance(statistics(made), statistics(real)))
        infinite.append(frechet_infinity(made, statistics(real), seed=repeat))
    assert np.mean(plain) > 0.1, "200 images of the same distribution seem to differ"
    assert abs(np.mean(infinite)) < 0.3 * np.mean(plain)
    with pytest.raises(ValueError, match="at least 40 images, not 39"):
        frechet_infinity(made[:39], statistics(real))


def test_few_images_give_the_scores_that_they_allow():
    few, many = Features(MADE[:3].astype(np.float32)), Features(REAL.astype(np.float32))
    found, reasons = scores(few, many, bootstraps=5)
    assert {"frechet_distance", "frechet_distance/low", "kernel_distance", "density", "coverage"} <= found.keys()
    assert not {"precision", "recall", "frechet_distance_infinity"} & found.keys()
    assert any("precision and recall" in reason for reason in reasons) and any("at least 40" in r for r in reasons)
    found, reasons = scores(Features(MADE[:1].astype(np.float32)), many)
    assert set(found) == {"density", "coverage"} and any("not 1" in reason for reason in reasons)
    assert scores(Features(MADE), many)[1] == []
