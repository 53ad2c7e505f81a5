"""Power laws and their intervals."""

import numpy as np
import pytest
from support.coverage import NUM_SIZES, share

from varlab.scaling.power_law import exponents_by_floor, fit

SIZES = np.array([2.0, 3, 4, 6, 8, 10, 12, 16]) ** 3 * 73728


def truth(sizes, alpha=0.2, floor=5.0, scale=1e9):
    return floor + (scale / sizes) ** alpha


@pytest.mark.parametrize(("floor", "given"), [(5.0, 5.0), (5.0, None), (0.0, 0.0), (0.0, None)])
def test_exact_points_give_back_their_law(floor, given):
    law = fit(SIZES, truth(SIZES, floor=floor), floor=given, bootstraps=0)
    assert (law.alpha, law.floor) == pytest.approx((0.2, floor), abs=1e-4)
    assert law(1e9) == pytest.approx(floor + 1, abs=1e-4) and law.noise < 1e-6
    assert law.r == pytest.approx(-1, abs=1e-4)


def test_runs_count_by_their_relative_distance():
    """Least squares in ln y: a run that is 1 % off moves the law as much at a large loss as at a small one."""
    x, y = np.array([1.0, 10.0, 100.0]), np.array([100.0, 10.0, 1.0])
    moved = [fit(x, y * (1 + 0.01 * (np.arange(3) == i))).alpha for i in (0, 2)]
    assert moved[0] - 1 == pytest.approx(1 - moved[1], rel=1e-3)


@pytest.mark.parametrize(("num_sizes", "noise"), NUM_SIZES)
@pytest.mark.parametrize("floor", [5.0, None])
def test_intervals_hold_the_truth_as_often_as_they_say(floor, num_sizes, noise):
    """The exponent, and the loss of a further run of the largest size and of sixteen times the largest."""
    xs, rng = np.geomspace(6e5, 3e8, num_sizes), np.random.default_rng(num_sizes)
    held = np.zeros(3)
    for draw in range(200):
        law = fit(xs, truth(xs) * np.exp(rng.normal(0, noise, num_sizes)), floor, bootstraps=200, seed=draw)
        ends = [law.alpha_interval, law.interval(xs[-1], draw), law.interval(16 * xs[-1], draw)]
        further = [truth(factor * xs[-1]) * np.exp(rng.normal(0, noise)) for factor in (1, 16)]
        held += [low <= value <= high for (low, high), value in zip(ends, [0.2, *further], strict=True)]
    assert (held >= 180).all() and (held <= 199).all(), held


def test_a_band_holds_the_law_itself():
    """Narrower than the interval of a further run, and around the fit."""
    xs = np.geomspace(6e5, 3e8, 6)

    def is_held(draw):
        y = truth(xs) * np.exp(np.random.default_rng(draw).normal(0, 0.003, 6))
        low, high = fit(xs, y, 5.0, bootstraps=200, seed=draw).band(1e9)[:, 0]
        return low <= truth(1e9) <= high

    assert 0.9 <= share(200, is_held) <= 0.99
    law = fit(xs, truth(xs) * np.exp(np.random.default_rng(1).normal(0, 0.003, 6)), 5.0)
    (low, high), (lowest, highest) = law.band(1e9)[:, 0], law.interval(1e9)
    assert lowest < low < law(1e9) < high < highest


def test_a_wrong_floor_changes_the_exponent_and_hardly_the_correlation():
    low, right, high = (fit(SIZES, truth(SIZES), floor=floor, bootstraps=0) for floor in (4.5, 5.0, 5.3))
    assert low.alpha < 0.17 < right.alpha < 0.22 < high.alpha
    assert min(abs(law.r) for law in (low, right, high)) > 0.99


def test_few_sizes_give_no_interval_and_too_few_no_fit():
    assert fit(SIZES[:3], truth(SIZES[:3]), floor=5.0).alpha_interval is None
    with pytest.raises(ValueError, match="needs at least 3 different sizes, found 2"):
        fit(SIZES[:2], truth(SIZES[:2]), floor=None)
    with pytest.raises(ValueError, match=r"floor=9.0 is not below all values"):
        fit(SIZES, truth(SIZES), floor=9.0)
    assert fit([0.25, 0.5, 1.0], [4.0, 2.0, 1.0]).alpha == pytest.approx(1.0)
    for sizes, values in (
        ([0.0, 1, 2], [3.0, 2, 1.5]),
        ([1.0, 2, 3], [3.0, -2, 1.5]),
        ([1.0, 2, np.inf], [3.0, 2, 1.5]),
    ):
        with pytest.raises(ValueError, match="must be positive and finite"):
            fit(sizes, values)
    with pytest.raises(ValueError, match="diverged"):
        fit(SIZES, np.where(SIZES > 1e7, np.nan, 5.5), floor=None)


def test_the_profile_of_the_floor_passes_through_the_truth():
    profile = exponents_by_floor(SIZES, truth(SIZES))
    floors, exponents, correlations = zip(*profile, strict=True)
    assert floors[0] == 0 and floors[-1] == pytest.approx(truth(SIZES).min() - 0.02 * np.ptp(truth(SIZES)))
    assert np.interp(5.0, floors, exponents) == pytest.approx(0.2, abs=5e-3)
    assert list(exponents) == sorted(exponents) and max(correlations[:-4]) < -0.98
