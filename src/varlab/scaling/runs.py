"""Runs -> one table: a row for each, as its trainer wrote it in `run.json`."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from varlab.files import whole_file

Row = dict[str, Any]
SAME = ("tokenizer_id", "dataset_id", "patch_nums")  # what runs of one fit must share
UNITS = {
    "device_seconds": "s",
    "flops_exact": "FLOP",
    "flops_6nd": "FLOP",
    "flops_tokenizer": "FLOP",
    "val_err": "percent",
    "batch": "images",
}


def unit(column: str) -> str:
    """Unit of a column, empty for counts and words."""
    if column.startswith("val_loss"):
        return "nat/token"
    return UNITS.get(column, "percent" if column.startswith("val_err") else "")


def read_runs(source: Path) -> list[Row]:
    """Rows of a folder of runs, or of a CSV that `write_csv` made. Raises ValueError when there are none."""
    if source.is_file():
        with open(source, newline="") as file:
            rows = [{key.split(" [")[0]: parse(value) for key, value in row.items()} for row in csv.DictReader(file)]
    else:
        rows = [json.loads(file.read_text()) for file in sorted(source.rglob("run.json"))]
    rows = [row for row in rows if row.get("kind") == "var"]
    if not rows:
        raise ValueError(
            f"source={source} holds no VAR runs: give a multirun folder (with run.json files) or a table of runs as CSV"
        )
    return rows


def parse(text: str) -> Any:
    """A CSV cell as number, list or text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def finished(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """(runs that reached their end, the others)."""
    return [row for row in rows if row["state"] == "finished"], [row for row in rows if row["state"] != "finished"]


def check_same(rows: Sequence[Row]) -> None:
    """Raises ValueError when runs of different tokenizers, data or pyramids would be fitted together."""
    for key in SAME:
        values = {json.dumps(row.get(key)): row["name"] for row in rows}
        if len(values) > 1:
            named = ", ".join(f"{name}: {value}" for value, name in values.items())
            raise ValueError(f"runs of different {key} cannot be fitted together ({named})")


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Writes the table with units in its header."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with whole_file(path) as partial, open(partial, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([f"{column} [{unit(column)}]" if unit(column) else column for column in columns])
        for row in rows:
            writer.writerow(
                [
                    json.dumps(row[key]) if not isinstance(row.get(key), str) else row[key]
                    for key in columns
                    if key in row
                ]
            )
