"""What the manifests of shards and of token caches must say, and arrays that are checked before anything in them is used."""

import mmap
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, Field

from varlab.files import Schema, load_json, reason_of
from varlab.models import scales

MAX_CLASSES = 2**20
Count = Annotated[int, Field(ge=0, le=2**62)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]  # also the name of a file in the cache of downloads
Side = Annotated[int, Field(ge=1, le=4096)]
PatchNums = Annotated[
    list[Side | tuple[Side, Side]],
    Field(min_length=1, max_length=64),
    AfterValidator(lambda sides: sides if scales.sides(sides) else None),
]
ClassNames = Annotated[list[str], Field(min_length=1, max_length=MAX_CLASSES)]


class FileEntry(Schema):
    """A file of a set of shards, relative to the manifest, or a path or URL."""

    name: Annotated[str, Field(max_length=4096, pattern=r"^[^\x00-\x1f\x7f]+$")]
    num_bytes: Count
    sha256: Sha256


class ShardEntry(FileEntry):
    """A shard."""

    num_images: Count


class Split(Schema):
    """A split of a set of shards."""

    num_images: Annotated[int, Field(ge=0, lt=2**40)]
    index: FileEntry
    condition: FileEntry | None = None
    captions: FileEntry | None = None
    shards: list[ShardEntry]


class Captions(Schema):
    """`SPLIT.captions.json` of a set of shards: the captions of each image."""

    captions: list[list[str]]


class ShardsManifest(Schema):
    """`manifest.json` of a set of shards."""

    kind: Literal["shards"]
    format: Literal[2]
    name: str
    class_names: ClassNames
    splits: dict[str, Split]


class View(Schema):
    """A view of each image in a token cache."""

    crop: Literal["center", "random"]
    is_flipped: bool
    seed: int = 0


class TokenSplit(Schema):
    """A split of a token cache."""

    num_images: Annotated[int, Field(ge=0, lt=2**40)]
    skipped: Count
    sha256: Sha256
    dtype: Literal["uint8", "uint16", "uint32"]


class TextEntry(Schema):
    """The vectors of captions in a token cache."""

    encoder: str
    fingerprint: str
    tokens: Annotated[int, Field(ge=0, le=512)]  # of each caption
    captions: Annotated[int, Field(ge=1, le=1024)]  # of each image
    data: str  # hash of the captions


class TokensManifest(Schema):
    """`manifest.json` of a token cache."""

    kind: Literal["tokens"]
    format: Literal[1]
    tokenizer: str
    patch_nums: PatchNums
    codebook_size: Annotated[int, Field(ge=1, le=2**40)]
    data: str
    views: Annotated[list[View], Field(min_length=1, max_length=4096)]
    class_names: ClassNames
    text: TextEntry | None = None
    low_res: Annotated[int, Field(ge=2, le=64)] | None = None
    splits: dict[str, TokenSplit]


class ShapesManifest(Schema):
    """`manifest.json` of the token caches of several shapes: their folders beside it, HEIGHTxWIDTH in pixels."""

    kind: Literal["shapes"]
    format: Literal[1]
    shapes: Annotated[
        list[Annotated[str, Field(pattern="^[1-9][0-9]{0,4}x[1-9][0-9]{0,4}$")]], Field(min_length=1, max_length=256)
    ]


def is_token_cache(path: str | Path) -> bool:
    """Whether a folder holds a token cache, or those of several shapes."""
    file = Path(path) / "manifest.json"
    return file.is_file() and load_json(file, "varlab tokenize").get("kind") in ("tokens", "shapes")


def cache_folders(path: Path) -> list[Path]:
    """The folders of the token caches at `path`: itself, or one for each shape of its images. Raises ValueError for a manifest that
    is missing or damaged."""
    if load_json(path / "manifest.json", "varlab tokenize").get("kind") != "shapes":
        return [path]
    return [path / shape for shape in load_json(path / "manifest.json", "varlab tokenize", ShapesManifest)["shapes"]]


def open_array(file: Path, shape: tuple[int | None, ...] | None = None, dtype: Any = None) -> np.ndarray:
    """A `.npy` file, memory-mapped. `shape`: None for any length of an axis, or for any shape with rows; `dtype`: None for
    any numbers.

    Raises ValueError naming the file if it is missing, damaged, truncated, or holds another array.
    """
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy evaluates the header, so broken ones raise errors of many kinds
        raise ValueError(f"{file} cannot be read as an array: {reason_of(error)}") from None
    wanted = (None,) * max(array.ndim, 1) if shape is None else shape
    fits = len(wanted) == array.ndim and all(n in (None, m) for n, m in zip(wanted, array.shape, strict=True))
    if not fits or (array.dtype.kind not in "iuf" if dtype is None else array.dtype != dtype):
        expected = ", ".join("any" if n is None else str(n) for n in wanted)
        raise ValueError(
            f"{file} holds an array {array.shape} of {array.dtype}, expected ({expected}) of {dtype or 'numbers'}"
        )
    if array.nbytes > 2**28 and hasattr(mmap, "MADV_RANDOM"):  # rows are read in random order: no read-ahead
        array._mmap.madvise(mmap.MADV_RANDOM)
    return array


def read_archive(file: Path, *names: str) -> dict[str, np.ndarray]:
    """The arrays of an `.npz` file, or those of these names that it holds. Raises ValueError naming the file if it is missing,
    damaged, or holds anything but arrays of numbers."""
    try:
        with np.load(file, allow_pickle=False) as archive:
            return {name: np.asarray(archive[name]) for name in names or archive if name in archive}
    except Exception as error:  # numpy and zipfile raise errors of many kinds
        raise ValueError(f"{file} cannot be read as an archive of arrays: {reason_of(error)}") from None


def spot_check(num: int) -> slice:
    """Rows to check before a run: all of a file of up to four million rows, 64 evenly spaced ones of a larger file."""
    return slice(None, None, 1 if num <= 2**22 else num // 64)
