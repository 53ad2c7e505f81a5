"""Existing webdataset shards, used in place: only an index and a manifest are written."""

import bz2
import gzip
import logging
import lzma
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from varlab.data.shard_files import Members, ShardIndex, index_shard
from varlab.data.shards import FORMAT, save_index
from varlab.data.sources.labels import UNLABELED, class_numbers, number_of, read_names
from varlab.data.storage import RemoteFile, Storage, is_remote
from varlab.data.write_shards import PackOptions, in_processes
from varlab.files import atomic_write, json_hash, load_json, save_json, sha256

MAX_NAMED = 10
COMPRESSED: dict[bytes, Callable[..., Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One shard to index; the result is saved in `part`, so that a restarted call does not read the shard again."""

    url: str
    number: int
    storage: Storage
    part: Path
    members: Members
    unpacked: Path  # for the content of a compressed tar


def read_shard(job: Job) -> tuple[dict[str, Any], ShardIndex]:
    """(entry of the manifest and problems, index) of a shard; reuses the result of an earlier run."""
    described = job.part.with_suffix(".json")
    if not described.is_file():
        file, local = (
            job.storage.fetch_new(job.url)
            if is_remote(job.url)
            else (RemoteFile(job.url, Path(job.url).stat().st_size, sha256(Path(job.url))), Path(job.url))
        )
        if decompress(local, job.unpacked):
            local = job.unpacked
            file = RemoteFile(local.name, local.stat().st_size, sha256(local))
        index = index_shard(local, 0, job.members)
        with atomic_write(job.part) as partial, open(partial, "wb") as stream:
            arrays = {} if index.conditions is None else {"conditions": index.conditions}
            np.savez(stream, rows=index.rows, **arrays)  # pyright: ignore[reportArgumentType]
        entry = {"name": file.url, "num_images": len(index.rows), "num_bytes": file.num_bytes, "sha256": file.sha256}
        problems = [f"{job.url}: {problem}" for problem in index.problems]
        save_json(
            described,
            {
                "url": job.url,
                "entry": entry,
                "problems": problems,
                "keys": index.keys,
                "labels": index.labels,
                "captions": index.captions,
                "has_dots": index.has_dots,
            },
        )
    with np.load(job.part) as part:
        rows, conditions = part["rows"], part.get("conditions")
    rows["shard"] = job.number
    found = load_json(described, "varlab pack")
    return found, ShardIndex(found["keys"], rows, [], conditions, found["labels"], found["captions"])


def decompress(file: Path, target: Path) -> bool:
    """Writes the content of a compressed tar, whose images could not be read one by one, to `target`; returns whether it is
    compressed. Raises ValueError if it is damaged."""
    with open(file, "rb") as stream:
        head = stream.read(6)
    opener = next((opener for sign, opener in COMPRESSED.items() if head.startswith(sign)), None)
    if opener is None:
        return False
    try:
        with opener(file) as packed, atomic_write(target) as partial, open(partial, "wb") as stream:
            shutil.copyfileobj(packed, stream, 1 << 20)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"{file} is damaged: {error}") from None
    return True


@dataclass(frozen=True)
class ExistingShards:
    """Webdataset shards (image and label for each key, see `Members`) of two splits: paths or URLs, with globs or brace
    patterns. The content of compressed ones is written into the output folder.

    Line i of the file `class_names` names class i; without it, numbers name themselves, and text is numbered in sorted
    order. Keys without exactly one image and one label are left out and logged; raises ValueError if they exceed
    `max_skipped_share` of a split, or if a tar is damaged.
    """

    train: str | None
    val: str | None
    class_names: str | None = None
    max_skipped_share: float = 0.001
    storage: Storage = field(default_factory=Storage)
    image_member: str | None = None
    label_member: str | None = "cls"
    caption_member: str | None = "txt"

    def write(self, out: Path, options: PackOptions) -> dict[str, Any]:
        """Indexes the shards without copying them; returns the manifest."""
        if self.train is None or self.val is None:
            raise ValueError("source=shards needs train= and val=: paths, globs or URLs of shards")
        patterns = {"train": self.train, "val": self.val}
        members = Members(self.image_member, self.label_member, self.caption_member)
        return index_existing(
            patterns,
            out,
            read_names(self.class_names),
            self.storage,
            options.num_workers,
            self.max_skipped_share,
            members,
        )


def index_existing(
    patterns: dict[str, str],
    out: Path,
    class_names: list[str] | None,
    storage: Storage,
    num_workers: int,
    max_skipped_share: float,
    members: Members,
) -> dict[str, Any]:
    """Writes index and manifest of the shards of the splits `patterns`; returns the manifest."""
    manifest: dict[str, Any] = {
        "kind": "shards",
        "format": FORMAT,
        "name": out.name,
        "source": "shards",
        "reencoded": None,
    }
    found: dict[str, tuple[list[dict[str, Any]], list[ShardIndex]]] = {}
    for split, pattern in patterns.items():
        urls = [url if is_remote(url) else str(Path(url).resolve()) for url in storage.expand(pattern)]
        parts = out / "indexing"
        jobs = [
            Job(url, number, storage, parts / f"{name}.npz", members, out / f"{name}.tar")
            for number, url in enumerate(urls)
            for name in [json_hash([url, members.image, members.label, members.captions])]
        ]
        done = tqdm(in_processes(read_shard, jobs, num_workers), desc=f"index {split}", unit="shard", total=len(jobs))
        described, indexes = zip(*done, strict=True)
        found[split] = list(described), list(indexes)
    labels = [label for _, indexes in found.values() for index in indexes for label in index.labels]
    known = set(class_names or [])
    if any(number_of(label) is not None and label not in known for label in labels):
        leave_out_text(found)
        labels = [label for _, indexes in found.values() for index in indexes for label in index.labels]
    for split, (described, indexes) in found.items():
        problems = [problem for shard in described for problem in shard["problems"]]
        num_images = sum(len(index.rows) for index in indexes)
        for problem in problems[:MAX_NAMED]:
            log.warning("left out: %s", problem)
        if not num_images or len(problems) > max_skipped_share * num_images:
            raise ValueError(
                f"{patterns[split]}: {len(problems)} keys cannot be used and {num_images} can, but max_skipped_share="
                f"{max_skipped_share} allows fewer; the first: {problems[0] if problems else 'the shards are empty'}"
            )
    places = [
        f"{shard['url']}: key {key!r}"
        for described, _ in found.values()
        for shard in described
        for key in shard["keys"]
    ]
    numbers, names = class_numbers(labels, class_names, lambda i: places[i])
    names = UNLABELED if members.label is None else names
    counts = ", ".join(
        f"{sum(len(index.rows) for index in indexes):,} {split}" for split, (_, indexes) in found.items()
    )
    notes = [f"{counts} images of {len(names)} classes ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"]
    if any(shard["has_dots"] for described, _ in found.values() for shard in described):
        notes.append("keys end at the last dot of a name, since names up to the first are not unique")
    print("\n".join(notes), flush=True)
    manifest |= {"class_names": names, "notes": notes, "splits": {}}
    first = 0
    for split, (described, indexes) in found.items():
        for index in indexes:
            index.rows["label"] = numbers[first : first + len(index.rows)]
            first += len(index.rows)
        manifest["splits"][split] = {
            "num_images": sum(len(index.rows) for index in indexes),
            "skipped": sum(len(shard["problems"]) for shard in described),
            **save_index(out, split, indexes),
            "shards": [shard["entry"] for shard in described],
        }
    save_json(out / "manifest.json", manifest)
    shutil.rmtree(out / "indexing")
    return manifest


def leave_out_text(found: dict[str, tuple[list[dict[str, Any]], list[ShardIndex]]]) -> None:
    """Leaves out the keys whose label is no number, where other labels are numbers."""
    for described, indexes in found.values():
        for i, (shard, index) in enumerate(zip(described, indexes, strict=True)):
            kept = np.array([number_of(label) is not None for label in index.labels], dtype=bool)
            for key, label, is_kept in zip(index.keys, index.labels, kept, strict=True):
                if not is_kept:
                    shard["problems"].append(f"{shard['url']}: key {key!r} holds label {label!r}, expected a number")
            conditions = None if index.conditions is None else index.conditions[kept]
            keys, labels = (list(compress(values, kept)) for values in (index.keys, index.labels))
            captions = list(compress(index.captions, kept))
            shard["keys"] = keys
            indexes[i] = ShardIndex(keys, index.rows[kept], [], conditions, labels, captions)
            shard["entry"]["num_images"] = int(kept.sum())
