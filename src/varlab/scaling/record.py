"""What was fitted to what, and how: fits.json, and the checklist of "(Mis)Fitting: A Survey of Scaling Laws" (arXiv
2502.18969) for report.md and report.html."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from varlab.files import atomic_write
from varlab.scaling.analysis import COMPUTE, SIZE, Analysis
from varlab.scaling.parametric import CLEARLY, DELTA, NAMES, POLISHED, ParametricLaw, Problem
from varlab.scaling.power_law import PowerLaw
from varlab.scaling.runs import Row

KEPT = ("val_loss", SIZE), ("val_loss", COMPUTE)  # laws whose draws are written, beside those of L(N, D)


def rounded(values: Any) -> Any:
    """Numbers with six significant digits, nested as they are."""
    return [rounded(value) for value in values] if np.ndim(values) else float(f"{float(values):.6g}")


def drawn(draws: np.ndarray | None, names: Sequence[str], with_draws: bool) -> dict[str, Any]:
    """Names, covariance, and on demand the draws themselves."""
    if draws is None:
        return {}
    found = {"parameters": list(names), "covariance": rounded(np.cov(draws.T)), "num_draws": len(draws)}
    return found | ({"draws": rounded(draws)} if with_draws else {})


def law_json(law: PowerLaw, with_draws: bool = False) -> dict[str, Any]:
    """A power law for a JSON file."""
    kept = {key: value for key, value in asdict(law).items() if key != "draws"}
    return kept | drawn(law.draws, ("alpha", "log_x0", "floor", "noise"), with_draws)


def surface_json(law: ParametricLaw, with_draws: bool = False) -> dict[str, Any]:
    """L(N, D) for a JSON file."""
    kept = {key: value for key, value in law.__dict__.items() if key not in ("draws", "form", "others")}
    return {"form": law.form.words, **kept, "intervals": law.intervals()} | drawn(
        law.draws, (*NAMES, "noise"), with_draws
    )


def as_json(analysis: Analysis) -> dict[str, Any]:
    """Everything for fits.json."""
    surface, iso = analysis.surface, analysis.isoflop
    found: dict[str, Any] = {
        "settings": {**asdict(analysis.settings), "form": analysis.settings.form and analysis.settings.form.words},
        "counts": analysis.runs.counts,
        "runs": [row["name"] for row in analysis.runs.rows],
        "left_out": [*analysis.runs.left_out, *[f"{row['name']}: {reason}" for row, reason in analysis.outliers]],
        "laws": [{"y": y, "x": x, **law_json(law, (y, x) in KEPT)} for (y, x), law in analysis.laws.items()],
        "parametric": None,
    }
    if surface is not None:
        law = surface.law
        found["parametric"] = surface_json(law, with_draws=True) | {
            "delta": DELTA if law.form.loss == "huber" else None,
            "starts": len(starts_of(analysis)),
            "near_ties": [form.words for form in surface.near_ties],
            "lack_of_fit": surface.lack_of_fit,
            "repeat_decay": surface.repeat_decay,
            "points": [
                {"run": row["name"], "size": row[SIZE], "images": images, "loss": row["val_loss"],
                 "residual": float(np.log(row["val_loss"] / law(row[SIZE], images)))}
                for row, images in zip(surface.points, map(float, surface.images), strict=True)
            ],
        }  # fmt: skip
        found["parametric_other_loss"] = surface_json(surface.other_loss)
        found["parametric_interaction"] = surface.interaction and surface_json(surface.interaction)
        found["held_out_error_percent"] = [
            {"form": held.form.words, **held.errors, "mean": held.score} for held in surface.held_out
        ]
    found["isoflop"] = {
        "budgets": [
            {
                "compute": p.compute,
                "best_size": p.best,
                "interval": p.interval,
                "best_images": p.best_images,
                "points": len(p.rows),
            }
            for p in iso.parabolas
        ],
        "refused": iso.refused,
        "size_law": iso.size_law and law_json(iso.size_law),
        "images_law": iso.images_law and law_json(iso.images_law),
    }
    return found | {"extrapolation": analysis.extrapolation, "missing": analysis.missing}


def write_json(analysis: Analysis, path: Path) -> None:
    """Writes fits.json: indented, but a list of numbers on one line."""
    text = re.sub(
        r"\[[\s\d.,eE+-]*\]", lambda found: " ".join(found[0].split()), json.dumps(as_json(analysis), indent=2)
    )
    with atomic_write(path) as partial:
        partial.write_text(text + "\n", encoding="utf-8")


def starts_of(analysis: Analysis) -> np.ndarray:
    """Starting points of the fit of L(N, D)."""
    surface = analysis.surface
    assert surface is not None
    x = np.log([row[SIZE] for row in surface.points])
    loss = np.log([row["val_loss"] for row in surface.points])
    return Problem(x, np.log(surface.images), loss, surface.law.form).starts()


def values_of(rows: Sequence[Row], column: str) -> str:
    """The different values of a column, or that it is not in the table."""
    values = sorted({row[column] for row in rows if row.get(column) is not None}, key=str)
    if not values:
        return "not in the table"
    shown = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in values]
    return ", ".join(shown) if len(shown) <= 6 else f"{len(shown)} values, {shown[0]} to {shown[-1]}"


def checklist(analysis: Analysis) -> list[tuple[str, str]]:
    """(question, answer) pairs."""
    rows, settings, surface, counts = analysis.runs.rows, analysis.settings, analysis.surface, analysis.runs.counts
    is_counted = not any("6 N D" in note for note in analysis.runs.notes)
    sizes = sorted({row[SIZE] for row in rows})
    floor = "fitted" if settings.floor is None else "none" if settings.floor == 0 else f"{settings.floor:g} nat, given"
    left = [*analysis.runs.left_out, *[f"{row['name']}: {reason}" for row, reason in analysis.outliers]]
    found = [
        ("Laws", "L(N) = E + (N0 / N)^alpha at equal images, L(C) likewise on the frontier,"
            " L(N, D) = E + A / N^alpha + B / D^beta"),
        ("N counts", "parameters of the transformer blocks (params_main), without embeddings and head"
            if is_own(rows) else "the column given as N"),
        ("D counts", f"{counts} seen in training, repeats included" + (
            "" if surface is None or surface.repeat_decay is None else f"; repeats are discounted with R* = {surface.repeat_decay:.3g}"
        )),
        ("C counts", "training FLOPs as in the table (varlab: term by term, tokenizer apart)"
            if is_counted else "6 N D, since the table has no FLOPs"),
        ("Loss", f"validation loss in nat per token, mean over all tokens; floor E: {floor}"),
        ("Sizes", f"{len(sizes)}, N from {sizes[0]:.4g} to {sizes[-1]:.4g}"),
        (counts.capitalize(), f"{min(row['images_seen'] for row in rows):,.0f} to {max(row['images_seen'] for row in rows):,.0f};"
            f" different ones: {values_of(rows, 'unique_images')}"),
        ("Points used", f"{len(rows)} runs, one point each (the end of the run)" + (
            f"; L(N, D) also from training curves, {0 if surface is None else len(surface.points)} points" if settings.intermediate else ""
        )),
        ("Points left out", "; ".join(left) or "none"),
        ("Learning rate, schedule, batch", "; ".join(values_of(rows, column) for column in ("lr_peak", "schedule", "batch"))),
        ("Warm-up, weight decay, precision", "; ".join(values_of(rows, column) for column in ("warmup", "weight_decay", "precision"))),
        ("Seeds", values_of(rows, "seed")),
        ("Fit of L(N) and L(C)", "least squares in ln L, Levenberg-Marquardt from lines in ln(L - E) for a grid of floors"),
        ("Their intervals", f"{settings.bootstraps} parametric draws with the noise of the residuals, itself drawn (Student's t);"
            " L(C): per run, and the frontier is chosen anew in each draw"),
    ]  # fmt: skip
    if surface is not None:
        law = surface.law
        delta = f"Huber, delta {DELTA:g} in ln L" if law.form.loss == "huber" else "squares of ln L"
        scores = "; ".join(f"{held.form.words} {held.score:.3f} %" for held in surface.held_out) or "the form was given"
        found += [
            ("Fit of L(N, D)", f"{law.form.words}; sum of {delta}; {len(starts_of(analysis))} starts, the best {POLISHED} by"
                f" Levenberg-Marquardt, the best one by L-BFGS-B; objective {law.objective:.5g}"),
            ("Form chosen by", f"mean error of predictions for the quarter with the most N, D and C: {scores}; the default is left only"
                f" for a form with less than {CLEARLY:g} of its error"),
            ("Residuals of ln L", f"standard deviation {100 * law.noise:.3g} %; all of them are in fits.json"),
            ("Intervals of L(N, D)", f"{settings.bootstraps} draws of whole runs (branches stay with their trunk), seed {settings.seed};"
                " draws and covariance are in fits.json"),
        ]  # fmt: skip
    return [*found, ("Not fitted", "; ".join(analysis.missing) or "nothing")]


def is_own(rows: Sequence[Row]) -> bool:
    """Whether varlab wrote the rows."""
    return all("params_token" in row or "sizes" in row for row in rows)
