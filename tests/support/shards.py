"""Small real data: a few of the 5,000 digits, packed."""

from pathlib import Path

from varlab.data.sources.mnist5k import mnist5k_source
from varlab.data.write_shards import Source, pack


def digits(num_train: int = 48, num_val: int = 11) -> Source:
    source = mnist5k_source(0.1, seed=0)
    few = {
        "train": source.splits["train"][:: 4500 // num_train][:num_train],
        "val": source.splits["val"][:: 500 // num_val][:num_val],
    }
    return Source("mnist5k", "digits", source.class_names, few)


def make_shards(folder: Path, num_train: int = 48, num_val: int = 11) -> Path:
    pack(digits(num_train, num_val), folder, shard_images=20, seed=0)
    return folder
