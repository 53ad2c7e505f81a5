"""The best loss for a given compute: the frontier of all training curves, and the best size of each budget (IsoFLOP).

Hoffmann et al. 2022, first and second approach. Compute is the exact count, not 6ND.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from varlab.scaling.power_law import PowerLaw, Values, fit

Row = dict[str, Any]
SAME_BUDGET = 0.1  # budgets whose logarithms differ by less are treated as one
POINTS_PER_SIDE = 3  # maximum number of points on each side of the minimum that a parabola is fitted to


def frontier(compute: Values, loss: Values) -> list[int]:
    """Indices of the points with lower loss than every point of less compute, in order of compute."""
    best, chosen = np.inf, []
    for i in sorted(range(len(compute)), key=lambda i: (compute[i], loss[i])):
        if loss[i] < best:
            best = loss[i]
            chosen.append(i)
    return chosen


def candidates(rows: Sequence[Row], curves: Sequence[Row], column: str = "val_loss") -> list[Row]:
    """Points that may be on the frontier: with a constant learning rate, every validation after the warm-up; with a
    decaying schedule, only the end of each run, since an earlier point would have a lower loss with a schedule of its
    length."""
    points = [
        {key: row[key] for key in ("run_id", "depth", "flops_exact", "images_seen")} | {column: row[column]}
        for row in rows
    ]
    constant = {row["run_id"]: row for row in rows if row.get("schedule") == "constant"}
    for point in curves:
        row = constant.get(point["run_id"])
        if row is not None and point.get(column) is not None and point["images"] > float(row.get("warmup") or 0):
            points.append(
                {
                    "run_id": row["run_id"],
                    "depth": row["depth"],
                    "flops_exact": point["flops_exact"],
                    "images_seen": point["images"],
                    column: point[column],
                }
            )
    return points


@dataclass(frozen=True)
class Parabola:
    """Loss as a function of ln N at one compute budget (FLOP). `best`: N of its minimum. `spread`: standard error of
    the minimum's ln N."""

    compute: float
    coefficients: tuple[float, float, float]
    best: float
    best_images: float
    spread: float
    rows: list[Row]


@dataclass(frozen=True)
class IsoFLOP:
    """A parabola per budget; the best size and the best number of images as powers of compute (None for fewer than
    three budgets); rejected budgets, as text."""

    parabolas: list[Parabola]
    refused: list[str]
    size_law: PowerLaw | None
    images_law: PowerLaw | None


def budgets(rows: Sequence[Row]) -> list[list[Row]]:
    """Finished runs grouped by compute; groups of fewer than three sizes are left out."""
    groups: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: row["flops_exact"]):
        if groups and np.log(row["flops_exact"] / groups[-1][0]["flops_exact"]) < SAME_BUDGET:
            groups[-1].append(row)
        else:
            groups.append([row])
    return [group for group in groups if len({row["params_main"] for row in group}) >= 3]


def isoflop(rows: Sequence[Row], column: str = "val_loss", bootstraps: int = 1000) -> IsoFLOP:
    """Fits parabolas to the points near each budget's minimum. A minimum at the edge of the sizes is rejected, since
    larger or smaller networks are missing."""
    parabolas, refused = [], []
    for group in budgets(rows):
        compute = float(np.exp(np.mean([np.log(row["flops_exact"]) for row in group])))
        sizes = np.array(sorted({row["params_main"] for row in group}))
        means = np.array([np.mean([row[column] for row in group if row["params_main"] == size]) for size in sizes])
        lowest = int(means.argmin())
        near = sizes[max(lowest - POINTS_PER_SIDE, 0) : lowest + POINTS_PER_SIDE + 1]
        chosen = [row for row in group if row["params_main"] in near]
        x, y = np.log([row["params_main"] for row in chosen]), np.array([row[column] for row in chosen])
        center = x.mean()
        a, b, c = np.polyfit(x - center, y, 2)
        best = center - b / (2 * a) if a > 0 else np.nan
        if lowest in (0, len(sizes) - 1) or not x.min() <= best <= x.max():
            side = "smallest" if lowest == 0 else "largest" if lowest == len(sizes) - 1 else "edge"
            refused.append(
                f"{compute:.3g} FLOP: the minimum is at the {side} of {len(sizes)} sizes, so the optimum is unknown"
            )
            continue
        by_size = sorted((row["params_main"], row["images_seen"]) for row in chosen)
        images = np.exp(np.interp(best, np.log([n for n, _ in by_size]), np.log([d for _, d in by_size])))
        spread = spread_of_minimum(x - center, y, (a, b, c))
        coefficients = (float(a), float(b - 2 * a * center), float(c - b * center + a * center**2))
        parabolas.append(Parabola(compute, coefficients, float(np.exp(best)), float(images), spread, chosen))
    laws: list[PowerLaw | None] = [None, None]
    if len(parabolas) >= 3:
        compute = [parabola.compute for parabola in parabolas]
        for i, values in enumerate([[p.best for p in parabolas], [p.best_images for p in parabolas]]):
            laws[i] = fit(compute, values, floor=0.0, bootstraps=bootstraps)
    return IsoFLOP(parabolas, refused, laws[0], laws[1])


def spread_of_minimum(x: np.ndarray, y: np.ndarray, coefficients: tuple[float, float, float]) -> float:
    """Standard error of -b / (2 a) by linear error propagation; NaN for fewer than four points."""
    degrees = len(x) - 3
    if degrees < 1:
        return float("nan")
    a, b, _ = coefficients
    design = np.vander(x, 3)
    noise = np.square(y - design @ np.array(coefficients)).sum() / degrees
    covariance = noise * np.linalg.inv(design.T @ design)
    gradient = np.array([b / (2 * a**2), -1 / (2 * a), 0.0])
    return float(np.sqrt(gradient @ covariance @ gradient))
