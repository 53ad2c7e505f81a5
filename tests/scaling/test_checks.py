"""What is wrong with runs, and what speaks against a law."""

from dataclasses import replace

import numpy as np
import pytest
from support.coverage import TIED, branch_grid, isoflop_grid, noisy, rows_of, runs_of
from support.scaling_runs import make_row

from varlab.scaling.analysis import FitSettings, analyse
from varlab.scaling.checks import lack_of_fit, outliers, seed_noise
from varlab.scaling.parametric import CHINCHILLA, Form, ParametricLaw, fit_parametric


def test_the_spread_of_seeds_is_told_apart_from_that_of_the_law():
    rows = [make_row(depth, val_loss=loss, seed=seed) for depth in (1, 2) for seed, loss in enumerate((3.0, 3.03))]
    assert seed_noise(rows) == pytest.approx(np.log(1.01) / np.sqrt(2))
    assert seed_noise(rows[::2]) is None
    assert seed_noise([{**row, "seed": None} for row in rows]) is None  # who knows what else differs
    law = ParametricLaw(CHINCHILLA, 0.3, 1.0, 0.3, 1.0, 0.0, noise=0.1, objective=0.0)
    images = np.array([row["images_seen"] for row in rows], dtype=float)
    assert "14 times that" in lack_of_fit(rows, images, law)[0]
    assert lack_of_fit(rows, images, replace(law, noise=0.02)) == []


@pytest.mark.parametrize("kind", ["isoflop", "branches"])
def test_a_trend_of_the_residuals_is_found_without_seeds_and_random_residuals_are_not(kind):
    size, images, runs = (*isoflop_grid(6), None) if kind == "isoflop" else branch_grid(6)
    found = 0
    for draw in range(60):
        loss = noisy(size, images, 0.002, draw, runs, TIED)
        law = fit_parametric(size, images, loss, Form("tied"))
        found += bool(lack_of_fit(rows_of(size, images, loss), images, law))
    assert found <= 3
    bump = 0.3 * np.exp(-(np.log(size / 3e6) ** 2) / 4) * np.sqrt(1e7 / images)
    loss = noisy(size, images, 0.002, 0, runs, TIED) + bump
    [told] = lack_of_fit(rows_of(size, images, loss), images, fit_parametric(size, images, loss, Form("tied")))
    assert "instead of being random (p = " in told and "curves with" in told


def test_runs_that_went_wrong_are_named_and_left_out_or_kept():
    """One above the loss of uniform guesses, one 5 % off; a fit of all of them would be far off."""
    size, images, runs = branch_grid(6)
    loss = noisy(size, images, 0.002, 0, runs, TIED)
    clean = analyse(runs_of(size, images, loss), FitSettings(bootstraps=0))
    loss[3], loss[10] = 9.9, loss[10] * 1.05
    rows = rows_of(size, images, loss, runs, codes=512)
    told = {row["name"]: reason for row, reason in outliers(rows)}
    assert set(told) == {"r3", "r10"} and "is above ln(codes) = 6.238" in told["r3"] and "+4." in told["r10"]
    left = analyse(runs_of(size, images, loss, runs, codes=512), FitSettings(bootstraps=0))
    assert len(left.runs.rows) == 22 and [row["name"] for row, _ in left.outliers] == ["r3", "r10"]
    assert left.surface.law.alpha == pytest.approx(clean.surface.law.alpha, abs=0.01)
    kept = analyse(runs_of(size, images, loss, runs, codes=512), FitSettings(bootstraps=0, outliers="keep"))
    assert len(kept.runs.rows) == 24 and len(kept.outliers) == 2


def test_without_a_surface_an_outlier_is_found_by_its_compute():
    size = np.geomspace(1e6, 1e8, 6)
    loss = 2 + (1e6 / size) ** 0.3
    loss[4] *= 1.2
    assert [row["name"] for row, _ in outliers(rows_of(size, np.full(6, 1e7), loss))] == ["r4"]


def test_many_far_runs_are_no_outliers():
    """It is the law that does not fit."""
    size, images = isoflop_grid(6)
    loss = noisy(size, images, 0.001, 0, truth=TIED)
    loss[::4] *= 1.1
    assert outliers(rows_of(size, images, loss)) == []
