"""All fits of a set of runs: L(N) and Err(N) with their floor, also per scale; compute frontier; IsoFLOP; L(N, D). Each is
fitted alone: one that the runs do not allow is named with the reason, the others are not affected."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar

from varlab.scaling import checks
from varlab.scaling.frontier import IsoFLOP, candidates, fit_frontier, frontier, isoflop
from varlab.scaling.parametric import (
    Form,
    HeldOut,
    ParametricLaw,
    choose,
    compare_forms,
    effective_data,
    fit_parametric,
)
from varlab.scaling.power_law import MIN_SIZES, PowerLaw, exponents_by_floor, fit
from varlab.scaling.runs import Row, Runs, is_positive

SCORES = ("val_loss", "val_loss_last", "val_err", "val_err_last")
SIZE, COMPUTE = "params_main", "flops_exact"
EQUAL_IMAGES = 1.02  # runs whose numbers of images differ by less saw the same number
REPEATS = 2.0  # passes over the images from which on a run says something about repeated data


@dataclass(frozen=True)
class FitSettings:
    """`floor`: of losses; None fits it, 0 means none. `form`: of L(N, D); None selects it by held-out extrapolation.
    `repeated`: discounts repeated images; True fits the constant R*, a number gives it. `outliers`: `leave_out` or
    `keep`. `intermediate`: L(N, D) is fitted to points of the training curves as well."""

    floor: float | None = None
    form: Form | None = None
    repeated: bool | float | int = False
    bootstraps: int = 1000
    seed: int = 0
    outliers: str = "leave_out"
    intermediate: bool = False


def parse_floor(setting: str | float | int) -> float | None:
    """None for `fitted`, 0 for `none`, else the number given in nats. Raises ValueError for anything else."""
    named = {"fitted": None, "none": 0.0}
    if setting in named:
        return named[setting]  # pyright: ignore[reportArgumentType]
    try:
        floor = float(setting)
    except ValueError:
        floor = np.nan
    if not 0 <= floor < np.inf:
        raise ValueError(f"floor={setting!r}: choose none, fitted, or a number in nats, at least 0")
    return floor


@dataclass(frozen=True)
class Surface:
    """L(N, D): the law, the points it was fitted to, how its form was chosen, and what speaks against it."""

    law: ParametricLaw
    other_loss: ParametricLaw  # the same form, fitted with the other loss
    interaction: ParametricLaw | None  # only if `lack_of_fit` is not empty
    points: list[Row]
    images: np.ndarray  # D of the points
    held_out: list[HeldOut]
    near_ties: list[Form]
    lack_of_fit: list[str]
    repeat_decay: float | None  # R* of repeated images; None if they are not discounted

    def effective(self, images: float | int, unique: float | int | None) -> float:
        """D of the law for a number of images, some of them repeated."""
        if self.repeat_decay is None or not unique:
            return float(images)
        return float(effective_data(images, unique, self.repeat_decay))


@dataclass(frozen=True)
class Analysis:
    """All fits. `missing` names the fits that failed, with the reason."""

    runs: Runs  # without the outliers
    settings: FitSettings
    outliers: list[tuple[Row, str]]
    fixed: list[Row]  # the runs of equal images that L(N) is fitted to
    laws: dict[tuple[str, str], PowerLaw]
    frontiers: dict[str, list[Row]]
    isoflop: IsoFLOP
    surface: Surface | None
    floors: dict[str, list[tuple[float, float, float]]]
    extrapolation: dict[str, Any] | None
    missing: list[str] = field(default_factory=list)

    @property
    def num_scales(self) -> int:
        """Number of scales whose losses the runs logged."""
        return len(scale_columns(self.runs.rows))


def scale_columns(rows: Sequence[Row]) -> list[str]:
    """Columns of the loss of each scale, coarse to fine."""
    return sorted({key for row in rows for key in row if key.startswith("val_loss_scale_")})


def of_equal_images(rows: Sequence[Row]) -> list[Row]:
    """The largest group of runs that saw the same number of images: most sizes, then most images."""
    groups: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: row["images_seen"]):
        if groups and row["images_seen"] <= groups[-1][0]["images_seen"] * EQUAL_IMAGES:
            groups[-1].append(row)
        else:
            groups.append([row])
    return max(groups, key=lambda group: (len({row[SIZE] for row in group}), group[0]["images_seen"]), default=[])


def run_of(row: Row) -> str:
    """The run that a row belongs to; a branch belongs to the run whose first steps it shares."""
    return str(row.get("parent_run") or row.get("name") or row["run_id"])


def floor_of(y: str, settings: FitSettings) -> float | None:
    """The floor of a law of y: a given one belongs to losses, and not to one scale of them."""
    if not y.startswith("val_loss"):
        return 0.0
    return 0.0 if y.startswith("val_loss_scale") and settings.floor is not None else settings.floor


def analyse(runs: Runs, settings: FitSettings, is_loss_enough: bool = False) -> Analysis:
    """All fits that the runs allow; with `is_loss_enough` only those of the loss over all tokens, which answer questions."""
    scores, scales = (SCORES[:1], []) if is_loss_enough else (SCORES, scale_columns(runs.rows))
    missing: list[str] = []
    lowest = min(row["val_loss"] for row in runs.rows)
    if settings.floor is not None and settings.floor >= lowest:
        raise ValueError(f"floor={settings.floor:g} is not below all losses: the smallest is {lowest:.4g}")
    outliers = checks.outliers(runs.rows)
    if settings.outliers == "leave_out" and len(outliers) < len(runs.rows):
        gone = [row for row, _ in outliers]
        runs = replace(runs, rows=[row for row in runs.rows if all(row is not one for one in gone)])
    rows, laws = runs.rows, {}
    surface = surface_of(runs, settings, missing)
    fixed = of_equal_images(rows)
    if (found := len({row[SIZE] for row in fixed})) < MIN_SIZES:
        missing.append(f"L(N): needs {MIN_SIZES} sizes that saw equally many {runs.counts} (within 2 %), found {found}")
        fixed = []
    for y in [*scores, *scales]:
        usable = [row for row in fixed if is_positive(row.get(y))]
        if len({row[SIZE] for row in usable}) >= MIN_SIZES:
            xs, ys = [row[SIZE] for row in usable], [row[y] for row in usable]
            try:
                laws[y, SIZE] = fit(xs, ys, floor_of(y, settings), settings.bootstraps, settings.seed)
            except ValueError as error:
                missing.append(f"{y} against size: {error}")
        if 0 < len(usable) < len(fixed):
            missing.append(f"{y}: {len(fixed) - len(usable)} of {len(fixed)} runs have no usable value of it")
    frontiers: dict[str, list[Row]] = {}
    noise = max(surface.law.noise if surface and not surface.lack_of_fit else 0.0, checks.seed_noise(rows) or 0.0)
    for y in scores:
        points = candidates(
            [row for row in rows if is_positive(row.get(y))], runs.curves if y != "val_err_last" else [], y
        )
        if not points:
            continue
        compute, values = [point[COMPUTE] for point in points], [point[y] for point in points]
        frontiers[y] = [points[i] for i in frontier(compute, values)]
        own, spread = [run_of(point) for point in points], noise if y.startswith("val_loss") else 0.0
        try:
            laws[y, COMPUTE] = fit_frontier(
                compute, values, own, floor_of(y, settings), settings.bootstraps, settings.seed, spread
            )
        except ValueError as error:
            missing.append(f"{y} against compute: {error}")
    floors = {}
    for y in () if is_loss_enough else ("val_loss", "val_loss_last"):
        usable = [row for row in fixed if is_positive(row.get(y))]
        if (y, SIZE) in laws and np.ptp([row[y] for row in usable]) > 0:
            floors[y] = exponents_by_floor([row[SIZE] for row in usable], [row[y] for row in usable])
    is_predicted = ("val_loss", SIZE) in laws and not is_loss_enough
    extrapolation = extrapolated(fixed, settings, missing) if is_predicted else None
    iso = isoflop(rows, bootstraps=settings.bootstraps, law=laws.get(("val_loss", COMPUTE)))
    return Analysis(runs, settings, outliers, fixed, laws, frontiers, iso, surface, floors, extrapolation, missing)


def surface_of(runs: Runs, settings: FitSettings, missing: list[str]) -> Surface | None:
    """L(N, D) in the given form or the one to use by held-out extrapolation; None, with the reason, if it cannot be
    fitted."""
    points = list(runs.rows)
    if settings.intermediate:
        points = candidates(runs.rows, runs.curves)
    size, compute, loss = (np.array([row[name] for row in points], dtype=float) for name in (SIZE, COMPUTE, "val_loss"))
    try:
        decay = repeat_decay(points, settings)
        images = np.array([
            float(effective_data(row["images_seen"], row["unique_images"], decay))
            if decay is not None and row.get("unique_images") else float(row["images_seen"])
            for row in points
        ])  # fmt: skip
        if settings.form is not None:
            held_out, form, near = [], settings.form, []
        else:
            held_out = compare_forms(size, images, loss, compute, settings.floor)
            form, near = choose(held_out, settings.floor)
            free = form._replace(exponents="free")
            if form.exponents == "tied" and len(points) > free.num_parameters:
                tied, untied = (fit_parametric(size, images, loss, one) for one in (form, free))
                if checks.lack_of_fit(points, images, tied) and not checks.lack_of_fit(points, images, untied):
                    form, near = free, [one for one in near if one.exponents != "tied" and one != free]
        groups = [run_of(row) for row in points]
        law = fit_parametric(size, images, loss, form, groups, settings.bootstraps, settings.seed)
        law = replace(law, others=tuple(fit_parametric(size, images, loss, other) for other in near))
        other = fit_parametric(size, images, loss, form._replace(loss="squares" if form.loss == "huber" else "huber"))
    except ValueError as error:
        said = str(error)
        missing.append(
            (said if said.startswith("L(N, D)") else f"L(N, D): {said}")
            + (
                " (branch=1,0.5,0.25,0.125 gives four numbers of images per size)"
                if "numbers of images" in said
                else ""
            )
        )
        return None
    doubts, interaction = checks.lack_of_fit(points, images, law), None
    if doubts and form.exponents != "interaction" and len(points) > 8:
        interaction = fit_parametric(size, images, loss, form._replace(exponents="interaction"))
        if settings.form is None:
            more = compare_forms(size, images, loss, compute, settings.floor, ("interaction",))
            held_out = sorted([*held_out, *more], key=lambda one: one.score)
    return Surface(law, other, interaction, points, images, held_out, near, doubts, decay)


def repeat_decay(rows: Sequence[Row], settings: FitSettings) -> float | None:
    """R* of repeated images (Muennighoff et al. 2023): None if they are not discounted, the given one, or the one with
    which L(N, D) fits best. Raises ValueError if the runs do not determine it."""
    if settings.repeated is False:
        return None
    if settings.repeated is not True:
        return float(settings.repeated)
    unique = np.array([row.get("unique_images") or np.nan for row in rows], dtype=float)
    size, seen, loss = (
        np.array([row[name] for row in rows], dtype=float) for name in (SIZE, "images_seen", "val_loss")
    )
    if int((seen / unique > REPEATS).sum()) < 3 or np.isnan(unique).any():
        raise ValueError(
            "repeated=true fits the constant R* of repeated images, which needs unique_images of all runs and 3 runs of more than"
            f" {REPEATS:g} passes; give it as in repeated=15 (Muennighoff et al. 2023)"
        )
    form = settings.form or Form("tied", settings.floor)

    def objective(log_decay: float) -> float:
        return fit_parametric(size, effective_data(seen, unique, np.exp(log_decay)), loss, form).objective

    coarse = np.linspace(np.log(0.5), np.log(500), 15)
    best = int(np.argmin([objective(value) for value in coarse]))
    around = (coarse[max(best - 1, 0)], coarse[min(best + 1, len(coarse) - 1)])
    return float(np.exp(minimize_scalar(objective, bounds=around, method="bounded", options={"xatol": 1e-2}).x))  # pyright: ignore[reportAttributeAccessIssue]


def extrapolated(fixed: Sequence[Row], settings: FitSettings, missing: list[str]) -> dict[str, Any] | None:
    """L(N) fitted without the largest size, with its prediction for that size, the error, and whether each run of that
    size lies inside the interval (None: there is no interval)."""
    largest = max(row[SIZE] for row in fixed)
    kept = [row for row in fixed if row[SIZE] < largest]
    if len({row[SIZE] for row in kept}) < MIN_SIZES:
        missing.append(f"extrapolation to the largest size: needs {MIN_SIZES + 1} sizes of equal images")
        return None
    law = fit(
        [row[SIZE] for row in kept],
        [row["val_loss"] for row in kept],
        settings.floor,
        settings.bootstraps,
        settings.seed,
    )
    measured = [row["val_loss"] for row in fixed if row[SIZE] == largest]
    predicted, interval = float(law(largest)), law.interval(largest)
    return {
        "size": largest,
        "floor": law.floor,
        "alpha": law.alpha,
        "log_x0": law.log_x0,
        "predicted": predicted,
        "interval": interval,
        "found": float(np.mean(measured)),
        "error_percent": 100 * (predicted / float(np.mean(measured)) - 1),
        "inside": None if interval is None else all(interval[0] <= loss <= interval[1] for loss in measured),
    }
