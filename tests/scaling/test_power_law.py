"""Power laws and their intervals."""

import numpy as np
import pytest

from varlab.scaling.power_law import PowerLaw, exponents_by_floor, fit, t_correction


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


SIZES = np.array([2.0, 3, 4, 6, 8, 10, 12, 16]) ** 3 * 73728


def truth(sizes, alpha=0.2, floor=5.0, scale=1e9):
    return floor + (scale / sizes) ** alpha


@pytest.mark.parametrize(("floor", "given"), [(5.0, 5.0), (5.0, None), (0.0, 0.0), (0.0, None)])
def test_exact_points_give_back_their_law(floor, given):
    law = fit(SIZES, truth(SIZES, floor=floor), floor=given, bootstraps=0)
    assert law.alpha == pytest.approx(0.2, abs=2e-3)
    assert law.floor == pytest.approx(floor, abs=0.02)
    assert law(1e9) == pytest.approx(floor + 1, abs=5e-3)
    assert law.r == pytest.approx(-1, abs=1e-4)


def test_a_wrong_floor_changes_the_exponent_and_hardly_the_correlation():
    low, right, high = (fit(SIZES, truth(SIZES), floor=floor, bootstraps=0) for floor in (4.5, 5.0, 5.3))
    assert low.alpha < 0.17 < right.alpha < 0.22 < high.alpha
    assert min(abs(law.r) for law in (low, right, high)) > 0.99


def test_the_interval_covers_the_truth_as_often_as_it_says():
    covered, rng = 0, np.random.default_rng(0)
    xs = np.repeat(SIZES, 2)
    for draw in range(200):
        ys = 5 + (truth(xs) - 5) * np.exp(rng.normal(0, 0.02, len(xs)))
        low, high = fit(xs, ys, floor=5.0, bootstraps=200, seed=draw).alpha_interval
        covered += low <= 0.2 <= high
    assert 180 <= covered <= 198


def test_few_sizes_give_no_interval_and_too_few_no_fit():
    assert fit(SIZES[:3], truth(SIZES[:3]), floor=5.0).alpha_interval is None
    with pytest.raises(ValueError, match="needs more than 2 different sizes"):
        fit(SIZES[:2], truth(SIZES[:2]), floor=None)
    with pytest.raises(ValueError, match=r"floor=9.0 is not below all values"):
        fit(SIZES, truth(SIZES), floor=9.0)
    assert fit([0.25, 0.5, 1.0], [4.0, 2.0, 1.0]).alpha == pytest.approx(1.0)
    with pytest.raises(ValueError, match="sizes must be positive"):
        fit([0.0, 1.0, 2.0], [3.0, 2.0, 1.5])
    with pytest.raises(ValueError, match="diverged"):
        fit(SIZES, np.where(SIZES > 1e7, np.nan, 5.5), floor=None)


def test_the_profile_of_the_floor_passes_through_the_truth():
    profile = exponents_by_floor(SIZES, truth(SIZES))
    floors, exponents, correlations = zip(*profile, strict=True)
    assert floors[0] == 0 and floors[-1] == pytest.approx(truth(SIZES).min() - 0.02 * np.ptp(truth(SIZES)))
    assert np.interp(5.0, floors, exponents) == pytest.approx(0.2, abs=5e-3)
    assert list(exponents) == sorted(exponents) and max(correlations[:-4]) < -0.98


def test_a_prediction_holds_what_a_further_run_gives():
    """Fits of eight sizes, twice each; the interval for the next size holds a new run's loss as often as it says."""
    held, rng = 0, np.random.default_rng(1)
    xs = np.repeat(SIZES, 2)
    for draw in range(200):
        ys = 5 + (truth(xs) - 5) * np.exp(rng.normal(0, 0.02, len(xs)))
        low, high = fit(xs, ys, floor=5.0, bootstraps=100, seed=draw).interval(3e9, seed=draw)
        held += low <= 5 + (truth(3e9) - 5) * np.exp(rng.normal(0, 0.02)) <= high
    assert 180 <= held <= 199


@pytest.mark.parametrize(("floor", "parameters"), [(0.0, 2), (1.0, 3)])
def test_a_prediction_interval_is_widened_by_the_degrees_of_freedom(floor, parameters):
    resamples = np.array([(0.2, np.log(1e6) + shift, floor) for shift in np.linspace(-1, 1, 101)])
    law = PowerLaw(0.2, np.log(1e6), floor, -1.0, None, 5, noise=0.0, num_points=5, resamples=resamples)
    low, high = np.quantile(floor + np.exp(0.2 * (resamples[:, 1] - np.log(1e8))), (0.025, 0.975))
    center, factor = float(law(1e8)), t_correction(5 - parameters)
    assert law.interval(1e8) == pytest.approx((center + (low - center) * factor, center + (high - center) * factor))
