"""Figures of an analysis at the width of a page, ready for print: PNG, SVG and PDF, and their captions. In the SVG, the id
of each point names its run."""

import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogFormatterSciNotation, LogLocator, NullFormatter

from varlab.files import atomic_write
from varlab.scaling.analysis import COMPUTE, SCORES, SIZE, Analysis, scale_columns
from varlab.scaling.power_law import PowerLaw
from varlab.scaling.recipes import Multiplier
from varlab.scaling.runs import Row, loss_words

logging.getLogger("fontTools").setLevel(logging.WARNING)  # logs every glyph that it leaves out
STYLE: Any = {
    "font.size": 8, "axes.titlesize": 8, "legend.fontsize": 7, "xtick.labelsize": 7, "ytick.labelsize": 7, "lines.linewidth": 1.0,
    "lines.markersize": 4, "axes.grid": True, "grid.alpha": 0.25, "grid.linewidth": 0.5, "axes.linewidth": 0.6,
    "legend.frameon": False, "svg.fonttype": "none", "pdf.fonttype": 42,
}  # fmt: skip
WIDTH, HEIGHT = 6.8, 2.5  # inches: two columns of text, and one row of panels
BLUE, ORANGE, RED, GRAY = (
    "#0072B2",
    "#E69F00",
    "#D55E00",
    "0.35",
)  # colors of Okabe and Ito, told apart without red and green
MAX_NAMES = 8  # in a legend
MAX_POINTS = 400  # of a drawn training curve
LABELS = {
    "val_loss": "loss, all tokens [nat/token]",
    "val_loss_last": "loss, last scale [nat/token]",
    "val_err": "error, all tokens [%]",
    "val_err_last": "error, last scale [%]",
    SIZE: "parameters of the blocks, N",
    COMPUTE: "training compute, C [FLOP]",
}
PUBLISHED = {  # floor; factor and exponent of laws in N / 1e9 or C / 1e15 (VAR, equations 11 to 16 and figure 6; ImageNet 256)
    ("val_loss", SIZE): (5.0, {"published, ImageNet 256": (2.5, 0.20)}),
    ("val_loss_last", SIZE): (4.5, {"published, ImageNet 256": (2.0, 0.23)}),
    ("val_loss", COMPUTE): (5.0, {"published (text)": (1.5e-5, 0.16), "published (figure 6)": (2.2e-5, 0.13)}),
    ("val_loss_last", COMPUTE): (4.5, {"published (text)": (2.2e-5, 0.13), "published (figure 6)": (1.5e-5, 0.16)}),
}
PUBLISHED_RANGE = {SIZE: (1.59e7, 2.0e9), COMPUTE: (7e16, 2.5e21)}  # depths 6 to 30; one epoch of d6 to 350 of d30
KINDS = ("png", "svg", "pdf")
POINT = "run:"  # prefix of the id of a point in an SVG


def words(law: PowerLaw) -> str:
    """Exponent, interval and floor of a law, as one line of text."""
    if law.alpha_interval is None:
        interval = "no interval: fewer than 4 sizes" if law.num_sizes < 4 else "no interval: too few runs"
    else:
        interval = f"95 %: {law.alpha_interval[0]:.3f} to {law.alpha_interval[1]:.3f}"
    return f"exponent {law.alpha:.3f} ({interval}), floor {law.floor:.3g}"


def colors_of(rows: Iterable[Row]) -> dict[float | int, Any]:
    """One color per size, by N."""
    sizes = sorted({row[SIZE] for row in rows})
    return dict(zip(sizes, matplotlib.colormaps["viridis"](np.linspace(0.0, 0.9, len(sizes))), strict=True))


def save(figure: Figure, out: Path, name: str) -> list[Path]:
    """Writes a figure in all formats."""
    files = []
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        for kind in KINDS:
            file = out / f"{name}.{kind}"
            with atomic_write(file) as partial:
                undated = {"Date": None} if kind == "svg" else None  # the same figure gives the same file
                figure.savefig(partial, format=kind, dpi=200, metadata=undated)
            files.append(file)
            figure.set_layout_engine(None)  # the layout of the first format is that of all
    return files


def some(values: Sequence[Any]) -> list[Any]:
    """At most `MAX_NAMES` of the values, evenly chosen, both ends kept."""
    chosen = np.unique(np.linspace(0, len(values) - 1, min(len(values), MAX_NAMES)).round().astype(int))
    return [values[i] for i in chosen]


def legend_of_sizes(figure: Figure, rows: Sequence[Row]) -> None:
    """The colors of the sizes, or of some of them, below the panels."""
    names = {row[SIZE]: f"depth {row['depth']}" if row.get("depth") else f"N {row[SIZE]:.2g}" for row in rows}
    handles = [
        Line2D([], [], marker="o", linestyle="", color=color, label=names[size])
        for size, color in some(list(colors_of(rows).items()))
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=8, columnspacing=1.0, handletextpad=0.1)


def title_of(row: Row, y: str, value: float | int) -> str:
    """Description of a point's run, used as its id."""
    name, depth = (
        row.get("name") or row["run_id"],
        f"depth {row['depth']}" if row.get("depth") else f"N {row[SIZE]:.4g}",
    )
    return f"{POINT}{name} | {depth} | {row['images_seen']:,.0f} images | {row[COMPUTE]:.3g} FLOP | {y} {loss_words(value)}"


def points(panel: Axes, rows: Sequence[Row], x: str, y: str, **style: Any) -> None:
    """One marker per run."""
    colors = colors_of(rows)
    for row in rows:
        (marker,) = panel.plot(row[x], row[y], **{"marker": "o", "color": colors[row[SIZE]], **style})
        marker.set_gid(title_of(row, y, row[y]))


def tidy(figure: Figure) -> Figure:
    """Labels on logarithmic axes that do not overlap: powers of ten, and 2 and 5 between them on short axes."""
    for panel in figure.axes:
        for axis, scale, limits in (
            (panel.xaxis, panel.get_xscale(), panel.get_xlim()),
            (panel.yaxis, panel.get_yscale(), panel.get_ylim()),
        ):
            if scale == "log":
                decades = np.log10(limits[1] / limits[0])
                axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 2 else (1.0,), numticks=8))
                axis.set_major_formatter(
                    LogFormatterSciNotation(labelOnlyBase=False, minor_thresholds=(np.inf, np.inf))
                )
                axis.set_minor_formatter(NullFormatter())
    return figure


def plot_fit(panel: Axes, law: PowerLaw, first: float | int, last: float | int) -> None:
    """A law with its 95 % band."""
    span = np.geomspace(first / 1.3, last * 1.3, 100)
    panel.plot(span, law(span), "--", color=GRAY, zorder=0)
    band = law.band(span)
    if band is not None:
        panel.fill_between(span, *band, color=GRAY, alpha=0.15, linewidth=0, zorder=0)


def limits_of(panel: Axes, x: Sequence[float | int], y: Sequence[float | int]) -> None:
    """Axis limits of the runs' own values, with a margin: bands and published lines do not stretch them."""
    low, high = min(y), max(y)
    margin = 0.08 * (high - low) or 0.01 * abs(high)
    panel.set(xscale="log", xlim=(min(x) / 1.4, max(x) * 1.4), ylim=(low - margin, high + margin))


def scaling_panels(analysis: Analysis, is_published_shown: bool = False, kind: str = "val_loss") -> Figure:
    """Loss (or error, with `kind` val_err), of all tokens and the last scale, against size (runs of equal images) and
    against compute (all curves, with the frontier)."""
    ys = [y for y in SCORES if y in analysis.frontiers and y.startswith(kind)]
    xs = [SIZE, COMPUTE] if analysis.fixed else [COMPUTE]
    figure = Figure(figsize=(WIDTH, HEIGHT * len(ys) + 0.4), layout="constrained")
    panels = figure.subplots(len(ys), len(xs), squeeze=False)
    for line, y in zip(panels, ys, strict=True):
        for panel, x in zip(line, xs, strict=True):
            (plot_size if x == SIZE else plot_compute)(panel, analysis, y)
            if is_published_shown:
                plot_published(panel, y, x)
            if panel.get_legend_handles_labels()[0]:
                panel.legend(loc="best")
    legend_of_sizes(figure, analysis.runs.rows)
    return figure


def plot_published(panel: Axes, y: str, x: str) -> None:
    """Plots the paper's laws as published, at the sizes or budgets that they were published for, as far as these lie on
    the axes. Its text and its figure 6 swap the two laws against compute, so both are plotted."""
    floor, laws = PUBLISHED.get((y, x), (0.0, {}))
    (first, last), (low, high) = PUBLISHED_RANGE[x], panel.get_xlim()
    if max(first, low) >= min(last, high):
        return
    span, (bottom, top) = np.geomspace(max(first, low), min(last, high), 50), panel.get_ylim()
    for (label, (factor, alpha)), style in zip(laws.items(), (":", "-."), strict=False):
        line = floor + (factor * span / (1e9 if x == SIZE else 1e15)) ** -alpha
        if ((line < bottom) | (line > top)).all():
            continue
        panel.plot(span, line, style, color=RED, label=label)


def plot_size(panel: Axes, analysis: Analysis, y: str) -> None:
    """Plots the runs of equal images and L(N)."""
    rows = [row for row in analysis.fixed if row.get(y) is not None]
    if not rows:
        return
    points(panel, rows, SIZE, y)
    sizes = [row[SIZE] for row in rows]
    limits_of(panel, sizes, [row[y] for row in rows])
    if (y, SIZE) in analysis.laws:
        plot_fit(panel, analysis.laws[y, SIZE], min(sizes), max(sizes))
    panel.set(xlabel=LABELS[SIZE], ylabel=LABELS[y])


def thinned(line: Sequence[tuple[float | int, float | int]]) -> list[tuple[float | int, float | int]]:
    """At most `MAX_POINTS` points of a curve, evenly spaced in ln C, the last one kept."""
    line = sorted(line)
    if len(line) <= MAX_POINTS:
        return list(line)
    wanted = np.geomspace(line[0][0], line[-1][0], MAX_POINTS)
    chosen = np.unique(np.searchsorted([c for c, _ in line], wanted).clip(0, len(line) - 1))
    return [line[i] for i in chosen]


def plot_compute(panel: Axes, analysis: Analysis, y: str) -> None:
    """Plots training curves, finished runs, the frontier and its law."""
    rows, colors = [row for row in analysis.runs.rows if row.get(y) is not None], colors_of(analysis.runs.rows)
    sizes = {row["run_id"]: row[SIZE] for row in rows if "run_id" in row}
    lines: dict[str, list[tuple[float, float]]] = {}
    for point in analysis.runs.curves:
        if point.get(y) is not None and point["run_id"] in sizes and point.get(COMPUTE):
            lines.setdefault(point["run_id"], []).append((point[COMPUTE], point[y]))
    for run_id, line in lines.items():
        panel.plot(*zip(*thinned(line), strict=True), color=colors[sizes[run_id]], linewidth=0.7, alpha=0.6)
    points(panel, rows, COMPUTE, y, markersize=3)
    front = analysis.frontiers.get(y, [])
    compute = [point[COMPUTE] for point in front]
    panel.plot(compute, [point[y] for point in front], "o", mfc="none", mec=RED, ms=6, mew=0.8, label="frontier")
    law = analysis.laws.get((y, COMPUTE))
    if law is not None:
        plot_fit(panel, law, min(compute), max(compute))
    limits_of(panel, [row[COMPUTE] for row in rows], [row[y] for row in [*rows, *front]])
    panel.set(xlabel=LABELS[COMPUTE], ylabel=LABELS[y])


def scales_panels(analysis: Analysis) -> Figure:
    """Loss of each scale against size, and the exponent of each scale, which shows which scales benefit from size."""
    columns = [column for column in scale_columns(analysis.fixed) if (column, SIZE) in analysis.laws]
    figure = Figure(figsize=(WIDTH, HEIGHT + 0.3), layout="constrained")
    left, right = figure.subplots(1, 2)
    shades = matplotlib.colormaps["plasma"](np.linspace(0.0, 0.85, len(columns)))
    shown: list[float] = []
    for column, shade in zip(columns, shades, strict=True):
        k, law = int(column.rpartition("_")[2]), analysis.laws[column, SIZE]
        rows = [row for row in analysis.fixed if row.get(column) is not None]
        span = np.geomspace(min(row[SIZE] for row in rows), max(row[SIZE] for row in rows), 60)
        left.plot(span, law(span), "--", color=shade)
        points(left, rows, SIZE, column, color=shade, markersize=3)
        if law.alpha_interval is not None and law.alpha_interval[0] > 0:
            right.errorbar(
                k,
                law.alpha,
                [[max(law.alpha - law.alpha_interval[0], 0)], [max(law.alpha_interval[1] - law.alpha, 0)]],
                fmt="o",
                color=shade,
            )
            shown.append(law.alpha)
        else:
            right.plot(k, 0, "x", color=shade)
    handles = [
        Line2D([], [], marker="o", linestyle="", color=shade, label=f"scale {int(column.rpartition('_')[2])}")
        for column, shade in zip(columns, shades, strict=True)
    ]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(len(handles), 8), columnspacing=1.2, handletextpad=0.2
    )
    left.set(xscale="log", xlabel=LABELS[SIZE], ylabel="loss of one scale [nat/token]")
    right.set(xlabel="scale, coarse to fine", ylabel="exponent of L(N), 95 %", xticks=range(len(columns)))
    right.axhline(0, color="0.6", linewidth=0.8)
    if shown:  # an interval that is open at the top does not flatten the others
        right.set_ylim(-0.15 * max(shown), 1.5 * max(shown))
    return figure


def floor_panels(analysis: Analysis) -> Figure:
    """The exponent and the correlation against the subtracted floor."""
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    for panel, (y, profile) in zip(
        figure.subplots(1, len(analysis.floors), squeeze=False)[0], analysis.floors.items(), strict=True
    ):
        floors, exponents, correlations = zip(*profile, strict=True)
        law = analysis.laws[y, SIZE]
        panel.plot(floors, exponents, color=BLUE)
        panel.plot(law.floor, law.alpha, "o", color=BLUE, label=f"used: E = {law.floor:.3g}")
        panel.set(xlabel=f"floor E of {LABELS[y]}", ylabel="exponent of L(N)")
        panel.legend(loc="upper left")
        beside = panel.twinx()
        beside.plot(floors, correlations, color=ORANGE, linestyle=":")
        beside.set_ylabel("Pearson r (dotted)")
        beside.grid(visible=False)
    return figure


def isoflop_panels(analysis: Analysis) -> Figure:
    """Loss against size at each compute budget, and the best size against compute with its intervals."""
    found = analysis.isoflop
    figure = Figure(figsize=(WIDTH, HEIGHT + 0.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    shades = matplotlib.colormaps["viridis"](np.linspace(0.0, 0.9, len(found.parabolas)))
    for parabola, shade in zip(found.parabolas, shades, strict=True):
        points(left, parabola.rows, SIZE, "val_loss", color=shade)
        sizes = np.log([row[SIZE] for row in parabola.rows])
        logs = np.linspace(sizes.min(), sizes.max(), 60)
        left.plot(
            np.exp(logs), np.polyval(parabola.coefficients, logs), color=shade, label=f"{parabola.compute:.2g} FLOP"
        )
        left.plot(parabola.best, np.polyval(parabola.coefficients, np.log(parabola.best)), "*", color=shade, ms=9)
        right.plot(parabola.compute, parabola.best, "*", color=shade, ms=9)
        if parabola.interval is not None:
            right.vlines(parabola.compute, *parabola.interval, color=shade)
    if found.size_law is not None:
        plot_fit(right, found.size_law, found.parabolas[0].compute, found.parabolas[-1].compute)
    left.set(xscale="log", xlabel=LABELS[SIZE], ylabel=LABELS["val_loss"])
    handles, names = left.get_legend_handles_labels()
    figure.legend(some(handles), some(names), loc="outside lower center", ncols=4)
    right.set(xscale="log", yscale="log", xlabel=LABELS[COMPUTE], ylabel="best N")
    return figure


def surface_panels(analysis: Analysis) -> Figure:
    """L(N, D): measured against fitted loss, residuals, and the held-out errors by which the form was chosen."""
    surface = analysis.surface
    assert surface is not None
    law, num_panels = surface.law, 3 if surface.held_out else 2
    figure = Figure(figsize=(WIDTH, HEIGHT + 0.6), layout="constrained")
    left, middle, *rest = figure.subplots(1, num_panels)
    told = [
        {
            **row,
            "expected": float(law(row[SIZE], images)),
            "residual": 100 * (row["val_loss"] / float(law(row[SIZE], images)) - 1),
        }
        for row, images in zip(surface.points, surface.images, strict=True)
    ]
    points(left, told, "expected", "val_loss")
    left.axline((told[0]["expected"], told[0]["expected"]), slope=1, color="0.5", linewidth=0.8)
    left.set(xlabel="L(N, D), fitted", ylabel="measured loss [nat/token]")
    points(middle, told, "images_seen", "residual")
    middle.axhline(0, color="0.5", linewidth=0.8)
    middle.set(xscale="log", xlabel=f"{analysis.runs.counts}, D", ylabel="measured relative to fitted [%]")
    for right in rest:
        names = [held.form.words.replace(", E fitted", "").replace(", ", "\n") for held in surface.held_out]
        place, folds = np.arange(len(names)), list(surface.held_out[0].errors)
        for i, (fold, color) in enumerate(zip(folds, (BLUE, ORANGE, RED), strict=False)):
            errors = [held.errors[fold] for held in surface.held_out]
            right.barh(
                place + 0.25 * (i - 1),
                errors,
                0.25,
                color=color,
                label=f"most {fold}" if fold != "size" else "largest N",
            )
        right.set_yticks(place, names, fontsize=6)
        right.invert_yaxis()
        right.set(xlabel="held-out error [%]")
    legend_of_sizes(figure, told)
    if rest:
        place_above = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.0), "borderaxespad": 0.2}
        rest[0].legend(fontsize=6, ncols=3, columnspacing=0.8, handlelength=1.0, handletextpad=0.4, **place_above)
    return figure


def extrapolation_panel(analysis: Analysis) -> Figure:
    """L(N) fitted without the largest size, and the measured loss of that size."""
    found = analysis.extrapolation
    assert found is not None
    figure = Figure(figsize=(WIDTH / 2, HEIGHT), layout="constrained")
    panel = figure.subplots()
    law = PowerLaw(found["alpha"], found["log_x0"], found["floor"], 0.0, None, 0)
    points(panel, analysis.fixed, SIZE, "val_loss")
    span = np.geomspace(min(row[SIZE] for row in analysis.fixed) / 1.2, found["size"] * 1.3, 80)
    panel.plot(span, law(span), "--", color=GRAY, label="fitted without the largest")
    panel.plot(found["size"], found["predicted"], "x", color=RED, ms=7, label="predicted, 95 %")
    if found["interval"] is not None:
        panel.vlines(found["size"], *found["interval"], color=RED)
    panel.set(xscale="log", xlabel=LABELS[SIZE], ylabel=LABELS["val_loss"])
    panel.legend()
    return figure


def recipes_panels(found: Multiplier, a: str, b: str) -> Figure:
    """The runs that two recipes were compared by, and the multiplier of each pair."""
    figure = Figure(figsize=(WIDTH, HEIGHT + 0.2), layout="constrained")
    left, *rest = figure.subplots(1, 2 if found.is_paired else 1, squeeze=False)[0]
    for name, rows, color, marker in ((a, found.a, BLUE, "o"), (b, found.b, ORANGE, "s")):
        left.plot([row[COMPUTE] for row in rows], [row["val_loss"] for row in rows], marker, color=color, label=name)
    left.set(xscale="log", xlabel=LABELS[COMPUTE], ylabel=LABELS["val_loss"])
    left.legend()
    for right in rest:
        right.plot(*zip(*found.by_pair, strict=True), "o", color=BLUE)
        right.axhline(1, color="0.6", linewidth=0.8)
        right.axhline(found.value, color=GRAY, linestyle="--")
        if found.interval is not None:
            right.axhspan(*found.interval, color=GRAY, alpha=0.15, linewidth=0)
        right.set(xscale="log", xlabel=LABELS[COMPUTE], ylabel="compute multiplier")
    return tidy(figure)


def laws_in_words(analysis: Analysis, kind: str) -> str:
    """The laws that a figure of losses or errors shows."""
    told = [
        f"{LABELS[y]} against {'N' if x == SIZE else 'C'}: {words(law)}"
        for (y, x), law in analysis.laws.items()
        if y in SCORES and y.startswith(kind)
    ]
    return f" Dashed: laws with their 95 % bands. {'; '.join(told)}." if told else ""


def captions(analysis: Analysis) -> dict[str, str]:
    """What each figure shows, with the settings of its fits."""
    counts = analysis.runs.counts
    equal = f"runs of {analysis.fixed[0]['images_seen']:,.0f} {counts}" if analysis.fixed else ""
    sides = f"Left: {equal} against size. Right: all runs" if analysis.fixed else "All runs"
    found = {
        "scaling": f"{sides} (points), training curves (lines) and the frontier (rings) against compute."
        + laws_in_words(analysis, "val_loss"),
        "errors": f"The same for the share of wrong tokens.{laws_in_words(analysis, 'val_err')}",
        "scales": f"Left: loss of each scale, {equal}. Right: exponents of L(N) by scale with 95 % intervals; a cross marks a scale"
        " without a gain that the runs show.",
        "floors": "Exponent of L(N) and correlation (dotted) for each floor that could be subtracted: correlation does not choose it.",
        "isoflop": "Left: loss against size at equal compute, with parabolas near the minimum. Right: best size, 95 %.",
    }
    if analysis.surface is not None:
        law = analysis.surface.law
        found["surface"] = (
            f"L(N, D) with {law.form.words}: E {law.floor:.4g}, alpha {law.alpha:.3f}, beta {law.beta:.3f} (D in {counts}). Left: measured"
            " against fitted loss. Middle: residuals. Right: error for the quarter of the runs with the most N, D or C, left out."
        )
    if analysis.extrapolation is not None:
        off = analysis.extrapolation["error_percent"]
        found["extrapolation"] = f"L(N) fitted without the largest size: its prediction is off by {off:+.2f} %."
    return found


def figures(analysis: Analysis, out: Path, is_published_shown: bool = False) -> dict[str, list[Path]]:
    """Writes all figures that the analysis allows, and captions.md; returns files by figure, the main figure first."""
    has_scales = any(y.startswith("val_loss_scale") for y, _ in analysis.laws)
    has_errors = any(y.startswith("val_err") for y in analysis.frontiers)
    wanted: dict[str, Callable[[], Figure] | None] = {
        "scaling": lambda: scaling_panels(analysis, is_published_shown),
        "errors": (lambda: scaling_panels(analysis, kind="val_err")) if has_errors else None,
        "scales": (lambda: scales_panels(analysis)) if has_scales else None,
        "floors": (lambda: floor_panels(analysis)) if analysis.floors else None,
        "isoflop": (lambda: isoflop_panels(analysis)) if analysis.isoflop.parabolas else None,
        "surface": (lambda: surface_panels(analysis)) if analysis.surface is not None else None,
        "extrapolation": (lambda: extrapolation_panel(analysis)) if analysis.extrapolation is not None else None,
    }
    with matplotlib.rc_context(STYLE):
        found = {name: save(tidy(plot()), out, name) for name, plot in wanted.items() if plot is not None}
    for name in set(wanted) - set(found):  # of earlier fits into the same folder
        for kind in KINDS:
            (out / f"{name}.{kind}").unlink(missing_ok=True)
    texts = captions(analysis)
    with atomic_write(out / "captions.md") as partial:
        partial.write_text("".join(f"**{name}.** {texts[name]}\n\n" for name in found), encoding="utf-8")
    return found
