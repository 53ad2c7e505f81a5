"""Answers from the fits: the loss of the next size, the best use of a compute budget, how far a run is from the fit of
the others, which run would narrow the prediction interval most."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from varlab.cost.flops import parameter_counts, training_flops
from varlab.scaling.analysis import COMPUTE, SIZE, Analysis, images_of, lack_of_fit, power_law, run_of
from varlab.scaling.parametric import ParametricLaw, fit_parametric
from varlab.scaling.runs import Row

DEPTHS = range(1, 129)


@dataclass(frozen=True)
class Candidate:
    """A possible run: its cost in FLOP, and the width of the target's interval after it relative to now."""

    depth: int
    images: float | int
    flops: float | int
    narrowing: float


def sizes_of(rows: list[Row], depth: int) -> dict[str, Any]:
    """Sizes of a network of another depth, by the rule that the runs follow (width proportional to depth).

    Raises ValueError if they follow no such rule.
    """
    known = max(rows, key=lambda row: row["depth"])
    ratios = {row["width"] / row["depth"] for row in rows}
    if len(ratios) > 1 or not known.get("sizes"):
        raise ValueError(
            f"the runs do not have one ratio of width to depth (found {sorted(ratios)}), so other depths cannot be computed"
        )
    return {**known["sizes"], "depth": depth, "width": int(ratios.pop()) * depth, "num_heads": depth}


def size_of(rows: list[Row], depth: int) -> int:
    """N, the parameters of the blocks."""
    return parameter_counts(sizes_of(rows, depth))[SIZE]


def flops_of(rows: list[Row], depth: int) -> int:
    """Training FLOPs per image."""
    return training_flops(sizes_of(rows, depth))


def parametric(analysis: Analysis) -> ParametricLaw:
    """L(N, D). Raises ValueError if it could not be fitted."""
    if analysis.parametric is None:
        raise ValueError(next(line for line in analysis.missing if line.startswith("L(N, D)")))
    return analysis.parametric


def predict(analysis: Analysis, depth: int, images: float | int | None = None) -> list[str]:
    """The loss of a depth after `images` (new) images; by default, after the number that L(N) was fitted at."""
    rows = analysis.runs.rows
    size, at = size_of(rows, depth), float(analysis.fixed[0]["images_seen"])
    if images is None or abs(images / at - 1) < 0.02:
        law, name, images = analysis.laws["val_loss", SIZE], "L(N)", at
        value, interval = float(law(size)), law.interval(size)
    else:
        surface = parametric(analysis)
        name, value, interval = "L(N, D)", float(surface(size, images)), surface.interval(size, images)
    largest, most = max(row[SIZE] for row in rows), max(row["images_seen"] for row in rows)
    width = "no interval: too few sizes" if interval is None else f"95 %: {interval[0]:.4f} to {interval[1]:.4f}"
    return [
        f"depth {depth} ({size / 1e6:,.3g} M parameters in blocks) after {images:,.0f} images: loss {value:.4f} ({width}) by {name}",
        f"cost: {flops_of(rows, depth) * images:.3g} FLOP; {size / largest:.3g} times the largest size and {images / most:.3g}"
        " times the most images in the fit",
    ]


def optimal(analysis: Analysis, compute: float | int) -> list[str]:
    """Depth and images with the lowest predicted loss for a compute budget (FLOP), with the range over bootstraps."""
    law, rows = parametric(analysis), analysis.runs.rows
    sizes = np.array([size_of(rows, depth) for depth in DEPTHS], dtype=float)
    images = compute / np.array([flops_of(rows, depth) for depth in DEPTHS], dtype=float)
    usable = images >= 1
    if not usable.any():
        raise ValueError(f"compute={compute:g} FLOP is less than one image of the smallest network")
    losses = np.where(usable, law(sizes, np.maximum(images, 1)), np.inf)
    best = int(losses.argmin())
    lines = [
        f"{compute:.3g} FLOP: depth {DEPTHS[best]} ({sizes[best] / 1e6:,.3g} M parameters in blocks), {images[best]:,.0f} images, loss"
        f" {losses[best]:.4f}"
    ]
    if law.resamples is not None:
        from varlab.scaling.parametric import evaluate

        found = [
            DEPTHS[int(np.where(usable, evaluate(parameters, sizes, images), np.inf).argmin())]
            for parameters in law.resamples
        ]
        low, high = (int(depth) for depth in np.percentile(found, (2.5, 97.5), method="nearest"))
        lines.append(
            f"95 % of bootstraps: depth {low} to {high}, {images[high - 1]:,.0f} to {images[low - 1]:,.0f} images"
        )
    near = [i for i in (best - 1, best + 1) if 0 <= i < len(DEPTHS) and usable[i]]
    lines += [f"  depth {DEPTHS[i]}: {images[i]:,.0f} images, loss {losses[i]:.4f}" for i in near]
    if DEPTHS[best] in (DEPTHS[0], DEPTHS[-1]):
        lines.append("the best depth is at the edge of the range that was searched")
    return lines


def compare(analysis: Analysis, run: str) -> list[str]:
    """How far a run is from the fit of all others (L(N, D) if available, otherwise L(N)), in percent and in standard
    deviations of a run."""
    rows = analysis.runs.rows
    chosen = [row for row in rows if run in (row["name"], row.get("run_id"))]
    if not chosen:
        raise ValueError(f"run={run!r} is none of {', '.join(str(row['name']) for row in rows[:20])}")
    surface, settings, lines = analysis.parametric, analysis.settings, []
    others = [row for row in (rows if surface else analysis.fixed) if run_of(row) != run_of(chosen[0])]
    sizes, loss = [row[SIZE] for row in others], [row["val_loss"] for row in others]
    bootstraps = min(settings.bootstraps, 500)
    for row in chosen:
        if surface is None:
            if row not in analysis.fixed:
                raise ValueError(f"run={run!r} saw {row['images_seen']:,} images, but L(N) is fitted at another number")
            law = power_law(sizes, loss, settings.floor, replace(settings, bootstraps=bootstraps))
            name, expected, interval, noise = "L(N)", float(law(row[SIZE])), law.interval(row[SIZE]), law.noise
        else:
            seen, images = images_of(row, settings.repeated), [images_of(other, settings.repeated) for other in others]
            rest = fit_parametric(sizes, images, loss, surface.form, [run_of(other) for other in others], bootstraps)
            name, expected, noise = "L(N, D)", float(rest(row[SIZE], seen)), rest.noise
            interval = rest.interval(row[SIZE], seen)
        away = float(np.log(row["val_loss"] / expected))
        verdict = ""
        if interval is not None:
            inside = interval[0] <= row["val_loss"] <= interval[1]
            verdict = (
                f"; 95 %: {interval[0]:.4f} to {interval[1]:.4f}: {'as expected' if inside else 'not as expected'}"
            )
        spread = f", {away / noise:+.1f} standard deviations of a run" if noise > 0 else ""
        lines.append(
            f"{row['name']}: loss {row['val_loss']:.4f}, {name} of the others predicts {expected:.4f}"
            f" ({100 * away:+.2f} %{spread}){verdict}"
        )
    return lines


def gradient(law: ParametricLaw, size: float | int, images: float | int) -> np.ndarray:
    """Derivative of ln L with respect to the free parameters of the form."""
    by_size, by_images = np.exp(law.log_a) / size**law.alpha, np.exp(law.log_b) / images**law.beta
    alpha, beta = -np.log(size) * by_size, -np.log(images) * by_images
    parts = [alpha + beta] if law.form.tied else [alpha, beta]
    parts += [by_size, by_images] + ([1.0] if law.form.floor is None else [])
    return np.array(parts) / float(law(size, images))


def next_runs(
    analysis: Analysis, depth: int | None = None, images: float | int | None = None, budget: float | int | None = None
) -> list[Candidate]:
    """Runs that would narrow the prediction interval for (depth, images) most, the best first; default target: twice
    the largest depth and images. Linearized around the fit; runs cost at most `budget` FLOP (default: twice the most
    expensive so far)."""
    law, rows = parametric(analysis), analysis.runs.rows
    most, deepest = max(row["images_seen"] for row in rows), max(row["depth"] for row in rows)
    target = gradient(law, size_of(rows, depth or 2 * deepest), images or 2 * most)
    budget = budget or 2 * max(row[COMPUTE] for row in rows)
    design = np.array([gradient(law, row[SIZE], images_of(row, analysis.settings.repeated)) for row in rows])
    scale = np.abs(design).max(axis=0)
    covariance = np.linalg.pinv((design / scale).T @ (design / scale), rcond=1e-12)
    target = target / scale
    before = float(target @ covariance @ target)
    found = []
    for new_depth in range(1, 2 * deepest + 1):
        for new_images in (most / 4, most / 2, most, 2 * most):
            flops = flops_of(rows, new_depth) * new_images
            if flops > budget:
                continue
            row = gradient(law, size_of(rows, new_depth), new_images) / scale
            seen = covariance @ row
            after = before - float(target @ seen) ** 2 / (1 + float(row @ seen))
            found.append(Candidate(new_depth, new_images, flops, float(np.sqrt(max(after, 0) / before))))
    return sorted(found, key=lambda candidate: candidate.narrowing)


def answer(analysis: Analysis, ask: str, given: dict[str, Any]) -> list[str]:
    """The lines that answer `predict`, `optimal`, `compare` or `next`. Raises ValueError for an unknown question or a
    missing setting."""
    if ask not in ("predict", "optimal", "compare", "next"):
        raise ValueError(f"{ask!r}: choose predict, optimal, compare or next")
    needed = {"predict": "depth", "optimal": "compute", "compare": "run"}.get(ask)
    if needed is not None and given.get(needed) is None:
        raise ValueError(f"varlab scaling {ask} needs {needed}=...")
    warning = [] if analysis.parametric is None else lack_of_fit(analysis.runs.rows, analysis.parametric)
    if ask == "predict":
        lines = predict(analysis, given["depth"], given["images"])
        return lines + (warning if "by L(N, D)" in lines[0] else [])
    if ask == "optimal":
        return optimal(analysis, given["compute"]) + warning
    if ask == "compare":
        return compare(analysis, str(given["run"])) + warning
    best = next_runs(analysis, given["depth"], given["images"], given["compute"])[:5]
    if not best:
        raise ValueError("no run fits the budget: give a larger compute=...")
    return warning + [
        f"depth {c.depth}, {c.images:,.0f} images ({c.flops:.3g} FLOP): prediction interval {c.narrowing:.0%} as wide as now"
        for c in best
    ]
