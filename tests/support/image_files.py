"""Image sets in the forms that people have: the ILSVRC2012 archives, parquet files."""

import gzip
import io
import json
import struct
import tarfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from PIL import Image
from scipy.io import savemat

from varlab.data.sources.mnist5k import mnist5k_source


def make_ilsvrc(folder):
    """Archives of the true nested structure, from real digits: three classes, five validation images."""
    digits_by_class = {"n03": 2, "n01": 0, "n02": 1}  # the devkit's numbers are not in the order of the ids
    source = mnist5k_source(0.1, seed=0)
    folder.mkdir()

    def jpeg(label, i):
        item = [item for item in source.splits["train"] if item.label == label][i]
        buffer = io.BytesIO()
        Image.open(io.BytesIO(item.load())).resize((40 + i, 60)).save(buffer, "jpeg")
        return buffer.getvalue()

    def add(tar, name, content):
        info = tarfile.TarInfo(name)
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))

    expected = {"train": [], "val": []}
    with tarfile.open(folder / "train.tar", "w") as outer:
        for wordnet_id, label in digits_by_class.items():
            inner_bytes = io.BytesIO()
            with tarfile.open(fileobj=inner_bytes, mode="w") as inner:
                for i in range(4):
                    content = jpeg(label, i)
                    add(inner, f"{wordnet_id}_{i}.JPEG", content)
                    expected["train"].append((content, label))
            add(outer, f"{wordnet_id}.tar", inner_bytes.getvalue())
    truth = [2, 1, 3, 3, 2]  # ILSVRC2012_IDs: 1 is n03, 2 is n01, 3 is n02
    label_of = {1: 2, 2: 0, 3: 1}
    with tarfile.open(folder / "val.tar", "w") as tar:
        for number, identity in enumerate(truth, start=1):
            content = jpeg(label_of[identity], 10 + number)
            add(tar, f"ILSVRC2012_val_{number:08d}.JPEG", content)
            expected["val"].append((content, label_of[identity]))
    kind = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    rows = [(1, "n03", "cat, feline", 0), (2, "n01", "ant", 0), (3, "n02", "bee", 0), (4, "n09", "animal", 3)]
    meta = io.BytesIO()
    savemat(meta, {"synsets": np.array(rows, dtype=kind)})
    with tarfile.open(folder / "devkit.tar.gz", "w:gz") as tar:
        add(tar, "ILSVRC2012_devkit_t12/data/meta.mat", meta.getvalue())
        add(
            tar,
            "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt",
            "\n".join(map(str, truth)).encode(),
        )
    return expected


def make_parquet(folder, names=None):
    """Two files as a hub serves them, from the ImageNet archives' images: a struct of bytes and path, and a label."""
    expected = make_ilsvrc(folder / "in")
    features = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
    metadata = {"huggingface": json.dumps(features)} if names else None
    for split, members in expected.items():
        for part in (0, 1):
            own = members[part::2]
            columns = {
                "image": [{"bytes": content, "path": None} for content, _ in own],
                "label": [label for _, label in own],
            }
            table = pyarrow.table(columns).replace_schema_metadata(metadata)
            pyarrow.parquet.write_table(table, folder / f"{split}-{part}.parquet", row_group_size=2)
    return expected


def make_photo(folder: Path) -> Path:
    """A noisy image of 40 x 30 pixels."""
    file = folder / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(256, size=(30, 40, 3), dtype=np.uint8)).save(file)
    return file


def pattern(side: int, num: int = 2) -> torch.Tensor:
    """Smooth images in [-1, 1], the same everywhere."""
    x = torch.linspace(0, 6, side)
    waves = torch.sin(x[:, None] * torch.arange(1, 3 * num + 1)[:, None, None] + x[None, :] * 2)
    return waves.view(num, 3, side, side)


def make_tables(folder):
    """`train.csv` and `val.csv` of paths and breeds, in `folder`."""
    items = mnist5k_source(0.1, seed=0).splits
    for split in ("train", "val"):
        lines = ["path,breed"]
        for i, item in enumerate(items[split][:: len(items[split]) // 12][:12]):
            (folder / f"{split}-{i}.png").write_bytes(item.load())
            lines.append(f"{split}-{i}.png,{('beagle', 'poodle')[i % 2]}")
        (folder / f"{split}.csv").write_text("\n".join(lines) + "\n")


def make_idx(folder):
    """Twelve random images of ten classes as idx files."""
    folder.mkdir()
    images = np.random.default_rng(0).integers(256, size=(12, 28, 28), dtype=np.uint8)
    for kind, array in (("images-idx3", images), ("labels-idx1", np.arange(12, dtype=np.uint8) % 3)):
        header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
        (folder / f"train-{kind}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes()))
