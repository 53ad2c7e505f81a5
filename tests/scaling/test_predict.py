"""What the fitted laws say about runs that were not made."""

import numpy as np
import pytest
from support.scaling_runs import make_row, sizes, surface

from varlab.cost.flops import parameter_counts, training_flops
from varlab.scaling.analysis import FitSettings, analyse
from varlab.scaling.parametric import CHINCHILLA, evaluate
from varlab.scaling.predict import compare, gradient, next_runs, optimal, predict
from varlab.scaling.runs import Runs

BUDGETS = (5000, 10000, 20000, 40000)


def analysis(noise=0.002, bootstraps=30, **settings):
    rng, rows = np.random.default_rng(0), []
    for depth in (1, 2, 3, 4, 5, 6):
        for images in BUDGETS:
            row = make_row(depth, images)
            rows.append({**row, "val_loss": row["val_loss"] * float(np.exp(rng.normal(0, noise)))})
    return analyse(Runs(rows, [], []), FitSettings(bootstraps=bootstraps, form=CHINCHILLA, **settings))


def test_a_prediction_says_loss_interval_cost_and_how_far_it_reaches():
    found = analysis()
    lines = predict(found, 12, 160000)
    size = parameter_counts(sizes(12))["params_main"]
    value = float(lines[0].split("loss ")[1].split()[0])
    assert value == pytest.approx(surface(size, 160000), rel=0.01)
    low, _, high = lines[0].split("95 %: ")[1].split(")")[0].partition(" to ")
    assert float(low) < value < float(high)
    assert f"{training_flops(sizes(12)) * 160000:.3g} FLOP" in lines[1] and "4 times the most images" in lines[1]
    assert "by L(N)" in predict(found, 12)[0]


def test_the_best_depth_for_a_budget_is_that_of_the_truth():
    compute = 1e15
    lines = optimal(analysis(noise=0.0005), compute)
    losses = {
        depth: surface(parameter_counts(sizes(depth))["params_main"], compute / training_flops(sizes(depth)))
        for depth in range(1, 60)
    }
    best = min(losses, key=losses.get)
    assert abs(int(lines[0].split("depth ")[1].split()[0]) - best) <= 1
    with pytest.raises(ValueError, match="is less than one image"):
        optimal(analysis(), 1.0)


def test_a_run_that_went_wrong_stands_out():
    rows = [make_row(depth, images) for depth in (1, 2, 3, 4, 5, 6) for images in BUDGETS]
    rng = np.random.default_rng(0)
    rows = [{**row, "val_loss": row["val_loss"] * float(np.exp(rng.normal(0, 0.002)))} for row in rows]
    rows[9]["val_loss"] *= 1.05
    found = analyse(Runs(rows, [], []), FitSettings(bootstraps=20, form=CHINCHILLA))
    assert "not as expected" in compare(found, rows[9]["name"])[0]
    others = [compare(found, row["name"])[0] for i, row in enumerate(rows) if i // 4 != 9 // 4]
    assert sum("not as expected" not in line for line in others) >= 0.8 * len(others)
    with pytest.raises(ValueError, match="run='d99' is none of"):
        compare(found, "d99")


def test_where_all_saw_equal_images_a_run_is_compared_by_size_alone():
    rng = np.random.default_rng(0)
    rows = [make_row(depth) for depth in (1, 2, 3, 4, 5, 6, 8)]
    rows = [{**row, "val_loss": row["val_loss"] * float(np.exp(rng.normal(0, 0.002)))} for row in rows]
    rows[4]["val_loss"] *= 1.1
    found = analyse(Runs(rows, [], []), FitSettings(floor=2.0, bootstraps=50))
    line = compare(found, rows[4]["name"])[0]
    assert "L(N) of the others predicts" in line and "not as expected" in line
    with pytest.raises(ValueError, match="needs more than 5 runs"):
        optimal(found, 1e15)


def test_the_next_run_narrows_as_foreseen():
    """Linear theory against the bootstrap: the best candidate is added and the interval measured."""
    found = analysis(bootstraps=0)
    best, *_, worst = next_runs(found, 12, 80000, budget=1e18)
    assert best.narrowing < worst.narrowing <= 1
    law = found.parametric
    size = parameter_counts(sizes(12))["params_main"]
    numeric = []
    for i in range(5):
        step = np.zeros(5)
        step[i] = 1e-6
        numeric.append(float(np.log(evaluate(law.parameters + step, size, 8e4) / law(size, 8e4))) / 1e-6)
    alpha, beta, log_a, log_b, floor = gradient(law, size, 8e4)
    assert (alpha, log_a, beta, log_b, floor) == pytest.approx(numeric, rel=1e-3)
    assert all(candidate.flops <= 1e14 for candidate in next_runs(found, 12, 80000, budget=1e14))
