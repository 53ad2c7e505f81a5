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
