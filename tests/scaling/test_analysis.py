"""Fits against synthetic truth; the table keeps apart what does not belong together."""

from dataclasses import replace

import numpy as np
import pytest
from support.scaling_runs import make_row

from varlab.scaling.analysis import lack_of_fit, seed_noise
from varlab.scaling.parametric import CHINCHILLA, ParametricLaw


def test_the_spread_of_seeds_is_told_apart_from_that_of_the_law():
    rows = [make_row(depth, val_loss=loss, seed=seed) for depth in (1, 2) for seed, loss in enumerate((3.0, 3.03))]
    assert seed_noise(rows) == pytest.approx(np.log(1.01) / np.sqrt(2))
    assert seed_noise(rows[::2]) is None
    law = ParametricLaw(CHINCHILLA, 0.3, 1.0, 0.3, 1.0, 0.0, noise=0.1, objective=0.0)
    assert "14 times that" in lack_of_fit(rows, law)[0]
    assert lack_of_fit(rows, replace(law, noise=0.02)) == [] == lack_of_fit(rows[::2], law)
