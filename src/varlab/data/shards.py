"""The shard format: webdataset tar files (image + `.cls`), an index of the position of each image, and a manifest.

    manifest.json         name, source, class names; for each split its index and shards with counts, bytes and sha256
    train-000000.tar      00000123.png, 00000123.cls, ...     (readable by any webdataset reader)
    train.index.npy       one row per image: shard, offset, size, label, crc32
    train.condition.npy   only if shards hold vectors (00000123.npy): one row per image

Images are read through the index, not as a stream: any position in the epoch is one read, so a resumed run starts
immediately, any number of ranks and workers gets the same order, and checksums detect damaged images. A folder of
shards may be a URL: each shard is then downloaded when its first image is needed.
"""

import io
import json
import os
import tarfile
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from tqdm.auto import tqdm

from varlab.data.manifests import ShardsManifest, open_array, spot_check
from varlab.data.storage import RemoteFile, Storage, is_remote, join
from varlab.files import atomic_write, json_hash, load_json, parse_json, sha256

FORMAT = 2
EXTENSIONS = {"jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "heic", "heif", "avif"}
INDEX_ROW = np.dtype([("shard", "u4"), ("offset", "u8"), ("size", "u4"), ("label", "u4"), ("crc32", "u4")])
MAX_OPEN_SHARDS = 128
ConditionKind = Literal["label", "vector"]


class Sample(NamedTuple):
    """One image to be written into a shard."""

    key: str
    image: bytes  # an encoded file
    extension: str  # without the dot
    label: int
    condition: np.ndarray | None = None  # a vector, in addition to the label

    def members(self) -> list[tuple[str, bytes]]:
        """(extension, content) of each file of the sample."""
        found = [(self.extension, self.image), ("cls", str(self.label).encode())]
        if self.condition is not None:
            buffer = io.BytesIO()
            np.save(buffer, self.condition, allow_pickle=False)
            found.append(("npy", buffer.getvalue()))
        return found


def write_shard(path: Path, samples: Iterable[Sample]) -> None:
    """Writes a tar of images and labels atomically; the same samples give the same bytes."""
    with atomic_write(path) as partial, tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            for name, content in sample.members():
                info = tarfile.TarInfo(f"{sample.key}.{name}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


@dataclass(frozen=True)
class ShardIndex:
    """Contents of a shard: keys, index rows, labels as found, and vectors (if any) of its images, and the problems of the
    keys that are left out."""

    keys: list[str]
    rows: np.ndarray
    problems: list[str]
    conditions: np.ndarray | None = None
    labels: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class Members:
    """Which files of a key are its image and its label. `image`: an extension, such as `input.jpg`; None: the only one of a
    known type. `label`: an extension, `json:FIELD` for a field of a `.json`, or None for images without labels."""

    image: str | None = None
    label: str | None = "cls"

    def image_of(self, files: dict[str, tarfile.TarInfo]) -> tarfile.TarInfo | None:
        """The image among the files of a key, by extension; None unless there is exactly one."""
        if self.image is not None:
            return files.get(self.image.lower())
        images = [info for extension, info in files.items() if extension.rpartition(".")[2] in EXTENSIONS]
        return images[0] if len(images) == 1 else None

    def label_of(self, content: bytes) -> Any:
        """The label in a file. Raises ValueError if it holds none."""
        text = content.decode().strip()
        if self.label is not None and self.label.startswith("json:"):
            try:
                text = json.loads(text)[self.label[5:]]
            except (KeyError, TypeError, RecursionError):
                raise ValueError("no such field") from None
        if not isinstance(text, int | float | str) or text == "":
            raise ValueError("no label")
        return text


def grouped(infos: Sequence[tarfile.TarInfo], members: Members) -> dict[str, list[tuple[str, tarfile.TarInfo]]]:
    """(extension, file) by key. The key ends at the first dot of the name, as in webdataset, or, where that gives fewer
    keys with one image, at the last: names with dots."""
    by_dot: list[dict[str, list[tuple[str, tarfile.TarInfo]]]] = [{}, {}]
    for info in infos:
        folder, slash, name = info.name.rpartition("/")
        for keys, (stem, _, extension) in zip(by_dot, (name.partition("."), name.rpartition(".")), strict=True):
            keys.setdefault(folder + slash + stem, []).append((extension.lower(), info))
    counts = [sum(members.image_of(dict(files)) is not None for files in keys.values()) for keys in by_dot]
    return by_dot[counts[1] > counts[0]]


def index_shard(path: Path, shard: int, members: Members = Members()) -> ShardIndex:
    """Reads a shard. A key needs one image and a label; an optional `.npy` is its vector, of the same shape for all keys.
    Other files are ignored. Rows hold the labels that are numbers.

    Raises ValueError for a tar that is damaged, truncated or compressed.
    """
    problems: dict[str, str] = {}
    rows, vectors, labels = [], [], []
    label_file = "json" if (members.label or "").startswith("json:") else members.label
    try:
        with tarfile.open(path, "r:") as tar:
            groups = grouped([info for info in tar if info.isfile() and not info.issparse()], members)
            for key, found in groups.items():
                files = dict(found)
                image = members.image_of(files)
                if len(files) < len(found):
                    extensions = [extension for extension, _ in found]
                    problems[key] = f"two files of type .{next(e for e in extensions if extensions.count(e) > 1)}"
                elif image is None or (label_file is not None and label_file not in files):
                    label = f" and one .{label_file}" if label_file else ""
                    problems[key] = f"{sorted(files)}, expected one {members.image or 'image'}{label}"
                if key in problems or image is None:
                    continue
                content = read_member(tar, image)
                label = 0
                if label_file is not None:
                    written = read_member(tar, files[label_file])
                    try:
                        label = members.label_of(written)
                    except (ValueError, RecursionError) as error:
                        problems[key] = f"label {written[:20]!r}: {error}"
                        continue
                if "npy" in files:
                    vector = read_vector(read_member(tar, files["npy"]))
                    if vector is None or (vectors and vector.shape != vectors[0].shape):
                        problems[key] = "a .npy that is not an array of numbers of the same shape as the others"
                        continue
                    vectors.append(vector)
                labels.append(label)
                number = int(label) if str(label).isdecimal() and len(str(label)) < 10 else 0
                rows.append(
                    (key, (shard, image.offset_data, len(content), min(number, 2**32 - 1), zlib.crc32(content)))
                )  # pyright: ignore[reportOptionalMemberAccess]
    except (tarfile.TarError, EOFError, OSError, ValueError, OverflowError) as error:
        raise ValueError(f"{path} is damaged: {str(error).splitlines()[0]}") from None
    if vectors and len(vectors) != len(rows):
        raise ValueError(
            f"{path}: {len(vectors)} of {len(rows)} images have a vector (.npy): all of them need one, or none"
        )
    return ShardIndex(
        conditions=np.stack(vectors) if vectors else None,
        keys=[key for key, _ in rows],
        rows=np.array([row for _, row in rows], dtype=INDEX_ROW),
        problems=[f"key {key!r} holds {problem}" for key, problem in problems.items()],
        labels=labels,
    )


def read_member(tar: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    """The content of a file in a tar."""
    stream = tar.extractfile(info)
    assert stream is not None
    return stream.read()


def read_vector(content: bytes) -> np.ndarray | None:
    """A `.npy` file of numbers; None for anything else."""
    try:
        array = np.load(io.BytesIO(content), allow_pickle=False)
    except (ValueError, EOFError, OSError):
        return None
    return array if isinstance(array, np.ndarray) and array.dtype.kind in "fiu" else None


def save_index(out: Path, split: str, indexes: Sequence[ShardIndex]) -> dict[str, Any]:
    """Writes the index of a split, and its vectors if it has any; returns their entries in the manifest.

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
    return found


def save_array(file: Path, array: np.ndarray) -> dict[str, Any]:
    """Writes an array atomically; returns its entry in the manifest."""
    with atomic_write(file) as partial, open(partial, "wb") as stream:
        np.save(stream, array)
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

        Raises ValueError if vectors are requested from a set without them.
        """
        if kind == "label":
            return self.labels
        if "condition" not in self.described:
            raise ValueError(f"data.condition=vector: {self.path} has labels only, no vector (.npy) per image")
        return self.load_array(self.described["condition"], None, None)

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
        entries = [split["index"], *([split["condition"]] if "condition" in split else []), *split["shards"]]
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
