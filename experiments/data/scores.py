"""What a classifier of the same data reads in samples and reconstructions, and distances in its features."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from classifier import Classifier
from glyphs import LOOK_ALIKES
from torch import Tensor

from varlab import image_grid
from varlab.checkpoints.load import load_tokenizer
from varlab.data.images import CenterCrops
from varlab.data.shards import ShardReader
from varlab.evaluation.image_sets import ImageSet
from varlab.evaluation.samples import evaluate_samples

sys.path.insert(0, str(Path(__file__).parents[1]))
from steps import varlab

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Judge:
    """The classifier of a packed set, trained if it is missing."""

    data: Path

    @property
    def shards(self) -> Path:
        """The packed set."""
        return self.data / "shards"

    @property
    def network(self) -> Classifier:
        """The frozen network."""
        weights = self.data / "classifier.safetensors"
        if not weights.is_file():
            script = Path(__file__).parent / "classifier.py"
            subprocess.run([sys.executable, script, self.shards, weights], check=True)
        return Classifier(str(weights))

    def agreement(self, labels: Tensor, found: Tensor) -> float:
        """Percent of images read as their label; look-alikes count as one."""
        if self.data.name == "glyphs32":
            labels, found = torch.from_numpy(LOOK_ALIKES)[labels], torch.from_numpy(LOOK_ALIKES)[found]
        return 100 * (labels == found).float().mean().item()

    @torch.no_grad()
    def of_reconstructions(self, checkpoint: Path, grid: Path) -> dict[str, float]:
        """PSNR, feature distance and what the classifier reads, over the validation images; draws some pairs of original and
        reconstruction into `grid`. The feature distance is relative to that of two random images."""
        tokenizer, network, reader = load_tokenizer(checkpoint), self.network, ShardReader(self.shards, "val")
        labels, errors, before, after, shown = torch.from_numpy(reader.labels.astype(np.int64)), [], [], [], []
        for images in CenterCrops(reader, tokenizer.image_size[0], 1.0, None, 250, CPU):
            again = tokenizer.decode(tokenizer.encode(images)).clamp(-1, 1)
            errors.append(((images - again) / 2).square().mean((1, 2, 3)))
            before.append(network.pooled(images))
            after.append(network.pooled(again))
            if len(shown) < 8:
                shown.append(image_grid.columns_of(images[:8], again[:8]))
        image_grid.save(image_grid.grid(torch.cat(shown) / 2 + 0.5, columns=16, min_side=64), grid)
        original, reconstruction = torch.cat(before), torch.cat(after)
        read = [network.net["head"](features).argmax(1) for features in (original, reconstruction)]
        unrelated = (original - original.roll(1, 0)).norm(dim=1).mean()
        return {
            "psnr": (-10 * torch.cat(errors).log10()).mean().item(),
            "mean_squared_error": torch.cat(errors).mean().item(),
            "feature_distance": ((original - reconstruction).norm(dim=1).mean() / unrelated).item(),
            "accuracy_original": self.agreement(labels, read[0]),
            "accuracy_reconstruction": self.agreement(labels, read[1]),
            "images": len(labels),
        }

    @torch.no_grad()
    def of_samples(self, checkpoint: Path, folder: Path, per_class: int, **settings: float | str) -> dict[str, Any]:
        """Class agreement, and distances to the validation images, of `per_class` samples of each class."""
        network = self.network
        num_classes = network.net["head"][1].out_features
        num, given = per_class * num_classes, [f"{key}={value}" for key, value in settings.items()]
        if not (folder / "samples.json").is_file():
            varlab("sample", f"checkpoint={checkpoint}", f"out={folder}", f"num={num}", "batch_size=124", "npz=true",
                   "classes=balanced", *given)  # fmt: skip
        found = evaluate_samples(
            str(folder), str(self.shards), network, folder, split="val", batch_size=500, device=CPU, bootstraps=0
        )
        images = ImageSet(folder)
        parts = np.array_split(np.arange(num), -(-num // 500))
        read = torch.cat([network(images.batch(part.tolist(), CPU)).argmax(1) for part in parts])
        scores = {key: value for key, value in (found or {}).items() if isinstance(value, float) and "/std" not in key}
        return {
            **settings,
            "class_agreement": self.agreement(torch.arange(num) % num_classes, read),
            **scores,
            "images": num,
        }
