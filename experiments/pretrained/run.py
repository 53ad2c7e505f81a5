"""The models that are installed with varlab: tokenizer and transformer for glyphs32 and fashion32, trained on two CPU cores,
scored by a classifier of the same data, exported. Finished steps are skipped; an interrupted run continues.

    python experiments/data/glyphs.py && python experiments/pretrained/run.py glyphs32
    python experiments/data/fashion.py && python experiments/pretrained/run.py fashion32
    python experiments/pretrained/run.py glyphs32 --until tokenizer      (stops after a step: tokenizer, var, scores, export)
"""

import argparse
import csv
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from varlab import image_grid
from varlab.checkpoints.export_folder import save_pretrained
from varlab.checkpoints.load import load, load_tokenizer
from varlab.data.images import CenterCrops
from varlab.data.shards import ShardReader, load_manifest
from varlab.evaluation.image_sets import ImageSet
from varlab.evaluation.samples import evaluate_samples
from varlab.files import save_json

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
sys.path.insert(0, str(HERE.parent / "data"))
from classifier import Classifier  # noqa: E402
from glyphs import LOOK_ALIKES  # noqa: E402

STEPS = ("tokenizer", "var", "scores", "export")
GUIDANCE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)


@dataclass(frozen=True)
class Model:
    """What a model is trained on, for how long, and how it is best sampled."""

    about: str
    tokenizer: list[str]
    var: list[str]
    per_class: int  # samples per class
    same: np.ndarray | None = None  # groups of classes that look alike

    def matches(self, labels: torch.Tensor, found: torch.Tensor) -> float:
        """Percent of the labels that agree, look-alikes folded."""
        groups = torch.arange(10**4) if self.same is None else torch.from_numpy(self.same)
        return 100 * (groups[labels] == groups[found]).float().mean().item()


MODELS = {
    "glyphs32": Model(
        "letters and digits of 3,700 free fonts, rendered by experiments/data/glyphs.py from Debian's packages",
        [], [], 40, LOOK_ALIKES,
    ),
    "fashion32": Model(
        "Fashion-MNIST (Xiao et al. 2017, MIT license), 60,000 photographs",
        ["steps=1600", "val_every=400"], ["model.depth=4", "model.width=160", "model.drop_path=0.05"], 200,
    ),
}  # fmt: skip


def varlab(*command: str) -> None:
    """Prints and runs one command."""
    print("varlab", " ".join(command), flush=True)
    subprocess.run([sys.executable, "-m", "varlab", *command], check=True)


def finished(folder: Path) -> bool:
    """Whether a training run reached its end."""
    file = folder / "run.json"
    return file.is_file() and json.loads(file.read_text())["state"] == "finished"


def train(name: str, experiment: str, run: str, *settings: str) -> Path:
    """Trains, unless finished; returns the checkpoint."""
    folder = Path("runs") / name / run
    if not finished(folder):
        varlab(
            "train", f"experiment={experiment}", f"name={name}/{run}", "trainer=cpu", "trainer.precision=bf16-mixed",
            "logger=csv", "ckpt_path=last", *settings,
        )  # fmt: skip
    return folder / "checkpoints/last.ckpt"


@torch.no_grad()
def score_reconstructions(model: Model, checkpoint: Path, shards: Path, judge: Classifier) -> dict[str, Any]:
    """PSNR and what the classifier reads in held-out images and in their reconstructions."""
    tokenizer = load_tokenizer(checkpoint)
    reader = ShardReader(shards, "val")
    labels = torch.from_numpy(reader.labels.astype(np.int64))
    read: dict[str, list[torch.Tensor]] = {"original": [], "reconstruction": []}
    features, errors, rows = {kind: [] for kind in read}, [], []
    for images in CenterCrops(reader, 32, 1.0, None, 250, torch.device("cpu")):
        again = tokenizer.decode(tokenizer.encode(images)).clamp(-1, 1)
        for kind, batch in (("original", images), ("reconstruction", again)):
            read[kind].append(judge(batch).argmax(1))
            features[kind].append(judge.pooled(batch))
        errors.append(((images - again) / 2).square().mean((1, 2, 3)))
        if len(rows) < 8:
            rows.append((images[:6], again[:6]))
    seen = {kind: torch.cat(parts) for kind, parts in read.items()}
    distance = torch.cat(features["original"]) - torch.cat(features["reconstruction"])
    scale = torch.cat(features["original"]).std(0).norm()
    pairs = torch.cat([torch.stack([a, b], 1).flatten(0, 1) for a, b in rows])
    image_grid.save(image_grid.grid(pairs / 2 + 0.5, columns=12), HERE / f"{shards.parent.name}-reconstructions.png")
    return {
        "psnr": float((-10 * torch.cat(errors).log10()).mean()),
        "feature_distance": float(distance.norm(dim=1).mean() / scale),
        "accuracy_original": model.matches(labels, seen["original"]),
        "accuracy_reconstruction": model.matches(labels, seen["reconstruction"]),
        "same_class_read": 100 * (seen["original"] == seen["reconstruction"]).float().mean().item(),
        "images": len(labels),
    }


def score_samples(
    name: str, model: Model, checkpoint: Path, shards: Path, judge: Classifier, **settings: float
) -> dict[str, Any]:
    """Class agreement, Frechet distance, precision and recall of samples, equally many of each class."""
    point = "-".join(f"{key}{value:g}" for key, value in settings.items())
    samples, num = Path("runs") / name / "samples" / point, model.per_class * judge.net["head"][1].out_features
    if not (samples / "samples.json").is_file():
        given = [f"{key}={value:g}" for key, value in settings.items()]
        varlab("sample", f"checkpoint={checkpoint}", f"out={samples}", f"num={num}", "batch_size=124", "npz=true",
               "classes=balanced", "cfg_schedule=constant", *given)  # fmt: skip
    found = evaluate_samples(
        str(samples), str(shards), judge, samples, split="val", batch_size=500, device=torch.device("cpu")
    )
    images = ImageSet(samples)
    read = torch.cat([
        judge(images.batch(list(part), torch.device("cpu"))).argmax(1) for part in np.array_split(np.arange(num), max(1, num // 500))
    ])  # fmt: skip
    labels = torch.arange(num) % judge.net["head"][1].out_features
    scores = {key: value for key, value in (found or {}).items() if isinstance(value, float)}
    return {**settings, "class_agreement": model.matches(labels, read), **scores, "images": num}


def main() -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__)
    parser.add_argument("model", choices=list(MODELS))
    parser.add_argument("--until", choices=STEPS, default="export")
    given = parser.parse_args()
    name, model = given.model, MODELS[given.model]
    last, shards, runs = STEPS.index(given.until), Path("data") / name / "shards", Path("runs") / name
    if not (shards / "manifest.json").is_file():
        sys.exit(f"{shards} does not exist: run experiments/data/{name.removesuffix('32')}.py first")
    weights = shards.parent / "classifier.safetensors"
    tokenizer = train(name, "tokenizer_glyphs32", "tokenizer", f"data.path={shards}", *model.tokenizer)
    if not weights.is_file():
        subprocess.run([sys.executable, HERE.parent / "data/classifier.py", shards, weights], check=True)
    judge = Classifier(str(weights))
    facts_file = runs / "reconstructions.json"
    if not facts_file.is_file():
        save_json(facts_file, score_reconstructions(model, tokenizer, shards, judge))
    reconstructions = json.loads(facts_file.read_text())
    print(json.dumps(reconstructions, indent=1), flush=True)
    if last < 1:
        return
    tokens = runs / "tokens"
    if not (tokens / "manifest.json").is_file():
        varlab("tokenize", f"tokenizer={tokenizer}", f"shards={shards}", f"out={tokens}", "resize_ratio=1.0")
    checkpoint = train(name, "var_glyphs32", "var", f"tokenizer={tokenizer}", f"data.path={tokens}", *model.var)
    if last < 2:
        return
    rows = [score_samples(name, model, checkpoint, shards, judge, cfg_scale=scale, top_p=0.97) for scale in GUIDANCE]
    with open(HERE / f"{name}-samples.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    if last < 3:
        return
    best = min(rows, key=lambda row: next(value for key, value in row.items() if key.startswith("frechet")))
    run = json.loads((runs / "var/run.json").read_text())
    facts = {
        "trained on": model.about,
        "data set": load_manifest(shards)["name"],
        "reconstructions of held-out images": f"{reconstructions['psnr']:.1f} dB PSNR; a classifier reads"
        f" {reconstructions['accuracy_reconstruction']:.1f} % of them right, of the originals"
        f" {reconstructions['accuracy_original']:.1f} %",
        "validation loss": f"{run['val_loss']:.3f} nats per token",
        "best sampling": f"cfg_scale={best['cfg_scale']:g} cfg_schedule=constant top_p=0.97: the classifier reads"
        f" {best['class_agreement']:.1f} % as the requested class",
    }
    networks = load(checkpoint)
    save_pretrained(ROOT / "src/varlab/pretrained" / name, *networks, facts, dtype=torch.bfloat16)


if __name__ == "__main__":
    main()
