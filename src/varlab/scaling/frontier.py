"""The best loss for a given compute: the frontier of all training curves, and the best size of each budget (IsoFLOP).

Hoffmann et al. 2022, first and second approach. Compute is the exact count, not 6ND.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.special import stdtrit

from varlab.scaling.power_law import MIN_SIZES, PowerLaw, Values, fit, parameters, solve, values_and_slopes

Row = dict[str, Any]
SAME_BUDGET = 0.1  # budgets whose logarithms differ by less are treated as one
WINDOW = np.log(4.0)  # a parabola is fitted to sizes within this distance of the minimum in ln N: its bias is below 2 %
POINTS_PER_SIDE = 2  # a sparse grid's parabola takes the two nearest sizes on each side, even beyond the window


def bins(compute: Values) -> np.ndarray:
    """The budget of each point, numbered by compute: rounding and small differences make no new budget."""
    numbers, number, first = np.zeros(len(compute), dtype=int), -1, 0.0
    for i in np.argsort(compute, kind="stable"):
        if number < 0 or np.log(compute[i] / first) >= SAME_BUDGET:
            number, first = number + 1, compute[i]
        numbers[i] = number
    return numbers


def staircases(budgets: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """For each row of losses (B, N), which points are the best of their budget and better than all smaller budgets."""
    best = np.stack([losses[:, budgets == k].min(axis=1) for k in range(budgets.max() + 1)], axis=1)
    before = np.minimum.accumulate(np.pad(best, ((0, 0), (1, 0)), constant_values=np.inf)[:, :-1], axis=1)
    return (losses == best[:, budgets]) & (best < before)[:, budgets]


def frontier(compute: Values, loss: Values) -> list[int]:
    """Indices of the points that are the best of their budget and better than every smaller one, by compute."""
    chosen = np.flatnonzero(staircases(bins(compute), np.asarray(loss, dtype=float)[None])[0])
    return [int(i) for i in chosen[np.argsort(np.asarray(compute)[chosen], kind="stable")]]


def fit_frontier(
    compute: Values,
    loss: Values,
    runs: Sequence[Any] | np.ndarray,
    floor: float | None,
    bootstraps: int = 1000,
    seed: int = 0,
    run_noise: float = 0.0,
) -> PowerLaw:
    """L(C) on the frontier of all points, with an interval that knows how the frontier was chosen.

    In each draw every run of `runs` (the run of each point) gets further noise, the frontier is chosen anew, and the law
    is refitted; the values of the refit are mirrored around those of the law, since the noise of the runs and that of the
    draw favor lucky runs in the same direction. The noise of a run is that of the frontier's residuals, at least `run_noise` (standard
    deviation of ln L). Raises ValueError for fewer than four budgets on the frontier; no draws if it has no more runs
    than the law has parameters.
    """
    c, y = np.asarray(compute, dtype=float), np.asarray(loss, dtype=float)
    budgets, chosen = bins(c), frontier(c, y)
    if len(chosen) < MIN_SIZES:
        raise ValueError(f"L(C) needs {MIN_SIZES} budgets on the frontier, found {len(chosen)}")
    law = fit(c[chosen], y[chosen], floor, bootstraps=0)
    names = {name: i for i, name in enumerate(dict.fromkeys(runs))}
    member = np.array([names[name] for name in runs])
    on_it, inverse, counts = np.unique(member[chosen], return_inverse=True, return_counts=True)
    degrees = len(on_it) - (3 if floor is None else 2)
    if degrees < 1 or not bootstraps:
        return law
    residuals = np.log(y[chosen]) - np.log(law(c[chosen]))
    means = np.bincount(inverse, residuals) / counts
    noise = max(float(np.sqrt((means**2 * counts).sum() / counts.sum() * len(on_it) / degrees)), run_noise)
    rng = np.random.default_rng(seed)
    spread = noise * np.sqrt(degrees / rng.chisquare(degrees, bootstraps))
    drawn = np.log(y) + spread[:, None] * rng.standard_normal((bootstraps, len(names)))[:, member]
    masks = staircases(budgets, drawn)
    used = masks.any(axis=0)
    center = float(np.log(c[chosen]).mean())
    best = np.array([law.alpha * (law.log_x0 - center), law.alpha] + ([law.floor] if floor is None else []))
    starts = np.repeat(best[None], bootstraps, axis=0)
    refits, _ = solve(np.log(c[used]) - center, drawn[:, used], floor, starts, masks[:, used].astype(float))
    x = np.log(c[used]) - center
    reflected = 2 * np.log(law(c[used])) - values_and_slopes(x, refits, floor)[0]
    mirrored, _ = solve(x, reflected, floor, starts)
    draws = np.column_stack([parameters(mirrored, center, floor), spread])
    low, high = np.percentile(draws[:, 0], (2.5, 97.5))
    return replace(law, alpha_interval=(float(low), float(high)), noise=noise, draws=draws)


def candidates(rows: Sequence[Row], curves: Sequence[Row], column: str = "val_loss") -> list[Row]:
    """Points that may be on the frontier: with a constant learning rate, every validation after the warm-up; with a
    decaying schedule, only the end of each run, since an earlier point would have a lower loss with a schedule of its
    length."""
    points = [row for row in rows if row.get(column) is not None]
    constant = {row["run_id"]: row for row in rows if row.get("schedule") == "constant"}
    for point in curves:
        row = constant.get(point["run_id"])
        if (
            row is not None
            and point.get(column) is not None
            and float(row.get("warmup") or 0) < point["images"] < row["images_seen"]
        ):
            points.append(
                row | {"flops_exact": point["flops_exact"], "images_seen": point["images"], column: point[column]}
            )
    return points


@dataclass(frozen=True)
class Parabola:
    """Loss as a function of ln N at one compute budget (FLOP). `best`: N of its minimum. `interval`: 95 % interval of it,
    None if no budget has more than three points. `error`: standard error of ln(best) per relative noise of a run.
    `residuals`: of the points, relative to their loss."""

    compute: float
    coefficients: tuple[float, float, float]
    best: float
    best_images: float
    error: float
    residuals: np.ndarray
    rows: list[Row]
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class IsoFLOP:
    """A parabola per budget; the best size and the best number of images as powers of compute (None for fewer than
    three budgets); rejected budgets, as text."""

    parabolas: list[Parabola]
    refused: list[str]
    size_law: PowerLaw | None
    images_law: PowerLaw | None


def budgets(rows: Sequence[Row]) -> list[list[Row]]:
    """Runs grouped by compute; groups of fewer than three sizes are left out, and groups that are no budgets: the
    gaps to the next groups are not much wider than they are."""
    groups: dict[int, list[Row]] = {}
    for row, number in zip(rows, bins([row["flops_exact"] for row in rows]), strict=True):
        groups.setdefault(number, []).append(row)
    ends = [[np.log(find(row["flops_exact"] for row in groups[k])) for find in (min, max)] for k in range(len(groups))]
    found = []
    for k, (low, high) in enumerate(ends):
        gaps = [ends[k][0] - ends[k - 1][1]] if k else []
        gaps += [ends[k + 1][0] - high] if k + 1 < len(ends) else []
        is_budget = min(gaps, default=np.inf) > max(2 * (high - low), SAME_BUDGET)
        if is_budget and len({row["params_main"] for row in groups[k]}) >= 3:
            found.append(groups[k])
    return found


def window(sizes: np.ndarray, center: float) -> np.ndarray:
    """The sizes near a minimum: within `WINDOW` in ln N, and at least the two nearest on each side."""
    logs = np.log(sizes) - np.log(center)
    below, above = sizes[logs < -1e-9], sizes[logs > 1e-9]
    near = sizes[np.abs(logs) <= WINDOW]
    return np.unique(np.concatenate([near, below[-POINTS_PER_SIDE:], above[:POINTS_PER_SIDE]]))


def isoflop(
    rows: Sequence[Row], column: str = "val_loss", bootstraps: int = 1000, law: PowerLaw | None = None
) -> IsoFLOP:
    """Fits parabolas to the points near each budget's minimum. A minimum at the edge of the sizes is rejected, since
    larger or smaller networks are missing. `law`: L(C), by whose slope losses are moved to the budget's mean compute."""
    parabolas, refused = [], []
    for group in budgets(rows):
        compute = float(np.exp(np.mean([np.log(row["flops_exact"]) for row in group])))
        if law is not None:
            group = [row | {column: row[column] - float(law(row["flops_exact"]) - law(compute))} for row in group]
        sizes = np.array(sorted({row["params_main"] for row in group}), dtype=float)
        means = np.array([np.mean([row[column] for row in group if row["params_main"] == size]) for size in sizes])
        lowest = int(means.argmin())
        found = None if lowest in (0, len(sizes) - 1) else parabola(group, sizes, float(sizes[lowest]), compute, column)
        if found is None:
            side = "smallest" if lowest == 0 else "largest" if lowest == len(sizes) - 1 else "edge"
            refused.append(
                f"{compute:.3g} FLOP: the minimum is at the {side} of {len(sizes)} sizes, so the optimum is unknown"
            )
        else:
            parabolas.append(found)
    noise, degrees = pooled(parabolas)
    if degrees:
        half = noise * float(stdtrit(degrees, 0.975))
        ends = [(np.exp(-half * one.error), np.exp(half * one.error)) for one in parabolas]
        parabolas = [
            replace(one, interval=(one.best * float(low), one.best * float(high)))
            for one, (low, high) in zip(parabolas, ends, strict=True)
        ]
    size_law = law_of_minima(parabolas, [one.best for one in parabolas], noise, degrees, bootstraps)
    images_law = law_of_minima(parabolas, [one.best_images for one in parabolas], noise, degrees, bootstraps)
    return IsoFLOP(parabolas, refused, size_law, images_law)


def pooled(parabolas: Sequence[Parabola]) -> tuple[float, int]:
    """(relative noise of a run around its parabola, from all budgets together; its degrees of freedom)."""
    degrees = sum(len(one.rows) - 3 for one in parabolas)
    if degrees < 1:
        return 0.0, 0
    return float(np.sqrt(sum(np.square(one.residuals).sum() for one in parabolas) / degrees)), degrees


def law_of_minima(
    parabolas: Sequence[Parabola], values: Sequence[float], noise: float, degrees: int, bootstraps: int, seed: int = 0
) -> PowerLaw | None:
    """Best size or images as a power of compute: a weighted line through the minima, whose draws move each of them by its
    own error. None for fewer than three budgets."""
    if len(parabolas) < 3:
        return None
    x, y = np.log([one.compute for one in parabolas]), np.log(values)
    error = np.array([one.error for one in parabolas])
    weights = error**-2 / (error**-2).sum()
    center = float(weights @ x)

    def lines(values: np.ndarray) -> np.ndarray:
        """alpha, log_x0 of the lines through rows of values."""
        slope = (values * weights) @ (x - center) / (weights @ (x - center) ** 2)
        return np.column_stack([-slope, center - (values @ weights) / slope])

    alpha, log_x0 = lines(y[None])[0]
    law = PowerLaw(float(alpha), float(log_x0), 0.0, float(np.corrcoef(x, y)[0, 1]), None, len(x), noise, len(x))
    own = float(np.sqrt((np.square((y - np.log(law(np.exp(x)))) / error)).sum() / (len(x) - 2)))
    if not degrees or not bootstraps:
        return law
    noise, degrees = (
        (own, len(x) - 2) if own > noise else (noise, degrees)
    )  # more than the runs' noise moves the minima
    rng = np.random.default_rng(seed)
    spread = noise * np.sqrt(degrees / rng.chisquare(degrees, bootstraps))
    drawn = lines(np.log(law(np.exp(x))) + spread[:, None] * error * rng.standard_normal((bootstraps, len(x))))
    draws = np.column_stack([drawn, np.zeros(bootstraps), spread])
    low, high = np.percentile(drawn[:, 0], (2.5, 97.5))
    return replace(law, alpha_interval=(float(low), float(high)), draws=draws)


def parabola(group: Sequence[Row], sizes: np.ndarray, lowest: float, compute: float, column: str) -> Parabola | None:
    """The parabola around the lowest size, fitted again around its own minimum; None if that is outside of its points."""
    first = parabola_at(group, sizes, lowest, compute, column)
    return first and parabola_at(group, sizes, first.best, compute, column)


def parabola_at(group: Sequence[Row], sizes: np.ndarray, center: float, compute: float, column: str) -> Parabola | None:
    """The parabola through the sizes near `center`; None if its minimum is outside of them."""
    near = window(sizes, center)
    chosen = [row for row in group if row["params_main"] in near]
    x, y = np.log([row["params_main"] for row in chosen]), np.array([row[column] for row in chosen])
    middle = x.mean()
    a, b, c = (float(value) for value in np.polyfit(x - middle, y, 2))
    if a <= 0 or not x.min() <= middle - b / (2 * a) <= x.max():
        return None
    best = float(np.exp(middle - b / (2 * a)))
    by_size = sorted((row["params_main"], row["images_seen"]) for row in chosen)
    images = np.exp(np.interp(np.log(best), np.log([n for n, _ in by_size]), np.log([d for _, d in by_size])))
    residuals = (y - np.polyval((a, b, c), x - middle)) / y
    error = error_of_minimum(x - middle, (a, b, c)) * float(y.mean())
    coefficients = (a, float(b - 2 * a * middle), float(c - b * middle + a * middle**2))
    return Parabola(compute, coefficients, best, float(images), error, residuals, chosen)


def error_of_minimum(x: np.ndarray, coefficients: tuple[float, float, float]) -> float:
    """Standard error of -b / (2 a) for points of unit noise, by linear error propagation."""
    a, b, _ = coefficients
    design = np.vander(x, 3)
    gradient = np.array([b / (2 * a**2), -1 / (2 * a), 0.0])
    return float(np.sqrt(gradient @ np.linalg.inv(design.T @ design) @ gradient))
