"""`source=idx`: MNIST and its relatives as their authors publish them."""

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np

from varlab.data.sources.items import Item, check_share, png
from varlab.data.sources.labels import Rows, labeled, read_names
from varlab.data.write_shards import Source

PARTS = {"train": "train", "val": "t10k"}


def read_idx(file: Path, num_dims: int) -> np.ndarray:
    """The bytes of an idx file, also gzipped. Raises ValueError naming the file if it is another one, or truncated."""
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{file} cannot be read: {error}") from None
    header = 4 + 4 * num_dims
    shape = struct.unpack(f">{num_dims}I", content[4:header]) if len(content) >= header else ()
    size = int(np.prod(shape, dtype=object)) if shape else -1
    if content[:4] != bytes([0, 0, 8, num_dims]) or len(content) != header + size:
        raise ValueError(f"{file} is not an idx file of bytes in {num_dims} dimensions, or it is truncated")
    return np.frombuffer(content, dtype=np.uint8, offset=header).reshape(shape)


def idx_source(path: str | None, class_names: str | None = None, val_share: float = 0.1, seed: int = 0) -> Source:
    """A folder with `train-images-idx3-ubyte` and `train-labels-idx1-ubyte`, and, for validation, the same with `t10k`;
    each may end in `.gz`."""
    check_share(val_share)
    if path is None:
        raise ValueError("source=idx needs path=FOLDER with train-images-idx3-ubyte and train-labels-idx1-ubyte")
    splits: dict[str, Rows] = {}
    for split, part in PARTS.items():
        found = {kind: sorted(Path(path).glob(f"{part}-{kind}[-.]idx*-ubyte*")) for kind in ("images", "labels")}
        if not all(found.values()):
            if split == "train":
                raise ValueError(f"{path} holds no train-images-idx3-ubyte and train-labels-idx1-ubyte")
            continue
        images, labels = read_idx(found["images"][0], 3), read_idx(found["labels"][0], 1)
        if len(images) != len(labels):
            raise ValueError(f"{found['images'][0]} holds {len(images)} images, but there are {len(labels)} labels")
        splits[split] = [
            (int(label), Item(0, "png", png(image), name=f"{found['images'][0]}, image {i}"))
            for i, (label, image) in enumerate(zip(labels, images, strict=True))
        ]
    return labeled("idx", Path(path).name, splits, read_names(class_names), val_share, seed, [])
