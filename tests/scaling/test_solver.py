"""Many small fits at once."""

import numpy as np
import pytest

from varlab.scaling.solver import penalty, solve_many

X = np.linspace(0, 2, 12)


def model(v):
    """exp(a - b x) and its derivatives."""
    values = np.exp(v[:, :1] - v[:, 1:] * X)
    return values, np.stack([values, -values * X], axis=-1)


def test_each_row_is_solved_for_itself():
    """With targets and weights of its own; a weight of zero leaves a point out."""
    truth = np.array([[0.3, 1.0], [1.0, 0.2], [0.5, 2.0]])
    target, weights = model(truth)[0], np.ones((3, 12))
    target[1, 4], weights[1, 4] = 99.0, 0.0
    found, sums = solve_many(model, np.zeros((3, 2)), target, weights)
    assert found == pytest.approx(truth, abs=1e-6) and sums == pytest.approx(np.zeros(3), abs=1e-12)


def test_the_huber_loss_is_hardly_moved_by_an_outlier_and_least_squares_is():
    target = model(np.array([[0.3, 1.0]]))[0][0]
    target[3] += 0.5
    huber, squares = (
        solve_many(model, np.zeros((1, 2)), target, delta=delta, iterations=300)[0][0] for delta in (1e-4, None)
    )
    assert huber == pytest.approx([0.3, 1.0], abs=1e-3) and abs(squares[1] - 1.0) > 0.04
    assert penalty(np.array([0.05, -0.5]), 0.1) == pytest.approx([0.00125, 0.045])


def test_a_variable_stays_above_its_bound():
    target = model(np.array([[0.3, -0.5]]))[0][0]
    found, _ = solve_many(model, np.ones((1, 2)), target, lower=np.array([-np.inf, 0.0]))
    assert found[0, 1] == 0.0
    assert np.exp(found[0, 0]) == pytest.approx(target.mean(), rel=1e-5)  # the best constant


def test_a_start_from_which_nothing_can_be_computed_is_kept_and_told():
    found, sums = solve_many(model, np.array([[1e6, 0.0], [0.0, 0.0]]), np.ones(12))
    assert np.isinf(sums[0]) and sums[1] == pytest.approx(0.0, abs=1e-12) and found[0, 0] == 1e6
