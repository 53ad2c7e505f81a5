"""Existing webdataset shards, used in place: only an index and a manifest are written."""

import json
import logging
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from varlab.data.shards import FORMAT, ShardIndex, index_shard, save_index
from varlab.data.storage import RemoteFile, Storage, is_remote
from varlab.data.write_shards import PackOptions, in_processes
from varlab.files import atomic_write, json_hash, save_json, sha256

MAX_NAMED = 10
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One shard to index; the result is saved in `part`, so that a restarted call does not read the shard again."""

    url: str
    number: int
    storage: Storage
    part: Path


def read_shard(job: Job) -> tuple[dict[str, Any], ShardIndex]:
    """(entry of the manifest and problems, index) of a shard; reuses the result of an earlier run."""
    described = job.part.with_suffix(".json")
    if not described.is_file():
        if is_remote(job.url):
            file, local = job.storage.fetch_new(job.url)
        else:
            local = Path(job.url)
            file = RemoteFile(job.url, local.stat().st_size, sha256(local))
        index = index_shard(local, 0)
        with atomic_write(job.part) as partial, open(partial, "wb") as stream:
            arrays = {} if index.conditions is None else {"conditions": index.conditions}
            np.savez(stream, rows=index.rows, **arrays)  # pyright: ignore[reportArgumentType]
        entry = {"name": file.url, "num_images": len(index.rows), "num_bytes": file.num_bytes, "sha256": file.sha256}
        save_json(described, {"entry": entry, "problems": [f"{job.url}: {problem}" for problem in index.problems]})
    with np.load(job.part) as part:
        rows, conditions = part["rows"], part.get("conditions")
    rows["shard"] = job.number
    return json.loads(described.read_text()), ShardIndex([], rows, [], conditions)


@dataclass(frozen=True)
class ExistingShards:
    """Webdataset shards (image and `.cls` for each key) of two splits: paths or URLs, with globs or brace patterns.

    Line i of the file `class_names` names class i; without the file its name is "i". Keys without exactly one image and
    one label are left out and logged; raises ValueError if they exceed `max_skipped_share` of a split, or if a tar is
    damaged.
    """

    train: str | None
    val: str | None
    class_names: str | None = None
    max_skipped_share: float = 0.001
    storage: Storage = field(default_factory=Storage)

    def write(self, out: Path, options: PackOptions) -> dict[str, Any]:
        """Indexes the shards without copying them; returns the manifest."""
        if self.train is None or self.val is None:
            raise ValueError("source=shards needs train= and val=: paths, globs or URLs of shards")
        names = Path(self.class_names).read_text().splitlines() if self.class_names else None
        patterns = {"train": self.train, "val": self.val}
        return index_existing(patterns, out, names, self.storage, options.num_workers, self.max_skipped_share)


def index_existing(
    patterns: dict[str, str],
    out: Path,
    class_names: list[str] | None,
    storage: Storage,
    num_workers: int,
    max_skipped_share: float,
) -> dict[str, Any]:
    """Writes index and manifest of the shards of the splits `patterns`; returns the manifest."""
    manifest: dict[str, Any] = {
        "kind": "shards",
        "format": FORMAT,
        "name": out.name,
        "source": "shards",
        "reencoded": None,
    }
    num_classes, splits = 0, {}
    for split, pattern in patterns.items():
        urls = [url if is_remote(url) else str(Path(url).resolve()) for url in storage.expand(pattern)]
        parts = out / "indexing"
        jobs = [Job(url, number, storage, parts / f"{json_hash(url)}.npz") for number, url in enumerate(urls)]
        found = tqdm(in_processes(read_shard, jobs, num_workers), desc=f"index {split}", unit="shard", total=len(jobs))
        described, indexes = zip(*found, strict=True)
        problems = [problem for shard in described for problem in shard["problems"]]
        num_images = sum(len(index.rows) for index in indexes)
        for problem in problems[:MAX_NAMED]:
            log.warning("left out: %s", problem)
        if not num_images or len(problems) > max_skipped_share * num_images:
            raise ValueError(
                f"{pattern}: {len(problems)} keys cannot be used and {num_images} can, but max_skipped_share="
                f"{max_skipped_share} allows fewer; the first: {problems[0] if problems else 'the shards are empty'}"
            )
        num_classes = max(num_classes, 1 + max(int(index.rows["label"].max()) for index in indexes if len(index.rows)))
        splits[split] = {
            "num_images": num_images,
            "skipped": len(problems),
            **save_index(out, split, indexes),
            "shards": [shard["entry"] for shard in described],
        }
    if class_names is not None and len(class_names) < num_classes:
        raise ValueError(f"label {num_classes - 1} is out of range, class_names has {len(class_names)} names")
    manifest |= {"class_names": class_names or [str(i) for i in range(num_classes)], "splits": splits}
    save_json(out / "manifest.json", manifest)
    shutil.rmtree(out / "indexing")
    return manifest
