"""Likelihood of a VAR on images or cached tokens, written as files with protocol and figure."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from varlab import __version__
from varlab.checkpoints.export_folder import tokenizer_fingerprint
from varlab.data.images import CenterCrops
from varlab.data.manifests import TokensManifest, cache_folders, is_token_cache
from varlab.data.shards import ShardReader
from varlab.data.storage import Storage
from varlab.data.token_datamodule import TokenDataModule
from varlab.evaluation.likelihood import likelihood_scores
from varlab.evaluation.plots import curve_by_scale
from varlab.evaluation.retrieval import retrieval_scores
from varlab.files import load_json, save_json
from varlab.models import scales
from varlab.models.msvqvae import MSVQVAE
from varlab.models.var import VAR

Batches = Iterator[tuple[Tensor, Tensor]]


def evaluate_likelihood(
    tokenizer: MSVQVAE,
    var: VAR,
    data: str,
    out: Path,
    *,
    checkpoint: str,
    split: str = "val",
    num_images: int | None = None,
    resize_ratio: float = 1.0,
    batch_size: int = 32,
    device: torch.device,
    storage: Storage | None = None,
    retrieval: int | None = None,
) -> dict[str, Any]:
    """Writes likelihood.json and likelihood.png into `out`: loss, error, calibration per scale. `data`: a packed set,
    or a token cache, of which the validation split is used. Those of several shapes are scored one by one, each in a folder of its
    name, and the scores are the means over all images. `retrieval`: see `retrieval_scores`. Returns the scores."""
    is_cache = is_token_cache(data)
    if is_cache and len(folders := cache_folders(Path(data))) > 1:
        shared = {"checkpoint": checkpoint, "batch_size": batch_size, "device": device, "retrieval": retrieval}
        by_shape = {
            folder.name: evaluate_likelihood(tokenizer, var, str(folder), out / folder.name, **shared)
            for folder in folders
            if load_json(folder / "manifest.json", "varlab tokenize", TokensManifest)["splits"]["val"]["num_images"]
        }
        protocol = {"data": data, "split": "val", "varlab": __version__, "checkpoint": checkpoint}
        result = mean_over_images(by_shape)
        result |= {"by_shape": by_shape}
        save_json(out / "likelihood.json", {**result, "protocol": protocol})
        return result
    tokenizer, var = tokenizer.to(device), var.to(device)

    module = TokenDataModule(data, global_batch_size=batch_size, condition=var.embedder.kind)
    if is_cache:
        module.setup()
        tokenizer, var = tokenizer.at(module.pyramids[0]), var.at(module.pyramids[0])

    def from_tokens() -> Batches:
        if module.manifest["tokenizer"] != tokenizer_fingerprint(tokenizer):
            raise ValueError(
                f"{data} was made by tokenizer {module.manifest['tokenizer']}, not by the tokenizer of {checkpoint}"
            )
        var.embedder.check_data(module.condition_shape, module.text, data)
        for batch in module.val_dataloader():
            is_real = batch.weight > 0
            yield batch.sequence[is_real].to(device), batch.condition[is_real].to(device)

    def from_images() -> Batches:
        reader = ShardReader(data, split, storage)
        crops = CenterCrops(reader, tokenizer.image_size, resize_ratio, num_images, batch_size, device)
        conditions = crops.conditions(var.embedder).to(device)
        for images, condition in zip(crops, conditions.split(batch_size), strict=True):
            yield torch.cat(tokenizer.encode(images), dim=1), condition

    read = from_tokens if is_cache else from_images
    result = likelihood_scores(var, tokenizer.quantizer, read())
    if retrieval is not None:
        result |= retrieval_scores(var, tokenizer.quantizer, read(), retrieval)
    protocol = {"data": data, "split": "val" if is_cache else split, "varlab": __version__, "checkpoint": checkpoint}
    save_json(out / "likelihood.json", {**result, "protocol": protocol})
    shown = {name: result["by_scale"][name] for name in ("loss", "unconditional_loss", "error", "calibration_error")}
    labels = [f"{h}x{w}" for h, w in scales.sides(var.patch_nums)]
    curve_by_scale(shown, labels, out / "likelihood.png")
    return result


def mean_over_images(by_shape: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The means of the scores of several shapes over all of their images; of those of retrieval, over the images compared."""
    result: dict[str, Any] = {}
    for name in ("loss", "error", "unconditional_loss", "class_gap", "bits_per_token", "bits_per_image", "retrieval"):
        count = "retrieval_images" if name == "retrieval" else "num_images"
        found = [scores for scores in by_shape.values() if scores.get(name) is not None]
        total = sum(scores[count] for scores in found)
        if total:
            result |= {name: sum(scores[name] * scores[count] for scores in found) / total, count: total}
    return result
