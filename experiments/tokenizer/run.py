"""What does each tokenizer loss contribute, and what do the codebook remedies do? Trains and scores one tokenizer per
arm on emoji64, at a size for two CPU cores. Finished steps are skipped; an interrupted run continues.

    python experiments/tokenizer/prepare.py && python experiments/tokenizer/run.py        (about two hours)
    python experiments/tokenizer/run.py plain perceptual                                   (these arms only)

At full size on a GPU, for one arm (150 epochs of 13,398 images, batch 256):

    varlab train experiment=tokenizer_f8_64 trainer=gpu data.path=data/emoji64/shards data.global_batch_size=256 epochs=150 \
        perceptual=efficientnet_lite0 adversarial=patch name=emoji64/full
"""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from varlab import image_grid
from varlab.checkpoints.load import load_tokenizer
from varlab.data.images import Crop, ImageDataset, to_tensor
from varlab.data.order import SampleRequest
from varlab.data.shards import ShardReader

SHARDS, RUNS, HERE = Path("data/emoji64/shards"), Path("runs/emoji64"), Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from steps import finished, varlab  # noqa: E402

PERCEPTUAL = ["perceptual=efficientnet_lite0"]
ADVERSARIAL = ["adversarial=patch", "adversarial.discriminator.channels=32", "adversarial.augment=null"]
ARMS = {
    "plain": [],
    "perceptual": PERCEPTUAL,
    "perceptual_adversarial": PERCEPTUAL + ADVERSARIAL,
    "perceptual_adversarial_r1": [*PERCEPTUAL, *ADVERSARIAL, "adversarial.r1_weight=1.0"],
    "kmeans_revive": [
        "callbacks.kmeans={_target_: varlab.training.codebook_callbacks.KMeansInit}",
        "callbacks.reset_dead_codes={_target_: varlab.training.codebook_callbacks.ResetDeadCodes, every: 100}",
    ],
    "rotation": ["model.quantizer.gradient=rotation"],
    "scale_dropout": ["model.quantizer.scale_dropout=0.1"],
}
SCORES = ["psnr", "ssim", "efficientnet_lite0", "frechet_distance/efficientnet_lite0", "usage", "perplexity"]
FLOOR = "frechet_distance/efficientnet_lite0/real_against_real"


def train_and_score(arm: str, settings: list[str]) -> dict:
    """Trains and evaluates an arm unless finished; returns its scores on the validation images."""
    folder = RUNS / arm
    if not finished(folder):
        shared = [f"name=emoji64/{arm}", f"data.path={SHARDS}", "ckpt_path=last", "logger=csv"]
        varlab("train", "experiment=tokenizer_emoji64", *shared, *settings)
    result = folder / "evaluation/evaluation.json"
    if not result.is_file():
        checkpoint = f"checkpoint={folder / 'checkpoints/last.ckpt'}"
        networks = ["features=efficientnet_lite0", *PERCEPTUAL]
        varlab("evaluate", checkpoint, f"shards={SHARDS}", f"out={result.parent}", *networks)
    return json.loads(result.read_text())


def logged(arm: str, name: str) -> tuple[list[int], list[float]]:
    """(steps, values) of one curve."""
    with open(RUNS / arm / "metrics.csv", encoding="utf-8") as file:
        points = {int(row["step"]): float(row[name]) for row in csv.DictReader(file) if row.get(name)}
    return list(points), list(points.values())


def plot_curves(arms: list[str]) -> None:
    """Plots PSNR and codes in use during training."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    panels = {
        "val/psnr": "PSNR of validation images (dB)",
        "train/perplexity": "codes in use, of 512 (perplexity, all scales)",
        "train/perplexity_scale_00": "codes in use at the 1 x 1 scale (perplexity)",
    }
    for axes, (name, title) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for arm in arms:
            axes.plot(*logged(arm, name), label=arm)
        axes.set(xlabel="step", title=title)
        axes.title.set_fontsize(9)
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.savefig(HERE / "curves.png", dpi=130)


@torch.no_grad()
def draw_reconstructions(arms: list[str]) -> Image.Image:
    """A grid with one row per validation image: the original, then its reconstruction by each arm."""
    dataset = ImageDataset(ShardReader(SHARDS, "val"), 64, 1.0, random_crop=False, random_flip=False)
    chosen = np.linspace(0, len(dataset) - 1, 8).astype(int)
    images = to_tensor([dataset.readable(SampleRequest(int(i), 0, True), Crop())[0] for i in chosen])
    columns = [images]
    for arm in arms:
        tokenizer = load_tokenizer(RUNS / arm / "checkpoints/last.ckpt").eval()
        columns.append(tokenizer.decode(tokenizer.encode(images)))
    return image_grid.grid(image_grid.columns_of(*columns) / 2 + 0.5, columns=len(columns))


def write_scores(file: Path, found: dict[str, dict]) -> None:
    """One row per arm; also printed."""
    with open(file, "w", encoding="utf-8", newline="") as output:
        writer = csv.writer(output)
        writer.writerow(["arm", *SCORES, FLOOR, "images", "perplexity_by_scale"])
        for arm, scores in found.items():
            by_scale = " ".join(f"{value:.1f}" for value in scores["perplexity_by_scale"])
            numbers = [f"{scores[name]:.4g}" for name in [*SCORES, FLOOR]]
            writer.writerow([arm, *numbers, scores["num_images"], by_scale])
    print(file.read_text(encoding="utf-8"))


def check_data() -> None:
    """Ends with a sentence if the images are not there."""
    if not (SHARDS / "manifest.json").is_file():
        sys.exit(f"{SHARDS} does not exist: run experiments/tokenizer/prepare.py first")


def main() -> None:
    arms = sys.argv[1:] or list(ARMS)
    if unknown := [arm for arm in arms if arm not in ARMS]:
        sys.exit(f"no such arm: {', '.join(unknown)}; choose among {', '.join(ARMS)}")
    check_data()
    write_scores(HERE / "results.csv", {arm: train_and_score(arm, ARMS[arm]) for arm in arms})
    plot_curves(arms)
    image_grid.save(draw_reconstructions(arms), HERE / "reconstructions.png")


if __name__ == "__main__":
    main()
