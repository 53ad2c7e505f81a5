"""The Frechet distance."""

import numpy as np
import pytest
from scipy.linalg import sqrtm
from support.features import MADE, REAL, Given, through
from torchmetrics.image.fid import FrechetInceptionDistance

from varlab.evaluation import frechet
from varlab.evaluation.frechet import frechet_distance, statistics


def test_frechet_distance_is_that_of_torchmetrics():
    expected = float(through(FrechetInceptionDistance(feature=Given(), normalize=True)))
    assert frechet_distance(statistics(MADE), statistics(REAL)) == pytest.approx(expected, rel=1e-3)


def test_frechet_distance_agrees_with_the_matrix_square_root():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(200, 12)), rng.normal(size=(150, 12)) @ rng.normal(size=(12, 12)) + 0.5
    x, y = frechet.statistics(a), frechet.statistics(b)
    root = sqrtm(x.covariance @ y.covariance).real
    expected = ((x.mean - y.mean) ** 2).sum() + np.trace(x.covariance + y.covariance - 2 * root)
    assert frechet.frechet_distance(x, y) == pytest.approx(expected, rel=1e-9)
    assert frechet.frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    shifted = frechet.statistics(a + 3)
    assert frechet.frechet_distance(x, shifted) == pytest.approx(9 * 12, rel=1e-9)
    with pytest.raises(ValueError, match="needs at least 2 images, not 1"):
        frechet.statistics(a[:1])
