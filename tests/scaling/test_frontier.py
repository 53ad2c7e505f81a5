"""The frontier of loss against compute, and IsoFLOP profiles."""

import numpy as np
import pytest
from support.coverage import NUM_SIZES, TRUTH, isoflop_grid, noisy, rows_of
from support.scaling_runs import make_row, sizes

from varlab.cost.flops import parameter_counts
from varlab.scaling.frontier import budgets, candidates, error_of_minimum, fit_frontier, frontier, isoflop
from varlab.scaling.parametric import evaluate


def test_the_frontier_is_what_nothing_beats_with_less_compute():
    assert frontier([1, 2, 3, 4, 2.5], [5, 6, 4, 4.5, 5]) == [0, 2]


def test_budgets_that_are_equal_but_for_rounding_are_one():
    """Each alone, the worst run of the largest budget would be on the frontier."""
    compute = [1e15, 1.0001e15, 1.0002e15, 4e15, 4.0001e15]
    assert frontier(compute, [5.2, 5.0, 5.1, 4.6, 4.5]) == [1, 4]
    assert frontier([1e15, 1.2e15], [5.2, 5.0]) == [0, 1]


def curves_grid(num_sizes):
    """Twenty points along the run of each size."""
    size = np.repeat(np.geomspace(1e6, 3e8, num_sizes), 20)
    return size, np.tile(np.geomspace(1e8 / 3000, 1e8, 20), num_sizes), np.repeat(np.arange(num_sizes), 20)


@pytest.mark.parametrize(("num_sizes", "noise"), NUM_SIZES)
@pytest.mark.parametrize("kind", ["isoflop", "curves"])
@pytest.mark.parametrize("floor", [2.0, None])
def test_the_interval_of_a_frontier_holds_the_exponent_that_runs_without_noise_have(kind, num_sizes, noise, floor):
    """Runs of five budgets equal but for rounding, or whole curves; the noise of a run is known from L(N, D)."""
    if kind == "isoflop":
        size, images = isoflop_grid(num_sizes, rounding=1e-3)
        runs = np.arange(len(size))
    else:
        size, images, runs = curves_grid(num_sizes)
    exact, compute = evaluate(TRUTH, size, images), 6 * size * images
    truth = fit_frontier(compute, exact, runs, floor, bootstraps=0).alpha
    held = 0
    for draw in range(60):
        rng = np.random.default_rng(draw)
        loss = exact * np.exp(noise * rng.standard_normal(runs.max() + 1)[runs])
        low, high = fit_frontier(compute, loss, runs, floor, 200, draw, noise).alpha_interval
        held += low <= truth <= high
    assert held >= 52, held


def test_the_draws_correct_for_lucky_runs():
    """Among many sizes the frontier is that of the lucky ones, and the fit is steeper than the truth. Draws that choose it
    once more are three times as far off; mirrored, they are not."""
    size, images, runs = curves_grid(16)
    exact, compute, off = evaluate(TRUTH, size, images), 6 * size * images, []
    truth = fit_frontier(compute, exact, runs, 2.0, bootstraps=0).alpha
    for draw in range(40):
        noise = np.random.default_rng(draw).standard_normal(16)[runs]
        law = fit_frontier(compute, exact * np.exp(0.003 * noise), runs, 2.0, 100, draw, 0.003)
        off.append((law.alpha - truth, np.median(law.draws[:, 0]) - truth))
    fitted, drawn = np.mean(off, axis=0)
    assert fitted > 2e-4 and abs(drawn) < 1.5 * fitted, (fitted, drawn)


def test_the_band_of_a_frontier_without_a_floor_stays_at_its_line():
    """Runs of six sizes on glyphs (experiments/depth_scaling), whose frontier is a power law without a floor: the draws whose
    floor would mirror to one below 0 are not far from the law either."""
    compute = np.array(
        [
            2.58e11,
            5.16e11,
            9.42e11,
            1.03e12,
            1.88e12,
            2.07e12,
            2.42e12,
            3.77e12,
            4.84e12,
            5.06e12,
            7.53e12,
            9.24e12,
            9.68e12,
            1.01e13,
            1.53e13,
            1.85e13,
            1.94e13,
            2.02e13,
            3.06e13,
            3.7e13,
            4.05e13,
            6.13e13,
            7.39e13,
            1.23e14,
        ]
    )
    loss = np.array(
        [
            4.887,
            4.692,
            4.887,
            4.474,
            4.546,
            4.336,
            4.905,
            4.148,
            4.467,
            4.9,
            3.895,
            4.94,
            3.959,
            4.396,
            4.934,
            4.426,
            3.637,
            3.835,
            4.366,
            3.772,
            3.422,
            3.698,
            3.316,
            3.225,
        ]
    )
    law = fit_frontier(compute, loss, np.arange(len(loss)), None, 300)
    span = np.geomspace(compute.min(), compute.max(), 20)
    low, high = law.band(span)
    assert (low < law(span) * 1.001).all() and (high > law(span) * 0.999).all()
    assert (high < 1.1 * law(span)).all() and (low > 0.9 * law(span)).all()


def test_points_of_one_run_share_their_noise():
    """Treated as independent, the points of a curve give a narrower interval."""
    size, images, runs = curves_grid(6)
    loss = noisy(size, images, 0.003, 0, runs)
    together, apart = (fit_frontier(6 * size * images, loss, given, 2.0, 300) for given in (runs, np.arange(len(size))))
    wide, narrow = (np.ptp(law.alpha_interval) for law in (together, apart))
    assert wide > 1.1 * narrow


def test_a_frontier_of_few_runs_has_no_interval():
    size, images, runs = curves_grid(2)
    assert fit_frontier(6 * size * images, noisy(size, images, 0.001, 0), runs, 2.0).alpha_interval is None


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


def test_a_parabola_on_a_wide_grid_is_not_biased():
    """Chinchilla's law at 1e24 FLOP on a grid that reaches 16 times to both sides (arXiv 2603.22339): through all of it, the
    best N would be found 6 % too large, or 13 % if the grid lies off center."""
    truth = np.array([0.34, np.log(406.4), 0.28, np.log(410.7), 1.69, 0.0, 0.0])
    best = (0.34 * 406.4 / (0.28 * 410.7)) ** (1 / 0.62) * (1e24 / 6) ** (0.28 / 0.62)
    for shift in (0.5, 1.0, 2.0):
        size = best * shift * np.geomspace(1 / 16, 16, 9)
        images = 1e24 / (6 * size)
        [parabola] = isoflop(rows_of(size, images, evaluate(truth, size, images)), bootstraps=0).parabolas
        assert parabola.best == pytest.approx(best, rel=0.025), shift


def test_the_window_is_as_wide_for_many_sizes_as_for_few():
    found = isoflop(iso_rows(0.15, budgets=(1e15,), depths=range(1, 15)), bootstraps=0)
    [parabola] = found.parabolas
    sizes = [row["params_main"] for row in parabola.rows]
    assert max(sizes) / parabola.best < 4.2 and parabola.best / min(sizes) < 4.2 and len(sizes) == 4
    sparse = isoflop(iso_rows(0.15, budgets=(1e15,), depths=(1, 2, 4, 8, 16)), bootstraps=0)
    assert len(sparse.parabolas[0].rows) >= 4  # two on each side, even where they are far


@pytest.mark.parametrize(("num_sizes", "noise"), NUM_SIZES[1:])
def test_the_interval_of_a_best_size_holds_it(num_sizes, noise):
    """And that of its power of compute, over budgets of five."""
    size, images = isoflop_grid(num_sizes)
    held, total, exponent, optimum = 0, 0, 0, (0.34 * np.exp(TRUTH[1]) / (0.28 * np.exp(TRUTH[3]))) ** (1 / 0.62)
    for draw in range(100):
        found = isoflop(rows_of(size, images, noisy(size, images, noise, draw)), bootstraps=200)
        for parabola in found.parabolas:
            best = optimum * (parabola.compute / 6) ** (0.28 / 0.62)
            held, total = held + (parabola.interval[0] <= best <= parabola.interval[1]), total + 1
        low, high = found.size_law.alpha_interval
        exponent += low <= -0.28 / 0.62 <= high
    assert 0.89 * total <= held <= 0.99 * total, (held, total)
    assert exponent >= 88


def test_budgets_within_a_tenth_are_one():
    rows = [make_row(depth, flops_exact=1e15 * factor) for depth, factor in ((1, 1.0), (2, 1.05), (3, 1.10))]
    assert [len(group) for group in budgets(rows)] == [3]
    rows.append(make_row(4, flops_exact=1e15 * 1.4))
    assert [len(group) for group in budgets(rows)] == [3]


def test_runs_of_any_compute_are_no_budgets():
    """As many sizes as runs, with compute drawn at random: what lies within a tenth by chance is no IsoFLOP profile."""
    rng = np.random.default_rng(0)
    size, compute = np.exp(rng.uniform(13, 20, 200)), np.exp(rng.uniform(30, 40, 200))
    assert len(budgets(rows_of(size, compute / (6 * size), np.full(200, 3.0)))) <= 1
    size, images = isoflop_grid(6, rounding=5e-3)
    assert [len(group) for group in budgets(rows_of(size, images, np.full(30, 3.0)))] == [6] * 5


def test_losses_within_a_budget_are_moved_to_its_mean_compute():
    """Runs of up to 8 % more compute would seem better by it."""
    size, images = isoflop_grid(7)
    images = images * np.tile(np.linspace(1.0, 1.08, 7), 5)
    loss, compute = evaluate(TRUTH, size, images), 6 * size * images
    law = fit_frontier(compute, loss, np.arange(35), None, bootstraps=0)
    rows = rows_of(size, images, loss)
    moved, not_moved = (isoflop(rows, bootstraps=0, law=given).parabolas for given in (law, None))
    optimum = (0.34 * np.exp(TRUTH[1]) / (0.28 * np.exp(TRUTH[3]))) ** (1 / 0.62)
    errors = [
        [abs(np.log(one.best / (optimum * (one.compute / 6) ** (0.28 / 0.62)))) for one in found]
        for found in (moved, not_moved)
    ]
    assert np.mean(errors[0]) < 0.7 * np.mean(errors[1])


def test_the_error_of_a_minimum_is_that_of_repeated_draws():
    """Standard deviation of the fitted minimum over 2,000 noisy copies of one parabola."""
    rng, x = np.random.default_rng(0), np.array([-2.0, -1, 0, 1, 2, 3])
    minima, errors = [], []
    for _ in range(2000):
        y = 0.5 * (x - 0.3) ** 2 + rng.normal(0, 0.05, len(x))
        a, b, c = np.polyfit(x, y, 2)
        minima.append(-b / (2 * a))
        errors.append((0.05 * error_of_minimum(x, (a, b, c))) ** 2)
    assert np.sqrt(np.mean(errors)) == pytest.approx(np.std(minima), rel=0.05)


def test_three_points_determine_a_parabola_and_say_nothing_of_its_error():
    found = isoflop(iso_rows(0.15, depths=(2, 3, 4)) + iso_rows(0.15, depths=(5, 6, 8)), bootstraps=0)
    rows = [row for row in iso_rows(0.15, budgets=(4e15,)) if row["depth"] in (4, 5, 6)]
    [alone] = isoflop(rows, bootstraps=0).parabolas
    assert alone.interval is None and found.parabolas[0].interval is not None
