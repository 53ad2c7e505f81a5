"""The shard format: webdataset tar files (image + `.cls`), an index of the position of each image, and a manifest.

    manifest.json         name, source, class names; for each split its index and shards with counts, bytes and sha256
    train-000000.tar      00000123.png, 00000123.cls, ...     (readable by any webdataset reader)
    train.index.npy       one row per image: shard, offset, size, label, crc32
    train.condition.npy   only if shards hold vectors (00000123.npy): one row per image
    train.captions.json   only if shards hold captions (00000123.txt, one per line): a list per image

Images are read through the index, not as a stream: any position in the epoch is one read, so a resumed run starts
immediately, any number of ranks and workers gets the same order, and checksums detect damaged images. A folder of
shards may be a URL: each shard is then downloaded when its first image is needed.
"""

import os
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm.auto import tqdm

from varlab.data.manifests import Captions, ShardsManifest, open_array, spot_check
from varlab.data.shard_files import INDEX_ROW, ShardIndex
from varlab.data.storage import RemoteFile, Storage, is_remote, join
from varlab.files import atomic_write, json_hash, load_json, parse_json, save_json, sha256

FORMAT = 2
MAX_OPEN_SHARDS = 128
ConditionKind = Literal["label", "vector", "text", "image"]


def save_index(out: Path, split: str, indexes: Sequence[ShardIndex]) -> dict[str, Any]:
    """Writes the index of a split, and its vectors and captions if it has any; returns their entries in the manifest.

    Raises ValueError if only some shards hold vectors, or vectors of different shapes.
    """
    vectors = [index.conditions for index in indexes if len(index.rows)]
    shapes = {None if array is None else array.shape[1:] for array in vectors}
    if len(shapes) > 1:
        raise ValueError(
            f"{out}: the shards of {split} hold vectors of different shapes ({shapes}): all images need the same shape"
        )
    found = {"index": save_array(out / f"{split}.index.npy", np.concatenate([index.rows for index in indexes]))}
    if vectors and vectors[0] is not None:
        found["condition"] = save_array(out / f"{split}.condition.npy", np.concatenate(vectors))  # pyright: ignore[reportArgumentType, reportCallIssue]
    captions = [texts for index in indexes for texts in index.captions]
    if any(captions):
        save_json(out / f"{split}.captions.json", {"captions": captions})
        found["captions"] = entry_of(out / f"{split}.captions.json")
    return found


def save_array(file: Path, array: np.ndarray) -> dict[str, Any]:
    """Writes an array atomically; returns its entry in the manifest."""
    with atomic_write(file) as partial, open(partial, "wb") as stream:
        np.save(stream, array)
    return entry_of(file)


def entry_of(file: Path) -> dict[str, Any]:
    """A file's entry in the manifest."""
    return {"name": file.name, "num_bytes": file.stat().st_size, "sha256": sha256(file)}


def load_manifest(path: str | Path, storage: Storage | None = None) -> dict[str, Any]:
    """The manifest of a folder of shards, local or remote."""
    file = join(path, "manifest.json")
    if is_remote(path):
        return parse_json((storage or Storage()).read(file), file, "varlab pack", ShardsManifest)
    return load_json(Path(file), "varlab pack", ShardsManifest)


def fingerprint(manifest: dict[str, Any]) -> str:
    """Identity of a data set's content, independent of its name and location."""
    return json_hash(
        {name: [shard["sha256"] for shard in split["shards"]] for name, split in manifest["splits"].items()}
    )


class ShardReader:
    """The images of one split, by number. The constructor checks that every local shard exists and has the size that
    the manifest says.

    `path`: folder or URL of a packed set. Remote files are downloaded through `storage` and verified by their checksum.
    """

    def __init__(self, path: str | Path, split: str, storage: Storage | None = None) -> None:
        self.path, self.storage = str(path), storage or Storage()
        self.manifest = load_manifest(path, self.storage)
        if split not in self.manifest["splits"]:
            raise ValueError(f"{path} has no split {split!r}, only {sorted(self.manifest['splits'])}")
        self.split = split
        self.described = described = self.manifest["splits"][split]
        self.shards = [
            RemoteFile(join(path, shard["name"]), shard["num_bytes"], shard["sha256"]) for shard in described["shards"]
        ]
        self.shard_counts = [shard["num_images"] for shard in described["shards"]]
        for shard in self.shards:
            if problem := problem_of_length(shard):
                raise ValueError(f"{problem}: pack it again")
        self.num_classes = len(self.manifest["class_names"])
        self.shard_bytes = np.array([shard.num_bytes for shard in self.shards], dtype=np.int64)
        self.index = self.load_array(described["index"], (None,), INDEX_ROW)
        self.check_rows(self.index[spot_check(len(self.index))])
        self.open_shards: OrderedDict[int, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self.index)

    @property
    def labels(self) -> np.ndarray:
        """The label of each image (N,), a view of the mapped index."""
        return self.index["label"]

    def load_array(self, entry: dict[str, Any], shape: tuple[int | None, ...] | None, dtype: Any) -> np.ndarray:
        """An array that the manifest lists, one row per image. Raises ValueError if it is another one."""
        file = self.local(RemoteFile(join(self.path, entry["name"]), entry["num_bytes"], entry["sha256"]))
        array = open_array(file, shape, dtype)
        if len(array) != self.described["num_images"]:
            raise ValueError(
                f"{join(self.path, entry['name'])} lists {len(array)} images, the manifest {self.described['num_images']}"
            )
        return array

    def check_rows(self, rows: np.ndarray) -> None:
        """Raises ValueError for index rows that name no place in a shard, or a label without a class."""
        named = rows["shard"] < len(self.shards)
        if named.all():
            sizes = self.shard_bytes[rows["shard"]]
            room = sizes - rows["size"]
            named = (rows["offset"] <= sizes.astype(np.uint64)) & (rows["offset"].astype(np.int64) <= room)
        name = join(self.path, self.described["index"]["name"])
        if not named.all():
            raise ValueError(f"{name} is damaged: it lists an image that is in none of the {len(self.shards)} shards")
        if len(rows) and rows["label"].max() >= self.num_classes:
            raise ValueError(
                f"{name}: label {rows['label'].max()} is out of range, the manifest names {self.num_classes} classes"
            )

    def conditions(self, kind: ConditionKind) -> np.ndarray:
        """The conditions of all images, memory-mapped: labels (N,), or the vectors (N, ...) that the shards hold.

        Raises ValueError if vectors are requested from a set without them, and for texts and images, which are prepared beforehand.
        """
        if kind == "label":
            return self.labels
        if kind == "text":
            raise ValueError(
                f"{self.path} holds captions, and the network takes vectors of them: `varlab tokenize text=minilm` writes a token"
                " cache that has them; use that"
            )
        if kind == "image":
            raise ValueError(
                f"{self.path} holds images, and the network takes smaller versions of them: `varlab tokenize low_res=2` writes a token"
                " cache that has them; use that"
            )
        if "condition" not in self.described:
            raise ValueError(f"data.condition=vector: {self.path} has labels only, no vector (.npy) per image")
        return self.load_array(self.described["condition"], None, None)

    def captions(self) -> list[list[str]]:
        """The captions of each image; none for images without."""
        entry = self.described.get("captions")
        if entry is None:
            return [[] for _ in range(len(self))]
        file = self.local(RemoteFile(join(self.path, entry["name"]), entry["num_bytes"], entry["sha256"]))
        found = load_json(file, "varlab pack", Captions)["captions"]
        if len(found) != len(self):
            raise ValueError(f"{file} lists {len(found)} images, the manifest {len(self)}")
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "open_shards": OrderedDict()}  # file descriptors are not valid in other processes

    def local(self, file: RemoteFile) -> Path:
        """A local path of the file, downloaded if it is remote."""
        return self.storage.fetch(file) if is_remote(file.url) else Path(file.url)

    def prepare(self, samples: Sequence[int]) -> None:
        """Downloads the remote shards of these samples, several at a time."""
        shards = [self.shards[i] for i in np.unique(self.index["shard"][list(samples)])]
        self.storage.fetch_all(shard for shard in shards if is_remote(shard.url))

    def read(self, i: int) -> bytes:
        """The encoded image number `i`.

        Raises ValueError naming shard and offset if its bytes changed since packing; OSError if they cannot be
        downloaded.
        """
        self.check_rows(self.index[i : i + 1])
        row = self.index[i]
        shard = int(row["shard"])
        is_fetched = is_remote(self.shards[shard].url)
        image = self.read_fetched(shard, row) if is_fetched else os.pread(*self.place(shard, row))
        if zlib.crc32(image) != row["crc32"]:
            raise ValueError(f"{self.name_of(i)} is damaged (checksum differs)")
        return image

    def place(self, shard: int, row: np.void) -> tuple[int, int, int]:
        """(file descriptor, size, offset) of an image in a local shard; recently used shards stay open."""
        if shard not in self.open_shards:
            self.open_shards[shard] = os.open(self.shards[shard].url, os.O_RDONLY)
            if len(self.open_shards) > MAX_OPEN_SHARDS:
                os.close(self.open_shards.popitem(last=False)[1])
        self.open_shards.move_to_end(shard)
        return self.open_shards[shard], int(row["size"]), int(row["offset"])

    def read_fetched(self, shard: int, row: np.void) -> bytes:
        """Bytes of an image in the cache. Files are not kept open: an open one would use disk space after removal."""
        while True:
            try:
                with open(self.local(self.shards[shard]), "rb") as file:
                    return os.pread(file.fileno(), int(row["size"]), int(row["offset"]))
            except FileNotFoundError:  # another process just removed it to make room
                continue

    def name_of(self, i: int) -> str:
        """The position of image `i`, for messages."""
        row = self.index[i]
        names, source = Path(self.path) / f"{self.split}.sources.txt", ""
        if names.is_file():
            with open(names, encoding="utf-8") as lines:
                source = next(islice(lines, i, None), "").strip()
        return f"{self.shards[int(row['shard'])].url}: the image at byte {row['offset']}{source and f', from {source}'}"


def problem_of_length(shard: RemoteFile) -> str | None:
    """A description of a missing local shard or of its wrong size; None if it is intact or remote."""
    if is_remote(shard.url):
        return None
    size = os.path.getsize(shard.url) if os.path.isfile(shard.url) else None
    if size == shard.num_bytes:
        return None
    state = "is missing" if size is None else f"has {size} bytes"
    return f"shard {shard.url} {state}, the manifest says {shard.num_bytes} bytes"


def verify(path: str | Path, storage: Storage | None = None) -> int:
    """Verifies the checksum of every file; returns the number of images. Raises ValueError naming all broken files."""
    storage = storage or Storage()
    manifest = load_manifest(path, storage)
    broken = []
    for name, split in manifest["splits"].items():
        arrays = [split[name] for name in ("index", "condition", "captions") if split.get(name)]
        entries = [*arrays, *split["shards"]]
        files = [RemoteFile(join(path, entry["name"]), entry["num_bytes"], entry["sha256"]) for entry in entries]
        found = [problem_of(file, storage) for file in tqdm(files, desc=f"verify {name}", unit="file")]
        broken += [problem for problem in found if problem]
        if not any(found):
            described = sum(shard["num_images"] for shard in split["shards"])
            counted = len(ShardReader(path, name, storage))
            if described != counted:
                broken.append(f"{name}: the shards of the manifest hold {described} images, the index lists {counted}")
    if broken:
        raise ValueError(f"{path}: {len(broken)} files are broken: {'; '.join(broken)}")
    return sum(split["num_images"] for split in manifest["splits"].values())


def problem_of(file: RemoteFile, storage: Storage) -> str | None:
    """A description of a missing or changed file, verified by checksum; None if it is intact."""
    if problem := problem_of_length(file):
        return problem
    try:
        local = storage.fetch(file) if is_remote(file.url) else Path(file.url)
        return None if sha256(local) == file.sha256 else f"{file.url}: its content changed since packing"
    except OSError as error:
        return str(error)
