"""Image sources -> shards + manifest.

The assignment of images to shards depends on the seed alone, so an interrupted run continues with the missing shards,
and several processes can write at once.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm.auto import tqdm

from varlab.data.shards import FORMAT, Sample, ShardIndex, index_shard, save_index, write_shard
from varlab.data.sources.items import Item, reencode
from varlab.files import save_json, sha256

T = TypeVar("T")
R = TypeVar("R")
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

    def samples(self) -> Iterator[Sample]:
        """The images as they are written into the shard."""
        for key, item in zip(self.keys, self.items, strict=True):
            image, extension = item.load(), ""
            if self.short_side is not None:
                image, extension = reencode(image, self.short_side, self.quality)
            yield Sample(key, image, extension or item.extension, item.label, item.condition)


def write(job: Job) -> tuple[dict[str, Any], ShardIndex]:
    """Writes a shard unless an earlier run finished it; returns its entry in the manifest and its part of the index."""
    if not (job.file.is_file() and index_shard(job.file, job.number).keys == job.keys):
        write_shard(job.file, job.samples())
    index = index_shard(job.file, job.number)
    return entry_of(job.file.name, job.file, len(index.rows)), index


def entry_of(name: str, file: Path, num_images: int) -> dict[str, Any]:
    """A shard's entry in the manifest."""
    return {"name": name, "num_images": num_images, "num_bytes": file.stat().st_size, "sha256": sha256(file)}


@dataclass(frozen=True)
class PackOptions:
    """How a source is packed. `shard_images`: images per shard; `shard_size`: approximate size of a shard in MB, which
    overrides it. If `short_side` is given, larger images are re-encoded to it as JPEG of `quality`."""

    shard_images: int = 1000
    shard_size: float | None = None
    seed: int = 0
    num_workers: int = 1
    short_side: int | None = None
    quality: int = 95


@dataclass(frozen=True)
class Source:
    """All images of a data set. `splits` maps train and val to items; class i has name class_names[i]. `notes`: what was
    understood and left out, in sentences; they are printed and kept in the manifest.

    A custom source is a function that returns a `Source`: see docs/extend.md.
    """

    kind: str
    name: str
    class_names: list[str]
    splits: dict[str, list[Item]]
    notes: list[str] = field(default_factory=list)

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
        return pack(self, out, shard_images, options.seed, options.num_workers, options.short_side, options.quality)


def pack(
    source: Source,
    out: Path,
    shard_images: int,
    seed: int,
    num_workers: int = 1,
    short_side: int | None = None,
    quality: int = 95,
) -> dict[str, Any]:
    """Writes shards, index and manifest of a source into `out`; returns the manifest.

    Images are shuffled over the shards of their split by `seed`. The manifest is written last, so a folder without one
    is incomplete. Raises OSError naming the file if the disk is full; finished shards are kept and reused next time.
    Raises ValueError if `out` holds shards of another source or other settings.
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
            )
            for number, chunk in enumerate(np.split(order, range(shard_images, len(order), shard_images)))
        ]
        written = tqdm(in_processes(write, jobs, num_workers), desc=f"pack {split}", unit="shard", total=len(jobs))
        entries, indexes = zip(*written, strict=True)
        arrays = save_index(out, split, indexes)
        manifest["splits"][split] = {"num_images": len(items), **arrays, "shards": list(entries)}
    save_json(out / "manifest.json", manifest)
    return manifest


def images_per_shard(source: Source, megabytes: float, short_side: int | None, quality: int) -> int:
    """Number of images in a shard of about this size, estimated from 64 of them, re-encoded if required."""
    items = source.splits["train"]
    chosen = [items[i].load() for i in np.linspace(0, len(items) - 1, min(64, len(items))).astype(int)]
    written = [image if short_side is None else reencode(image, short_side, quality)[0] for image in chosen]
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
    if file.is_file() and (begun := json.loads(file.read_text())) != settings:
        changed = [key for key in settings if begun.get(key) != settings[key]]
        raise ValueError(
            f"{out} holds shards packed with different {', '.join(changed)}: choose another folder or remove it"
        )
    save_json(file, settings)
