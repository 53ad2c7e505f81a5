"""Guidance, top-k and top-p on glyphs: what legibility costs in variety, with the model in the box, three seeds of sampling.
Existing samples are reused.

    python experiments/glyphs/guidance.py          (after experiments/data/glyphs.py)

Writes guidance.csv (one row per setting and seed) and guidance.png beside this file, and prints means and 95 % intervals.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "data"))
from scores import Judge  # noqa: E402
from steps import interval, write_table  # noqa: E402

SEEDS, PER_CLASS, RUNS = (0, 1, 2), 10, Path("runs/glyphs-guidance")
CONSTANT, RAMP = {"cfg_schedule": "constant"}, {"cfg_schedule": "linear"}
FAMILIES: dict[str, list[dict[str, Any]]] = {
    "guidance, constant": [{**CONSTANT, "cfg_scale": scale, "top_p": 0.97} for scale in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)],
    "guidance, growing": [{**RAMP, "cfg_scale": scale, "top_p": 0.97} for scale in (2.0, 4.0)],
    "top_p, guidance 1": [{**CONSTANT, "cfg_scale": 1.0, "top_p": top_p} for top_p in (0.9, 1.0)],
    "top_k, guidance 1": [{**CONSTANT, "cfg_scale": 1.0, "top_k": top_k} for top_k in (50,)],
}
SCORES = ("class_agreement", "frechet_distance", "precision", "recall", "density", "coverage")


def main() -> None:
    judge, rows = Judge(Path("data/glyphs32")), []
    for family, points in FAMILIES.items():
        for point in points:
            for seed in SEEDS:
                folder = RUNS / "-".join(f"{key}{value}" for key, value in {**point, "seed": seed}.items())
                found = judge.of_samples(Path("glyphs32"), folder, PER_CLASS, **point, seed=10_000 * seed)
                named = {key.split("/")[0]: value for key, value in found.items() if "real_against_real" not in key}
                real = {f"{key.split('/')[0]}_real": value for key, value in found.items() if "real_against" in key}
                rows.append({"family": family, **{"top_k": 0, "top_p": 0.0}, **named, **real})
                print(json.dumps(rows[-1]), flush=True)
    write_table(HERE / "guidance.csv", rows)
    lines = [f"| cfg_schedule | cfg_scale | top_k | top_p | {' | '.join(SCORES).replace('_', ' ')} |"]
    lines.append("|---" * (4 + len(SCORES)) + "|")
    for point in (point for points in FAMILIES.values() for point in points):
        chosen = [row for row in rows if all(row[key] == value for key, value in point.items())]
        settings = [chosen[0][key] for key in ("cfg_schedule", "cfg_scale", "top_k", "top_p")]
        lines.append(
            f"| {' | '.join([*map(str, settings), *(interval([row[key] for row in chosen]) for key in SCORES)])} |"
        )
    print("\n".join(lines))
    plot(rows)


def plot(rows: list[dict[str, Any]]) -> None:
    """Precision against recall, and class agreement against coverage, one line per family; crosses are real images."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    for axes, (x, y) in zip(
        figure.subplots(1, 2), (("recall", "precision"), ("recall", "class_agreement")), strict=True
    ):
        for family, points in FAMILIES.items():
            means = [
                [np.mean([row[key] for row in rows if all(row[k] == v for k, v in point.items())]) for key in (x, y)]
                for point in points
            ]
            axes.plot(*zip(*means, strict=True), "o-", label=family)
            for point, (across, up) in zip(points, means, strict=True):
                changed = point["cfg_scale"] if "guidance," in family else point.get("top_k", point.get("top_p"))
                axes.annotate(f"{changed:g}", (across, up), xytext=(3, 3), textcoords="offset points", fontsize=7)
        if f"{y}_real" in rows[0]:
            axes.plot(rows[0][f"{x}_real"], rows[0][f"{y}_real"], "kx", label="real images")
        axes.set(xlabel=x, ylabel=y.replace("_", " "))
    axes.legend(fontsize=7)
    figure.savefig(HERE / "guidance.png", dpi=130)


if __name__ == "__main__":
    main()
