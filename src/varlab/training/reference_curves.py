"""Reference curves of an experiment, and how a run compares with them.

A reference is a CSV of metric, step, mean, low and high, made from runs with several seeds
(experiments/reference/make.py), and a JSON of the same name that describes them. Curves are smoothed in the same way
before they are compared.
"""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from varlab.files import atomic_write, flat, load_json, save_json
from varlab.training.run_settings import SPEED

COMPARED = ("train/", "val/")
NOT_COMPARED = ("train/grad_scaler_scale", "train/num_scales", "train/steps_skipped", "train/grad_norm_spikes")
WINDOW, POINTS = 9, 60  # logged points in a running mean; points kept of a curve
PUBLISHED = {  # facts about the released ImageNet models, not our own runs
    "val/err": (94.0, 96.0, "4 to 6 % of tokens right at the end (released code, issue 143)"),
    "val/loss": (5.0, 9.0, "above the irreducible part near 5 nats (the authors, issue 23)"),
}
SETTINGS_THAT_MATTER = ("model", "module", "data", "steps", "epochs", "accumulate")
REASONS = {  # metric, side: why
    "train/loss above": "learning rate too high or too low (module.base_lr), a different batch size or tokenizer, or"
    " wrong labels",
    "train/loss below": "an easier task than the reference: fewer or repeated images, fewer codes in use, or val images in train",
    "val/loss above": "too little data for the model size (train falls, val does not): use more data, flips, crops, or fewer epochs",
    "val/loss below": "a different validation set, or training images in it",
    "val/err above": "see val/loss",
    "train/grad_norm above": "learning rate too high, warm-up too short, bad data, or bf16 where fp32 is needed",
    "train/grad_norm below": "weights hardly change: learning rate too low, or gates still near 0 (init_adaln_gamma)",
    "train/perplexity below": "the codebook collapses, coarse scales first: try callbacks.kmeans,"
    " callbacks.reset_dead_codes, model.quantizer.scale_dropout (docs: train on your own images)",
    "train/codebook_usage below": "codes are dead: try callbacks.reset_dead_codes, a smaller codebook, or more images per step",
    "train/vq_loss above": "encoder and codes diverge: lower module.base_lr, or initialize the codes with callbacks.kmeans",
    "val/psnr below": "reconstructions are worse: train longer, or lower the perceptual and adversarial weights",
    "train/reconstruction_loss above": "reconstructions are worse: different images or resolution, or a wrong learning rate",
}

Curves = dict[str, dict[int, float]]


@dataclass(frozen=True)
class Band:
    """The usual range of a metric, by step."""

    steps: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclass(frozen=True)
class Comparison:
    """A metric of a run compared with its band."""

    metric: str
    share_inside: float
    side: str  # above or below
    first_outside: int | None

    @property
    def is_normal(self) -> bool:
        """Inside the band for at least 90 % of the steps, since noise occasionally leaves it."""
        return self.share_inside >= 0.9


def smooth(curve: dict[int, float]) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) after a running mean over WINDOW points, fewer at the ends."""
    steps, values = np.array(list(curve), dtype=float), np.array(list(curve.values()), dtype=float)
    reach = min(WINDOW, len(values)) // 2
    padded = np.concatenate([np.full(reach, np.nan), values, np.full(reach, np.nan)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1)
    return steps, np.nanmean(windows, axis=1)


def band(runs: Sequence[Curves]) -> dict[str, Band]:
    """The band of several runs of one experiment: a 95 % prediction interval for a further run at each step, assuming
    normally distributed runs (Student's t, since the spread is estimated from few runs)."""
    factor = float(stats.t.ppf(0.975, len(runs) - 1)) * np.sqrt(1 + 1 / len(runs))
    found = {}
    for metric in runs[0]:
        if not metric.startswith(COMPARED) or metric in NOT_COMPARED or any(metric not in run for run in runs):
            continue
        smoothed = [smooth(run[metric]) for run in runs]
        steps = smoothed[0][0]
        if len(steps) > POINTS:
            steps = steps[np.linspace(0, len(steps) - 1, POINTS).round().astype(int)]
        values = np.stack([np.interp(steps, *one) for one in smoothed])
        deviation = values.std(axis=0, ddof=1)
        margin = factor * np.maximum(deviation, deviation.mean()) + 1e-3 * np.abs(values).mean()
        found[metric] = Band(steps, mean := values.mean(axis=0), mean - margin, mean + margin)
    return found


def write_band(path: Path, bands: dict[str, Band], facts: dict[str, Any]) -> None:
    """Saves a reference: the CSV, and a JSON of the same name that describes its runs."""
    with atomic_write(path) as partial, open(partial, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["metric", "step", "mean", "low", "high"])
        for metric, found in bands.items():
            for row in zip(found.steps, found.mean, found.low, found.high, strict=True):
                writer.writerow([metric, int(row[0]), *(f"{value:.5g}" for value in row[1:])])
    save_json(path.with_suffix(".json"), facts)


def read_band(path: Path) -> dict[str, Band]:
    """Reads a reference. Raises ValueError naming the file if it is not one."""
    rows: dict[str, list[list[float]]] = {}
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != ["metric", "step", "mean", "low", "high"]:
            raise ValueError(f"{path} is not a reference: its columns are {reader.fieldnames}")
        for row in reader:
            rows.setdefault(row["metric"], []).append([float(row[key]) for key in ("step", "mean", "low", "high")])
    return {metric: Band(*np.array(values).T) for metric, values in rows.items()}


def compare_to_bands(curves: Curves, bands: dict[str, Band]) -> list[Comparison]:
    """A comparison for each metric that both have, over the steps that both have."""
    comparisons = []
    for metric, found in bands.items():
        if metric not in curves:
            continue
        steps, values = smooth(curves[metric])
        shared = (steps >= found.steps[0]) & (steps <= found.steps[-1])
        if not shared.any():
            continue
        steps, values = steps[shared], values[shared]
        above, below = (
            values > np.interp(steps, found.steps, found.high),
            values < np.interp(steps, found.steps, found.low),
        )
        outside = above | below | ~np.isfinite(values)
        first = int(steps[outside.argmax()]) if outside.any() else None
        comparisons.append(
            Comparison(metric, 1 - float(outside.mean()), "above" if above.sum() >= below.sum() else "below", first)
        )
    return comparisons


def settings_of(folder: Path) -> dict[str, Any]:
    """The settings of a run that affect its curves, flattened."""
    from omegaconf import DictConfig, OmegaConf

    file = next((file for file in (folder / "job.yaml", folder / ".hydra/config.yaml") if file.is_file()), None)
    if file is None:
        return {}
    config = OmegaConf.load(file)
    assert isinstance(config, DictConfig)
    plain: Any = OmegaConf.to_container(config, resolve=False)
    found = flat({key: plain.get(key) for key in SETTINGS_THAT_MATTER})
    return {
        key: value
        for key, value in found.items()
        if not (isinstance(value, str) and ("/" in value or "${" in value))  # paths, and values of other settings
    }


def experiment_of(folder: Path) -> str:
    """The experiment that a run was started with. Raises ValueError if it is not recorded."""
    from omegaconf import OmegaConf

    file = folder / ".hydra/hydra.yaml"
    if not file.is_file():
        raise ValueError(
            f"{file} is missing, so the experiment of the run is unknown: give the CSV file of a reference"
        )
    return str(OmegaConf.select(OmegaConf.load(file), "hydra.runtime.choices.experiment"))


def references() -> Path:
    """The folder of included references: in the package, or in the checkout."""
    package = Path(__file__).resolve().parents[1]
    return next(f for f in (package / "reference", package.parents[1] / "experiments/reference") if f.is_dir())


def published_bands(curves: Curves) -> dict[str, Band]:
    """Bands at a run's last step from the few published facts about ImageNet models."""
    bands = {}
    for metric, (low, high, _) in PUBLISHED.items():
        if metric in curves:
            last = np.array([float(max(curves[metric]))])
            middle = np.array([(low + high) / 2])
            bands[metric] = Band(last, middle, np.array([low]), np.array([high]))
    return bands


def reason(comparison: Comparison) -> str | None:
    """A possible reason why a metric is out of its band, or None."""
    fitting = [
        why
        for key, why in REASONS.items()
        if comparison.metric.startswith(key.split()[0]) and key.endswith(f" {comparison.side}")
    ]
    return fitting[0] if fitting else None


def report(folder: Path, reference: Path | None = None) -> str:
    """The comparisons as text; writes `doctor.png` into the run's folder."""
    from varlab.files import read_curves

    curves = read_curves(folder / "metrics.csv")
    if not curves:
        raise ValueError(f"{folder / 'metrics.csv'} holds no curves")
    reference = reference or references() / f"{experiment_of(folder)}.csv"
    lines = []
    if reference.is_file():
        bands = read_band(reference)
        made = load_json(reference.with_suffix(".json"), "experiments/reference/make.py")
        lines.append(
            f"{folder} compared with {reference} ({len(made['seeds'])} runs, {made['machine']}, {made['date']})"
        )
        mine = settings_of(folder)
        expected = {key: value for key, value in made["settings"].items() if not key.startswith(SPEED)}
        differing = [
            f"{key}={mine[key]} (reference {value})" if key in mine else f"{key} is not set (reference {value})"
            for key, value in expected.items()
            if key not in mine or mine[key] != value
        ]
        if differing:
            lines.append(f"  settings that differ, so differences are expected: {', '.join(differing)}")
    elif experiment_of(folder) in ("var_d16", "var_d20", "var_d24", "var_d30"):
        bands = published_bands(curves)
        lines.append(f"{folder}: there is no reference run; published values at the end of the full recipe:")
        lines += [f"  {metric}: {why}" for metric, (_, _, why) in PUBLISHED.items()]
    else:
        known = ", ".join(sorted(file.stem for file in references().glob("*.csv")))
        raise ValueError(
            f"there is no reference {reference}: choose one of {known}, give a CSV file, or make one (experiments/reference/make.py)"
        )
    comparisons = compare_to_bands(curves, bands)
    normal = [comparison for comparison in comparisons if comparison.is_normal]
    lines.append(f"  in band: {len(normal)} of {len(comparisons)} metrics")
    for comparison in (comparison for comparison in comparisons if not comparison.is_normal):
        lines.append(
            f"  out of band: {comparison.metric}, {comparison.side} from step {comparison.first_outside},"
            f" {comparison.share_inside:.0%} inside"
        )
    whys = dict.fromkeys(why for comparison in comparisons if not comparison.is_normal and (why := reason(comparison)))
    lines += [f"  possible cause: {why}" for why in whys]
    row = folder / "run.json"
    if row.is_file() and "speed/images_per_second" in curves:
        speed = np.median(list(curves["speed/images_per_second"].values()))
        device = json.loads(row.read_text(encoding="utf-8"))["device"]
        lines.append(f"  {speed:.3g} images per second on {device} (not compared, since machines differ)")
    plot(curves, bands, comparisons, folder / "doctor.png")
    return "\n".join([*lines, f"  figure: {folder / 'doctor.png'}"])


def plot(curves: Curves, bands: dict[str, Band], comparisons: Sequence[Comparison], path: Path) -> None:
    """One panel per metric, out-of-band ones first: the band, the reference's mean, the run."""
    from matplotlib.figure import Figure

    shown = sorted(comparisons, key=lambda comparison: comparison.share_inside)[:24]
    columns = min(4, max(len(shown), 1))
    rows = max(-(-len(shown) // columns), 1)
    figure = Figure(figsize=(3.6 * columns, 2.6 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for axes, comparison in zip(panels, shown, strict=False):
        found = bands[comparison.metric]
        axes.fill_between(found.steps, found.low, found.high, color="0.85", label="band")
        axes.plot(found.steps, found.mean, color="0.5", lw=1, label="reference")
        axes.plot(*smooth(curves[comparison.metric]), color="C0" if comparison.is_normal else "C3", label="this run")
        axes.set_title(comparison.metric + ("" if comparison.is_normal else f": {comparison.side}"), fontsize=9)
        axes.grid(alpha=0.3)
    for axes in list(panels)[len(shown) :]:
        axes.axis("off")
    if shown:
        figure.axes[0].legend(fontsize=7)
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=110, format="png")
