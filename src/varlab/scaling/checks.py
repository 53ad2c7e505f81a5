"""What can be wrong with runs before they are fitted, and with a law after it: outliers, lack of fit, overfitting."""

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import fdtrc

from varlab.scaling.frontier import SAME_BUDGET
from varlab.scaling.parametric import DELTA, Form, ParametricLaw, fit_parametric
from varlab.scaling.power_law import solve, starts, values_and_slopes
from varlab.scaling.runs import Runs, key_of, loss_words

Row = dict[str, Any]
FAR = 6.0  # robust standard deviations from the fit to all runs beyond which a run is an outlier,
FAR_AT_LEAST = 0.01  # and relative distance that it must have
FEW = 1 / 8  # share of the runs that may be outliers; if more are, it is the law that does not fit
SIGNIFICANT = 1e-3  # p-value of the test for a trend in the residuals
OVERFITTED = 0.02  # relative excess of validation loss over training loss in a run that overfits


def uniform_loss(row: Row) -> float | None:
    """ln of the number of codes: the loss of a network that has learned nothing; None if the number is not known."""
    sizes = row.get("sizes")
    codes = row.get("codes") or (sizes.get("codebook_size") if isinstance(sizes, dict) else None)
    return float(np.log(codes)) if isinstance(codes, int) and codes > 1 else None


def outliers(rows: Sequence[Row]) -> list[tuple[Row, str]]:
    """Runs that went wrong, with the reason: above the loss of uniform guesses, or far from the robust fit to all runs."""
    found = []
    for row in rows:
        uniform = uniform_loss(row)
        if uniform is not None and row["val_loss"] > uniform:
            found.append(
                (row, f"its loss {row['val_loss']:.4g} is above ln(codes) = {uniform:.4g}, that of uniform guesses")
            )
    rest = [row for row in rows if all(row is not one for one, _ in found)]
    residuals = robust_residuals(rest)
    if residuals is None:
        return found
    limit = max(FAR * 1.4826 * float(np.median(np.abs(residuals))), FAR_AT_LEAST)
    far = [
        (row, f"its loss is {100 * residual:+.1f} % from the robust fit to all runs (limit {100 * limit:.1f} %)")
        for row, residual in zip(rest, residuals, strict=True)
        if abs(residual) > limit
    ]
    return found + (far if len(far) <= max(1, FEW * len(rest)) else [])


def robust_residuals(rows: Sequence[Row]) -> np.ndarray | None:
    """ln of measured over fitted loss by the Huber loss: of L(N, D), or else of L(C); None for fewer than six runs."""
    if len(rows) < 6:
        return None
    size, images, compute, loss = (
        np.array([row[name] for row in rows], dtype=float)
        for name in ("params_main", "images_seen", "flops_exact", "val_loss")
    )
    if len(rows) >= 8:
        with contextlib.suppress(ValueError):
            return np.log(loss / fit_parametric(size, images, loss, Form("tied"))(size, images))
    x = np.log(compute) - np.log(compute).mean()
    if np.ptp(x) < SAME_BUDGET:
        return None
    found, sums = solve(x, np.log(loss), None, starts(x, loss, None), delta=DELTA)
    return np.log(loss) - values_and_slopes(x, found[[int(sums.argmin())]], None)[0][0]


def seed_noise(rows: Sequence[Row]) -> float | None:
    """Standard deviation of ln L between runs that differ only in their seed; None if there are none."""
    groups: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        if row.get("seed") is not None:
            same = (row["params_main"], row["images_seen"], row.get("lr_peak"), row.get("batch"))
            groups.setdefault(same, []).append(float(np.log(row["val_loss"])))
    repeated = [np.array(values) for values in groups.values() if len(values) > 1]
    if not repeated:
        return None
    squares = sum(float(np.square(values - values.mean()).sum()) for values in repeated)
    return float(np.sqrt(squares / sum(len(values) - 1 for values in repeated)))


def lack_of_fit(rows: Sequence[Row], images: np.ndarray, law: ParametricLaw) -> list[str]:
    """What shows that L(N, D) does not describe the runs, as text: their distance from it is much larger than that
    between seeds, or it follows N, D or C instead of being random.

    `images`: D of each run, as fitted.
    """
    found = []
    spread = seed_noise(rows)
    if spread is not None and law.noise > 3 * spread:
        found.append(
            f"L(N, D) does not describe these runs: their deviation from it is {law.noise / spread:.0f} times that between seeds"
        )
    trend = trend_of_residuals(rows, images, law)
    if trend is not None:
        found.append(f"L(N, D) does not describe these runs: their deviation from it {trend}")
    return found


def trend_of_residuals(rows: Sequence[Row], images: np.ndarray, law: ParametricLaw) -> str | None:
    """Which trend the residuals of the law follow, if they follow any: an F test of a quadratic polynomial in ln N and
    ln D, after what the parameters of the law could still take up. None without a trend or with too few runs."""
    size, loss = (np.array([row[name] for row in rows], dtype=float) for name in ("params_main", "val_loss"))
    residuals = np.log(loss / law(size, images))
    robust = 1.4826 * float(np.median(np.abs(residuals)))
    residuals = np.clip(residuals, -4 * robust, 4 * robust)
    x, z = (np.log(values) - np.log(values).mean() for values in (size, images))
    basis, _ = np.linalg.qr(np.nan_to_num(scaled(law.slopes(size, images))))
    shapes = scaled(np.column_stack([x**2, z**2, x * z, x**3, z**3]))
    left = shapes - basis @ (basis.T @ shapes)
    directions, strengths, _ = np.linalg.svd(left, full_matrices=False)
    directions = directions[:, strengths > 1e-2]
    count, degrees = directions.shape[1], len(rows) - basis.shape[1] - directions.shape[1]
    residuals = residuals - basis @ (basis.T @ residuals)
    explained = float(np.square(directions.T @ residuals).sum())
    rest = float(np.square(residuals).sum()) - explained
    if count == 0 or degrees < 3 or rest <= 0:
        return None
    p_value = float(fdtrc(count, degrees, explained / count / (rest / degrees)))
    if p_value > SIGNIFICANT:
        return None
    curves = {"N": x**2, "D": z**2, "C": (x + z) ** 2, "the ratio of D to N": (z - x) ** 2}
    named = max(curves, key=lambda name: abs(np.corrcoef(curves[name], residuals)[0, 1]) if np.ptp(curves[name]) else 0)
    return f"curves with {named} instead of being random (p = {p_value:.1g})"


def scaled(columns: np.ndarray) -> np.ndarray:
    """Columns of unit length."""
    return columns / np.maximum(np.linalg.norm(columns, axis=0), 1e-300)


def divergences(runs: Runs) -> list[str]:
    """Runs that overfit, as text: where validation loss begins to exceed training loss by more than `OVERFITTED`, and
    where it was lowest if it rose again."""
    lines, names = [], {key_of(row): row for row in runs.rows}
    curves: dict[str, list[Any]] = {}
    for point in runs.curves:
        if point["run_id"] in names:
            curves.setdefault(point["run_id"], []).append(point)
    for run_id, curve in curves.items():
        row, validated, trained, gaps = names[run_id], [], [], []
        for point in curve:
            if point.get("train_loss") is not None:
                trained.append(point["train_loss"])
            if point.get("val_loss") is not None:
                validated.append(point)
                gaps.append(point["val_loss"] / (sum(trained) / len(trained)) - 1 if trained else 0.0)
                trained = []
        if gaps and gaps[-1] > OVERFITTED:
            first = next(i for i in range(len(gaps)) if min(gaps[i:]) > OVERFITTED)
            lines.append(
                f"{row['name']}: train and validation loss diverge after {seen(row, validated[first])};"
                f" validation loss ends {100 * gaps[-1]:.1f} % above training loss"
            )
        lowest = min(validated, key=lambda point: point["val_loss"], default=None)
        if lowest is not None and row["val_loss"] > 1.005 * lowest["val_loss"]:
            rise = 100 * (row["val_loss"] / lowest["val_loss"] - 1)
            lines.append(
                f"{row['name']}: validation loss was lowest ({loss_words(lowest['val_loss'])}) after {seen(row, lowest)} and ended"
                f" {rise:.1f} % higher"
            )
    return lines


def seen(row: Row, point: Row) -> str:
    """Images seen at a point of a curve, with the number of passes if it is known."""
    unique = row.get("unique_images")
    return f"{point['images']:,.0f} images" + (f" ({point['images'] / unique:.3g} passes)" if unique else "")
