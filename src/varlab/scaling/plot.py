"""The scaling figure: loss and error against parameters and against compute."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.lines import Line2D

from varlab.files import whole_file
from varlab.scaling.fit import PowerLaw
from varlab.scaling.runs import Row

LABELS = {
    "val_loss": "loss, all tokens [nat/token]",
    "val_loss_last": "loss, last scale [nat/token]",
    "val_err": "error, all tokens [%]",
    "val_err_last": "error, last scale [%]",
    "params_main": "parameters of the blocks, N",
    "flops_exact": "training compute, C [FLOP]",
}


def words(law: PowerLaw) -> str:
    """Exponent, interval and floor of a law in a line."""
    if law.alpha_interval is None:
        interval = "no interval: fewer than 4 sizes" if law.num_sizes < 4 else "no interval: too few runs"
    else:
        interval = f"95 %: {law.alpha_interval[0]:.3f} to {law.alpha_interval[1]:.3f}"
    return f"exponent {law.alpha:.3f} ({interval}), floor {law.floor:.3g}"


def figure(rows: Sequence[Row], laws: dict[tuple[str, str], PowerLaw], out: Path) -> list[Path]:
    """Draws one panel for each (y, x) law; writes scaling.png and scaling.svg into `out`."""
    xs = list(dict.fromkeys(x for _, x in laws))
    ys = list(dict.fromkeys(y for y, _ in laws))
    figure, panels = plt.subplots(
        len(xs), len(ys), figsize=(4.4 * len(ys), 3.9 * len(xs)), squeeze=False, layout="constrained"
    )
    depths = sorted({row["depth"] for row in rows})
    colors = dict(zip(depths, plt.colormaps["viridis"](np.linspace(0.05, 0.85, len(depths))), strict=True))
    for (y, x), law in laws.items():
        panel = panels[xs.index(x)][ys.index(y)]
        for row in rows:
            panel.plot(row[x], row[y], "o", color=colors[row["depth"]], markersize=7)
        span = np.geomspace(min(row[x] for row in rows) / 1.3, max(row[x] for row in rows) * 1.3, 100)
        panel.plot(span, law(span), "--", color="0.35", linewidth=1.2, zorder=0)
        panel.set(xscale="log", xlabel=LABELS[x], ylabel=LABELS[y])
        panel.set_title(words(law), fontsize=8)
        panel.grid(alpha=0.25, which="both")
    handles = [
        Line2D([], [], marker="o", linestyle="", color=colors[depth], label=f"depth {depth}") for depth in depths
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(depths), frameon=False)
    files = []
    for kind in ("png", "svg"):
        file = out / f"scaling.{kind}"
        with whole_file(file) as partial:
            figure.savefig(partial, format=kind, dpi=150)
        files.append(file)
    plt.close(figure)
    return files
