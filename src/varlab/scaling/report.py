"""The result of an analysis as one self-contained HTML page and as Markdown, or as a W&B report and workspace."""

import html
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from varlab.files import atomic_write
from varlab.scaling.analysis import COMPUTE, SIZE, Analysis, Surface
from varlab.scaling.checks import divergences, seed_noise
from varlab.scaling.plot import POINT, words
from varlab.scaling.predict import optimum
from varlab.scaling.record import checklist
from varlab.scaling.runs import loss_words

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
    "scaling": "Loss against size and compute",
    "errors": "Error against size and compute",
    "scales": "Exponent by scale",
    "floors": "Exponent by assumed floor",
    "isoflop": "Best size at a given compute",
    "surface": "Loss by size and data",
    "extrapolation": "Prediction of the largest size from the others",
}
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
figure svg { width: 100%; max-width: 860px; height: auto; min-width: 480px }
.note { white-space: pre-wrap; background: var(--soft); padding: .6rem 1rem; border-left: 3px solid var(--line); font-size: .85rem }
figcaption { color: #333; font-size: .85rem; padding: .25rem .5rem } .words td { text-align: left; vertical-align: top }
g.run:hover path, g.run:hover use { stroke: #d62728; stroke-width: 3 }
"""


def summary_lines(analysis: Analysis) -> list[str]:
    """The results, one per line, as printed and as written into reports; what speaks against them comes first."""
    rows, surface, counts = analysis.runs.rows, analysis.surface, analysis.runs.counts
    depths = sorted({row["depth"] for row in rows if row.get("depth")})
    sizes = sorted({row[SIZE] for row in rows})
    has_depths = all(row.get("depth") for row in rows)
    size = (
        f"depths {depths}"
        if has_depths
        else f"{len(sizes)} {'size' if len(sizes) == 1 else 'sizes'}, N {sizes[0]:.3g} to {sizes[-1]:.3g}"
    )
    lines = [f"{len(rows)} {'run' if len(rows) == 1 else 'runs'}, {size}"]
    if analysis.fixed:
        lines[0] += (
            f"; L(N) is fitted to the {len(analysis.fixed)} runs of {analysis.fixed[0]['images_seen']:,.0f} {counts}"
        )
    lines += analysis.runs.notes
    is_kept = analysis.settings.outliers == "keep"
    lines += [
        f"outlier, {'kept' if is_kept else 'left out'}: {row['name']}, {reason}" for row, reason in analysis.outliers
    ]
    if surface is not None:
        lines += surface.lack_of_fit
    for (y, x), found in analysis.laws.items():
        if not y.startswith("val_loss_scale"):
            lines.append(f"{y:14} against {x:12} {words(found)}, r {found.r:.3f}")
    scales = [exponent_words(found) for (y, _), found in analysis.laws.items() if y.startswith("val_loss_scale")]
    if scales:
        lines.append(f"exponents by scale, coarse to fine: {', '.join(scales)}")
    if surface is not None:
        lines += surface_lines(surface)
    spread_of_seeds = seed_noise(rows)
    if spread_of_seeds is not None:
        lines.append(f"runs that differ only in their seed vary by {100 * spread_of_seeds:.2f} %")
    lines += isoflop_lines(analysis)
    if analysis.extrapolation is not None:
        found = analysis.extrapolation
        inside = {True: ", inside", False: ", outside", None: ""}[found["inside"]]
        interval = (
            "no interval"
            if found["interval"] is None
            else f"95 %: {loss_words(found['interval'][0])} to {loss_words(found['interval'][1])}{inside}"
        )
        lines.append(
            f"extrapolation: fitted without the largest size, L(N) predicts {loss_words(found['predicted'])} for it,"
            f" measured {loss_words(found['found'])}"
            f" ({found['error_percent']:+.2f} %; {interval})"
        )
    lines += divergences(analysis.runs)
    return lines + [f"not fitted: {line}" for line in analysis.missing]


def exponent_words(law: Any) -> str:
    """An exponent, or that the runs do not show a gain."""
    if law.alpha_interval is not None and law.alpha_interval[0] <= 0:
        return "no gain shown"
    return f"{law.alpha:.3f}"


def surface_lines(surface: Surface) -> list[str]:
    """L(N, D): parameters with their intervals, the other loss, near-ties, and an interaction where the law does not fit."""
    law, other = surface.law, surface.other_loss
    spread = {name: ends for name, ends in law.intervals().items() if name != "floor" or law.form.floor is None}
    said = ", ".join(
        f"{name} {spread[name][0]:.3g} to {spread[name][1]:.3g}"
        for name in ("floor", "alpha", "beta")
        if name in spread
    )
    decay = "" if surface.repeat_decay is None else f"; repeated images discounted with R* {surface.repeat_decay:.3g}"
    lines = [
        f"L(N, D) = E + A / N^alpha + B / D^beta: E {law.floor:.4g}, alpha {law.alpha:.3f}, beta {law.beta:.3f}"
        f" ({law.form.words}; 95 %: {said or 'no bootstraps'}); noise per run {100 * law.noise:.2f} %{decay}",
        f"  with the other loss ({other.form.words}): E {other.floor:.4g}, alpha {other.alpha:.3f}, beta {other.beta:.3f}"
        + disagreement(spread, other),
    ]
    if surface.near_ties:
        named = "; ".join(form.words for form in surface.near_ties)
        lines.append(f"  extrapolating about as well, so intervals of predictions include them: {named}")
    if surface.interaction is not None:
        lines.append(
            f"  with an interaction of N and D (form=interaction_{law.form.loss}): noise per run {100 * surface.interaction.noise:.2f} %"
        )
    return lines


def isoflop_lines(analysis: Analysis) -> list[str]:
    """The best size of each budget, with what L(N, D) says of the same budget beside it."""
    found, surface, lines = analysis.isoflop, analysis.surface, []
    for one in found.parabolas:
        interval = "no interval" if one.interval is None else f"95 %: {one.interval[0]:.3g} to {one.interval[1]:.3g}"
        line = f"IsoFLOP, {one.compute:.3g} FLOP: best N {one.best:.4g} ({interval}), {one.best_images:,.0f} {analysis.runs.counts}"
        if surface is not None:
            told = optimum(analysis, one.compute)
            line += f"; by L(N, D): {told.sizes[told.best]:.4g}"
        lines.append(line)
    lines += [f"IsoFLOP, {line}" for line in found.refused]
    if found.size_law is not None:
        ends = found.size_law.alpha_interval
        interval = "no interval: fewer than 4 budgets" if ends is None else f"95 %: {-ends[1]:.3f} to {-ends[0]:.3f}"
        lines.append(f"IsoFLOP: best N grows as C^{-found.size_law.alpha:.3f} ({interval})")
    return lines


def disagreement(spread: dict[str, tuple[float, float]], other: Any) -> str:
    """A warning if the parameters of the other loss are outside the intervals, else ""."""
    outside = [
        name
        for name in ("alpha", "beta", "floor")
        if name in spread and not spread[name][0] <= getattr(other, name) <= spread[name][1]
    ]
    return f" - outside the interval: {', '.join(outside)}" if outside else ""


def table(rows: Sequence[dict[str, Any]], columns: Sequence[str], kind: str = "numbers") -> str:
    """An HTML table."""
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(shown(row.get(column)))}</td>" for column in columns) + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def shown(value: Any) -> str:
    """A number for display."""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e5 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else "" if value is None else str(value)


def with_titles(svg: str, name: str) -> str:
    """The SVG with the name of the run as each point's tooltip, and ids that no other figure of a page has."""
    svg, counter = svg[svg.index("<svg") :], itertools.count()
    svg = re.sub(
        rf'<g id="{POINT}([^"]*)">',
        lambda found: f'<g class="run" id="p{next(counter)}"><title>{found[1]}</title>',
        svg,
    )
    svg = re.sub(r'\bid="([^"]*)"', lambda found: f'id="{name}-{found[1]}"', svg)
    return re.sub(r'(url\(|href=")#', rf"\g<1>#{name}-", svg)


def write_reports(
    analysis: Analysis, files: dict[str, list[Path]], captions: dict[str, str], out: Path, title: str
) -> Path:
    """Writes report.html (fits, figures with the run of every point, how it was fitted, the table of runs) and report.md
    (the same without the table); returns the path of the page."""
    lines, asked = summary_lines(analysis), checklist(analysis)
    parts = [f"<h1>{html.escape(title)}</h1>"]
    parts.append("<pre class='note wide'>" + html.escape("\n".join(lines)) + "</pre>")
    text = [f"# {title}", "", *[f"- {line.strip()}" for line in lines]]
    for name, kinds in files.items():
        svg = next(file for file in kinds if file.suffix == ".svg")
        drawn = with_titles(svg.read_text(encoding="utf-8"), name)
        parts.append(
            f"<h2>{NAMES[name]}</h2><figure>{drawn}<figcaption>{html.escape(captions[name])}</figcaption></figure>"
        )
        text += ["", f"## {NAMES[name]}", "", f"![{NAMES[name]}]({name}.png)", "", captions[name]]
    table_of_answers = [{"question": question, "answer": answer} for question, answer in asked]
    parts.append("<h2>How it was fitted</h2>" + table(table_of_answers, ("question", "answer"), "words"))
    text += ["", "## How it was fitted", "", "| | |", "|---|---|"]
    text += [f"| {question} | {answer.replace('|', '/')} |" for question, answer in asked]
    parts.append("<h2>Runs</h2>" + table(analysis.runs.rows, SHOWN))
    if analysis.runs.left_out:
        listed = "".join(f"<li>{html.escape(line)}</li>" for line in analysis.runs.left_out)
        parts.append(f"<h2>Runs that were left out or used unfinished</h2><ul>{listed}</ul>")
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>{''.join(parts)}</body></html>"
    )
    for file, content in ((out / "report.html", page), (out / "report.md", "\n".join(text) + "\n")):
        with atomic_write(file) as partial:
            partial.write_text(content, encoding="utf-8")
    return out / "report.html"


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
