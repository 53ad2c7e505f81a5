"""Figures of scores."""

from pathlib import Path

from matplotlib.figure import Figure

from varlab.files import atomic_write


def curve_by_scale(scores: dict[str, list[float]], labels: list[str], path: Path) -> None:
    """Plots each score against the scale after which it was computed, one panel per score, as PNG."""
    figure = Figure(figsize=(3.4 * len(scores), 2.8), layout="constrained")
    for axes, (name, values) in zip(figure.subplots(1, len(scores), squeeze=False)[0], scores.items(), strict=True):
        axes.plot(range(len(values)), values, marker="o")
        axes.set_xticks(range(len(values)), labels, rotation=45 if len(values) > 6 else 0)
        axes.set(xlabel="after scale", title={"psnr": "PSNR (dB)", "ssim": "SSIM"}.get(name, name))
        axes.grid(alpha=0.3)
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=150, format="png")


def curves_of_grid(rows: list[dict], score: str, path: Path) -> None:
    """Plots a score against guidance, one line per pair of filters, as PNG; that of other real images is dashed."""
    figure = Figure(figsize=(5.5, 3.6), layout="constrained")
    axes = figure.subplots()
    for top_k, top_p in dict.fromkeys((row["top_k"], row["top_p"]) for row in rows):
        line = sorted((row["cfg_scale"], row[score]) for row in rows if (row["top_k"], row["top_p"]) == (top_k, top_p))
        axes.plot(*zip(*line, strict=True), marker="o", label=f"top_k {top_k:g}, top_p {top_p:g}")
    if floor := rows[0].get(f"{score}/real_against_real"):
        axes.axhline(floor, color="0.5", ls="--", label="other real images")
    axes.set(xlabel="cfg_scale", ylabel=score)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=150, format="png")
