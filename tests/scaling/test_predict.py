"""What the fitted laws say about runs that were not made, and where they refuse."""

import numpy as np
import pytest
from support.coverage import NUM_SIZES, TIED, isoflop_grid, noisy, runs_of
from support.scaling_runs import make_row, sizes, surface

from varlab.cost.flops import parameter_counts, training_flops
from varlab.scaling.analysis import FitSettings, analyse
from varlab.scaling.parametric import CHINCHILLA, Form
from varlab.scaling.predict import Limits, answer, compare, contradict, flops_of, next_runs, optimal, optimum, predict
from varlab.scaling.runs import Runs

BUDGETS = (5000, 10000, 20000, 40000)
FAR = Limits(force=True)


def size(depth):
    return float(parameter_counts(sizes(depth))["params_main"])


def analysis(noise=0.002, bootstraps=30, change=None, depths=(1, 2, 3, 4, 5, 6), **settings):
    rng, rows = np.random.default_rng(0), []
    for depth in depths:
        for images in BUDGETS:
            row = make_row(depth, images)
            rows.append({**row, "val_loss": row["val_loss"] * float(np.exp(rng.normal(0, noise)))})
            if change is not None:
                rows[-1] |= change(rows[-1])
    return analyse(
        Runs(rows, [], []), FitSettings(bootstraps=bootstraps, form=settings.pop("form", CHINCHILLA), **settings)
    )


def test_a_prediction_says_loss_interval_cost_and_how_far_it_reaches():
    lines = predict(analysis(), size(12), 160000)
    [told] = [line for line in lines if line.startswith("depth 12 (")]
    value = float(told.split("loss ")[1].split()[0])
    assert value == pytest.approx(surface(size(12), 160000), rel=0.01)
    low, _, high = told.split("95 %: ")[1].split(")")[0].partition(" to ")
    assert float(low) < value < float(high)
    assert f"{training_flops(sizes(12)) * 160000:.3g} FLOP" in lines[-1] and "4 times the most images" in lines[-1]


def test_a_prediction_does_not_jump_where_two_laws_meet():
    """At the images of L(N) and 2 % beyond them the answer is that of L(N, D); L(N) is shown beside it where it is near."""
    found = analysis(noise=0.0005)
    at, beside, far = (predict(found, size(8), 40000 * factor) for factor in (1.0, 1.03, 1.2))
    values = [float(lines[0].split("loss ")[1].split()[0]) for lines in (at, beside, far)]
    assert abs(values[0] - values[1]) < 0.005 and all("by L(N, D)" in lines[0] for lines in (at, beside, far))
    assert "  L(N): " in at[1] and "  L(N): " in beside[1] and "L(N): " not in far[1]


def better_at_the_end(row):
    """The longest runs are 10 % better than the surface of the others says."""
    return {"val_loss": row["val_loss"] * (0.9 if row["images_seen"] == 40000 else 1)}


def test_laws_that_contradict_each_other_give_no_single_number():
    lines = predict(
        analysis(noise=0.0002, change=better_at_the_end, form=Form("tied"), outliers="keep"), size(8), 40000
    )
    assert any("the laws contradict each other, so there is no single answer" in line for line in lines)
    assert {line.split(":")[0] for line in lines if line.startswith("  L(N")} == {"  L(N, D)", "  L(N)"}
    assert not any(" loss " in line and " by L" in line for line in lines)


@pytest.mark.parametrize(
    ("first", "second", "is_doubted", "expected"),
    [((1.0, 2.0), (2.1, 3.0), False, True), ((1.0, 2.0), (1.9, 3.0), False, False), ((1.0, 2.0), (1.9, 3.0), True, True),
     ((1.0, 2.6), (1.4, 3.0), True, False), (None, (1.0, 2.0), True, False)],
)  # fmt: skip
def test_what_contradicts(first, second, is_doubted, expected):
    """Values in the middle of their intervals."""
    given = [("law", 0.0 if ends is None else sum(ends) / 2, ends) for ends in (first, second)]
    assert contradict(*given, is_doubted=is_doubted) is expected


def test_warnings_come_first():
    lines = predict(analysis(), size(60), 9e5)
    assert lines[0].startswith("warning: N ") and "times above the most in the fit" in lines[0]
    assert any(line.startswith("depth 60 (") for line in lines[1:])


def test_images_that_do_not_exist_are_refused_or_discounted():
    """A million different images: two million are no new ones."""
    with pytest.raises(
        ValueError, match=r"no answer: 2,000,001 images are more than the 1,000,000 different ones .*force=true"
    ):
        predict(analysis(), size(6), 2000001)
    assert "worth less" in predict(analysis(), size(6), 2000001, FAR)[0]
    found = analysis(repeated=15.0)
    [line] = [line for line in predict(found, size(6), 4e6) if " loss " in line]
    effective = float(found.surface.law(size(6), 1e6 + 15e6 * (1 - np.exp(-3 / 15))))
    assert f"loss {effective:.4f}" in line


def test_the_best_depth_for_a_budget_is_that_of_the_truth():
    compute = 1e15
    lines = optimal(analysis(noise=0.0005), compute, FAR)
    told = next(line for line in lines if line.startswith("1e+15 FLOP: "))
    losses = {depth: surface(size(depth), compute / training_flops(sizes(depth))) for depth in range(1, 60)}
    best = min(losses, key=losses.get)
    assert abs(int(told.split("depth ")[1].split()[0]) - best) <= 1
    with pytest.raises(ValueError, match="is less than one image"):
        optimal(analysis(), 1.0)


@pytest.mark.parametrize(
    ("compute", "reason"),
    [
        (1e18, r"C 1e\+18 is [\d,.]+ times above the most in the fit"),
        (1e17, "images are more than the 1,000,000 different ones"),
        (3e8, "below the least"),
    ],
)
def test_an_answer_out_of_reach_is_refused(compute, reason):
    """`optimal compute=1e18` of a set of 60,000 images would be a network of depth 1 and billions of images."""
    with pytest.raises(ValueError, match=f"no answer: .*{reason}.*force=true answers all the same"):
        optimal(analysis(noise=0.0005), compute)
    assert optimal(analysis(noise=0.0005), compute, FAR)[0].startswith("warning: ")
    assert optimal(analysis(noise=0.0005), 2e14, Limits(factor=100))[0].startswith("2e+14 FLOP: depth")


@pytest.mark.parametrize(("num_sizes", "noise"), NUM_SIZES)
def test_the_interval_of_the_best_size_holds_it(num_sizes, noise):
    """At ten times the largest budget of the fit."""
    grid, images = isoflop_grid(num_sizes)
    best, held = (1e18 / 6 * 1e6 / 3e5) ** 0.5, 0
    for draw in range(20):
        found = analyse(
            runs_of(grid, images, noisy(grid, images, noise, draw, truth=TIED)),
            FitSettings(bootstraps=200, seed=draw, form=Form("tied")),
            True,
        )
        told = optimum(found, 1e18)
        low, high = told.sizes[list(told.interval)]
        held += low <= best * 1.01 and best <= high * 1.01  # the sizes to choose from are this far apart
    assert held >= 17, held


def test_a_law_that_does_not_fit_answers_nothing():
    found = analysis(change=better_at_the_end, form=Form("tied"), outliers="keep")
    for ask, given in (("optimal", {"compute": 1e13}), ("next", {})):
        with pytest.raises(ValueError, match=r"no answer: L\(N, D\) does not describe these runs"):
            answer(found, ask, given)
        assert answer(found, ask, given, FAR)[0].startswith("warning: L(N, D) does not describe")
    assert answer(found, "predict", {"depth": 4, "images": 30000})[0].startswith("warning: L(N, D) does not")


def test_a_run_that_went_wrong_stands_out():
    """Though it is left out of the fits."""
    rng, rows = (
        np.random.default_rng(0),
        [make_row(depth, images) for depth in (1, 2, 3, 4, 5, 6) for images in BUDGETS],
    )
    rows = [{**row, "val_loss": row["val_loss"] * float(np.exp(rng.normal(0, 0.002)))} for row in rows]
    rows[9]["val_loss"] *= 1.05
    found = analyse(Runs(rows, [], []), FitSettings(bootstraps=20, form=CHINCHILLA))
    assert [row["name"] for row, _ in found.outliers] == [rows[9]["name"]]
    assert "not as expected" in compare(found, rows[9]["name"])[0]
    others = [compare(found, row["name"])[0] for i, row in enumerate(rows) if i // 4 != 9 // 4]
    assert sum("not as expected" not in line for line in others) >= 0.8 * len(others)
    with pytest.raises(ValueError, match="run='d99' is none of"):
        compare(found, "d99")


def test_where_all_saw_equal_images_a_run_is_compared_by_size_alone():
    rng, rows = np.random.default_rng(0), [make_row(depth) for depth in (1, 2, 3, 4, 5, 6, 8)]
    rows = [{**row, "val_loss": row["val_loss"] * float(np.exp(rng.normal(0, 0.002)))} for row in rows]
    rows[4]["val_loss"] *= 1.1
    found = analyse(Runs(rows, [], []), FitSettings(floor=2.0, bootstraps=50))
    line = compare(found, rows[4]["name"])[0]
    assert "L(N) of the others predicts" in line and "not as expected" in line
    with pytest.raises(ValueError, match=r"L\(N, D\) needs at least 3 different numbers of images"):
        optimal(found, 1e15)


def test_the_next_runs_weigh_noise_seeds_and_price():
    """All spend one budget: where a run is cheap, its seeds count; and what no run can narrow, the noise of a run, stays."""
    found = analysis(bootstraps=0)
    best, *_, worst = next_runs(found, size(12), 80000, budget=1e14)
    assert best.narrowing < worst.narrowing <= 1
    assert all(one.flops <= 1e14 and 1 <= one.seeds <= 8 for one in next_runs(found, size(12), 80000, budget=1e14))
    law, points = found.surface.law, found.surface
    design = law.slopes([row["params_main"] for row in points.points], points.images)
    target = law.slopes(size(12), 80000)[0]
    more = np.repeat(law.slopes(best.size, best.images), best.seeds, axis=0)
    before, after = (
        1 + target @ np.linalg.pinv(rows.T @ rows, rcond=1e-15) @ target
        for rows in (design, np.concatenate([design, more]))
    )
    assert best.narrowing == pytest.approx(np.sqrt(after / before), rel=0.02)
    cheap = [one for one in next_runs(found, size(12), 80000, budget=1e14) if one.size == size(1)]
    assert {one.seeds for one in cheap} == {8}


def test_a_table_without_depths_is_answered_in_parameters():
    grid, images = isoflop_grid(7)
    found = analyse(runs_of(grid, images, noisy(grid, images, 0.001, 0, truth=TIED)), FitSettings(bootstraps=50))
    jagged = [
        {**row, "flops_exact": row["flops_exact"] * (1 + 0.02 * (-1) ** i)} for i, row in enumerate(found.runs.rows)
    ]
    assert flops_of(jagged, found.runs.rows[3]["params_main"]) == pytest.approx(
        6 * found.runs.rows[3]["params_main"], rel=0.01
    )
    assert flops_of(found.runs.rows, 1e8) == pytest.approx(6e8) and flops_of(found.runs.rows, 3e9) == pytest.approx(
        1.8e10
    )
    [line, cost] = answer(found, "predict", {"n": 3e8, "d": 3e8})
    assert line.startswith("N 3e+08 after 300,000,000 images: loss ") and cost.startswith("cost: 5.4e+17 FLOP")
    told = answer(found, "optimal", {"compute": 1e17})[0]
    best = (1e17 / 6) ** 0.5 * (1e6 / 3e5) ** 0.5  # alpha = beta: N / D is that of the two scales
    assert float(told.split("N ")[1].split(",")[0]) == pytest.approx(best, rel=0.1)
    assert answer(found, "next", {})[0].count("x N ") == 1
    with pytest.raises(ValueError, match=r"depth=4: .* give the number of parameters instead, as in n=1e9"):
        answer(found, "predict", {"depth": 4, "images": 1e9})


@pytest.mark.parametrize(("ask", "given", "said"), [
    ("predict", {}, r"needs depth=... or n=..."), ("optimal", {}, r"needs compute=..."), ("compare", {}, r"needs run=..."),
    ("predict", {"n": -1.0, "d": 1e9}, r"n=-1.0: must be a number above 0"), ("predict", {"n": "abc"}, "n=abc: must be a number"),
    ("predict", {"n": float("inf")}, "n=inf: must be a number"),
    ("predict", {"depth": 2.5}, "depth=2.5: must be a whole number from 1 to 128"),
    ("predict", {"depth": 2, "n": 1e6}, "depth=2 and n=1000000.0: give one of them"), 
    ("predict", {"n": 1e6, "d": 1, "images": 1}, "images=1 and d=1"), ("why", {}, "choose predict, optimal, compare or next"),
])  # fmt: skip
def test_what_is_missing_is_named(ask, given, said):
    with pytest.raises(ValueError, match=said):
        answer(analysis(bootstraps=0), ask, given)
