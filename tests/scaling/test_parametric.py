"""L(N, D) against synthetic truth, and what is asked of it."""

from dataclasses import replace

import numpy as np
import pytest
from support.coverage import NUM_SIZES, TIED, branch_grid, isoflop_grid
from support.coverage import noisy as drawn
from support.scaling_runs import surface

from varlab.scaling.parametric import (
    CHINCHILLA,
    Form,
    HeldOut,
    Problem,
    choose,
    compare_forms,
    effective_data,
    evaluate,
    fit_parametric,
    folds,
    parse_form,
)

BUDGETS = (5000, 10000, 20000, 40000)


N = np.repeat(73728 * np.array([1.0, 2, 3, 4, 5, 6, 8]) ** 3, 4)


D = np.tile(np.array(BUDGETS, dtype=float), 7)


def noisy(seed, scatter=0.003, outliers=0.0):
    rng = np.random.default_rng(seed)
    y = surface(N, D) * np.exp(rng.normal(0, scatter, len(N)))
    return np.where(rng.random(len(N)) < outliers, y * 1.03, y)


@pytest.mark.parametrize("form", [CHINCHILLA, Form(loss="squares"), Form(floor=2.0)])
def test_exact_points_give_back_their_law(form):
    law = fit_parametric(N, D, surface(N, D), form)
    assert (law.alpha, law.beta, law.floor) == pytest.approx((0.3, 0.4, 2.0), abs=2e-3)
    assert law(1e9, 1e6) == pytest.approx(surface(1e9, 1e6), rel=1e-4)


def test_the_gradient_is_that_of_the_objective():
    for form in (CHINCHILLA, Form("tied", 0.0), Form("tied", None, "squares"), Form("free", 1.5), Form("interaction")):
        problem = Problem(np.log(N) - np.log(N).mean(), np.log(D) - np.log(D).mean(), np.log(noisy(0)), form)
        start = problem.starts()[5]
        value, slope = problem.objective(start)
        for i in range(len(start)):
            step = np.zeros(len(start))
            step[i] = 1e-6
            numeric = (problem.objective(start + step)[0] - problem.objective(start - step)[0]) / 2e-6
            assert slope[i] == pytest.approx(numeric, rel=1e-4, abs=1e-6 * abs(value))


def test_huber_is_hardly_moved_by_outliers_and_least_squares_is():
    y = surface(N, D).copy()
    y[[3, 10, 17]] *= 1.05
    huber, squares = (fit_parametric(N, D, y, Form(loss=loss)) for loss in ("huber", "squares"))
    assert abs(huber(1e9, 1e6) / surface(1e9, 1e6) - 1) < 1e-3 < abs(squares(1e9, 1e6) / surface(1e9, 1e6) - 1)


def test_tied_exponents_are_one():
    law = fit_parametric(N, D, 2 + (1e6 / N) ** 0.35 + (3e3 / D) ** 0.35, Form("tied"))
    assert law.alpha == law.beta == pytest.approx(0.35, abs=2e-3)


def test_an_interaction_of_size_and_images_is_found():
    """Farseer's first order: beta and B depend on N."""
    truth = np.array([0.3, 0.3 * np.log(1e6), 0.25, 0.25 * np.log(3e3), 2.0, 0.1, 0.02])
    law = fit_parametric(N, D, evaluate(truth, N, D), Form("interaction"))
    assert law.parameters == pytest.approx(truth, abs=1e-3)
    additive = fit_parametric(N, D, evaluate(truth, N, D), Form("free"))
    assert additive.noise > 20 * law.noise


@pytest.mark.parametrize(("num_sizes", "noise"), NUM_SIZES)
@pytest.mark.parametrize("kind", ["isoflop", "branches"])
def test_intervals_hold_the_truth_at_least_as_often_as_they_say(kind, num_sizes, noise):
    """Exponents, floor, and the loss of a further run ten times as large with ten times the data. Few runs make wide intervals,
    wider than necessary."""
    if kind == "isoflop":
        (size, images), runs = isoflop_grid(num_sizes), None
    else:
        size, images, runs = branch_grid(num_sizes)
    held, rng = np.zeros(4), np.random.default_rng(0)
    further = evaluate(TIED, 3e9, 1e9)
    for draw in range(100):
        loss = drawn(size, images, noise, draw, runs, TIED)
        law = fit_parametric(size, images, loss, Form("tied"), runs, bootstraps=200, seed=draw)
        ends = [*[law.intervals()[name] for name in ("alpha", "beta", "floor")], law.interval(3e9, 1e9, draw)]
        values = [0.34, 0.34, 2.0, further * np.exp(rng.normal(0, noise))]
        held += [low <= value <= high for (low, high), value in zip(ends, values, strict=True)]
    assert (held >= 86).all(), held


@pytest.mark.slow
def test_the_intervals_cover_the_truth_as_often_as_they_say():
    """200 draws with 4 % outliers; runs of one size and seed are drawn together. The prediction for a further run as well."""
    covered, held, rng = 0, 0, np.random.default_rng(9)
    names = np.repeat(np.arange(14), 2)
    for seed in range(200):
        law = fit_parametric(N, D, noisy(seed, outliers=0.04), Form(floor=2.0), groups=names, bootstraps=200, seed=seed)
        low, high = law.intervals()["alpha"]
        covered += low <= 0.3 <= high
        low, high = law.interval(1e8, 1e5, seed)
        held += low <= surface(1e8, 1e5) * np.exp(rng.normal(0, 0.003)) <= high
    assert 180 <= covered <= 199, covered
    assert 180 <= held <= 199, held


def test_the_objective_is_the_huber_loss_of_ln_l():
    """Sum over points of Huber(r, 1e-3) / 1e-3, or of r^2 / 2e-3."""
    y = surface(N, D) * np.exp(np.where(np.arange(len(N)) % 2, 5e-4, -4e-3))
    problem = Problem(np.log(N), np.log(D), np.log(y), Form(floor=2.0))
    truth = np.array([0.3 * np.log(1e6), 0.4 * np.log(3e3), 0.3, 0.4])
    small, large = 5e-4**2 / 2e-3, 4e-3 - 5e-4
    assert problem.objective(truth)[0] == pytest.approx(len(N) / 2 * (small + large), rel=1e-6)
    squares = Problem(problem.x, problem.z, problem.log_loss, Form(floor=2.0, loss="squares"))
    assert squares.objective(truth)[0] == pytest.approx(len(N) / 2 * (5e-4**2 + 4e-3**2) / 2e-3, rel=1e-6)


def test_starts_reproduce_the_mean_loss_at_the_center():
    y = surface(N, D)
    for form in (CHINCHILLA, Form("tied", 0.0), Form("tied", 2.0), Form("interaction")):
        problem = Problem(np.log(N), np.log(D), np.log(y), form)
        for start in problem.starts():
            floor = start[-1] if form.floor is None else form.floor
            assert floor + np.exp(start[:2]).sum() == pytest.approx(np.exp(np.log(y).mean()))


def test_intervals_are_the_middle_95_percent_of_the_draws():
    law = fit_parametric(N, D, noisy(1), Form(floor=2.0), bootstraps=40)
    low, high = law.intervals()["alpha"]
    alphas = law.draws[:, 0]
    assert (low, high) == pytest.approx((np.quantile(alphas, 0.025), np.quantile(alphas, 0.975)))
    assert low < law.alpha < high and law.intervals()["floor"] == (2.0, 2.0)
    values = evaluate(law.draws[:, :-1], 1e9, 1e6) * np.exp(
        np.random.default_rng(7).normal(0, 1, 40) * law.draws[:, -1]
    )
    assert law.interval(1e9, 1e6, seed=7) == pytest.approx((np.quantile(values, 0.025), np.quantile(values, 0.975)))
    plain = fit_parametric(N, D, noisy(1))
    assert plain.intervals() == {} and plain.interval(1e9, 1e6) is None


def test_forms_that_extrapolate_about_as_well_widen_a_prediction():
    law = fit_parametric(N, D, noisy(1), Form("tied"), bootstraps=40)
    other = fit_parametric(N, D, noisy(1), Form("free", 1.5))
    away = float(other(1e9, 1e6) - law(1e9, 1e6))
    (low, high), (lowest, highest) = law.interval(1e9, 1e6), replace(law, others=(other,)).interval(1e9, 1e6)
    assert (lowest, highest) == pytest.approx((low + min(away, 0), high + max(away, 0))) and abs(away) > 1e-3


def test_slopes_are_the_derivatives_of_the_logarithm():
    law = fit_parametric(N, D, noisy(1), Form("interaction"))
    names = ("log_a", "log_b", "alpha", "beta", "kappa", "mu", "floor")
    for slope, name in zip(law.slopes(3e7, 2e5)[0], names, strict=True):
        up, down = (replace(law, **{name: getattr(law, name) + step}) for step in (1e-6, -1e-6))
        assert slope == pytest.approx(float(np.log(up(3e7, 2e5) / down(3e7, 2e5))) / 2e-6, rel=1e-4)


def test_too_little_is_said():
    with pytest.raises(ValueError, match="at least 3 different numbers of images, there are 1"):
        fit_parametric(N, np.full(len(N), 5.0), noisy(0))
    with pytest.raises(ValueError, match="above the floor"):
        fit_parametric(N, D, noisy(0), Form(floor=4.0))


def test_folds_are_the_largest_quarters_of_what_matters():
    held = folds(N, D, N * D)
    assert set(N[held["size"]]) == set(np.unique(N)[-2:]) and set(D[held["images"]]) == {40000.0}
    assert 0.25 <= held["compute"].mean() <= 0.5
    size, images = isoflop_grid(6)  # every number of images once
    assert {name: int(out.sum()) for name, out in folds(size, images, 6 * size * images).items()} == {
        "size": 10, "images": 8, "compute": 12}  # fmt: skip


def test_the_default_form_is_left_only_for_one_that_is_clearly_better():
    """Tied exponents with a floor, Huber. Forms without a floor are no candidates: they lose everywhere."""
    held = compare_forms(N, D, evaluate(TIED, N, D))
    assert len(held) == 4 and all(one.form.floor is None for one in held)
    scores = {"tied_huber": 1.0, "free_squares": 0.71, "tied_squares": 0.9, "free_huber": 1.5}

    def told(**changes):
        errors = scores | changes
        found = [HeldOut(parse_form(name, None), {"size": value}) for name, value in errors.items()]
        return choose(sorted(found, key=lambda one: one.score))

    form, near = told()
    assert form == Form("tied") and {one.exponents + one.loss for one in near} == {"freesquares", "tiedsquares"}
    form, near = told(free_squares=0.69)
    assert form == Form("free", None, "squares") and near == [Form("tied", None, "squares")]


def test_the_default_extrapolates_where_exponents_are_tied_and_free_ones_do_where_they_are_not():
    size, images = isoflop_grid(8)
    y = drawn(size, images, 0.003, 4, truth=TIED)
    assert choose(compare_forms(size, images, y))[0].exponents == "tied"
    far = TIED.copy()
    far[2:4] = 0.15, 0.15 * np.log(3e5)
    assert choose(compare_forms(size, images, drawn(size, images, 0.0003, 4, truth=far)))[0].exponents == "free"


def test_images_seen_again_are_worth_less():
    assert effective_data(1000, 1000) == 1000 and effective_data(500, 1000) == 500
    assert effective_data(2000, 1000) == pytest.approx(1000 + 15000 * (1 - np.exp(-1 / 15)))
    assert effective_data(10**9, 1000) == pytest.approx(16000)
    assert 3.6 < effective_data(4000, 1000) / 1000 < 4


def test_a_full_fit_takes_few_evaluations(monkeypatch):
    """Counted in evaluations of the model for all starts at once, and of the objective."""
    calls = 0
    original = Problem.model

    def counted(self, *arguments):
        nonlocal calls
        calls += 1
        return original(self, *arguments)

    n, d = np.tile(N, 9)[:250], np.tile(D, 9)[:250] * np.repeat(np.arange(1, 11), 25)
    y = surface(n, d) * np.exp(np.random.default_rng(0).normal(0, 0.003, 250))
    monkeypatch.setattr(Problem, "model", counted)
    fit_parametric(n, d, y)
    assert calls < 400
