"""Fashion-MNIST (Xiao et al. 2017, MIT license) as a data set of 32 pixel images: 60,000 and 10,000 gray photographs of ten
kinds of clothes, with a margin of two pixels.

    python experiments/data/fashion.py [FOLDER]      (default data/fashion32; a minute, 31 MB of downloads)

Needs Debian or a system based on it (`apt-get download`, no root), or the four idx files in FOLDER/idx.
"""

import shutil
import sys
from pathlib import Path

import numpy as np
from debian import download

from varlab.data.dataset_card import write_card
from varlab.data.sources.idx import read_idx
from varlab.data.sources.items import Item, png, usable_cores
from varlab.data.write_shards import Source, pack

CLASSES = ["t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"]
MARGIN = 2


def items(folder: Path, part: str) -> list[Item]:
    """The images of a split, with a margin in the color of the background."""
    images = read_idx(folder / f"{part}-images-idx3-ubyte.gz", 3)
    labels = read_idx(folder / f"{part}-labels-idx1-ubyte.gz", 1)
    padded = np.pad(images, ((0, 0), (MARGIN, MARGIN), (MARGIN, MARGIN)))
    return [Item(int(label), "png", png(image)) for label, image in zip(labels, padded, strict=True)]


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "data/fashion32")
    if not (folder / "idx").is_dir():
        package = download(["dataset-fashion-mnist"], folder / "package")[0]
        shutil.copytree(package / "usr/share/datasets/fashion-mnist", folder / "idx")
    splits = {split: items(folder / "idx", part) for split, part in (("train", "train"), ("val", "t10k"))}
    source = Source("fashion", "fashion32", CLASSES, splits)
    shards = folder / "shards"
    pack(source, shards, shard_images=10_000, seed=0, num_workers=usable_cores(), check=False)
    write_card(shards)
    print(f"{shards}: {len(splits['train']):,} images for training, {len(splits['val']):,} for validation")


if __name__ == "__main__":
    main()
