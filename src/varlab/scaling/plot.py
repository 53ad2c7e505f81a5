"""Figures of an analysis, ready for print: PNG, SVG and PDF. In the SVG, the id of each point names its run."""

import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter

from varlab.files import atomic_write
from varlab.scaling.analysis import COMPUTE, SCORES, SIZE, Analysis, images_of, scale_columns
from varlab.scaling.power_law import PowerLaw
from varlab.scaling.runs import Row

logging.getLogger("fontTools").setLevel(logging.WARNING)  # logs every glyph that it leaves out
matplotlib.rcParams.update({"svg.fonttype": "none", "pdf.fonttype": 42})
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
KINDS = ("png", "svg", "pdf")
POINT = "run:"  # prefix of the id of a point in an SVG


def words(law: PowerLaw) -> str:
    """Exponent, interval and floor of a law, as one line of text."""
    if law.alpha_interval is None:
        interval = "no interval: fewer than 4 sizes" if law.num_sizes < 4 else "no interval: too few runs"
    else:
        interval = f"95 %: {law.alpha_interval[0]:.3f} to {law.alpha_interval[1]:.3f}"
    return f"exponent {law.alpha:.3f} ({interval}), floor {law.floor:.3g}"


def colors_of(rows: Iterable[Row]) -> dict[int, Any]:
    """One color per depth."""
    depths = sorted({row["depth"] for row in rows})
    return dict(zip(depths, matplotlib.colormaps["viridis"](np.linspace(0.05, 0.85, len(depths))), strict=True))


def save(figure: Figure, out: Path, name: str) -> list[Path]:
    """Writes a figure in all formats."""
    files = []
    with matplotlib.rc_context({"svg.hashsalt": name}):
        for kind in KINDS:
            file = out / f"{name}.{kind}"
            with atomic_write(file) as partial:
                undated = {"Date": None} if kind == "svg" else None  # the same figure gives the same file
                figure.savefig(partial, format=kind, dpi=150, metadata=undated)
            files.append(file)
    return files


def legend_of_depths(figure: Figure, rows: Sequence[Row]) -> None:
    """The colors of the depths, below the panels."""
    handles = [
        Line2D([], [], marker="o", linestyle="", color=color, label=f"depth {depth}")
        for depth, color in colors_of(rows).items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 8), frameon=False)


def title_of(row: Row, y: str, value: float | int) -> str:
    """Description of a point's run, used as its id."""
    name = row.get("name") or row["run_id"]
    return f"{POINT}{name} | depth {row['depth']} | {row['images_seen']:,.0f} images | {row[COMPUTE]:.3g} FLOP | {y} {value:.4f}"


def points(panel: Axes, rows: Sequence[Row], x: str, y: str, **style: Any) -> None:
    """One marker per run."""
    colors = colors_of(rows)
    for row in rows:
        (marker,) = panel.plot(
            row[x], row[y], **{"marker": "o", "color": colors[row["depth"]], "markersize": 6, **style}
        )
        marker.set_gid(title_of(row, y, row[y]))


def scaling_panels(analysis: Analysis, is_published_shown: bool = False) -> Figure:
    """Loss and error, of all tokens and the last scale, against size (runs of equal images) and against compute (all
    curves, with the frontier): the four panels of the VAR paper, once per x axis."""
    ys = [y for y in SCORES if (y, SIZE) in analysis.laws]
    figure = Figure(figsize=(4.4 * len(ys), 7.8), layout="constrained")
    panels = figure.subplots(2, len(ys), squeeze=False)
    for column, y in enumerate(ys):
        plot_law(panels[0][column], analysis.fixed, SIZE, y, analysis.laws[y, SIZE])
        plot_compute(panels[1][column], analysis, y)
        if is_published_shown:
            plot_published(panels[0][column], y, SIZE)
            plot_published(panels[1][column], y, COMPUTE)
    legend_of_depths(figure, analysis.runs.rows)
    return figure


def plot_published(panel: Axes, y: str, x: str) -> None:
    """Plots the paper's laws as published. Its text and its figure 6 swap the two laws against compute, so both are
    plotted."""
    floor, laws = PUBLISHED.get((y, x), (0.0, {}))
    first, last = panel.get_xlim()
    span = np.geomspace(first, last, 50)
    for (label, (factor, alpha)), style in zip(laws.items(), (":", "-."), strict=False):
        line = floor + (factor * span / (1e9 if x == SIZE else 1e15)) ** -alpha
        panel.plot(span, line, style, color="tab:red", linewidth=1, label=label)
        panel.legend(fontsize=8)


def plot_law(panel: Axes, rows: Sequence[Row], x: str, y: str, law: PowerLaw) -> None:
    """Plots runs and the law fitted to them."""
    points(panel, rows, x, y)
    values = [row[x] for row in rows]
    span = np.geomspace(min(values) / 1.3, max(values) * 1.3, 100)
    panel.plot(span, law(span), "--", color="0.35", linewidth=1.2, zorder=0)
    panel.set(xscale="log", xlabel=LABELS[x], ylabel=LABELS[y])
    panel.set_title(words(law), fontsize=8)
    panel.grid(alpha=0.25, which="both")


def plot_compute(panel: Axes, analysis: Analysis, y: str) -> None:
    """Plots training curves, finished runs, the frontier and its law."""
    rows, colors = analysis.runs.rows, colors_of(analysis.runs.rows)
    depths = {row["run_id"]: row["depth"] for row in rows if "run_id" in row}
    lines: dict[str, list[tuple[float, float]]] = {}
    for point in analysis.runs.curves:
        if point.get(y) is not None and point["run_id"] in depths and point.get(COMPUTE):
            lines.setdefault(point["run_id"], []).append((point[COMPUTE], point[y]))
    for run_id, line in lines.items():
        panel.plot(*zip(*sorted(line), strict=True), color=colors[depths[run_id]], linewidth=0.8, alpha=0.6)
    points(panel, rows, COMPUTE, y, markersize=4)
    front = analysis.frontiers.get(y, [])
    panel.plot(
        [p[COMPUTE] for p in front], [p[y] for p in front], "o", mfc="none", mec="tab:red", ms=8, label="frontier"
    )
    law = analysis.laws.get((y, COMPUTE))
    if law is not None:
        span = np.geomspace(min(p[COMPUTE] for p in front) / 1.3, max(p[COMPUTE] for p in front) * 1.3, 100)
        panel.plot(span, law(span), "--", color="0.35", linewidth=1.2, zorder=0)
        panel.set_title(words(law), fontsize=8)
    panel.set(xscale="log", xlabel=LABELS[COMPUTE], ylabel=LABELS[y])
    panel.legend(fontsize=8)
    panel.grid(alpha=0.25, which="both")


def scales_panels(analysis: Analysis) -> Figure:
    """Loss of each scale against size, and the exponent of each scale, which shows which scales benefit from size."""
    columns = [column for column in scale_columns(analysis.fixed) if (column, SIZE) in analysis.laws]
    figure = Figure(figsize=(9, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    shades = matplotlib.colormaps["plasma"](np.linspace(0.05, 0.85, len(columns)))
    for k, (column, shade) in enumerate(zip(columns, shades, strict=True)):
        law = analysis.laws[column, SIZE]
        values = [row[SIZE] for row in analysis.fixed]
        span = np.geomspace(min(values), max(values), 60)
        left.plot(span, law(span), "--", color=shade, linewidth=1)
        points(left, analysis.fixed, SIZE, column, color=shade, markersize=4, label=f"scale {k}")
        right.plot(k, law.alpha, "o", color=shade)
        if law.alpha_interval is not None:
            right.vlines(k, *law.alpha_interval, color=shade)
        right.annotate(f"E={law.floor:.2g}", (k, law.alpha), fontsize=7, xytext=(5, 3), textcoords="offset points")
    handles = [
        Line2D([], [], marker="o", linestyle="", color=shade, label=f"scale {k}") for k, shade in enumerate(shades)
    ]
    left.legend(handles=handles, fontsize=7)
    left.set(xscale="log", xlabel=LABELS[SIZE], ylabel="loss of one scale [nat/token]")
    right.set(xlabel="scale, coarse to fine", ylabel="exponent of L(N), 95 %", xticks=range(len(columns)))
    right.axhline(0, color="0.6", linewidth=0.8)
    return add_grid(figure)


def floor_panels(analysis: Analysis) -> Figure:
    """The exponent and the correlation against the subtracted floor."""
    figure = Figure(figsize=(4.6 * len(analysis.floors), 3.6), layout="constrained")
    for panel, (y, profile) in zip(
        figure.subplots(1, len(analysis.floors), squeeze=False)[0], analysis.floors.items(), strict=True
    ):
        floors, exponents, correlations = zip(*profile, strict=True)
        law = analysis.laws[y, SIZE]
        panel.plot(floors, exponents, color="tab:blue")
        panel.plot(law.floor, law.alpha, "o", color="tab:blue", label=f"used: E = {law.floor:.3g}")
        panel.set(xlabel="floor E [nat/token]", ylabel="exponent of L(N)", title=LABELS[y])
        panel.legend(fontsize=8, loc="upper left")
        beside = panel.twinx()
        beside.plot(floors, correlations, color="0.6", linestyle=":")
        beside.set_ylabel("Pearson r (dotted)")
    return figure


def isoflop_panels(analysis: Analysis) -> Figure:
    """Loss against size at each compute budget, and the best size against compute."""
    found = analysis.isoflop
    figure = Figure(figsize=(9, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    shades = matplotlib.colormaps["viridis"](np.linspace(0.1, 0.85, max(len(found.parabolas), 1)))
    for parabola, shade in zip(found.parabolas, shades, strict=False):
        points(left, parabola.rows, SIZE, "val_loss", color=shade)
        sizes = np.log([row[SIZE] for row in parabola.rows])
        logs = np.linspace(sizes.min(), sizes.max(), 60)
        left.plot(
            np.exp(logs), np.polyval(parabola.coefficients, logs), color=shade, label=f"{parabola.compute:.2g} FLOP"
        )
        left.plot(parabola.best, np.polyval(parabola.coefficients, np.log(parabola.best)), "*", color=shade, ms=12)
        right.plot(parabola.compute, parabola.best, "*", color=shade, ms=12)
    if found.size_law is not None:
        span = np.geomspace(found.parabolas[0].compute, found.parabolas[-1].compute, 50)
        right.plot(span, found.size_law(span), "--", color="0.35")
        right.set_title(f"best N grows as C^{-found.size_law.alpha:.2f}", fontsize=9)
    left.set(xscale="log", xlabel=LABELS[SIZE], ylabel=LABELS["val_loss"])
    left.legend(fontsize=7)
    right.set(xscale="log", yscale="log", xlabel=LABELS[COMPUTE], ylabel="best N")
    return add_grid(figure)


def surface_panels(analysis: Analysis) -> Figure:
    """L(N, D): measured against fitted loss, residuals, and the held-out errors that selected the form."""
    law = analysis.parametric
    assert law is not None
    rows = analysis.runs.rows
    num_panels = 3 if analysis.held_out else 2
    figure = Figure(figsize=(4.5 * num_panels, 3.9), layout="constrained")
    left, middle, *rest = figure.subplots(1, num_panels)
    expected = [float(law(row[SIZE], images_of(row, analysis.settings.repeated))) for row in rows]
    told = [
        {**row, "expected": value, "residual": 100 * (row["val_loss"] / value - 1)}
        for row, value in zip(rows, expected, strict=True)
    ]
    points(left, told, "expected", "val_loss", markersize=5)
    left.axline((expected[0], expected[0]), slope=1, color="0.5", linewidth=0.8)
    left.set(xlabel="L(N, D), fitted", ylabel="measured loss [nat/token]")
    left.set_title(
        f"{law.form.words}\nE {law.floor:.3g}, alpha {law.alpha:.3f}, beta {law.beta:.3f} (images)", fontsize=8
    )
    points(middle, told, "images_seen", "residual", markersize=5)
    middle.axhline(0, color="0.5", linewidth=0.8)
    middle.set(xscale="log", xlabel="images, D", ylabel="measured relative to fitted [%]")
    middle.xaxis.set_minor_formatter(NullFormatter())
    for right in rest:
        names = [held.form.words for held in analysis.held_out]
        place = np.arange(len(names))
        right.barh(place - 0.2, [held.largest_size for held in analysis.held_out], 0.4, label="largest size left out")
        right.barh(place + 0.2, [held.largest_images for held in analysis.held_out], 0.4, label="most images left out")
        right.set_yticks(place, names, fontsize=7)
        right.invert_yaxis()
        right.set(xlabel="error of the prediction [%]")
        right.legend(fontsize=7, loc="lower right")
    return add_grid(figure)


def extrapolation_panel(analysis: Analysis) -> Figure:
    """L(N) fitted without the largest size, and the measured loss of that size."""
    found = analysis.extrapolation
    assert found is not None
    figure = Figure(figsize=(5.2, 3.9), layout="constrained")
    panel = figure.subplots()
    law = PowerLaw(found["alpha"], found["log_x0"], found["floor"], 0.0, None, 0)
    points(panel, analysis.fixed, SIZE, "val_loss")
    span = np.geomspace(min(row[SIZE] for row in analysis.fixed) / 1.2, found["size"] * 1.3, 80)
    panel.plot(span, law(span), "--", color="0.35", label="fitted without the largest")
    panel.plot(found["size"], found["predicted"], "x", color="tab:red", ms=10, label="predicted")
    if found["interval"] is not None:
        panel.vlines(found["size"], *found["interval"], color="tab:red", linewidth=1)
    panel.set(xscale="log", xlabel=LABELS[SIZE], ylabel=LABELS["val_loss"])
    panel.set_title(f"prediction off by {found['error_percent']:+.2f} %", fontsize=9)
    panel.legend(fontsize=8)
    return add_grid(figure)


def add_grid(figure: Figure) -> Figure:
    """Adds light grids to all panels."""
    for panel in figure.axes:
        panel.grid(alpha=0.25, which="both")
    return figure


def figures(analysis: Analysis, out: Path, is_published_shown: bool = False) -> dict[str, list[Path]]:
    """Writes all figures that the analysis allows; returns files by figure, the main figure first."""
    wanted: dict[str, Callable[[], Figure] | None] = {
        "scaling": lambda: scaling_panels(analysis, is_published_shown),
        "scales": (lambda: scales_panels(analysis)) if scale_columns(analysis.fixed) else None,
        "floors": (lambda: floor_panels(analysis)) if analysis.floors else None,
        "isoflop": (lambda: isoflop_panels(analysis)) if analysis.isoflop.parabolas else None,
        "surface": (lambda: surface_panels(analysis)) if analysis.parametric is not None else None,
        "extrapolation": (lambda: extrapolation_panel(analysis)) if analysis.extrapolation is not None else None,
    }
    return {name: save(plot(), out, name) for name, plot in wanted.items() if plot is not None}
