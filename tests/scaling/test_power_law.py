"""Power laws and their intervals."""

import numpy as np
import pytest

from varlab.scaling.power_law import fit, t_correction


def test_the_interval_of_an_exponent_covers_it_at_four_sizes():
    """Without the factor t / 1.96 it would cover 79 %, not about 93 %."""
    rng, x, covered = np.random.default_rng(0), np.array([1e6, 3e6, 1e7, 3e7]), []
    for _ in range(300):
        y = 10 * x**-0.1 * np.exp(rng.normal(0, 0.01, 4))
        low, high = fit(x, y, bootstraps=200).alpha_interval
        covered.append(low <= 0.1 <= high)
    assert 0.88 < np.mean(covered) < 0.98


def test_the_correction_is_t_over_z():
    assert t_correction(2) == pytest.approx(4.3027 / 1.96, rel=1e-4)
    assert t_correction(10**6) == pytest.approx(1, abs=1e-4)


def test_an_exact_law_is_found():
    x = np.array([1e6, 3e6, 1e7, 3e7, 1e8])
    law = fit(x, 1.5 + (x / 1e5) ** -0.3, floor=None, bootstraps=0)
    assert law.alpha == pytest.approx(0.3, rel=0.01) and law.floor == pytest.approx(1.5, rel=0.01)
    assert law(2e7) == pytest.approx(1.5 + 200**-0.3, rel=1e-3)
