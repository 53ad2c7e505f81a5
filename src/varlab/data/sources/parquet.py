"""`source=parquet`: parquet files as on public hubs, with a column of encoded images and one of labels.

Random access to rows of a parquet file is slow, and packing shuffles images over all shards. So each file is first
staged next to the shards (`staging/`, as large as the images, removed when packing is done).
"""

import io
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from varlab.data.sources.items import Item, check_share, split_off
from varlab.data.storage import Storage
from varlab.data.write_shards import PackOptions, Source, in_processes
from varlab.files import atomic_write, json_hash

ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class StagedFile:
    """One parquet file and its staged form: `flat` (all images concatenated) and `table` (label, extension, offset and
    size of each)."""

    parquet: Path
    flat: Path
    table: Path
    image_column: str
    label_column: str


def stage(file: StagedFile) -> list[Item]:
    """The images of a parquet file, staged unless an earlier run did so. Raises ValueError naming file and row."""
    if not file.table.is_file():
        write_flat(file)
    with np.load(file.table) as table:
        columns = [table[name].tolist() for name in ("label", "extension", "offset", "size")]
    return [
        Item(label, extension, file=file.flat, offset=offset, size=size)
        for label, extension, offset, size in zip(*columns, strict=True)
    ]


def write_flat(file: StagedFile) -> None:
    """Writes `flat` and then `table`, each atomically."""
    parquet = open_parquet(file.parquet)
    for column in (file.image_column, file.label_column):
        if column not in parquet.schema_arrow.names:
            raise ValueError(f"{file.parquet} has no column {column!r}, only {parquet.schema_arrow.names}")
    rows: list[tuple[int, str, int, int]] = []
    with atomic_write(file.flat) as partial, open(partial, "wb") as stream:
        for batch in parquet.iter_batches(ROWS_AT_ONCE, columns=[file.image_column, file.label_column]):
            images, labels = (batch.column(name).to_pylist() for name in (file.image_column, file.label_column))
            for image, label in zip(images, labels, strict=True):
                encoded = image["bytes"] if isinstance(image, dict) else image
                if not isinstance(encoded, bytes) or not isinstance(label, int) or label < 0:
                    raise ValueError(
                        f"{file.parquet}, row {len(rows)}: expected an encoded image and a label of at least 0, found"
                        f" {type(encoded).__name__} and {label!r}"
                    )
                rows.append((label, extension_of(encoded), stream.tell(), len(encoded)))
                stream.write(encoded)
    labels, extensions, offsets, sizes = (np.array(column) for column in zip(*rows, strict=True))
    with atomic_write(file.table) as partial, open(partial, "wb") as stream:
        np.savez(stream, label=labels, extension=extensions, offset=offsets, size=sizes)


def open_parquet(file: Path) -> Any:
    """Opens a parquet file. Raises ValueError if it is not one or if pyarrow is missing."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError("source=parquet needs pyarrow: pip install 'varlab[parquet]'") from None
    try:
        return pyarrow.parquet.ParquetFile(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file} is not a parquet file: {error}") from None


def extension_of(encoded: bytes) -> str:
    """File extension detected from the content; jpg if it cannot be recognized."""
    try:
        kind = (Image.open(io.BytesIO(encoded)).format or "jpeg").lower()
    except Exception:  # whatever decoders raise for broken files
        kind = "jpeg"
    return {"jpeg": "jpg", "mpo": "jpg"}.get(kind, kind)


def names_in(file: Path, label_column: str) -> list[str] | None:
    """Class names in the hub's metadata of a file, if any."""
    metadata = open_parquet(file).schema_arrow.metadata or {}
    features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    return features.get(label_column, {}).get("names")


@dataclass(frozen=True)
class ParquetSource:
    """Parquet files by split: paths, globs or brace patterns. Without `val`, `val_share` of each class becomes the
    validation set.

    Class names come from the files' metadata; without it they are the labels.
    """

    train: str | None
    val: str | None = None
    image_column: str = "image"
    label_column: str = "label"
    val_share: float = 0.1
    seed: int = 0

    def write(self, out: Path, options: PackOptions) -> dict[str, Any]:
        """Packs the images; returns the manifest."""
        if self.train is None:
            raise ValueError("source=parquet needs train= (and val=): parquet files, globs or brace patterns")
        check_share(self.val_share)
        manifest = self.staged(out / "staging", options.num_workers).write(out, options)
        shutil.rmtree(out / "staging")
        return manifest

    def staged(self, staging: Path, num_workers: int) -> Source:
        """The images of all files, staged in a folder."""
        assert self.train is not None
        patterns = {"train": self.train, "val": self.val}
        files = {split: list(map(Path, Storage().expand(pattern))) for split, pattern in patterns.items() if pattern}
        splits: dict[str, list[Item]] = {}
        for split, members in files.items():
            staged = [
                StagedFile(
                    file, staging / f"{name}.flat", staging / f"{name}.npz", self.image_column, self.label_column
                )
                for file in members
                for name in [f"{split}-{file.stem}-{json_hash([str(file.resolve()), file.stat().st_size])}"]
            ]
            done = tqdm(in_processes(stage, staged, num_workers), desc=f"read {split}", unit="file", total=len(staged))
            splits[split] = [item for items in done for item in items]
        if not splits.get("val"):
            splits = split_off(splits["train"], self.val_share, self.seed)
        num_classes = 1 + max(item.label for items in splits.values() for item in items)
        names = names_in(files["train"][0], self.label_column) or [str(i) for i in range(num_classes)]
        if len(names) < num_classes:
            raise ValueError(
                f"{files['train'][0]} names {len(names)} classes, but the labels go up to {num_classes - 1}"
            )
        return Source("parquet", "parquet", names, splits)
