"""The result of an analysis as one self-contained HTML page, or as a W&B report and workspace."""

import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from varlab.files import atomic_write
from varlab.scaling.analysis import COMPUTE, SIZE, Analysis, lack_of_fit, seed_noise
from varlab.scaling.plot import POINT, words
from varlab.scaling.runs import key_of

SHOWN = (
    "name",
    "depth",
    SIZE,
    "images_seen",
    COMPUTE,
    "val_loss",
    "val_loss_last",
    "val_err",
    "seed",
    "lr_peak",
    "device",
)
NAMES = {
    "scaling": "Loss and error against size and compute",
    "scales": "Exponent by scale",
    "floors": "Exponent by assumed floor",
    "isoflop": "Best size at a given compute",
    "surface": "Loss by size and data",
    "extrapolation": "Prediction of the largest size from the others",
}
DIVERGED = 0.02  # relative excess of validation loss over training loss in a run that overfits
STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --paper: #ffffff; --line: #d7dae0; --soft: #f4f5f7; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e7ea; --paper: #16181c; --line: #3a3e46; --soft: #20242a; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); }
body { max-width: 1180px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2rem }
table { border-collapse: collapse; font-size: .85rem }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: right }
th:first-child, td:first-child { text-align: left } .wide { overflow-x: auto }
figure { margin: 0; background: #fff; padding: .5rem; border: 1px solid var(--line); overflow-x: auto }
figure svg { max-width: 100%; height: auto; min-width: 480px }
.note { white-space: pre-wrap; background: var(--soft); padding: .6rem 1rem; border-left: 3px solid var(--line); font-size: .85rem }
g[id^="run:"]:hover path, g[id^="run:"]:hover use { stroke: #d62728; stroke-width: 3 }
"""


def summary_lines(analysis: Analysis) -> list[str]:
    """The results, one per line, as printed and as written into reports."""
    rows, law = analysis.runs.rows, analysis.parametric
    depths = sorted({row["depth"] for row in rows})
    lines = [
        f"{len(rows)} runs, depths {depths}; L(N) is fitted to the {len(analysis.fixed)} runs"
        f" of {analysis.fixed[0]['images_seen']:,.0f} images"
    ]
    for (y, x), found in analysis.laws.items():
        if not y.startswith("val_loss_scale"):
            lines.append(f"{y:14} against {x:12} {words(found)}, r {found.r:.3f}")
    scales = [found.alpha for (y, _), found in analysis.laws.items() if y.startswith("val_loss_scale")]
    if scales:
        lines.append(f"exponents by scale, coarse to fine: {', '.join(f'{alpha:.3f}' for alpha in scales)}")
    if law is not None:
        spread = {name: ends for name, ends in law.intervals().items() if name != "floor" or law.form.floor is None}
        said = ", ".join(
            f"{name} {spread[name][0]:.3g} to {spread[name][1]:.3g}"
            for name in ("floor", "alpha", "beta")
            if name in spread
        )
        lines.append(
            f"L(N, D) = E + A / N^alpha + B / D^beta: E {law.floor:.4g}, alpha {law.alpha:.3f}, beta {law.beta:.3f}"
            f" ({law.form.words}; 95 %: {said or 'no bootstraps'}); noise per run {100 * law.noise:.2f} %"
        )
        if analysis.squares is not None:
            other = analysis.squares
            lines.append(
                f"  with the other loss ({other.form.words}): E {other.floor:.4g}, alpha {other.alpha:.3f}, beta {other.beta:.3f}"
                + disagreement(spread, other)
            )
    spread_of_seeds = seed_noise(rows)
    if spread_of_seeds is not None:
        lines.append(f"runs that differ only in their seed vary by {100 * spread_of_seeds:.2f} %")
    if law is not None:
        lines += lack_of_fit(rows, law)
    lines += [f"IsoFLOP, {line}" for line in analysis.isoflop.refused]
    if analysis.isoflop.size_law is not None:
        lines.append(f"IsoFLOP: best N grows as C^{-analysis.isoflop.size_law.alpha:.3f}")
    if analysis.extrapolation is not None:
        found = analysis.extrapolation
        lines.append(
            f"extrapolation: fitted without the largest size, L(N) predicts {found['predicted']:.4f} for it, measured {found['found']:.4f}"
            f" ({found['error_percent']:+.2f} %)"
        )
    lines += divergences(analysis)
    lines += [f"not fitted: {line}" for line in analysis.missing]
    return lines


def divergences(analysis: Analysis) -> list[str]:
    """Runs that overfit, as text: where validation loss begins to exceed training loss by more than `DIVERGED`, and
    where it was lowest if it rose again."""
    lines, names = [], {key_of(row): row for row in analysis.runs.rows}
    curves: dict[str, list[Any]] = {}
    for point in analysis.runs.curves:
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
        if gaps and gaps[-1] > DIVERGED:
            first = next(i for i in range(len(gaps)) if min(gaps[i:]) > DIVERGED)
            images = validated[first]["images"]
            lines.append(
                f"{row['name']}: train and validation loss diverge after {images:,.0f} images ({images / row['unique_images']:.3g} passes);"
                f" validation loss ends {100 * gaps[-1]:.1f} % above training loss"
            )
        lowest = min(validated, key=lambda point: point["val_loss"], default=None)
        if lowest is not None and row["val_loss"] > 1.005 * lowest["val_loss"]:
            rise = 100 * (row["val_loss"] / lowest["val_loss"] - 1)
            lines.append(
                f"{row['name']}: validation loss was lowest ({lowest['val_loss']:.4f}) after {lowest['images']:,.0f} images"
                f" ({lowest['images'] / row['unique_images']:.3g} passes) and ended {rise:.1f} % higher"
            )
    return lines


def disagreement(spread: dict[str, tuple[float, float]], other: Any) -> str:
    """A warning if the parameters of the other loss are outside the intervals, else ""."""
    outside = [
        name
        for name in ("alpha", "beta", "floor")
        if name in spread and not spread[name][0] <= getattr(other, name) <= spread[name][1]
    ]
    return f" - outside the interval: {', '.join(outside)}" if outside else ""


def table(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> str:
    """An HTML table."""
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(shown(row.get(column)))}</td>" for column in columns) + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def shown(value: Any) -> str:
    """A number for display."""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e5 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else "" if value is None else str(value)


def with_titles(svg: str) -> str:
    """The SVG with the name of the run as each point's tooltip."""
    svg = svg[svg.index("<svg") :]
    return re.sub(rf'(<g id="{POINT}([^"]*)">)', lambda found: f"{found[1]}<title>{found[2]}</title>", svg)


def write_html(analysis: Analysis, files: dict[str, list[Path]], out: Path, title: str) -> Path:
    """Writes `report.html`: fits, figures with the run of every point, the table of runs, unfinished runs."""
    parts = [f"<h1>{html.escape(title)}</h1>"]
    parts.append("<pre class='note wide'>" + html.escape("\n".join(summary_lines(analysis))) + "</pre>")
    for name, kinds in files.items():
        svg = next(file for file in kinds if file.suffix == ".svg")
        parts.append(f"<h2>{NAMES[name]}</h2><figure>{with_titles(svg.read_text(encoding='utf-8'))}</figure>")
    parts.append("<h2>Runs</h2>" + table(analysis.runs.rows, SHOWN))
    if analysis.runs.left_out:
        listed = "".join(f"<li>{html.escape(line)}</li>" for line in analysis.runs.left_out)
        parts.append(f"<h2>Unfinished runs</h2><ul>{listed}</ul>")
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>{''.join(parts)}</body></html>"
    )
    file = out / "report.html"
    with atomic_write(file) as partial:
        partial.write_text(page, encoding="utf-8")
    return file


def wandb_report(analysis: Analysis, entity: str, project: str, title: str) -> Any:
    """A W&B report (not yet saved): the fits as text, curves against compute, loss against compute and size, the table
    of runs."""
    import wandb_workspaces.reports.v2.interface as wr

    text = "\n".join(f"- {line}" for line in summary_lines(analysis))
    panels = [
        wr.LinePlot(title="loss against compute", x=f"count/{COMPUTE}", y=["val/loss"], log_x=True),
        wr.LinePlot(title="last scale against compute", x=f"count/{COMPUTE}", y=["val/loss_last"], log_x=True),
        wr.ScatterPlot(title="loss against size", x=wr.SummaryMetric(SIZE), y=wr.SummaryMetric("val_loss"), log_x=True),
        wr.ScatterPlot(
            title="loss against compute", x=wr.SummaryMetric(COMPUTE), y=wr.SummaryMetric("val_loss"), log_x=True
        ),
        wr.RunComparer(diff_only="split"),
    ]
    grid = wr.PanelGrid(runsets=[wr.Runset(entity=entity, project=project, name="runs")], panels=panels)
    blocks = [wr.H1(text="Scaling law"), wr.MarkdownBlock(text=text), grid]
    return wr.Report(entity=entity, project=project, title=title, description="made by `varlab scaling`", blocks=blocks)


def wandb_workspace(entity: str, project: str) -> Any:
    """A W&B workspace (not yet saved) whose panels show loss against compute and size."""
    import wandb_workspaces.reports.v2.interface as wr
    import wandb_workspaces.workspaces as ws

    panels = [
        wr.LinePlot(title="loss against compute", x=f"count/{COMPUTE}", y=["val/loss"], log_x=True),
        wr.ScatterPlot(title="loss against size", x=wr.SummaryMetric(SIZE), y=wr.SummaryMetric("val_loss"), log_x=True),
    ]
    sections = [ws.Section(name="Scaling", panels=panels, is_open=True)]
    return ws.Workspace(entity=entity, project=project, name="Scaling law", sections=sections)
