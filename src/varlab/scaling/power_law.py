"""Power laws with a floor: y = E + (x0 / x)^alpha, and intervals for the exponent.

The floor E is zero, given, or fitted by profiling. Correlation does not test the floor: subtracting a wrong one can
give an equally straight line, so the exponent is always reported together with E.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from scipy.stats import t as student

Values = Sequence[float] | Sequence[int] | np.ndarray
MIN_SIZES_FOR_INTERVAL = 4


@dataclass(frozen=True)
class PowerLaw:
    """y = floor + (x0 / x)^alpha. `alpha_interval`: 95 % interval, None for too few sizes. `noise`: standard deviation
    of ln(y - floor) around the law. `resamples`: (alpha, log_x0, floor) of each bootstrap."""

    alpha: float
    log_x0: float
    floor: float
    r: float  # Pearson correlation of ln x and ln(y - floor)
    alpha_interval: tuple[float, float] | None
    num_sizes: int
    noise: float = 0.0
    num_points: int = 0
    resamples: np.ndarray | None = field(default=None, repr=False, compare=False)

    def __call__(self, x: Any) -> np.ndarray:
        """Predicted y."""
        return np.asarray(self.floor + np.exp(self.alpha * (self.log_x0 - np.log(x))))

    def interval(self, x: float | int, seed: int = 0) -> tuple[float, float] | None:
        """95 % prediction interval for the loss of one further run of this size, from the uncertainty of the parameters
        and the noise of a run. None if the exponent has no interval."""
        if self.resamples is None:
            return None
        alpha, log_x0, floor = self.resamples.T
        noise = np.random.default_rng(seed).normal(0, self.noise, len(alpha))
        values = floor + np.exp(alpha * (log_x0 - np.log(x)) + noise)
        center, low_high = float(self(x)), np.percentile(values, (2.5, 97.5))
        low, high = center + (low_high - center) * t_correction(self.num_points - (2 if not self.floor else 3))
        return float(low), float(high)


def t_correction(degrees: int) -> float:
    """Factor t / z that widens a percentile interval for few degrees of freedom."""
    return float(student.ppf(0.975, max(degrees, 1))) / 1.96


def line(log_x: np.ndarray, log_y: np.ndarray) -> tuple[float, float, np.ndarray]:
    """(slope, intercept at the mean of log_x, residuals) of the least-squares line."""
    centered = log_x - log_x.mean()
    slope = float(centered @ log_y / (centered @ centered))
    return slope, float(log_y.mean()), log_y - log_y.mean() - slope * centered


def squared_errors(x: np.ndarray, y: np.ndarray, floors: np.ndarray) -> np.ndarray:
    """Squared error of y of the best power law for each floor."""
    log_x = np.log(x) - np.log(x).mean()
    gaps = y - floors[:, None]
    log_y = np.log(gaps)
    slopes = log_y @ log_x / (log_x @ log_x)
    fitted = np.exp(log_y.mean(axis=1, keepdims=True) + slopes[:, None] * log_x)
    return np.square(gaps - fitted).sum(axis=1)


def best_floor(x: np.ndarray, y: np.ndarray) -> float:
    """The floor in [0, min y) whose power law has the smallest squared error of y: a grid in ln(min y - floor), refined
    three times around its best point."""
    lowest, span = float(y.min()), float(y.max() - y.min()) or 1e-9
    low, high = np.log(span * 1e-3), np.log(max(lowest, span * 2e-3))
    floors = np.array([0.0])
    for _ in range(4):
        gaps = np.linspace(low, high, 40)
        floors = np.maximum(lowest - np.exp(gaps), 0.0)
        best = int(squared_errors(x, y, floors).argmin())
        low, high = gaps[max(best - 1, 0)], gaps[min(best + 1, len(gaps) - 1)]
        floors = floors[[best]]
    return float(floors[0])


def fit(x: Values, y: Values, floor: float | None = 0.0, bootstraps: int = 1000, seed: int = 0) -> PowerLaw:
    """Fits a power law. `floor`: None fits it, 0 means no floor. Raises ValueError for too few or unusable points.

    The interval comes from a residual bootstrap (the floor is refitted in each resample), widened by t(df) / 1.96:
    plain percentile intervals are too narrow for few sizes.
    """
    xs, ys = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    num_sizes = len(np.unique(xs))
    if num_sizes < (3 if floor is None else 2):
        raise ValueError(
            f"a power law{' with a fitted floor' if floor is None else ''} needs more than {num_sizes} different sizes"
        )
    if floor is not None and not (ys > floor).all():
        raise ValueError(f"floor={floor} is not below all values; the smallest is {ys.min():.4g}")
    if not (xs > 0).all() or not np.isfinite(ys).all():
        raise ValueError("sizes must be positive and values finite: a run diverged or is incomplete")
    law = replace(fit_once(xs, ys, floor), num_points=len(xs))
    degrees = len(xs) - (3 if floor is None else 2)
    if num_sizes < MIN_SIZES_FOR_INTERVAL or degrees < 1 or bootstraps == 0:
        return law
    rng = np.random.default_rng(seed)
    log_fit = np.log(law(xs) - law.floor)
    residuals = (np.log(ys - law.floor) - log_fit) * np.sqrt(len(xs) / degrees)
    refits = [
        fit_once(xs, law.floor + np.exp(log_fit + rng.choice(residuals, len(xs))), floor) for _ in range(bootstraps)
    ]
    resamples = np.array([(refit.alpha, refit.log_x0, refit.floor) for refit in refits])
    low, high = (float(np.percentile(resamples[:, 0], percent)) - law.alpha for percent in (2.5, 97.5))
    interval = (law.alpha + low * t_correction(degrees), law.alpha + high * t_correction(degrees))
    noise = float(np.sqrt(np.square(np.log(ys - law.floor) - log_fit).sum() / degrees))
    return replace(law, alpha_interval=interval, noise=noise, resamples=resamples)


def fit_once(x: np.ndarray, y: np.ndarray, floor: float | None) -> PowerLaw:
    """The power law without an interval."""
    bottom = best_floor(x, y) if floor is None else floor
    log_x, log_y = np.log(x), np.log(y - bottom)
    slope, intercept, _ = line(log_x, log_y)
    log_x0 = float(log_x.mean() - intercept / slope) if slope else 0.0
    r = float(np.corrcoef(log_x, log_y)[0, 1]) if len(x) > 2 and log_y.std() > 0 else float("nan")
    return PowerLaw(-slope, log_x0, bottom, r, None, len(np.unique(x)))


def exponents_by_floor(x: Values, y: Values, num: int = 40) -> list[tuple[float, float, float]]:
    """(floor, exponent, Pearson r) for floors from 0 to just below the smallest y: r hardly depends on the floor."""
    xs, ys = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    laws = [fit_once(xs, ys, float(floor)) for floor in np.linspace(0, ys.min() - 0.02 * np.ptp(ys), num)]
    return [(law.floor, law.alpha, law.r) for law in laws]
