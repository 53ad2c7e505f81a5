"""Samples and scores of a VAR over a grid of sampling settings: which point is best, how sure that is, and the front of
fidelity against variety."""

import csv
from collections.abc import Callable, Iterable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from matplotlib.figure import Figure

from varlab.distributed import WorkSplit
from varlab.files import atomic_write

PARTS = ("/low", "/high", "/std", "/real_against_real")  # of names of scores


def evaluate_grid(
    points: Mapping[str, Iterable[float]],
    sample: Callable[[Path, dict[str, Any]], None],
    evaluate: Callable[[Path], dict[str, Any] | None],
    out: Path,
) -> str:
    """Samples and scores a VAR at each point of a grid of sampling settings; writes grid.csv and grid.png into `out`.
    Existing images and features are reused. Returns the best point, and how sure that is, as text.

    `sample(folder, point)` writes the samples of a point, `evaluate(folder)` scores them, or returns None in all processes of
    torchrun but the first, which do nothing more. Raises ValueError if there is no point, or too few samples for a distance.

    In grid.csv, `on_front` says that no other point has both more precision and more recall; `lowest` and `not_worse`: see
    `stability`.
    """
    rows: list[dict[str, Any]] = []
    resampled: list[list[float]] = []
    for values in product(*points.values()):
        point = dict(zip(points, values, strict=True))
        folder = out / "-".join(f"{key}{value:g}" for key, value in point.items())
        sample(folder, point)
        if (found := evaluate(folder)) is None:
            continue
        rows.append({**point, **{key: value for key, value in found.items() if isinstance(value, float)}})
        resampled.append(found.get("resampled_distances", []))
        write_rows(rows, out / "grid.csv")
    if WorkSplit.of_environment().rank > 0:
        return ""
    if not rows:
        raise ValueError("the grid has no point: give at least one value of cfg_scale, top_k and top_p")
    score = next((key for key in rows[0] if key.startswith(("fid", "frechet_distance"))), None)
    if score is None:
        raise ValueError("a grid is compared by its distances, which need at least 2 images: give more (grid.num)")
    measured = np.array([row[score] for row in rows])
    best = int(measured.argmin())
    text = f"lowest {score} {measured[best]:.4g} at {named(rows[best], points)}"
    common = [key for key in rows[0] if not key.endswith(PARTS) and all(key in row for row in rows)]
    axes = [[key for key in common if key.split("/")[0] == name][:1] for name in ("recall", "precision")]
    axes = [*axes[0], *axes[1]]
    if len(axes) == 2:
        for row, is_on_front in zip(rows, front(np.array([[row[key] for key in axes] for row in rows])), strict=True):
            row["on_front"] = bool(is_on_front)
    if len(rows) > 1 and all(resampled):
        lowest, not_worse = stability(measured, np.array(resampled))
        for row, share, other in zip(rows, lowest, not_worse, strict=True):
            row |= {"lowest": round(float(share), 4), "not_worse": bool(other)}
        others = [named(row, points) for i, row in enumerate(rows) if not_worse[i] and i != best]
        text += f", in {100 * lowest[best]:.0f} % of resamplings; "
        text += f"not clearly worse: {'; '.join(others)}" if others else "all others are clearly worse"
    write_rows(rows, out / "grid.csv")
    plot(rows, score, axes, best, out / "grid.png")
    return text


def named(row: dict[str, Any], points: Iterable[str]) -> str:
    """A point as text."""
    return ", ".join(f"{key}={row[key]:g}" for key in points)


def front(coordinates: Float[np.ndarray, "P d"]) -> Bool[np.ndarray, " P"]:
    """The points than which no other is larger in all coordinates and in one strictly (Pareto)."""
    no_less = np.all(coordinates[None] >= coordinates[:, None], axis=2)
    more = np.any(coordinates[None] > coordinates[:, None], axis=2)
    return np.logical_not(np.any(no_less & more, axis=1))


def stability(
    measured: Float[np.ndarray, " P"], resampled: Float[np.ndarray, "P R"]
) -> tuple[Float[np.ndarray, " P"], Bool[np.ndarray, " P"]]:
    """(share of resamplings in which each point has the smallest distance, whether it could be as good as the point that was
    measured best: the 95 % interval of the difference contains 0). Resampling r draws the same real images for all points.
    """
    lowest = np.bincount(resampled.argmin(axis=0), minlength=len(measured)) / resampled.shape[1]
    best = measured.argmin()
    differences = resampled - resampled[best]
    center = 2 * (measured - measured[best]) - differences.mean(axis=1)
    return lowest, center <= 1.96 * differences.std(axis=1, ddof=1)


def write_rows(rows: list[dict[str, Any]], file: Path) -> None:
    """Writes grid.csv."""
    columns = dict.fromkeys(key for row in rows for key in row)
    with atomic_write(file) as partial, open(partial, "w", encoding="utf-8", newline="") as opened:
        writer = csv.DictWriter(opened, list(columns))
        writer.writeheader()
        writer.writerows(rows)


def plot(rows: list[dict[str, Any]], score: str, front_axes: list[str], best: int, path: Path) -> None:
    """The distance against guidance, one line per pair of filters, and precision against recall; bars are 95 % intervals (of
    the distance: below the measured one, which few images bias upward). The best point is a star, other real images are a dashed
    line and a cross."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)

    def ends(chosen: list[dict[str, Any]], key: str) -> list[list[float]]:
        return [[row.get(f"{key}/{end}", np.nan) for row in chosen] for end in ("low", "high")]

    for top_k, top_p in dict.fromkeys((row["top_k"], row["top_p"]) for row in rows):
        chosen = [row for row in rows if (row["top_k"], row["top_p"]) == (top_k, top_p)]
        chosen.sort(key=lambda row: row["cfg_scale"])
        x = [row["cfg_scale"] for row in chosen]
        (line,) = left.plot(x, [row[score] for row in chosen], "o-", label=f"top_k {top_k:g}, top_p {top_p:g}")
        left.vlines(x, *ends(chosen, score), color=line.get_color(), alpha=0.5)
        if len(front_axes) == 2:
            across, up = ([row[key] for row in chosen] for key in front_axes)
            right.plot(across, up, "o-", color=line.get_color())
            right.hlines(up, *ends(chosen, front_axes[0]), color=line.get_color(), alpha=0.5)
            right.vlines(across, *ends(chosen, front_axes[1]), color=line.get_color(), alpha=0.5)
            for scale, *place in zip(x, across, up, strict=True):
                right.annotate(f"{scale:g}", place, xytext=(4, 4), textcoords="offset points", fontsize=8)
    left.plot(rows[best]["cfg_scale"], rows[best][score], "*", ms=14, color="0.2", zorder=3)
    left.set(xlabel="cfg_scale", ylabel=score, title="bars: 95 % interval, without the bias of few images")
    if floor := rows[0].get(f"{score}/real_against_real"):
        left.axhline(floor, color="0.5", ls="--", label="other real images")
    if len(front_axes) == 2:
        right.set(xlabel=front_axes[0], ylabel=front_axes[1], title="numbers: cfg_scale")
        right.plot(*(rows[best][key] for key in front_axes), "*", ms=14, color="0.2", zorder=3)
        real = [rows[0].get(f"{key}/real_against_real") for key in front_axes]
        if None not in real:
            right.plot(*real, "kx")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    left.legend(fontsize=8)
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=150, format="png")
