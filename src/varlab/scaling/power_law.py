"""Power laws with a floor: y = E + (x0 / x)^alpha, fitted by least squares in ln y, since runs scatter in proportion to y.

The floor E is zero, given, or fitted. Correlation does not test the floor: subtracting a wrong one can give an equally
straight line, so the exponent is always reported together with E.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from varlab.scaling.solver import solve_many

Values = Sequence[float] | Sequence[int] | np.ndarray
MIN_SIZES = 4  # of a law with an interval: three points determine a fitted floor exactly


@dataclass(frozen=True)
class PowerLaw:
    """y = floor + (x0 / x)^alpha. `alpha_interval`: 95 % interval, None without draws. `noise`: standard deviation of ln
    y around the law. `draws`: (alpha, log_x0, floor, noise) of each draw of the bootstrap."""

    alpha: float
    log_x0: float
    floor: float
    r: float  # Pearson correlation of ln x and ln(y - floor)
    alpha_interval: tuple[float, float] | None
    num_sizes: int
    noise: float = 0.0
    num_points: int = 0
    draws: np.ndarray | None = field(default=None, repr=False, compare=False)

    def __call__(self, x: Any) -> np.ndarray:
        """Predicted y."""
        with np.errstate(over="ignore"):
            return np.asarray(self.floor + np.exp(self.alpha * (self.log_x0 - np.log(x))))

    def drawn(self, x: Any) -> np.ndarray | None:
        """y of each draw at each x, (draws, x); None without draws."""
        if self.draws is None:
            return None
        alpha, log_x0, floor, _ = self.draws.T[..., None]
        with np.errstate(over="ignore"):
            return floor + np.exp(alpha * (log_x0 - np.log(np.atleast_1d(x))))

    def band(self, x: Any) -> np.ndarray | None:
        """(lower, upper) ends of the 95 % interval of the law itself at each x; None without draws."""
        values = self.drawn(x)
        return None if values is None else np.percentile(values, (2.5, 97.5), axis=0)

    def interval(self, x: float | int, seed: int = 0) -> tuple[float, float] | None:
        """95 % prediction interval for y of one further run at x, from the uncertainty of the parameters and the noise of
        a run. None without draws."""
        values = self.drawn(x)
        if values is None or self.draws is None:
            return None
        noise = np.random.default_rng(seed).normal(0, 1, len(values)) * self.draws[:, 3]
        low, high = np.percentile(values[:, 0] * np.exp(noise), (2.5, 97.5))
        return float(low), float(high)


def line(log_x: np.ndarray, log_y: np.ndarray) -> tuple[float, float, np.ndarray]:
    """(slope, intercept at the mean of log_x, residuals) of the least-squares line."""
    centered = log_x - log_x.mean()
    slope = float(centered @ log_y / (centered @ centered))
    return slope, float(log_y.mean()), log_y - log_y.mean() - slope * centered


def values_and_slopes(x: np.ndarray, v: np.ndarray, floor: float | None) -> tuple[np.ndarray, np.ndarray]:
    """ln y at centered ln x (N,) and its derivatives, for variables (B, P): ln of the term at the center, alpha, and the
    floor unless it is given."""
    term = np.exp(v[:, :1] - v[:, 1:2] * x)
    total = term + (v[:, 2:3] if floor is None else floor)
    parts = [term, -term * x] + ([np.ones_like(term)] if floor is None else [])
    return np.log(total), np.stack(parts, axis=-1) / total[..., None]


def solve(
    x: np.ndarray,
    log_y: np.ndarray,
    floor: float | None,
    start: np.ndarray,
    weights: np.ndarray | float = 1.0,
    delta: float | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """(variables, minimized sums) of the fits of log_y (N,) or (B, N) from `start` (B, P): least squares, or the Huber
    loss with `delta`."""
    lower = np.array([-np.inf, -np.inf, 0.0]) if floor is None else None
    return solve_many(lambda v: values_and_slopes(x, v, floor), start, log_y, weights, delta, lower)


def starts(x: np.ndarray, y: np.ndarray, floor: float | None) -> np.ndarray:
    """Lines in ln(y - E) for floors from 0 to just below the smallest y, or for the given one."""
    gap = np.geomspace(max(y.min(), 1e-300), max(np.ptp(y), 1e-9) * 1e-2, 12) if floor is None else [y.min() - floor]
    found = []
    for bottom in np.maximum(y.min() - np.asarray(gap), 0.0):
        slope, intercept, _ = line(x, np.log(y - bottom))
        found.append([intercept, -slope] + ([bottom] if floor is None else []))
    return np.array(found)


def fit(x: Values, y: Values, floor: float | None = 0.0, bootstraps: int = 1000, seed: int = 0) -> PowerLaw:
    """Fits a power law. `floor`: None fits it, 0 means no floor. Raises ValueError for too few or unusable points.

    The draws come from a parametric bootstrap: refits of values drawn around the law, whose noise is itself drawn from
    what the residuals say of it (their sum of squares over a chi-squared variable), so that intervals have the width of
    Student's t for few runs.
    """
    xs, ys = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    num_sizes, num_parameters = len(np.unique(xs)), 3 if floor is None else 2
    if num_sizes < num_parameters:
        raise ValueError(
            f"a power law{' with a fitted floor' if floor is None else ''} needs at least {num_parameters} different sizes,"
            f" found {num_sizes}"
        )
    if not (xs > 0).all() or not np.isfinite(xs).all() or not np.isfinite(ys).all() or not (ys > 0).all():
        raise ValueError("sizes and values must be positive and finite: a run diverged or is incomplete")
    if floor is not None and not (ys > floor).all():
        raise ValueError(f"floor={floor} is not below all values; the smallest is {ys.min():.4g}")
    center = float(np.log(xs).mean())
    log_x, log_y = np.log(xs) - center, np.log(ys)
    found, sums = solve(log_x, log_y, floor, starts(log_x, ys, floor))
    best = found[int(sums.argmin())]
    degrees = len(xs) - num_parameters
    noise = float(np.sqrt(2 * sums.min() / degrees)) if degrees else 0.0
    alpha, log_x0, bottom = (float(value) for value in parameters(best[None], center, floor)[0])
    above = ys > bottom
    gaps = np.log(ys[above] - bottom)
    r = float(np.corrcoef(log_x[above], gaps)[0, 1]) if above.sum() > 2 and gaps.std() > 0 else float("nan")
    law = PowerLaw(alpha, log_x0, bottom, r, None, num_sizes, noise, len(xs))
    if num_sizes < MIN_SIZES or degrees < 1 or not bootstraps:
        return law
    rng = np.random.default_rng(seed)
    spread = noise * np.sqrt(degrees / rng.chisquare(degrees, bootstraps))
    drawn = np.log(law(xs)) + spread[:, None] * rng.standard_normal((bootstraps, len(xs)))
    refits, _ = solve(log_x, drawn, floor, np.repeat(best[None], bootstraps, axis=0))
    draws = np.column_stack([parameters(refits, center, floor), spread])
    low, high = np.percentile(draws[:, 0], (2.5, 97.5))
    return replace(law, alpha_interval=(float(low), float(high)), draws=draws)


def parameters(v: np.ndarray, center: float, floor: float | None) -> np.ndarray:
    """alpha, log_x0, floor of fits (B, P) to centered ln x."""
    alpha = np.where(v[:, 1] == 0, 1e-12, v[:, 1])
    bottom = v[:, 2] if floor is None else np.full(len(v), floor)
    return np.column_stack([alpha, center + v[:, 0] / alpha, bottom])


def exponents_by_floor(x: Values, y: Values, num: int = 40) -> list[tuple[float, float, float]]:
    """(floor, exponent, Pearson r) for floors from 0 to just below the smallest y: r hardly depends on the floor."""
    xs, ys = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    laws = [fit(xs, ys, float(floor), bootstraps=0) for floor in np.linspace(0, ys.min() - 0.02 * np.ptp(ys), num)]
    return [(law.floor, law.alpha, law.r) for law in laws]
