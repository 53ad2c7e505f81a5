"""`source=csv`: a table of image paths, labels and captions."""

import csv
from pathlib import Path

from varlab.data.sources.items import Item, check_share, extension_of, lines_of
from varlab.data.sources.labels import UNLABELED, Rows, labeled, read_names
from varlab.data.write_shards import Source


def read_rows(
    file: Path, image_column: str, label_column: str | None, caption_column: str | None, notes: list[str]
) -> Rows:
    """(label, image) of each row; rows without one are left out and noted. Raises ValueError naming file and row."""
    if not file.is_file():
        raise ValueError(f"{file} does not exist: give a CSV file with a header")
    rows, empty = [], 0
    with open(file, newline="", encoding="utf-8-sig") as lines:
        try:
            table = csv.DictReader(lines, delimiter="\t" if file.suffix == ".tsv" else ",")
            for column in (image_column, label_column, caption_column):
                if column is not None and column not in (table.fieldnames or []):
                    raise ValueError(f"has no column {column!r}, only {list(table.fieldnames or [])}")
            for row in table:
                path, label = row[image_column], UNLABELED[0] if label_column is None else row[label_column]
                if not path or not label:
                    empty += 1
                    continue
                image = file.parent / path
                if not image.is_file():
                    raise ValueError(f"line {table.line_num}: there is no file {image}")
                captions = () if caption_column is None else lines_of(row[caption_column] or "")
                rows.append((label.strip(), Item(0, extension_of(image), file=image, captions=captions)))
        except (csv.Error, ValueError) as error:
            raise ValueError(f"{file} {error}") from None
    if empty:
        notes.append(f"{file}: {empty} rows without a path or label are left out")
    return rows


def csv_source(
    train: str | None,
    val: str | None = None,
    image_column: str = "image",
    label_column: str | None = "label",
    caption_column: str | None = None,
    class_names: str | None = None,
    val_share: float = 0.1,
    seed: int = 0,
) -> Source:
    """Images whose paths, relative to the table, stand in a column of a CSV file (`.tsv`: separated by tabs), with labels
    in another (null: images without labels), and captions in a third, one per line of a cell.

    `class_names`: a file that names class i in line i; without it, text labels are numbered in sorted order.
    """
    check_share(val_share)
    if train is None:
        raise ValueError("source=csv needs train=FILE.csv (and val=): a table of image paths and labels")
    notes: list[str] = []
    files = {split: Path(file) for split, file in (("train", train), ("val", val)) if file is not None}
    splits = {
        split: read_rows(file, image_column, label_column, caption_column, notes) for split, file in files.items()
    }
    return labeled("csv", Path(train).stem, splits, read_names(class_names), val_share, seed, notes)
