"""The audit of a VAR as files: membership inference, samples near training images, a line for the model card."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from varlab import __version__, image_grid
from varlab.checkpoints.export_folder import tokenizer_fingerprint
from varlab.data.images import CenterCrops
from varlab.data.manifests import TokensManifest, cache_folders, is_token_cache
from varlab.data.order import SampleRequest
from varlab.data.shards import ShardReader
from varlab.data.storage import Storage
from varlab.data.token_datamodule import TokenDataModule
from varlab.evaluation.image_sets import ImageSet
from varlab.evaluation.membership import attack, code_likelihood, copied, nearest, signals
from varlab.files import atomic_write, load_json, save_json
from varlab.models.msvqvae import MSVQVAE
from varlab.models.var import VAR

SIDE = 16  # pixels at which images are compared
SHOWN = 16
CARD_PREFIX = "- membership inference: "


def audit(
    tokenizer: MSVQVAE,
    var: VAR,
    data: str,
    out: Path,
    *,
    samples: str | None,
    num_images: int,
    resize_ratio: float,
    batch_size: int,
    seed: int,
    device: torch.device,
    storage: Storage | None = None,
) -> dict[str, Any]:
    """Writes audit.json and audit.png into `out`; returns what audit.json holds.

    `data`: the training set, as shards or as a token cache, with a validation split that was not trained on. `samples`:
    images that are compared with all training images, which need shards. Raises ValueError for tokens of another
    tokenizer.
    """
    tokenizer, var = tokenizer.to(device), var.to(device)
    is_cache = is_token_cache(data)
    folders = cache_folders(Path(data)) if is_cache else []
    if len(folders) > 1:
        raise ValueError(f"{data} holds caches of several shapes: audit them one by one, first shards={folders[0]}")
    if is_cache:
        data = str(folders[0])
        pyramid = load_json(folders[0] / "manifest.json", "varlab tokenize", TokensManifest)["patch_nums"]
        tokenizer, var = tokenizer.at(pyramid), var.at(pyramid)
    if is_cache and samples is not None:
        raise ValueError(
            f"samples are compared with training images, and {data} holds tokens only: give shards=PACKED_SET"
        )

    def tokens(split: str) -> tuple[Tensor, Tensor]:
        if is_cache:
            return cached_tokens(data, split, num_images, var, tokenizer)
        reader = ShardReader(data, split, storage)
        crops = CenterCrops(reader, tokenizer.image_size, resize_ratio, num_images, batch_size, device)
        conditions = crops.conditions(var.embedder)
        return torch.cat([torch.cat(tokenizer.encode(images), dim=1).cpu() for images in crops]), conditions

    sequences = {split: tokens(split) for split in ("train", "val")}

    def batches(split: str) -> Iterator[tuple[Tensor, Tensor]]:
        for sequence, condition in zip(*(x.split(batch_size) for x in sequences[split]), strict=True):
            yield sequence.to(device), condition.to(device)

    members, others = (signals(var, tokenizer.quantizer, batches(split), split) for split in ("train", "val"))
    plain = {split: sequence.numpy() for split, (sequence, _) in sequences.items()}
    half = len(plain["train"]) // 2  # the control is not to know its own members
    for found, kept in ((members, plain["train"][:half]), (others, plain["val"])):
        found["control"] = code_likelihood(kept, plain["train"][half:], var.codebook_size)
    membership = {name: asdict(attack(members[name], others[name], seed)) for name in members}
    low, high = membership["control"]["auc_interval"]
    warnings = []
    if membership["control"]["tpr"] is None:
        warnings.append(
            f"{len(plain['val'])} held-out images do not allow 1 % false positives: at least 100 are needed"
        )
    if not low <= 0.5 <= high:
        warnings.append(
            f"training and held-out images are not alike: the frequencies of codes alone tell them apart (AUC {low:.2f} to"
            f" {high:.2f}), so that not all of the success is knowledge of members"
        )
    result: dict[str, Any] = {"membership": membership, "warnings": warnings}
    figures: list[Tensor] = []
    if samples is not None:
        result["memorization"], figures = compare_samples(
            ImageSet(samples), data, resize_ratio, num_images, batch_size, device, storage
        )
    protocol = {"data": data, "train_images": len(plain["train"]), "val_images": len(plain["val"]), "samples": samples}
    result["protocol"] = {**protocol, "seed": seed, "varlab": __version__}
    save_json(out / "audit.json", result)
    plot(members, others, membership, out / "audit.png")
    if figures:
        image_grid.save(
            image_grid.grid(image_grid.columns_of(*figures), columns=2 * 4, min_side=64), out / "nearest.png"
        )
    return result


def cached_tokens(data: str, split: str, num_images: int, var: VAR, tokenizer: MSVQVAE) -> tuple[Tensor, Tensor]:
    """(sequences, conditions) of evenly spaced images of a token cache, each in one of its views."""
    module = TokenDataModule(data, global_batch_size=1, condition=var.embedder.kind)
    module.setup()
    if module.manifest["tokenizer"] != tokenizer_fingerprint(tokenizer):
        raise ValueError(f"{data} was made by another tokenizer than the checkpoint's")
    var.embedder.check_data(module.condition_shape, module.text, data)
    rows = module.read(Path(data), split)
    chosen = np.linspace(0, len(rows) - 1, min(num_images, len(rows))).round().astype(int)
    batch = rows.__getitems__([SampleRequest(int(i), 0, True) for i in chosen])
    return batch.sequence, batch.condition


def compare_samples(
    samples: ImageSet,
    data: str,
    resize_ratio: float,
    num_images: int,
    batch_size: int,
    device: torch.device,
    storage: Storage | None,
) -> tuple[dict[str, Any], list[Tensor]]:
    """(how near samples are to their nearest training images, compared with held-out images; the nearest samples and those
    training images). Images are compared by their pixels at 16 x 16."""

    def small(images: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(images, SIDE).flatten(1).cpu()

    train, val = (
        CenterCrops(ShardReader(data, split, storage), samples.size, resize_ratio, count, batch_size, device)
        for split, count in (("train", None), ("val", num_images))
    )
    parts = np.array_split(np.arange(len(samples)), -(-len(samples) // batch_size))
    queries = torch.cat([small(samples.batch(part.tolist(), device)) for part in parts])
    held_out = torch.cat([small(images) for images in val])
    distances, numbers = nearest(torch.cat([queries, held_out]), (small(images) for images in train))
    first = distances[: len(queries)].argsort()[:SHOWN]
    pairs = [
        samples.batch(first.tolist(), device) / 2 + 0.5,
        train.read([train.samples[i] for i in numbers[first]]) / 2 + 0.5,
    ]
    return copied(distances[: len(queries)], distances[len(queries) :]), pairs


def plot(members: dict, others: dict, membership: dict[str, Any], path: Path) -> None:
    """Histograms of each signal for training and held-out images."""
    figure = Figure(figsize=(3.6 * len(members), 2.9), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(members), squeeze=False)[0], members, strict=True):
        bins = np.histogram_bin_edges(np.concatenate([members[name], others[name]]), 40)
        for values, label in ((members[name], "training images"), (others[name], "held-out images")):
            axes.hist(values, bins, density=True, alpha=0.5, label=label)
        axes.set(title=f"{name.replace('_', ' ')}: AUC {membership[name]['auc']:.3f}", xlabel="nats per token")
    figure.axes[0].legend(fontsize=8)
    with atomic_write(path) as partial:
        figure.savefig(partial, dpi=130, format="png")


def card_line(card: str, found: dict[str, Any]) -> str:
    """The text of a model card with the result of an audit as its last bullet, in place of an earlier one."""
    strongest = max(
        (name for name in found["membership"] if name != "control"), key=lambda n: found["membership"][n]["auc"]
    )
    scores = found["membership"][strongest]
    low, high = scores["auc_interval"]
    text = f"{CARD_PREFIX}AUC {scores['auc']:.3f} ({low:.3f} to {high:.3f}; 0.5 is chance) from {strongest.replace('_', ' ')}"
    if scores["tpr"] is not None:
        text += f", {100 * scores['tpr']:.1f} % of training images found at 1 % false positives"
    lines = [line for line in card.splitlines() if not line.startswith(CARD_PREFIX)]
    last = max((i for i, line in enumerate(lines) if line.startswith("- ")), default=len(lines) - 1)
    return "\n".join([*lines[: last + 1], text, *lines[last + 1 :]]) + "\n"
