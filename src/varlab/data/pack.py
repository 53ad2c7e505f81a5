"""Packing: image sources -> shards + manifest.

Which image goes into which shard follows from the seed alone, so a killed run continues with the shards that are
missing, and several processes write at once.
"""

import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from varlab.data.shards import FORMAT, Sample, index_shard, write_shard
from varlab.data.sources import Item, Source, reencode
from varlab.files import save_json, sha256, whole_file


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
        """The images as they go into the shard."""
        for key, item in zip(self.keys, self.items, strict=True):
            image, extension = item.load(), ""
            if self.short_side is not None:
                image, extension = reencode(image, self.short_side, self.quality)
            yield Sample(key, image, extension or item.extension, item.label)


def write(job: Job) -> tuple[dict[str, Any], np.ndarray]:
    """The shard's entry in the manifest and its rows of the index; a shard that an earlier run finished is kept."""
    if not (job.file.is_file() and index_shard(job.file, 0)[0] == job.keys):
        write_shard(job.file, job.samples())
    rows = index_shard(job.file, job.number)[1]
    entry = {
        "name": job.file.name,
        "num_images": len(rows),
        "num_bytes": job.file.stat().st_size,
        "sha256": sha256(job.file),
    }
    return entry, rows


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

    Images are mixed over the shards of their split by `seed`; larger ones are re-encoded to `short_side` as JPEG of
    `quality` if it is given. The manifest comes last, so a folder without one is not a data set yet. Raises OSError
    naming the file when the disk is full; finished shards stay and are used next time. Raises ValueError when `out`
    holds shards of another source or other settings.
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
        "splits": {},
    }
    for split, items in source.splits.items():
        if not items:
            raise ValueError(f"{source.name} has no images for split {split!r}: give more images or another val_share")
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
        entries, rows = zip(
            *tqdm(written(jobs, num_workers), desc=f"pack {split}", unit="shard", total=len(jobs)), strict=True
        )
        with whole_file(out / f"{split}.index.npy") as partial, open(partial, "wb") as file:
            np.save(file, np.concatenate(rows))
        manifest["splits"][split] = {"num_images": len(items), "shards": list(entries)}
    save_json(out / "manifest.json", manifest)
    return manifest


def written(jobs: list[Job], num_workers: int) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """Results of `write` in order, from this process or from several."""
    if num_workers == 1 or len(jobs) == 1:
        yield from map(write, jobs)
        return
    with ProcessPoolExecutor(num_workers, mp_context=get_context("spawn")) as pool:
        try:
            yield from pool.map(write, jobs)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def check_settings(out: Path, settings: dict[str, Any]) -> None:
    """Notes what is being packed in `out`; raises ValueError when something else was begun there."""
    file = out / "packing.json"
    if file.is_file() and (begun := json.loads(file.read_text())) != settings:
        changed = [key for key in settings if begun.get(key) != settings[key]]
        raise ValueError(
            f"{out} holds shards packed with another {', '.join(changed)}: choose another folder or remove it"
        )
    save_json(file, settings)
