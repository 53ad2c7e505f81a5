"""Image sources -> shards + manifest.

The assignment of images to shards depends on the seed alone, so an interrupted run continues with the missing shards,
and several processes can write at once.
"""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from tqdm.auto import tqdm

from varlab.data.decoding import open_image
from varlab.data.shard_files import EXTENSIONS, Sample, ShardIndex, index_shard, write_shard
from varlab.data.shards import FORMAT, save_index
from varlab.data.sources.items import Item, reencode
from varlab.files import atomic_write, json_hash, save_json, sha256

T = TypeVar("T")
R = TypeVar("R")
log = logging.getLogger(__name__)
TAR_OVERHEAD = 512 + 1024 + 256  # header of the image, header and block of the label, half a block of padding


@dataclass(frozen=True)
class Job:
    """One shard to write: number `number` of its split."""

    file: Path
    number: int
    keys: list[str]
    items: list[Item]
    short_side: int | None
    quality: int
    check: bool

    def encoded(self, item: Item, image: bytes) -> tuple[bytes, str]:
        """(bytes, extension) of an image as they are written. Raises ValueError naming it if it cannot be decoded."""
        if self.check or self.short_side is not None:
            opened = open_image(image, item.where)
            smaller = None if self.short_side is None else reencode(opened, self.short_side, self.quality)
            return (image, item.extension) if smaller is None else (smaller, "jpg")
        return image, item.extension

    def samples(self, problems: list[str]) -> Iterator[Sample]:
        """The images as they are written into the shard; those that cannot be decoded are added to `problems`."""
        for key, item in zip(self.keys, self.items, strict=True):
            content = item.load()  # an image that cannot be read ends the work: it may be readable the next time
            try:
                image, extension = self.encoded(item, content)
            except ValueError as error:
                problems.append(str(error))
                continue
            yield Sample(key, image, extension, item.label, item.condition, item.captions)


class Written(NamedTuple):
    """A shard that was written: its entry in the manifest, its part of the index, the names of its images, and why others
    were left out."""

    entry: dict[str, Any]
    contents: ShardIndex
    names: list[str]
    problems: list[str]


def write(job: Job) -> Written:
    """Writes a shard unless an earlier run finished it."""
    done = index_shard(job.file, job.number).keys if job.file.is_file() else None
    problems: list[str] = []
    present = set(done or [])
    missing = [item for key, item in zip(job.keys, job.items, strict=True) if key not in present]
    left_out = replace(job, keys=[""] * len(missing), items=missing)
    if done is None or not present <= set(job.keys) or list(left_out.samples(problems)):  # another source
        problems = []
        write_shard(job.file, job.samples(problems))
    index = index_shard(job.file, job.number)
    written = dict.fromkeys(index.keys)
    kept = [item for key, item in zip(job.keys, job.items, strict=True) if key in written]
    names = ["" if item.content is not None and not item.name else item.where for item in kept]
    return Written(entry_of(job.file.name, job.file, len(index.rows)), index, names, problems)


def entry_of(name: str, file: Path, num_images: int) -> dict[str, Any]:
    """A shard's entry in the manifest."""
    return {"name": name, "num_images": num_images, "num_bytes": file.stat().st_size, "sha256": sha256(file)}


@dataclass(frozen=True)
class PackOptions:
    """How a source is packed. `shard_images`: images per shard; `shard_size`: approximate size of a shard in MB, which
    overrides it. If `short_side` is given, larger images are re-encoded to it as JPEG of `quality`. `check`: decode every
    image, and leave out those that cannot be."""

    shard_images: int = 1000
    shard_size: float | None = None
    seed: int = 0
    num_workers: int = 1
    short_side: int | None = None
    quality: int = 95
    check: bool = True


@dataclass(frozen=True)
class Source:
    """All images of a data set. `splits` maps train and val to items; class i has name class_names[i]. `notes`: what was
    understood and left out, in sentences; they are printed and kept in the manifest.

    A custom source is a function that returns a `Source`: see docs/extend.md. Raises ValueError naming the image whose label
    is not the number of a class, or whose extension is not that of an image.
    """

    kind: str
    name: str
    class_names: list[str]
    splits: dict[str, list[Item]]
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        num_classes = len(self.class_names)
        for name in self.class_names:
            if not name or "\n" in name or name != name.encode(errors="replace").decode():
                raise ValueError(f"the class name {name!r} is not text, or not in this locale: try LC_ALL=C.UTF-8")
        for item in (item for items in self.splits.values() for item in items):
            is_number = isinstance(item.label, int | np.integer) and not isinstance(item.label, bool)
            if not is_number or not 0 <= item.label < num_classes:
                raise ValueError(f"{item.where}: label {item.label!r} is not a number from 0 to {num_classes - 1}")
            if item.extension not in EXTENSIONS:
                raise ValueError(
                    f"{item.where}: extension {item.extension!r} is none of {' '.join(sorted(EXTENSIONS))}"
                )

    def describe(self) -> str:
        """What will be packed, in lines."""
        counts = ", ".join(f"{len(items):,} {split}" for split, items in self.splits.items())
        named = ", ".join(self.class_names[:5]) + (", ..." if len(self.class_names) > 5 else "")
        return "\n".join([f"{self.name}: {counts} images of {len(self.class_names)} classes ({named})", *self.notes])

    def write(self, out: Path, options: PackOptions) -> dict[str, Any]:
        """Packs the images into `out`; returns the manifest."""
        print(self.describe(), flush=True)
        shard_images = options.shard_images
        if options.shard_size is not None:
            shard_images = images_per_shard(self, options.shard_size, options.short_side, options.quality)
        settings = options.seed, options.num_workers, options.short_side, options.quality, options.check
        return pack(self, out, shard_images, *settings)


def pack(
    source: Source,
    out: Path,
    shard_images: int,
    seed: int,
    num_workers: int = 1,
    short_side: int | None = None,
    quality: int = 95,
    check: bool = True,
) -> dict[str, Any]:
    """Writes shards, index and manifest of a source into `out`; returns the manifest.

    Images are shuffled over the shards of their split by `seed`. Images that cannot be decoded are left out: the manifest
    counts them, `skipped.txt` names them. `SPLIT.sources.txt` names the source of each image. The manifest is written last,
    so a folder without one is incomplete. Raises OSError naming the file if the disk is full; finished shards are kept and
    reused next time. Raises ValueError if `out` holds shards of another source or other settings, or if all images of a
    split are left out.
    """
    if shard_images < 1 or num_workers < 1:
        raise ValueError(f"shard_images={shard_images} and num_workers={num_workers} must be positive")
    settings = {
        "source": source.kind,
        "counts": {split: len(items) for split, items in source.splits.items()},
        "shard_images": shard_images,
        "seed": seed,
        "reencoded": None if short_side is None else {"short_side": short_side, "quality": quality},
    }
    if any(item.captions for items in source.splits.values() for item in items):
        captions = {split: [item.captions for item in items] for split, items in source.splits.items()}
        settings["captions"] = json_hash(captions)
    check_settings(out, settings)
    manifest: dict[str, Any] = {
        "kind": "shards",
        "format": FORMAT,
        "name": source.name,
        **settings,
        "class_names": source.class_names,
        **({"notes": source.notes} if source.notes else {}),
        "splits": {},
    }
    skipped: list[str] = []
    for split, items in source.splits.items():
        if not items:
            raise ValueError(f"{source.name} has no images for split {split!r}: add images or change val_share")
        order = np.random.default_rng([seed, len(split)]).permutation(len(items))
        jobs = [
            Job(
                file=out / f"{split}-{number:06d}.tar",
                number=number,
                keys=[f"{i:08d}" for i in chunk],
                items=[items[i] for i in chunk],
                short_side=short_side,
                quality=quality,
                check=check,
            )
            for number, chunk in enumerate(np.split(order, range(shard_images, len(order), shard_images)))
        ]
        written = tqdm(in_processes(write, jobs, num_workers), desc=f"pack {split}", unit="shard", total=len(jobs))
        entries, indexes, names, problems = zip(*written, strict=True)
        num_images, left_out = sum(map(len, names)), [problem for part in problems for problem in part]
        if not num_images:
            raise ValueError(
                f"none of the {len(items)} images of split {split!r} can be used; the first: {left_out[0]}"
            )
        arrays = save_index(out, split, indexes)
        if any(name for part in names for name in part):
            save_lines(out / f"{split}.sources.txt", [name for part in names for name in part])
        counts = {"num_images": num_images, "skipped": len(left_out)}
        manifest["splits"][split] = {**counts, **arrays, "shards": list(entries)}
        skipped += left_out
    if skipped:
        save_lines(out / "skipped.txt", skipped)
        log.warning("%d images were left out, see %s; the first: %s", len(skipped), out / "skipped.txt", skipped[0])
    save_json(out / "manifest.json", manifest)
    return manifest


def save_lines(file: Path, lines: list[str]) -> None:
    """Writes one line per entry, atomically."""
    with atomic_write(file) as partial:
        partial.write_text("".join(line.replace("\n", "\\n") + "\n" for line in lines), encoding="utf-8")


def images_per_shard(source: Source, megabytes: float, short_side: int | None, quality: int) -> int:
    """Number of images in a shard of about this size, estimated from 64 of them, re-encoded if required."""
    items = source.splits["train"]
    chosen = [items[i] for i in np.linspace(0, len(items) - 1, min(64, len(items))).astype(int)]
    job = Job(Path(), 0, [str(i) for i in range(len(chosen))], chosen, short_side, quality, check=False)
    written = [sample.image for sample in job.samples([])] or [b""]
    mean = sum(map(len, written)) / len(written) + TAR_OVERHEAD
    return max(1, round(megabytes * 1e6 / mean))


def in_processes(function: Callable[[T], R], jobs: Sequence[T], num_workers: int) -> Iterator[R]:
    """Results in order, computed in this process or in `num_workers` processes."""
    if num_workers == 1 or len(jobs) == 1:
        yield from map(function, jobs)
        return
    with ProcessPoolExecutor(num_workers, mp_context=get_context("spawn")) as pool:
        try:
            yield from pool.map(function, jobs)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def check_settings(out: Path, settings: dict[str, Any]) -> None:
    """Records the settings of a packing run in `out`. Raises ValueError if it was started with other settings."""
    file = out / "packing.json"
    if file.is_file() and (begun := json.loads(file.read_text(encoding="utf-8"))) != settings:
        changed = [key for key in settings if begun.get(key) != settings[key]]
        raise ValueError(
            f"{out} holds shards packed with different {', '.join(changed)}: choose another folder or remove it"
        )
    save_json(file, settings)
