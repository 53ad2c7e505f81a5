"""The shard format: webdataset tar files (image + `.cls`), an index of where each image lies, and a manifest.

    manifest.json       name, source, class names; for each split its shards with counts, bytes and sha256
    train-000000.tar    00000123.png, 00000123.cls, ...     (readable by any webdataset reader)
    train.index.npy     one row an image: shard, offset, size, label, crc32

Images are read by the index, not as a stream: a position in the epoch costs one read, so a resumed run starts at once,
any number of ranks and workers sees the same order, and a damaged byte is noticed by its checksum.
"""

import io
import os
import tarfile
import zlib
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from varlab.files import json_hash, load_json, sha256, whole_file

FORMAT = 1
INDEX_ROW = np.dtype([("shard", "u4"), ("offset", "u8"), ("size", "u4"), ("label", "u4"), ("crc32", "u4")])
MAX_OPEN_SHARDS = 128


class Sample(NamedTuple):
    """One image on its way into a shard."""

    key: str
    image: bytes  # an encoded file
    extension: str  # without the dot
    label: int


def write_shard(path: Path, samples: Iterable[Sample]) -> None:
    """Writes a tar of images and labels, whole or not at all; the same samples give the same bytes."""
    with whole_file(path) as partial, tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            for name, content in [(sample.extension, sample.image), ("cls", str(sample.label).encode())]:
                info = tarfile.TarInfo(f"{sample.key}.{name}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def index_shard(path: Path, shard: int) -> tuple[list[str], np.ndarray]:
    """Keys and index rows of a shard, read back from the file. Raises ValueError for a tar that is damaged or holds a
    key without both image and label."""
    members: dict[str, dict[str, tarfile.TarInfo]] = {}
    rows = []
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                key, _, extension = info.name.partition(".")
                if extension in members.setdefault(key, {}):
                    raise ValueError(f"{path}: key {key!r} holds two files of type .{extension}")
                members[key][extension] = info
            for key, files in members.items():
                images = [info for extension, info in files.items() if extension != "cls"]
                if "cls" not in files or len(images) != 1:
                    raise ValueError(f"{path}: key {key!r} holds {sorted(files)}, expected one image and one .cls")
                image, label = (tar.extractfile(info).read() for info in (images[0], files["cls"]))  # pyright: ignore[reportOptionalMemberAccess]
                rows.append((shard, images[0].offset_data, len(image), int(label), zlib.crc32(image)))
    except tarfile.TarError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    return list(members), np.array(rows, dtype=INDEX_ROW)


def load_manifest(path: str | Path) -> dict[str, Any]:
    """The manifest of a folder of shards."""
    file = Path(path) / "manifest.json"
    manifest = load_json(file, "varlab pack")
    if manifest.get("kind") != "shards" or manifest.get("format") != FORMAT:
        raise ValueError(
            f"{file} describes {manifest.get('kind')!r} of format {manifest.get('format')!r}, expected shards of format {FORMAT}"
        )
    return manifest


def fingerprint(manifest: dict[str, Any]) -> str:
    """Identity of a data set: its content, whatever its name or place."""
    return json_hash(
        {name: [shard["sha256"] for shard in split["shards"]] for name, split in manifest["splits"].items()}
    )


class ShardReader:
    """The images of one split, by number. Checks at once that every shard is there and as long as it was written."""

    def __init__(self, path: str | Path, split: str) -> None:
        self.path, self.manifest = Path(path), load_manifest(path)
        if split not in self.manifest["splits"]:
            raise ValueError(f"{path} has no split {split!r}, only {sorted(self.manifest['splits'])}")
        described = self.manifest["splits"][split]
        self.shards = [self.path / shard["name"] for shard in described["shards"]]
        self.shard_counts = [shard["num_images"] for shard in described["shards"]]
        for file, shard in zip(self.shards, described["shards"], strict=True):
            size = file.stat().st_size if file.is_file() else None
            if size != shard["num_bytes"]:
                state = "is missing" if size is None else f"has {size} bytes"
                raise ValueError(f"shard {file} {state}, the manifest says {shard['num_bytes']} bytes: pack it again")
        self.index = np.load(self.path / f"{split}.index.npy", mmap_mode="r")
        if len(self.index) != described["num_images"]:
            raise ValueError(
                f"{self.path / split}.index.npy lists {len(self.index)} images, the manifest {described['num_images']}"
            )
        self.labels = np.asarray(self.index["label"], dtype=np.int64)
        num_classes = len(self.manifest["class_names"])
        if len(self.labels) and self.labels.max() >= num_classes:
            raise ValueError(
                f"{path}: label {self.labels.max()} is out of range, the manifest names {num_classes} classes"
            )
        self.open_shards: OrderedDict[int, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self.index)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "open_shards": OrderedDict()}  # file descriptors stay in their process

    def read(self, i: int) -> bytes:
        """The encoded image number `i`. Raises ValueError naming shard and offset when its bytes changed since packing."""
        row = self.index[i]
        shard = int(row["shard"])
        if shard not in self.open_shards:
            self.open_shards[shard] = os.open(self.shards[shard], os.O_RDONLY)
            if len(self.open_shards) > MAX_OPEN_SHARDS:
                os.close(self.open_shards.popitem(last=False)[1])
        self.open_shards.move_to_end(shard)
        image = os.pread(self.open_shards[shard], int(row["size"]), int(row["offset"]))
        if zlib.crc32(image) != row["crc32"]:
            raise ValueError(f"{self.shards[shard]}: the image at byte {row['offset']} is damaged (checksum differs)")
        return image


def verify(path: str | Path) -> int:
    """Reads every shard again; returns the number of images. Raises ValueError naming what is broken."""
    manifest = load_manifest(path)
    broken = []
    for split in manifest["splits"]:
        reader = ShardReader(path, split)
        for shard, described in zip(reader.shards, manifest["splits"][split]["shards"], strict=True):
            if sha256(shard) != described["sha256"]:
                broken.append(shard.name)
    if broken:
        raise ValueError(f"{path}: the content of {len(broken)} shards changed since packing: {', '.join(broken)}")
    return sum(split["num_images"] for split in manifest["splits"].values())
