"""Scores of a tokenizer on a packed set, written as files with their protocol and figures."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from varlab import __version__, image_grid
from varlab.checkpoints.export_folder import tokenizer_fingerprint
from varlab.data.images import CenterCrops
from varlab.data.resolutions import resolution_of
from varlab.data.shards import ShardReader, fingerprint
from varlab.data.storage import Storage
from varlab.evaluation.image_sets import score_name
from varlab.evaluation.plots import curve_by_scale
from varlab.evaluation.reconstruction import reconstruction_distance, reconstruction_scores
from varlab.files import save_json
from varlab.models.msvqvae import MSVQVAE


def evaluate_tokenizer(
    tokenizer: MSVQVAE,
    shards: str,
    out: Path,
    *,
    split: str = "val",
    num_images: int | None = None,
    curve_images: int = 512,
    resize_ratio: float = 1.0,
    batch_size: int = 32,
    device: torch.device,
    storage: Storage | None = None,
    features: nn.Module | None = None,
    metrics: dict[str, Callable] | None = None,
) -> dict[str, Any]:
    """Writes evaluation.json (scores with their protocol), by_scale.png and reconstructions.png into `out`; returns the
    scores.

    `features`: feature network of the Frechet distance. `metrics`: by name, functions of reconstructions and images
    (B 3 H W, in [-1, 1]) that return one value per image.
    """
    tokenizer = tokenizer.to(device).eval()

    def crops(split: str, num_images: int | None) -> CenterCrops:
        reader = ShardReader(shards, split, storage)
        return CenterCrops(reader, tokenizer.image_size, resize_ratio, num_images, batch_size, device)

    images = crops(split, num_images)
    moved = {
        name: metric.to(device) if isinstance(metric, nn.Module) else metric for name, metric in (metrics or {}).items()
    }
    result = reconstruction_scores(tokenizer, images, moved, curve_images)
    if features is not None:
        others = crops("train" if split != "train" else "val", result["num_images"])
        found = reconstruction_distance(tokenizer, features.to(device), images, others)
        network = score_name(features)
        name = "rfid" if network == "inception" else f"frechet_distance/{network}"
        result |= {name: found.pop("distance"), **{f"{name}/{what}": value for what, value in found.items()}}
    result["protocol"] = {
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "data": fingerprint(images.images.reader.manifest),
        "split": split,
        "resolution": resolution_of(tokenizer.image_size),
        "resize_ratio": resize_ratio,
        "crop": "center",
        "varlab": __version__,
    }
    save_json(out / "evaluation.json", result)
    curve_by_scale(result["by_scale"], [str(pn) for pn in tokenizer.patch_nums], out / "by_scale.png")
    shown = images.sample_images(8)
    strip = tokenizer.filmstrip(tokenizer.encode(shown)).detach()
    rows = image_grid.columns_of(shown, *strip) / 2 + 0.5
    image_grid.save(image_grid.grid(rows, columns=1 + len(strip)), out / "reconstructions.png")
    return result
