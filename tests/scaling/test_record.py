"""fits.json and the checklist of a report."""

import json

import numpy as np
import pytest
from support.coverage import TIED, branch_grid, noisy, runs_of

from varlab.scaling.analysis import FitSettings, analyse
from varlab.scaling.parametric import evaluate
from varlab.scaling.record import as_json, checklist


@pytest.fixture
def found():
    size, images, runs = branch_grid(6)
    loss = noisy(size, images, 0.001, 0, runs, TIED)
    loss[5] *= 1.1
    return analyse(runs_of(size, images, loss, runs, lr_peak=0.008, schedule="wsd"), FitSettings(bootstraps=40))


def test_draws_covariance_and_residuals_are_those_of_the_fit(found):
    told = json.loads(json.dumps(as_json(found)))
    surface, law = told["parametric"], found.surface.law
    draws = np.array(surface["draws"])
    assert surface["parameters"] == [
        "alpha",
        "log_a",
        "beta",
        "log_b",
        "floor",
        "kappa",
        "mu",
        "noise",
    ] and draws.shape == (40, 8)
    assert np.array(surface["covariance"]) == pytest.approx(np.cov(draws.T), rel=1e-3, abs=1e-9)
    assert np.quantile(draws[:, 0], (0.025, 0.975)) == pytest.approx(law.intervals()["alpha"], rel=1e-5)
    first = surface["points"][0]
    assert first["residual"] == pytest.approx(
        np.log(first["loss"] / evaluate(law.parameters, first["size"], first["images"]))
    )
    assert surface["delta"] == 1e-3 and surface["starts"] == 24 and len(surface["points"]) == 23
    laws = {(one["y"], one["x"]): one for one in told["laws"]}
    assert len(laws["val_loss", "flops_exact"]["draws"]) == 40 and told["settings"]["bootstraps"] == 40


def test_the_checklist_says_what_was_used_dropped_and_how(found):
    told = dict(checklist(found))
    assert told["Points used"].startswith("23 runs") and told["Points left out"].startswith("r5: its loss is +")
    assert told["Learning rate, schedule, batch"] == "0.008; wsd; not in the table"
    assert "24 starts" in told["Fit of L(N, D)"] and "Huber, delta 0.001" in told["Fit of L(N, D)"]
    assert "tied exponents, E fitted, Huber" in told["Form chosen by"] and told["Sizes"].startswith("6, N from 1e+06")
    assert told["Loss"].endswith("floor E: fitted") and told["N counts"] == "the column given as N"
