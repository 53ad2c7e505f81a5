"""Scores of generated images: the mathematics against independent references; names and protocols that cannot mislead."""

from collections import defaultdict

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
    half_sample_intervals,
    inception_score,
    kernel_distance,
    precision_recall,
    resampled_distances,
    scores,
    squared_mmd,
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


def point_scores(made, real):
    found = {"kernel_distance": squared_mmd(made.pooled, real.pooled)}
    found |= zip(("precision", "recall"), precision_recall(real.pooled, made.pooled), strict=True)
    found |= zip(("density", "coverage"), density_coverage(real.pooled, made.pooled), strict=True)
    return {**found, "inception_score": inception_score(made.probabilities)[0]}


def interval(made, real, seed=0):
    return frechet_interval(
        frechet_distance(statistics(made), statistics(real)), resampled_distances(made, real, 60, seed)
    )


def test_the_interval_of_a_distance_contains_the_true_one_as_often_as_it_says():
    """Two Gaussians whose distance is known: |m|^2 + sum (1 - s)^2. In 200 repetitions, 95 % gives 180 to 199."""
    random, sigma, mean = np.random.default_rng(0), np.linspace(0.6, 1.4, 6), np.full(6, 0.2)
    truth, hits, widths = float(np.square(mean).sum() + np.square(1 - sigma).sum()), 0, []
    for repeat in range(200):
        real, made = random.standard_normal((300, 6)), mean + sigma * random.standard_normal((250, 6))
        low, high = interval(made, real, seed=repeat)
        hits += low <= truth <= high
        widths.append(high - low)
    assert 180 <= hits <= 199
    assert np.mean(widths) < truth, "and it is not merely wide"


def test_the_interval_of_equal_distributions_begins_near_zero():
    random = np.random.default_rng(0)
    low, high = interval(random.standard_normal((400, 6)), random.standard_normal((400, 6)))
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
    found, reasons = scores(few, many, resampled=resampled_distances(few.pooled, many.pooled, 5), half_samples=5)
    assert {"frechet_distance", "frechet_distance/low", "kernel_distance", "density", "coverage"} <= found.keys()
    assert not {"precision", "recall", "frechet_distance_infinity"} & found.keys()
    assert any("precision and recall" in reason for reason in reasons) and any("at least 40" in r for r in reasons)
    found, reasons = scores(Features(MADE[:1].astype(np.float32)), many)
    assert set(found) == {"density", "coverage"} and any("not 1" in reason for reason in reasons)
    assert scores(Features(MADE), many)[1] == []


def test_intervals_contain_the_expected_scores_as_often_as_they_say():
    """The expectation of each score over sets of these sizes, from 400 other sets, is inside the intervals of 40 sets."""
    random = np.random.default_rng(0)

    def draw():
        real, made = random.standard_normal((120, 3)), 0.3 + 0.8 * random.standard_normal((100, 3))
        weights = np.exp(2 * made)
        return Features(made, probabilities=weights / weights.sum(axis=1, keepdims=True)), Features(real)

    names = ("kernel_distance", "inception_score", "precision", "recall", "density", "coverage")
    expected = {name: 0.0 for name in names}
    for _ in range(100):
        made, real = draw()
        found = point_scores(made, real)
        expected = {name: value + found[name] / 100 for name, value in expected.items()}
    hits, widths = dict.fromkeys(names, 0), dict.fromkeys(names, 0.0)
    for repeat in range(40):
        made, real = draw()
        measured = point_scores(made, real)
        found = half_sample_intervals(made, real, measured, 30, seed=repeat)
        assert set(found) == {f"{name}/{end}" for name in names for end in ("low", "high")}
        for name in names:
            hits[name] += found[f"{name}/low"] <= expected[name] <= found[f"{name}/high"]
            widths[name] += (found[f"{name}/high"] - found[f"{name}/low"]) / 40
    assert all(hit >= 33 for hit in hits.values()), hits
    spread = {name: widths[name] for name in ("precision", "recall", "coverage")}
    assert all(0.02 < width < 0.4 for width in spread.values()), spread


def test_intervals_of_unequal_sets_are_as_wide_as_the_scores_vary():
    random = np.random.default_rng(0)

    def draw():
        return Features(0.3 + random.standard_normal((40, 4))), Features(random.standard_normal((400, 4)))

    sets = [draw() for _ in range(60)]
    true = np.std([squared_mmd(made.pooled, real.pooled) for made, real in sets])
    ends = [
        half_sample_intervals(made, real, defaultdict(float), 20, seed=i) for i, (made, real) in enumerate(sets[:15])
    ]
    estimated = np.mean([found["kernel_distance/high"] - found["kernel_distance/low"] for found in ends]) / (2 * 1.96)
    assert 0.75 < estimated / true < 1.3, estimated / true


def test_half_samples_have_no_image_twice(monkeypatch):
    """An image and its copy are nearest neighbors at distance 0, which would shrink every radius."""
    seen = []
    monkeypatch.setattr("varlab.evaluation.generation_metrics.squared_mmd", lambda a, b: seen.append((a, b)) or 0.0)
    half_sample_intervals(Features(MADE), Features(REAL), defaultdict(float), 3)
    assert len(seen) == 3
    for a, b in seen:
        assert (
            len(np.unique(a, axis=0)) == len(a) == len(MADE) // 2
            and len(np.unique(b, axis=0)) == len(b) == len(REAL) // 2
        )


def test_intervals_stay_in_the_range_of_their_scores_and_are_left_out_for_many_images(monkeypatch):
    same = Features(np.random.default_rng(0).standard_normal((40, 2)))
    found, _ = scores(same, same, half_samples=20)
    assert found["precision/high"] == 1.0 and found["precision/low"] < 1.0 and found["density/low"] >= 0
    monkeypatch.setattr("varlab.evaluation.generation_metrics.MOST_IMAGES", 79)
    assert not any("/low" in key for key in scores(same, same, half_samples=20)[0])


def test_radii_of_a_set_are_computed_once(monkeypatch):
    monkeypatch.setattr("varlab.evaluation.generation_metrics.RADII", {})
    calls, real = [], torch.cdist
    monkeypatch.setattr("torch.cdist", lambda a, b, **how: calls.append(len(b)) or real(a, b, **how))
    a, b = Features(MADE), Features(REAL)
    first = scores(a, b)[0]
    assert calls.count(len(REAL)) == 3  # radii of the real images, and both sets against each other
    again = scores(a, b, half_samples=2)[0]
    assert {key: again[key] for key in first} == first
    assert (
        scores(b, b)[0]["precision"] == 1.0 and scores(Features(MADE + 1), b)[0]["precision"] < first["precision"] + 1
    )
    before = len(calls)
    scores(a, b)
    assert len(calls) - before == 3, "neither set's own radii are computed again"
