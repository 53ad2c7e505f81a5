"""`varlab doctor RUN`: a run's curves over the reference curves of its experiment: in or out of band, and why that might be.

A reference is a CSV of metric, step, mean, low and high, made by our own runs with several seeds (experiments/reference/make.py),
with a JSON beside it that says which. Curves are smoothed alike before they are compared.
"""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from varlab.config import argument_command
from varlab.files import atomic_write, flat, load_json, save_json

USAGE = """varlab doctor RUN [REFERENCE.csv]: is this run normal?
Lays the curves of RUN (metrics.csv) over the reference curves of its experiment: RUN/doctor.png, and in words what is out of
band and why that might be."""

JUDGED = ("train/", "val/")
NOT_JUDGED = ("train/loss_scale_factor", "train/num_scales", "train/steps_skipped", "train/grad_norm_spikes")
WINDOW, POINTS = 9, 60  # logged points smoothed over; points kept of a curve
PUBLISHED = {  # facts of the released ImageNet models, not runs of ours
    "val/err": (94.0, 96.0, "4 to 6 % of tokens right at the end (released code, issue 143)"),
    "val/loss": (5.0, 9.0, "above the irreducible part near 5 nats (the authors, issue 23)"),
}
SETTINGS_THAT_MATTER = ("model", "module", "data", "steps", "epochs", "accumulate")
REASONS = {  # metric, side: why
    "train/loss above": "learning rate too high or too low (module.base_lr), another batch, tokens of another tokenizer, or labels"
    " that do not belong to the images",
    "train/loss below": "an easier task than the reference: fewer or repeated images, fewer codes in use, or val images in train",
    "val/loss above": "too little data for the size (train falls, val does not): more data, flips, crops, or fewer epochs",
    "val/loss below": "another validation set, or training images in it",
    "val/err above": "as for the loss",
    "train/grad_norm above": "learning rate too high, warm-up too short, a bad stretch of data, or bf16 where fp32 is needed",
    "train/grad_norm below": "weights hardly move: learning rate too low, or gates still closed (init_adaln_gamma)",
    "train/perplexity below": "the codebook collapses, coarse scales first: callbacks.kmeans, callbacks.revive,"
    " model.scale_dropout (README, a tokenizer of your own)",
    "train/codebook_usage below": "codes die: callbacks.revive, a smaller codebook, or more images a step",
    "train/vq_loss above": "encoder and codes run apart: lower module.base_lr, or begin the codes by callbacks.kmeans",
    "val/psnr below": "reconstruction lags: train longer, or lower the perceptual and adversarial weights",
    "train/reconstruction_loss above": "reconstruction lags: images of another kind or size, or a learning rate that is off",
}

Curves = dict[str, dict[int, float]]


@dataclass(frozen=True)
class Band:
    """Where a metric usually lies, by step."""

    steps: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclass(frozen=True)
class Verdict:
    """How a metric of a run lies to its band."""

    metric: str
    share_inside: float
    side: str  # above or below
    first_outside: int | None

    @property
    def is_normal(self) -> bool:
        """Noise leaves a band now and then."""
        return self.share_inside >= 0.9


def smooth(curve: dict[int, float]) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) after a running mean over WINDOW points, fewer at the ends."""
    steps, values = np.array(list(curve), dtype=float), np.array(list(curve.values()), dtype=float)
    reach = min(WINDOW, len(values)) // 2
    padded = np.concatenate([np.full(reach, np.nan), values, np.full(reach, np.nan)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1)
    return steps, np.nanmean(windows, axis=1)


def band(runs: Sequence[Curves]) -> dict[str, Band]:
    """The band of several runs of one experiment: where 95 % of further runs would lie at a step, were they normal around the
    mean (Student's t, since a few runs say little about the spread)."""
    reach = float(stats.t.ppf(0.975, len(runs) - 1)) * np.sqrt(1 + 1 / len(runs))
    found = {}
    for metric in runs[0]:
        if not metric.startswith(JUDGED) or metric in NOT_JUDGED or any(metric not in run for run in runs):
            continue
        smoothed = [smooth(run[metric]) for run in runs]
        steps = smoothed[0][0]
        if len(steps) > POINTS:
            steps = steps[np.linspace(0, len(steps) - 1, POINTS).round().astype(int)]
        values = np.stack([np.interp(steps, *one) for one in smoothed])
        deviation = values.std(axis=0, ddof=1)
        margin = reach * np.maximum(deviation, deviation.mean()) + 1e-3 * np.abs(values).mean()
        found[metric] = Band(steps, mean := values.mean(axis=0), mean - margin, mean + margin)
    return found


def write_band(path: Path, bands: dict[str, Band], facts: dict[str, Any]) -> None:
    """Saves a reference: the CSV, and beside it a JSON of what it was made from."""
    with atomic_write(path) as partial, open(partial, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["metric", "step", "mean", "low", "high"])
        for metric, found in bands.items():
            for row in zip(found.steps, found.mean, found.low, found.high, strict=True):
                writer.writerow([metric, int(row[0]), *(f"{value:.5g}" for value in row[1:])])
    save_json(path.with_suffix(".json"), facts)


def read_band(path: Path) -> dict[str, Band]:
    """A reference. Raises ValueError naming the file when it is none."""
    rows: dict[str, list[list[float]]] = {}
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != ["metric", "step", "mean", "low", "high"]:
            raise ValueError(f"{path} is no reference: its columns are {reader.fieldnames}")
        for row in reader:
            rows.setdefault(row["metric"], []).append([float(row[key]) for key in ("step", "mean", "low", "high")])
    return {metric: Band(*np.array(values).T) for metric, values in rows.items()}


def judge(curves: Curves, bands: dict[str, Band]) -> list[Verdict]:
    """A verdict for each metric that both have, over the steps that both have."""
    verdicts = []
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
        verdicts.append(
            Verdict(metric, 1 - float(outside.mean()), "above" if above.sum() >= below.sum() else "below", first)
        )
    return verdicts


def settings_of(folder: Path) -> dict[str, Any]:
    """What of a run's config decides its curves, flat."""
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
        if not (
            isinstance(value, str) and ("/" in value or "${" in value)
        )  # paths and what follows from other settings
    }


def experiment_of(folder: Path) -> str:
    """The experiment a run was started as. Raises ValueError when that is not written down."""
    from omegaconf import OmegaConf

    file = folder / ".hydra/hydra.yaml"
    if not file.is_file():
        raise ValueError(f"{file} is missing, so the experiment of the run is unknown: name the reference's CSV")
    return str(OmegaConf.select(OmegaConf.load(file), "hydra.runtime.choices.experiment"))


def references() -> Path:
    """The folder of shipped references: inside the package, or in the checkout."""
    package = Path(__file__).resolve().parents[1]
    return next(f for f in (package / "reference", package.parents[1] / "experiments/reference") if f.is_dir())


def published_bands(curves: Curves) -> dict[str, Band]:
    """The few published facts about ImageNet models, at a run's last step."""
    bands = {}
    for metric, (low, high, _) in PUBLISHED.items():
        if metric in curves:
            last = np.array([float(max(curves[metric]))])
            middle = np.array([(low + high) / 2])
            bands[metric] = Band(last, middle, np.array([low]), np.array([high]))
    return bands


def reason(verdict: Verdict) -> str | None:
    """Why a metric may lie where it lies."""
    fitting = [
        why
        for key, why in REASONS.items()
        if verdict.metric.startswith(key.split()[0]) and key.endswith(f" {verdict.side}")
    ]
    return fitting[0] if fitting else None


def report(folder: Path, reference: Path | None = None) -> str:
    """The verdicts in words; draws `doctor.png` in the run's folder."""
    from varlab.files import read_curves

    curves = read_curves(folder / "metrics.csv")
    if not curves:
        raise ValueError(f"{folder / 'metrics.csv'} holds no curves")
    reference = reference or references() / f"{experiment_of(folder)}.csv"
    lines = []
    if reference.is_file():
        bands = read_band(reference)
        made = load_json(reference.with_suffix(".json"), "experiments/reference/make.py")
        lines.append(f"{folder} over {reference} ({len(made['seeds'])} runs, {made['machine']}, {made['date']})")
        mine = settings_of(folder)
        differing = [
            f"{key}={mine[key]} (reference {value})"
            for key, value in made["settings"].items()
            if key in mine and mine[key] != value
        ]
        if differing:
            lines.append(f"  settings that differ, so that differences are to be expected: {', '.join(differing)}")
    elif experiment_of(folder) in ("var_d16", "var_d20", "var_d24", "var_d30"):
        bands = published_bands(curves)
        lines.append(f"{folder}: no run of ours to compare with; published, at the end of the whole recipe:")
        lines += [f"  {metric}: {why}" for metric, (_, _, why) in PUBLISHED.items()]
    else:
        known = ", ".join(sorted(file.stem for file in references().glob("*.csv")))
        raise ValueError(
            f"there is no reference {reference}: known are {known}; name a CSV, or make one (experiments/reference/make.py)"
        )
    verdicts = judge(curves, bands)
    normal = [verdict for verdict in verdicts if verdict.is_normal]
    lines.append(f"  in band: {len(normal)} of {len(verdicts)} metrics")
    for verdict in (verdict for verdict in verdicts if not verdict.is_normal):
        lines.append(
            f"  out of band: {verdict.metric}, {verdict.side} from step {verdict.first_outside}, {verdict.share_inside:.0%} inside"
        )
    whys = dict.fromkeys(why for verdict in verdicts if not verdict.is_normal and (why := reason(verdict)))
    lines += [f"  this may be: {why}" for why in whys]
    row = folder / "run.json"
    if row.is_file() and "speed/images_per_second" in curves:
        speed = np.median(list(curves["speed/images_per_second"].values()))
        lines.append(
            f"  {speed:.3g} images a second on {json.loads(row.read_text())['device']} (not judged: machines differ)"
        )
    draw(curves, bands, verdicts, folder / "doctor.png")
    return "\n".join([*lines, f"  figure: {folder / 'doctor.png'}"])


def draw(curves: Curves, bands: dict[str, Band], verdicts: Sequence[Verdict], path: Path) -> None:
    """One panel a metric, out-of-band ones first: the band, the reference's mean, the run."""
    from matplotlib.figure import Figure

    shown = sorted(verdicts, key=lambda verdict: verdict.share_inside)[:24]
    columns = min(4, max(len(shown), 1))
    rows = max(-(-len(shown) // columns), 1)
    figure = Figure(figsize=(3.6 * columns, 2.6 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for axes, verdict in zip(panels, shown, strict=False):
        found = bands[verdict.metric]
        axes.fill_between(found.steps, found.low, found.high, color="0.85", label="band")
        axes.plot(found.steps, found.mean, color="0.5", lw=1, label="reference")
        axes.plot(*smooth(curves[verdict.metric]), color="C0" if verdict.is_normal else "C3", label="this run")
        axes.set_title(verdict.metric + ("" if verdict.is_normal else f": {verdict.side}"), fontsize=9)
        axes.grid(alpha=0.3)
    for axes in list(panels)[len(shown) :]:
        axes.axis("off")
    if shown:
        figure.axes[0].legend(fontsize=7)
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=110, format="png")


def run(arguments: list[str]) -> None:
    """Judges one run."""
    print(report(Path(arguments[0]), Path(arguments[1]) if len(arguments) > 1 else None))


main = argument_command("doctor", USAGE, run)

if __name__ == "__main__":
    main()
