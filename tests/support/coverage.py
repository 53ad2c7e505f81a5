"""How often an interval holds the truth, on synthetic runs."""

from collections.abc import Callable

import numpy as np
import pytest

from varlab.scaling.parametric import evaluate
from varlab.scaling.runs import Runs

# (number of sizes, noise of a run) of the tests of intervals; the two that bound the others are quick
RARE = [(4, 0.0015), (6, 0.0015), (6, 0.003), (8, 0.003), (16, 0.0015), (16, 0.003)]
NUM_SIZES = [(4, 0.003), (8, 0.0015), *[pytest.param(*given, marks=pytest.mark.slow) for given in RARE]]
# L(N, D) = 2 + (1e6 / N)^0.34 + (3e5 / D)^0.28 at compute-optimal sizes: L(C) falls as C^-0.1535
TRUTH = np.array([0.34, 0.34 * np.log(1e6), 0.28, 0.28 * np.log(3e5), 2.0, 0.0, 0.0])
TIED = np.array([0.34, 0.34 * np.log(1e6), 0.34, 0.34 * np.log(3e5), 2.0, 0.0, 0.0])


def share(draws: int, is_held: Callable[[int], bool]) -> float:
    """Share of the draws, numbered from 0, whose interval holds the truth."""
    return sum(bool(is_held(draw)) for draw in range(draws)) / draws


def isoflop_grid(num_sizes: int, rounding: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """(N, D) of five budgets, with every size at each; budgets are equal but for rounding."""
    size = np.tile(np.geomspace(1e6, 3e8, num_sizes), 5)
    compute = np.repeat(np.geomspace(1e13, 1e17, 5), num_sizes)
    return size, compute / (6 * size) * (1 + rounding * np.sin(np.arange(len(size)) * 7.0))


def branch_grid(num_sizes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(N, D, run): every size cooled down at 1, 1/2, 1/4 and 1/8 of its run."""
    size, images = np.repeat(np.geomspace(1e6, 3e8, num_sizes), 4), np.tile(1e8 * 2.0 ** -np.arange(4), num_sizes)
    return size, images, np.repeat(np.arange(num_sizes), 4)


def noisy(size, images, spread, seed, runs=None, truth=TRUTH):
    """Losses whose noise is shared half by the points of one run."""
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal(len(size))
    if runs is not None:
        noise = np.sqrt(0.5) * (noise + rng.standard_normal(int(runs.max()) + 1)[runs])
    return evaluate(truth, size, images) * np.exp(spread * noise)


def rows_of(size, images, loss, runs=None, **more):
    """Rows of a table without depths."""
    found = []
    for i, (n, d, y) in enumerate(zip(size, images, loss, strict=True)):
        row = {
            "run_id": f"r{i}",
            "name": f"r{i}",
            "params_main": float(n),
            "images_seen": float(d),
            "val_loss": float(y),
        }
        trunk = {} if runs is None else {"parent_run": f"trunk{runs[i]}"}
        found.append({**row, "flops_exact": 6.0 * n * d, **trunk, **more})
    return found


def runs_of(*given, **more) -> Runs:
    """The same as a set of runs."""
    return Runs(rows_of(*given, **more), [], [])
