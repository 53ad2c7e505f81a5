"""`source=parquet`: tables with columns of encoded images, labels and captions, as on public hubs: parquet files, or the
arrow files of a data set saved by the `datasets` library.

Random access to rows of these files is slow, and packing shuffles images over all shards. So each file is first
staged next to the shards (`staging/`, as large as the images, removed when packing is done).
"""

import io
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm.auto import tqdm

from varlab.data.shard_files import EXTENSIONS
from varlab.data.sources.items import Item, check_share, lines_of
from varlab.data.sources.labels import UNLABELED, Rows, labeled, read_names
from varlab.data.storage import Storage
from varlab.data.write_shards import PackOptions, in_processes
from varlab.files import atomic_write, json_hash, load_json, reason_of

ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class StagedFile:
    """One file and its staged form: `flat` (all images concatenated) and `table` (label, extension, offset, size and captions of
    each, number of rows left out)."""

    source: Path
    flat: Path
    table: Path
    image_column: str
    label_column: str | None
    caption_column: str | None


def stage(file: StagedFile) -> tuple[Rows, int]:
    """(label and image of each row, number of rows that are left out because one of them is null) of a file, staged unless
    an earlier run did so. Raises ValueError naming file and row."""
    if not file.table.is_file():
        write_flat(file)
    table = load_json(file.table, "varlab pack")
    rows = [
        (
            label,
            Item(
                0,
                extension,
                file=file.flat,
                offset=offset,
                size=size,
                captions=tuple(captions),
                name=f"{file.source}, row {row}",
            ),
        )
        for row, label, extension, offset, size, captions in table["rows"]
    ]
    return rows, table["empty"]


def write_flat(file: StagedFile) -> None:
    """Writes `flat` and then `table`, each atomically."""
    schema, batches = open_table(file.source)
    columns = [file.image_column, file.label_column, file.caption_column]
    for column in filter(None, columns):
        if column not in schema.names:
            raise ValueError(f"{file.source} has no column {column!r}, only {schema.names}")
    rows, number, empty = [], -1, 0
    with atomic_write(file.flat) as partial, open(partial, "wb") as stream:
        for batch in read_batches(batches, file.source):
            images, labels, texts = (
                [missing] * batch.num_rows if name is None else batch.column(name).to_pylist()
                for name, missing in zip(columns, (None, UNLABELED[0], None), strict=True)
            )
            for image, label, text in zip(images, labels, texts, strict=True):
                number += 1
                if image is None or label is None:
                    empty += 1
                    continue
                encoded = bytes_of(image, file.source.parent)
                if encoded is None or not isinstance(label, int | float | str | bool):
                    raise ValueError(
                        f"{file.source}, row {number}: expected an encoded image and a label (a number, text or a boolean), found"
                        f" {type(image).__name__} and {label!r}"
                    )
                captions = captions_of(text, f"{file.source}, row {number}")
                rows.append((number, label, extension_of(encoded), stream.tell(), len(encoded), captions))
                stream.write(encoded)
    with atomic_write(file.table) as partial:
        partial.write_text(json.dumps({"rows": rows, "empty": empty}), encoding="utf-8")


def read_batches(batches: Iterator[Any], file: Path) -> Iterator[Any]:
    """The batches. Raises ValueError naming the file if one of them is damaged."""
    try:
        yield from batches
    except (
        ArithmeticError,
        LookupError,
        TypeError,
        ValueError,
        OSError,
        NotImplementedError,
    ) as error:  # pyarrow's are of all kinds
        raise ValueError(f"{file} is damaged: {reason_of(error)}") from None


def captions_of(text: Any, where: str) -> list[str]:
    """The captions in a cell: a text, one per line, or a list of texts. Raises ValueError for anything else."""
    texts = [] if text is None else text if isinstance(text, list) else [text]
    if not all(isinstance(entry, str) for entry in texts):
        raise ValueError(f"{where}: expected captions (a text or a list of texts), found {text!r}")
    return [line for entry in texts for line in lines_of(entry)]


def bytes_of(image: Any, folder: Path) -> bytes | None:
    """The encoded image of a cell: bytes, or a hub's structure of bytes or of a path, relative to the table."""
    if not isinstance(image, dict):
        return image if isinstance(image, bytes) else None
    if image.get("bytes") is not None or not image.get("path"):
        return image.get("bytes")
    try:
        return (folder / image["path"]).read_bytes()
    except OSError as error:
        raise ValueError(f"{folder / image['path']} cannot be read: {error.strerror}") from None


def open_table(file: Path) -> tuple[Any, Iterator[Any]]:
    """(schema, batches of rows) of a parquet or arrow file. Raises ValueError if it is none or if pyarrow is missing."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError("source=parquet needs pyarrow: pip install 'varlab[parquet]'") from None
    try:
        if file.suffix == ".arrow":
            reader = pyarrow.ipc.open_stream(pyarrow.memory_map(str(file)))
            return reader.schema, iter(reader)
        table = pyarrow.parquet.ParquetFile(file)
        return table.schema_arrow, table.iter_batches(ROWS_AT_ONCE)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        kind = "an arrow" if file.suffix == ".arrow" else "a parquet"
        raise ValueError(f"{file} is not {kind} file: {reason_of(error)}") from None


def extension_of(encoded: bytes) -> str:
    """File extension detected from the content; jpg if it cannot be recognized."""
    try:
        kind = (Image.open(io.BytesIO(encoded)).format or "jpeg").lower()
    except Exception:  # whatever decoders raise for broken files
        kind = "jpeg"
    return kind if kind in EXTENSIONS and kind != "jpeg" else "jpg"


def names_in(file: Path, label_column: str | None) -> list[str] | None:
    """Class names in the hub's metadata of a file, if any."""
    try:
        features = json.loads((open_table(file)[0].metadata or {})[b"huggingface"])["info"]["features"]
        names = features[label_column]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return [str(name) for name in names] if isinstance(names, list) else None


def files_of_splits(folder: Path, notes: list[str]) -> dict[str, list[Path]]:
    """The tables below a folder by split, told by how a file's or folder's name starts: train, val, or else test."""
    found: dict[str, list[Path]] = {}
    for file in sorted(file for suffix in ("parquet", "arrow") for file in folder.rglob(f"*.{suffix}")):
        parts = [part.lower() for part in file.relative_to(folder).parts]
        if not parts[-1].startswith("cache-"):  # written by the datasets library while it works
            named = [name for name in ("train", "val", "test") if any(part.startswith(name) for part in parts)]
            found.setdefault(named[0] if named else "train", []).append(file)
    if "train" not in found:
        raise ValueError(f"{folder} holds no .parquet or .arrow files of a training split")
    if "val" in found and (left := found.pop("test", None)):
        notes.append(f"{len(left)} files are left out: they are the split test, and there is a split val")
    if "test" in found:
        found["val"] = found.pop("test")
        notes.append("the split test is used for validation")
    return found


@dataclass(frozen=True)
class ParquetSource:
    """Parquet or arrow files by split: `path`, a folder of them, or paths, globs or brace patterns for each split. Without a
    validation split, `val_share` of each class becomes one.

    `label_column`: null for images without labels. `caption_column`: null for images without captions. Class names come
    from the file `class_names` or the files' metadata; without them, numbers name themselves, and text is numbered in
    sorted order.
    """

    train: str | None = None
    val: str | None = None
    image_column: str = "image"
    label_column: str | None = "label"
    val_share: float = 0.1
    seed: int = 0
    path: str | None = None
    class_names: str | None = None
    caption_column: str | None = None

    def write(self, out: Path, options: PackOptions) -> dict[str, Any]:
        """Packs the images; returns the manifest."""
        columns = (self.image_column, self.label_column, self.caption_column)
        if self.train is None and self.path is None:
            raise ValueError("source=parquet needs path=FOLDER, or train= (and val=): files, globs or brace patterns")
        check_share(self.val_share)
        patterns = {split: pattern for split, pattern in (("train", self.train), ("val", self.val)) if pattern}
        files = {split: list(map(Path, Storage().expand(pattern))) for split, pattern in patterns.items()}
        notes: list[str] = []
        files = files or files_of_splits(Path(self.path or ""), notes)
        splits: dict[str, Rows] = {}
        notes += [f"{len(members)} files are the split {split}" for split, members in files.items()]
        for split, members in files.items():
            staged = [
                StagedFile(
                    file,
                    out / f"staging/{name}.flat",
                    out / f"staging/{name}.json",
                    *columns,
                )
                for file in members
                for identity in [[str(file.resolve()), file.stat().st_size, *columns]]
                for name in [f"{split}-{file.stem}-{json_hash(identity)}"]
            ]
            done = tqdm(
                in_processes(stage, staged, options.num_workers), desc=f"read {split}", unit="file", total=len(staged)
            )
            found = list(done)
            splits[split] = [row for rows, _ in found for row in rows]
            if empty := sum(count for _, count in found):
                notes.append(f"{empty} rows of {split} without an image or label are left out")
        names = read_names(self.class_names) or names_in(files["train"][0], self.label_column)
        source = labeled(
            "parquet", Path(self.path or self.train or "").name, splits, names, self.val_share, self.seed, notes
        )
        manifest = source.write(out, options)
        shutil.rmtree(out / "staging")
        return manifest
