"""The README of a packed set: a description of its contents, with sample images."""

from collections import Counter
from pathlib import Path

import numpy as np

from varlab import image_grid
from varlab.data.decoding import open_image
from varlab.data.images import Crop, preprocess, to_tensor
from varlab.data.shards import ShardReader, fingerprint, load_manifest
from varlab.data.storage import Storage, is_remote
from varlab.files import atomic_write

MAX_MEASURED = 2000
MAX_REMOTE = 64  # each may download a shard
NUM_SHOWN = 64


def write_card(folder: Path, storage: Storage | None = None) -> None:
    """Writes README.md and samples.png: counts, classes, resolutions (of at most 2,000 images), a grid of samples."""
    manifest = load_manifest(folder)
    reader = ShardReader(folder, "train", storage)
    num_chosen = MAX_REMOTE if any(is_remote(shard.url) for shard in reader.shards) else MAX_MEASURED
    chosen = np.linspace(0, len(reader) - 1, min(len(reader), num_chosen)).astype(int)
    sizes: Counter[str] = Counter()
    shown: list[np.ndarray] = []
    for position, i in enumerate(chosen):
        try:
            image = open_image(reader.read(int(i)))
            sizes[f"{image.width} x {image.height}"] += 1
            if len(shown) < NUM_SHOWN and position % max(1, len(chosen) // NUM_SHOWN) == 0:
                shown.append(preprocess(image, 64, 1.0, Crop()))
        except ValueError:
            sizes["cannot be decoded"] += 1
    image_grid.save(image_grid.grid(to_tensor(shown) / 2 + 0.5, columns=8), folder / "samples.png")
    counts = np.bincount(reader.labels, minlength=len(manifest["class_names"]))
    lines = [
        f"# {manifest['name']}",
        "",
        f"Packed by `varlab pack` (source `{manifest['source']}`), data set `{fingerprint(manifest)}`.",
        f"Re-encoded: {manifest['reencoded'] or 'no, bytes as in the source'}.",
        "",
        "![samples](samples.png)",
        "",
        "| split | images | shards |",
        "|---|---|---|",
        *(f"| {name} | {split['num_images']} | {len(split['shards'])} |" for name, split in manifest["splits"].items()),
        "",
        f"Images per class (train, {len(counts)} classes): {counts.min()} to {counts.max()}, median {np.median(counts):.0f}.",
        "",
        "| label | class | images |",
        "|---|---|---|",
        *(f"| {i} | {name} | {counts[i]} |" for i, name in enumerate(manifest["class_names"])),
        "",
        f"Width x height of {len(chosen)} images of the training set, most frequent first:",
        "",
        "| size | images |",
        "|---|---|",
        *(f"| {size} | {count} |" for size, count in sizes.most_common(12)),
        "",
    ]
    with atomic_write(folder / "README.md") as partial:
        partial.write_text("\n".join(lines), encoding="utf-8")
