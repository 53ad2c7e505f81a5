"""Two recipes at equal compute: how much compute the one needs for the loss that the other reaches with one unit."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from varlab.scaling.analysis import COMPUTE, SIZE, Analysis
from varlab.scaling.frontier import frontier
from varlab.scaling.power_law import fit, values_and_slopes
from varlab.scaling.runs import check_same
from varlab.scaling.solver import solve_many

Row = dict[str, Any]


@dataclass(frozen=True)
class Multiplier:
    """`value`: recipe b needs this many times the compute of recipe a for the same loss; with its 95 % interval.
    `by_pair`: (compute of a, multiplier) of each pair of runs, empty without pairs. `is_paired`: runs that differ in the
    recipe alone were compared one by one."""

    value: float
    interval: tuple[float, float] | None
    is_paired: bool
    num_runs: int
    by_pair: list[tuple[float, float]]
    a: list[Row]
    b: list[Row]

    def sentence(self, a: str, b: str) -> str:
        """The result in one sentence."""
        runs = f"{self.num_runs} {'pairs of runs' if self.is_paired else 'runs on the two frontiers'}"
        if self.interval is None:
            return (
                f"{a} reaches the loss of {b} with 1/{self.value:.3g} of the compute ({runs}: too few for an interval)."
            )
        low, high = self.interval
        verdict = "better" if low > 1 else "worse" if high < 1 else "not shown to differ"
        return (
            f"At equal loss, {b} needs {self.value:.3f} times the compute of {a} (95 %: {low:.3f} to {high:.3f}; {runs}):"
            f" {a} is {verdict}{'' if verdict == 'not shown to differ' else ' at equal compute'}."
        )


def pair_key(row: Row) -> tuple[Any, ...]:
    """What runs of a pair share: size, images and seed."""
    return row[SIZE], row["images_seen"], row.get("seed")


def multiplier(a: Analysis, b: Analysis, y: str = "val_loss") -> Multiplier:
    """The compute multiplier of recipe a over recipe b.

    Both frontiers follow one law of the compute, L = E + (x0 / (m C))^alpha, with m = 1 for b. Runs of equal size, images
    and seed form pairs: with at least three of them on their common frontier, only these are used, and the noise that the
    runs of a pair share is told apart from the rest, which alone matters for m. Raises ValueError for fewer than three
    points each, and for recipes whose losses cannot be compared: other tokenizers, data or pyramids.
    """
    check_same([*a.runs.rows, *b.runs.rows])
    if a.runs.counts != b.runs.counts:
        raise ValueError(f"D counts {a.runs.counts} in a and {b.runs.counts} in b: they cannot be compared")
    pairs = paired(a.runs.rows, b.runs.rows, y)
    if len(pairs) >= 3:
        on_it = frontier([row[COMPUTE] for _, row in pairs], [np.sqrt(one[y] * two[y]) for one, two in pairs])
        if len(on_it) >= 3:
            return joint_fit([pairs[i][0] for i in on_it], [pairs[i][1] for i in on_it], True, a, y)
    one, two = a.frontiers.get(y, []), b.frontiers.get(y, [])
    if len(one) < 3 or len(two) < 3:
        raise ValueError(
            f"comparing two recipes needs at least 3 runs on each frontier, or 3 pairs of equal size, images and seed; there are"
            f" {len(one)} and {len(two)}"
        )
    return joint_fit(one, two, False, a, y)


def paired(a: Sequence[Row], b: Sequence[Row], y: str) -> list[tuple[Row, Row]]:
    """(run of a, run of b) for each size and number of images that both recipes have, averaged over the seeds that both
    have."""
    others = {pair_key(row): row for row in b if row.get(y) is not None}
    groups: dict[tuple[Any, ...], list[tuple[Row, Row]]] = {}
    for row in a:
        if row.get(y) is not None and pair_key(row) in others:
            groups.setdefault(pair_key(row)[:2], []).append((row, others[pair_key(row)]))
    return [
        (averaged([one for one, _ in found], y), averaged([two for _, two in found], y)) for found in groups.values()
    ]


def averaged(rows: Sequence[Row], y: str) -> Row:
    """The first row with the geometric mean of y over all."""
    return {**rows[0], y: float(np.exp(np.mean(np.log([row[y] for row in rows]))))}


def compute_at(rows: Sequence[Row], loss: float, y: str) -> float:
    """ln C at which the runs reach a loss, interpolated."""
    ordered = sorted(rows, key=lambda row: row[y])
    return float(np.interp(loss, [row[y] for row in ordered], np.log([row[COMPUTE] for row in ordered])))


def joint_fit(one: Sequence[Row], two: Sequence[Row], is_paired: bool, a: Analysis, y: str) -> Multiplier:
    """One law for the runs of both recipes, with a shift ln m in ln C; for pairs, run `i` of both belong together."""
    settings, points, floor = a.settings, [*one, *two], a.settings.floor
    ends = [(min(row[y] for row in rows), max(row[y] for row in rows)) for rows in (one, two)]
    if max(low for low, _ in ends) > min(high for _, high in ends):
        raise ValueError(
            f"the recipes have no loss in common (a: {ends[0][0]:.4g} to {ends[0][1]:.4g}, b: {ends[1][0]:.4g} to {ends[1][1]:.4g}),"
            " so they cannot be compared at equal loss"
        )
    compute, log_y = (np.log(np.array([row[name] for row in points], dtype=float)) for name in (COMPUTE, y))
    center, is_a, count = compute.mean(), np.arange(len(points)) < len(one), len(one)
    shift = compute_at(two, middle := sum(sorted(np.ravel(ends))[1:3]) / 2, y) - compute_at(one, middle, y)
    law = fit(np.exp(compute + shift * is_a), np.exp(log_y), floor, bootstraps=0)
    start = np.array([law.alpha * (law.log_x0 - center), law.alpha] + ([law.floor] if floor is None else []) + [shift])
    lower = np.array([-np.inf] * 2 + ([0.0] if floor is None else []) + [-np.inf])
    blocks, degrees = [slice(None)], [len(points) - len(start)]
    turn = np.eye(len(points))  # to coordinates whose noise is independent: for pairs, their means and differences
    if is_paired:
        turn = np.block([[np.eye(count), np.eye(count)], [np.eye(count), -np.eye(count)]]) / np.sqrt(2)
        blocks, degrees = [slice(count), slice(count, None)], [count - len(start) + 1, count - 1]
    spreads = np.ones(len(points))

    def model(v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        values, slopes = values_and_slopes(compute - center + v[:, -1:] * is_a, v[:, :-1], floor)
        by_shift = -v[:, 1:2] * slopes[..., 0] * is_a
        slopes = np.concatenate([slopes, by_shift[..., None]], axis=-1)
        return values @ turn.T / spreads, turn @ slopes / spreads[:, None]

    best, residuals = start[None], np.zeros(len(points))
    for _ in range(3 if is_paired else 1):  # the spreads of means and differences follow from the residuals
        best, _ = solve_many(model, best, turn @ log_y / spreads, lower=lower, iterations=200)
        residuals = (turn @ log_y / spreads - model(best)[0][0]) * spreads
        noise = [
            float(np.sqrt((residuals[block] ** 2).sum() / max(free, 1)))
            for block, free in zip(blocks, degrees, strict=True)
        ]
        for block, value in zip(blocks, noise, strict=True):
            spreads[block] = max(value, 1e-9)
    interval = None
    if min(degrees) >= 1 and settings.bootstraps:
        rng, draws = np.random.default_rng(settings.seed), settings.bootstraps
        drawn = np.repeat(model(best)[0], draws, axis=0)
        for block, free in zip(blocks, degrees, strict=True):
            drawn[:, block] += np.sqrt(free / rng.chisquare(free, (draws, 1))) * rng.standard_normal(
                drawn[:, block].shape
            )
        refits, _ = solve_many(model, np.repeat(best, draws, axis=0), drawn, lower=lower)
        low, high = np.exp(np.percentile(refits[:, -1], (2.5, 97.5)))
        interval = (float(low), float(high))
    by_pair = []
    if is_paired:
        slopes = values_and_slopes(compute[:count] - center + best[0, -1], best[:, :-1], floor)[1][0, :, 0] * best[0, 1]
        shifts = best[0, -1] - residuals[count:] * np.sqrt(2) / slopes
        by_pair = [(float(row[COMPUTE]), float(np.exp(shift))) for row, shift in zip(one, shifts, strict=True)]
    return Multiplier(
        float(np.exp(best[0, -1])),
        interval,
        is_paired,
        count if is_paired else len(points),
        by_pair,
        list(one),
        list(two),
    )
