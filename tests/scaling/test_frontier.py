"""The frontier of loss against compute, and IsoFLOP profiles."""

import numpy as np
import pytest
from support.scaling_runs import make_row, sizes

from varlab.cost.flops import parameter_counts
from varlab.scaling.frontier import budgets, candidates, frontier, isoflop, spread_of_minimum


def test_the_frontier_is_what_nothing_beats_with_less_compute():
    assert frontier([1, 2, 3, 4, 2.5], [5, 6, 4, 4.5, 5]) == [0, 2]


def test_curves_count_where_the_rate_is_constant_and_past_the_warm_up():
    row = {
        "run_id": "a",
        "depth": 1,
        "flops_exact": 10,
        "images_seen": 10,
        "val_loss": 3.0,
        "warmup": 2,
        "schedule": "constant",
    }
    curve = [
        {"run_id": "a", "images": images, "flops_exact": images, "val_loss": 9.0 - images / 2} for images in (1, 4, 8)
    ]
    assert [p["flops_exact"] for p in candidates([row], curve)] == [10, 4, 8]
    assert [p["flops_exact"] for p in candidates([{**row, "schedule": "lin0"}], curve)] == [10]


def iso_rows(optimum, budgets=(1e15, 4e15, 16e15), depths=(2, 3, 4, 5, 6, 8, 10)):
    """Parabolas in ln N whose minimum lies at `optimum` times C^0.5."""
    return [
        make_row(depth, name=f"{depth}-{compute:g}", flops_exact=compute, images_seen=compute / depth**3,
                 val_loss=3 + 0.05 * np.log(size / (optimum * compute**0.5)) ** 2)
        for compute in budgets for depth in depths for size in [parameter_counts(sizes(depth))["params_main"]]
    ]  # fmt: skip


def test_parabolas_find_the_best_size_and_its_power_of_compute():
    found = isoflop(iso_rows(0.15), bootstraps=0)
    assert len(found.parabolas) == 3 and not found.refused
    for parabola in found.parabolas:
        assert parabola.best == pytest.approx(0.15 * parabola.compute**0.5, rel=0.01)
        assert np.polyval(parabola.coefficients, np.log(parabola.best)) == pytest.approx(3, abs=1e-6)
    assert found.size_law.alpha == pytest.approx(-0.5, abs=0.01)


def test_a_minimum_at_the_edge_is_refused():
    found = isoflop(iso_rows(100.0), bootstraps=0)
    assert not found.parabolas and "the minimum is at the largest of 7 sizes" in found.refused[0]
    smallest = isoflop(iso_rows(1e-4), bootstraps=0)
    assert not smallest.parabolas and "the minimum is at the smallest of 7 sizes" in smallest.refused[0]


def test_three_points_on_each_side_of_the_minimum_count():
    found = isoflop(iso_rows(0.15, budgets=(1e15,), depths=(1, 2, 3, 4, 5, 6, 8, 10, 12, 14)), bootstraps=0)
    [parabola] = found.parabolas
    depths = sorted(row["depth"] for row in parabola.rows)
    lowest = min(parabola.rows, key=lambda row: row["val_loss"])["depth"]
    every = [1, 2, 3, 4, 5, 6, 8, 10, 12, 14]
    at = every.index(lowest)
    assert at >= 3 and depths == every[at - 3 : at + 4]


def test_budgets_within_a_tenth_are_one():
    rows = [make_row(depth, flops_exact=1e15 * factor) for depth, factor in ((1, 1.0), (2, 1.05), (3, 1.10))]
    assert [len(group) for group in budgets(rows)] == [3]
    rows.append(make_row(4, flops_exact=1e15 * 1.11))
    assert [len(group) for group in budgets(rows)] == [3]


def test_the_error_of_a_minimum_is_that_of_repeated_draws():
    """Standard deviation of the fitted minimum over 2,000 noisy copies of one parabola."""
    rng, x = np.random.default_rng(0), np.array([-2.0, -1, 0, 1, 2, 3])
    minima, errors = [], []
    for _ in range(2000):
        y = 0.5 * (x - 0.3) ** 2 + rng.normal(0, 0.05, len(x))
        a, b, c = np.polyfit(x, y, 2)
        minima.append(-b / (2 * a))
        errors.append(spread_of_minimum(x, y, (a, b, c)) ** 2)
    assert np.sqrt(np.mean(errors)) == pytest.approx(np.std(minima), rel=0.05)
    assert np.isnan(spread_of_minimum(x[:3], x[:3] ** 2, (1.0, 0.0, 0.0)))
    assert spread_of_minimum(x[:4], x[:4] ** 2 + np.array([0.1, -0.1, -0.1, 0.1]), (1.0, 0.0, 0.0)) > 0
