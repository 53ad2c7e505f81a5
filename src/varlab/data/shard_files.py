"""One shard: a webdataset tar of images and labels, written from samples, and indexed without unpacking it."""

import io
import json
import tarfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from varlab.data.sources.items import lines_of
from varlab.files import atomic_write, reason_of

T = TypeVar("T")
EXTENSIONS = {"jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "heic", "heif", "avif"}
INDEX_ROW = np.dtype([("shard", "u4"), ("offset", "u8"), ("size", "u4"), ("label", "u4"), ("crc32", "u4")])


class Sample(NamedTuple):
    """One image to be written into a shard."""

    key: str
    image: bytes  # an encoded file
    extension: str  # without the dot
    label: int
    condition: np.ndarray | None = None  # a vector, in addition to the label
    captions: Sequence[str] = ()

    def members(self) -> list[tuple[str, bytes]]:
        """(extension, content) of each file of the sample."""
        found = [(self.extension, self.image), ("cls", str(self.label).encode())]
        if self.condition is not None:
            buffer = io.BytesIO()
            np.save(buffer, self.condition, allow_pickle=False)
            found.append(("npy", buffer.getvalue()))
        if self.captions:
            found.append(("txt", "\n".join(self.captions).encode()))
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
    """Contents of a shard: keys, index rows, labels as found, captions, and vectors (if any) of its images, and the problems of
    the keys that are left out. `has_dots`: whether keys contain dots."""

    keys: list[str]
    rows: np.ndarray
    problems: list[str]
    conditions: np.ndarray | None = None
    labels: list[Any] = field(default_factory=list)
    captions: list[list[str]] = field(default_factory=list)
    has_dots: bool = False


@dataclass(frozen=True)
class Members:
    """Which files of a key are its image, its label and its captions. `image`: an extension, such as `input.jpg`; None: the only
    one of a known type. `label`: an extension, `json:FIELD` for a field of a `.json`, or None for images without labels.
    `captions`: the same; an image may have several (lines of a text, or a list in a `.json`), or none."""

    image: str | None = None
    label: str | None = "cls"
    captions: str | None = "txt"

    def image_of(self, files: dict[str, tarfile.TarInfo]) -> tarfile.TarInfo | None:
        """The image among the files of a key, by extension; None unless there is exactly one."""
        if self.image is not None:
            return files.get(self.image.lower())
        images = [info for extension, info in files.items() if extension.rpartition(".")[2] in EXTENSIONS]
        return images[0] if len(images) == 1 else None

    def label_of(self, content: bytes) -> Any:
        """The label in a file. Raises ValueError if it holds none."""
        text = value_in(content, self.label)
        if text is None:
            raise ValueError("no such field")
        if not isinstance(text, int | float | str) or text == "":
            raise ValueError("no label")
        return text

    def captions_of(self, content: bytes) -> list[str]:
        """The captions in a file; none for an empty or missing field of a `.json`. Raises ValueError if it holds something else."""
        found = value_in(content, self.captions)
        texts = found if isinstance(found, list) else [] if found is None else [found]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("no text (caption_member=null packs the images without captions)")
        return [line for text in texts for line in lines_of(text)]


def value_in(content: bytes, member: str | None) -> Any:
    """The text of a file, or the field of a `.json` that `member` names; None if it has no such field. Raises ValueError for a
    file that is no text, or no object of JSON."""
    text = content.decode().strip()
    if member is None or not member.startswith("json:"):
        return text
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError("no object of JSON")
    return found.get(member[5:])


class Unusable(ValueError):
    """What a file of a key holds that keeps the key from being used."""


def parsed(content: bytes, parse: Callable[[bytes], T], what: str) -> T:
    """`parse(content)`. Raises Unusable naming the content if that raises an error."""
    try:
        return parse(content)
    except (ValueError, RecursionError) as error:
        raise Unusable(f"{what} {content[:20]!r}: {error}") from None


def file_of(member: str | None) -> str | None:
    """Extension of the file that holds a label or captions."""
    return "json" if (member or "").startswith("json:") else member


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
    """Reads a shard. A key needs one image and a label; an optional `.npy` is its vector, of the same shape for all keys, an
    optional `.txt` its captions. Other files are ignored. Rows hold the labels that are numbers.

    Raises ValueError for a tar that is damaged, truncated or compressed.
    """
    problems: dict[str, str] = {}
    rows, vectors, labels, captions = [], [], [], []
    label_file, caption_file = file_of(members.label), file_of(members.captions)
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
                label, texts = 0, []
                try:
                    if label_file is not None:
                        label = parsed(read_member(tar, files[label_file]), members.label_of, "label")
                    if caption_file in files:
                        texts = parsed(read_member(tar, files[caption_file]), members.captions_of, "captions")
                except Unusable as unusable:
                    problems[key] = str(unusable)
                    continue
                if "npy" in files:
                    vector = read_vector(read_member(tar, files["npy"]))
                    if vector is None or (vectors and vector.shape != vectors[0].shape):
                        problems[key] = "a .npy that is not an array of numbers of the same shape as the others"
                        continue
                    vectors.append(vector)
                labels.append(label)
                captions.append(texts)
                number = int(label) if str(label).isdecimal() and len(str(label)) < 10 else 0
                rows.append(
                    (key, (shard, image.offset_data, len(content), min(number, 2**32 - 1), zlib.crc32(content)))
                )
    except (tarfile.TarError, EOFError, OSError, ValueError, OverflowError) as error:
        raise ValueError(f"{path} is damaged: {reason_of(error)}") from None
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
        captions=captions,
        has_dots=any("." in key.rpartition("/")[2] for key, _ in rows),
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
