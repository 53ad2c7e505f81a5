"""All fits of a set of runs: L(N) and Err(N) with their floor, also per scale; compute frontier; IsoFLOP; L(N, D)."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from varlab.scaling.frontier import IsoFLOP, candidates, frontier, isoflop
from varlab.scaling.parametric import Form, HeldOut, ParametricLaw, compare_forms, effective_data, fit_parametric
from varlab.scaling.power_law import MIN_SIZES_FOR_INTERVAL, PowerLaw, Values, exponents_by_floor, fit
from varlab.scaling.runs import Row, Runs

SCORES = ("val_loss", "val_loss_last", "val_err", "val_err_last")
SIZE, COMPUTE = "params_main", "flops_exact"


@dataclass(frozen=True)
class FitSettings:
    """`floor`: of losses; None fits it, 0 means none. `form`: of L(N, D); None selects it by held-out extrapolation."""

    floor: float | None = None
    form: Form | None = None
    repeated: bool = False
    bootstraps: int = 1000
    seed: int = 0


def parse_floor(setting: str | float) -> float | None:
    """None for `fitted`, 0 for `none`, else the number given in nats. Raises ValueError for anything else."""
    named = {"fitted": None, "none": 0.0}
    if setting in named:
        return named[setting]  # pyright: ignore[reportArgumentType]
    try:
        return float(setting)
    except ValueError:
        raise ValueError(f"floor={setting!r}: choose none, fitted, or a number in nats") from None


@dataclass(frozen=True)
class Analysis:
    """All fits. `missing` names the fits that failed, with the reason."""

    runs: Runs
    settings: FitSettings
    fixed: list[Row]  # the runs of equal images that L(N) is fitted to
    laws: dict[tuple[str, str], PowerLaw]
    frontiers: dict[str, list[Row]]
    isoflop: IsoFLOP
    parametric: ParametricLaw | None
    squares: ParametricLaw | None  # the same form, fitted with the other loss
    held_out: list[HeldOut]
    floors: dict[str, list[tuple[float, float, float]]]
    extrapolation: dict[str, Any] | None
    missing: list[str] = field(default_factory=list)

    @property
    def num_scales(self) -> int:
        """Number of scales whose losses the runs logged."""
        return len(scale_columns(self.runs.rows))

    def as_json(self) -> dict[str, Any]:
        """Everything but the resamples, for fits.json."""
        return {
            "laws": [{"y": y, "x": x, **without_resamples(law)} for (y, x), law in self.laws.items()],
            "parametric": None if self.parametric is None else described(self.parametric),
            "parametric_other_loss": None if self.squares is None else described(self.squares),
            "held_out_error_percent": [
                {"form": held.form.words, "largest_size": held.largest_size, "largest_images": held.largest_images}
                for held in self.held_out
            ],
            "isoflop": {
                "budgets": [
                    {"compute": p.compute, "best_size": p.best, "best_images": p.best_images, "spread_of_ln": p.spread}
                    for p in self.isoflop.parabolas
                ],
                "refused": self.isoflop.refused,
                "size_law": self.isoflop.size_law and without_resamples(self.isoflop.size_law),
                "images_law": self.isoflop.images_law and without_resamples(self.isoflop.images_law),
            },
            "extrapolation": self.extrapolation,
            "missing": self.missing,
        }


def without_resamples(law: PowerLaw) -> dict[str, Any]:
    """A law for a JSON file."""
    return {key: value for key, value in asdict(law).items() if key != "resamples"}


def described(law: ParametricLaw) -> dict[str, Any]:
    """A parametric law for a JSON file."""
    kept = {key: value for key, value in asdict(law).items() if key not in ("resamples", "form")}
    return {"form": law.form.words, **kept, "intervals": law.intervals()}


def scale_columns(rows: Sequence[Row]) -> list[str]:
    """Columns of the loss of each scale, coarse to fine."""
    return sorted({key for row in rows for key in row if key.startswith("val_loss_scale_")})


def of_equal_images(rows: Sequence[Row]) -> list[Row]:
    """The largest group of runs that saw the same number of images (within 2 %): most sizes, then most images."""
    groups: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: row["images_seen"]):
        if groups and row["images_seen"] <= groups[-1][0]["images_seen"] * 1.02:
            groups[-1].append(row)
        else:
            groups.append([row])
    return max(groups, key=lambda group: (len({row[SIZE] for row in group}), group[0]["images_seen"]))


def images_of(row: Row, repeated: bool) -> float:
    """D of the fits: images seen, or with `repeated` the effective number, which discounts repeated images."""
    return float(effective_data(row["images_seen"], row["unique_images"])) if repeated else float(row["images_seen"])


def run_of(row: Row) -> str:
    """The run that a row belongs to; a branch belongs to the run whose first steps it shares."""
    return str(row.get("parent_run") or row["name"])


def analyse(runs: Runs, settings: FitSettings) -> Analysis:
    """All fits that the runs allow. Raises ValueError if not even L(N) can be fitted."""
    missing: list[str] = []
    fixed = of_equal_images(runs.rows)
    laws: dict[tuple[str, str], PowerLaw] = {}
    for y in [*SCORES, *scale_columns(fixed)]:
        if all(row.get(y) is not None for row in fixed):
            floor = settings.floor if y.startswith("val_loss") else 0.0
            if y.startswith("val_loss_scale") and floor is not None:
                floor = 0.0  # a given floor belongs to the mean over tokens, not to one scale
            laws[y, SIZE] = power_law([row[SIZE] for row in fixed], [row[y] for row in fixed], floor, settings)
    frontiers: dict[str, list[Row]] = {}
    for y in SCORES:
        if (y, SIZE) in laws:
            points = candidates(runs.rows, runs.curves if y != "val_err_last" else [], y)
            chosen = [points[i] for i in frontier([p[COMPUTE] for p in points], [p[y] for p in points])]
            frontiers[y] = chosen
            try:
                floor = settings.floor if y.startswith("val_loss") else 0.0
                laws[y, COMPUTE] = power_law([p[COMPUTE] for p in chosen], [p[y] for p in chosen], floor, settings)
            except ValueError as error:
                missing.append(f"{y} against compute: {error} (points on the frontier)")
    parametric, squares, held_out = parametric_laws(runs.rows, settings, missing)
    floors = {
        y: exponents_by_floor([row[SIZE] for row in fixed], [row[y] for row in fixed])
        for y in ("val_loss", "val_loss_last")
        if (y, SIZE) in laws
    }
    return Analysis(
        runs,
        settings,
        fixed,
        laws,
        frontiers,
        isoflop(runs.rows, bootstraps=settings.bootstraps),
        parametric,
        squares,
        held_out,
        floors,
        extrapolated(fixed, settings, missing),
        missing,
    )


def power_law(x: Values, y: Values, floor: float | None, settings: FitSettings) -> PowerLaw:
    """Fits a power law; for fewer than four sizes, which do not determine a floor, the floor is 0 instead of fitted."""
    if floor is None and len(np.unique(x)) < MIN_SIZES_FOR_INTERVAL:
        floor = 0.0
    return fit(x, y, floor, settings.bootstraps, settings.seed)


def parametric_laws(
    rows: Sequence[Row], settings: FitSettings, missing: list[str]
) -> tuple[ParametricLaw | None, ParametricLaw | None, list[HeldOut]]:
    """(L(N, D) in the given or the best extrapolating form, the same with the other loss, all forms compared)."""
    size = np.array([row[SIZE] for row in rows], dtype=float)
    images = np.array([images_of(row, settings.repeated) for row in rows])
    loss, groups = np.array([row["val_loss"] for row in rows]), [run_of(row) for row in rows]
    num_parameters = 5
    if len(rows) <= num_parameters or len(np.unique(size)) < 3 or len(np.unique(images)) < 3:
        missing.append(
            f"L(N, D): needs more than {num_parameters} runs of at least 3 sizes and 3 numbers of images, found {len(rows)} of"
            f" {len(np.unique(size))} and {len(np.unique(images))} (branch=1,0.5,0.25,0.125 gives four numbers per size)"
        )
        return None, None, []
    floors: list[float | None] = [None, 0.0] if not settings.floor else [None, 0.0, settings.floor]
    held_out = compare_forms(size, images, loss, floors) if settings.form is None else []
    form = settings.form or (held_out[0].form if held_out else Form())
    law = fit_parametric(size, images, loss, form, groups, settings.bootstraps, settings.seed)
    other = form._replace(loss="squares" if form.loss == "huber" else "huber")
    return law, fit_parametric(size, images, loss, other), held_out


def seed_noise(rows: Sequence[Row]) -> float | None:
    """Standard deviation of ln L between runs that differ only in their seed; None if there are none."""
    groups: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        groups.setdefault((row["depth"], row["images_seen"], row.get("lr_peak")), []).append(
            float(np.log(row["val_loss"]))
        )
    repeated = [np.array(values) for values in groups.values() if len(values) > 1]
    if not repeated:
        return None
    squares = sum(float(np.square(values - values.mean()).sum()) for values in repeated)
    return float(np.sqrt(squares / sum(len(values) - 1 for values in repeated)))


def lack_of_fit(rows: Sequence[Row], law: ParametricLaw) -> list[str]:
    """A warning if runs are much farther from the fit than seeds from each other; empty without runs that differ only
    in their seed."""
    spread = seed_noise(rows)
    if spread is None or law.noise <= 3 * spread:
        return []
    return [
        f"L(N, D) does not describe these runs: their deviation from it is {law.noise / spread:.0f} times that between seeds"
    ]


def extrapolated(fixed: Sequence[Row], settings: FitSettings, missing: list[str]) -> dict[str, Any] | None:
    """L(N) fitted without the largest size, with its prediction for that size and the error."""
    largest = max(row[SIZE] for row in fixed)
    kept = [row for row in fixed if row[SIZE] < largest]
    if len({row[SIZE] for row in kept}) < 3:
        missing.append("extrapolation to the largest size: needs at least 4 sizes")
        return None
    law = power_law([row[SIZE] for row in kept], [row["val_loss"] for row in kept], settings.floor, settings)
    found = float(np.mean([row["val_loss"] for row in fixed if row[SIZE] == largest]))
    predicted = float(law(largest))
    return {
        "size": largest,
        "floor": law.floor,
        "alpha": law.alpha,
        "log_x0": law.log_x0,
        "predicted": predicted,
        "interval": law.interval(largest),
        "found": found,
        "error_percent": 100 * (predicted / found - 1),
    }
