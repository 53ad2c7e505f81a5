"""Power laws with a floor: y = E + (x0 / x)^alpha, and intervals for the exponent.

The floor E is none, given, or fitted by profiling. Correlation does not test the floor: subtracting a wrong one can fit
as straight a line, so the exponent is always reported together with E.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.stats import t as student

Values = Sequence[float] | Sequence[int] | np.ndarray
MIN_SIZES_FOR_INTERVAL = 4


@dataclass(frozen=True)
class PowerLaw:
    """y = floor + (x0 / x)^alpha. `alpha_interval` is 95 %, None where too few sizes allow none."""

    alpha: float
    log_x0: float
    floor: float
    r: float  # Pearson correlation of ln x and ln(y - floor)
    alpha_interval: tuple[float, float] | None
    num_sizes: int

    def __call__(self, x: np.ndarray | float) -> np.ndarray:
        """Predicted y."""
        return np.asarray(self.floor + np.exp(self.alpha * (self.log_x0 - np.log(x))))


def line(log_x: np.ndarray, log_y: np.ndarray) -> tuple[float, float, np.ndarray]:
    """(slope, intercept at the mean of log_x, residuals) of the least-squares line."""
    centered = log_x - log_x.mean()
    slope = float(centered @ log_y / (centered @ centered))
    return slope, float(log_y.mean()), log_y - log_y.mean() - slope * centered


def best_floor(x: np.ndarray, y: np.ndarray) -> float:
    """The floor in [0, min y) whose power law leaves the smallest squared error of y."""
    log_x, span = np.log(x), float(y.max() - y.min()) or 1e-9

    def error(log_gap: float) -> float:
        floor = max(float(y.min()) - np.exp(log_gap), 0.0)
        slope, intercept, _ = line(log_x, np.log(y - floor))
        return float(np.square(y - floor - np.exp(intercept + slope * (log_x - log_x.mean()))).sum())

    bounds = (np.log(span * 1e-3), np.log(max(float(y.min()), span * 2e-3)))
    gaps = np.linspace(*bounds, 60)
    start = int(np.argmin([error(gap) for gap in gaps]))
    around = (gaps[max(start - 1, 0)], gaps[min(start + 1, len(gaps) - 1)])
    best = minimize_scalar(error, bounds=around, method="bounded").x
    return max(float(y.min()) - float(np.exp(best)), 0.0)


def fit(x: Values, y: Values, floor: float | None = 0.0, bootstraps: int = 1000, seed: int = 0) -> PowerLaw:
    """Fits a power law; `floor` None fits it, 0 is none. Raises ValueError for too few or unusable points.

    The interval comes from a residual bootstrap (the floor fitted anew in each draw), stretched by t(df) / 1.96: plain
    percentile intervals cover too little with few sizes.
    """
    xs, ys = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    num_sizes = len(np.unique(xs))
    if num_sizes < (3 if floor is None else 2):
        raise ValueError(
            f"a power law{' with a fitted floor' if floor is None else ''} needs more than {num_sizes} different sizes"
        )
    if floor is not None and not (ys > floor).all():
        raise ValueError(f"floor={floor} is not below all values, the smallest is {ys.min():.4g}")
    if not (xs > 0).all() or not np.isfinite(ys).all():
        raise ValueError("sizes must be positive and values finite: a run diverged or is incomplete")
    law = fit_once(xs, ys, floor)
    degrees = len(xs) - (3 if floor is None else 2)
    if num_sizes < MIN_SIZES_FOR_INTERVAL or degrees < 1 or bootstraps == 0:
        return law
    rng = np.random.default_rng(seed)
    log_fit = np.log(law(xs) - law.floor)
    residuals = (np.log(ys - law.floor) - log_fit) * np.sqrt(len(xs) / degrees)
    alphas = []
    for _ in range(bootstraps):
        draw = law.floor + np.exp(log_fit + rng.choice(residuals, len(xs)))
        alphas.append(fit_once(xs, draw, floor).alpha)
    low, high = (float(np.percentile(alphas, percent)) - law.alpha for percent in (2.5, 97.5))
    stretch = float(student.ppf(0.975, degrees)) / 1.96
    interval = (law.alpha + low * stretch, law.alpha + high * stretch)
    return PowerLaw(law.alpha, law.log_x0, law.floor, law.r, interval, num_sizes)


def fit_once(x: np.ndarray, y: np.ndarray, floor: float | None) -> PowerLaw:
    """The power law without an interval."""
    bottom = best_floor(x, y) if floor is None else floor
    log_x, log_y = np.log(x), np.log(y - bottom)
    slope, intercept, _ = line(log_x, log_y)
    log_x0 = float(log_x.mean() - intercept / slope) if slope else 0.0
    r = float(np.corrcoef(log_x, log_y)[0, 1]) if len(x) > 2 and log_y.std() > 0 else float("nan")
    return PowerLaw(-slope, log_x0, bottom, r, None, len(np.unique(x)))


def frontier(compute: Values, loss: Values) -> list[int]:
    """Indices of the points that no other point beats with less compute, by rising compute."""
    best, chosen = np.inf, []
    for i in sorted(range(len(compute)), key=lambda i: (compute[i], loss[i])):
        if loss[i] < best:
            best = loss[i]
            chosen.append(i)
    return chosen
