"""Runs -> two tables: one row per run, as the trainer wrote it (`run.json`), and one row per logged step
(`metrics.csv`).

A source is a folder of runs, a CSV written by `write_csv`, a folder of offline W&B runs, or `wandb:ENTITY/PROJECT` (a
project) or `wandb:ENTITY/PROJECT/sweeps/ID`. All contain the trainer's own counters; nothing is estimated afterward.
"""

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from varlab.files import Schema, atomic_write, checked, load_json, read_curves, read_rows
from varlab.scaling.wandb_runs import offline_runs, online_runs

Row = dict[str, Any]
SAME = ("tokenizer_id", "dataset_id", "patch_nums", "order")  # what runs of one fit must share
CURVES = {  # column of a curve -> name in the log
    "images": "count/images_seen",
    "flops_exact": "count/flops_exact",
    "lr": "lr",
    "train_loss": "train/loss",
    "val_loss": "val/loss",
    "val_loss_last": "val/loss_last",
    "val_err": "val/err",
}
UNITS = {
    "device_seconds": "s",
    "flops_exact": "FLOP",
    "flops_6nd": "FLOP",
    "flops_tokenizer": "FLOP",
    "batch": "images",
    "warmup": "images",
    "cooldown": "images",
}


Number = Annotated[float, Field(ge=0, le=1e40)]


class RunRow(Schema):
    """What the row of any run must say."""

    name: str
    kind: str
    state: str
    step: Annotated[int, Field(ge=0)]
    run_id: str | None = None
    order: str = "scales"
    images_seen: Number = 0
    cooldown: Number | None = None
    val_loss: float | None = None


class VARRow(RunRow):
    """What the row of a VAR's run must say."""

    depth: Annotated[int, Field(ge=1, le=10**6)]
    params_main: Number
    images_seen: Number  # pyright: ignore[reportGeneralTypeIssues]
    flops_exact: Number


@dataclass(frozen=True)
class Runs:
    """`rows`: one per run. `curves`: one per logged step, with the run's id. `left_out`: runs that were left out or
    used unfinished, with the reason."""

    rows: list[Row]
    curves: list[Row]
    left_out: list[str]


def unit(column: str) -> str:
    """Unit of a column, empty for counts and text."""
    if column.startswith(("val_loss", "train_loss")):
        return "nat/token"
    if column.startswith("entropy"):
        return "nat"
    return UNITS.get(column, "percent" if column.startswith("val_err") else "")


def collect(sources: Sequence[str], use_unfinished: bool = False, order: str = "scales") -> Runs:
    """All VAR runs of the sources, each once. Unfinished runs are left out and reported, or used up to their last
    validation.

    Raises ValueError if a source holds none, and if the runs cannot be fitted together (see `check_same`).
    """
    found: dict[str, tuple[Row, list[Row]]] = {}
    left_out: list[str] = []
    for source in sources:
        runs = read_source(source)
        if not any(row.get("kind") == "var" for row, _ in runs):
            raise ValueError(
                f"source={source} holds no VAR runs: give a multirun folder (with run.json files), a table of runs as CSV, a folder of"
                " offline W&B runs, or wandb:ENTITY/PROJECT"
            )
        for one, curve in runs:
            row = {"order": "scales", **one}
            if row.get("kind") == "var" and row["order"] == order:
                found.setdefault(key_of(row), (row, curve))
    rows: list[Row] = []
    curves: dict[str, list[Row]] = {}
    for row, curve in found.values():
        usable, reason = usable_row(row, curve, use_unfinished)
        if reason:
            left_out.append(f"{row['name']} (depth {row['depth']}, {row['state']} at step {row['step']}): {reason}")
        if usable is not None:
            rows.append(usable)
            curves[key_of(row)] = curve
    if not rows:
        raise ValueError(
            f"no run with order={order} can be used"
            + "".join(f"; {line}" for line in left_out[:5] or ["there is none"])
        )
    check_same(rows)
    rows.sort(key=lambda row: (row["depth"], row["flops_exact"], row["name"]))
    return Runs(rows, [point for row in rows for point in curves[key_of(row)]], left_out)


def key_of(row: Row) -> str:
    """The identity of a run."""
    return str(row.get("run_id", row["name"]))


def usable_row(row: Row, curve: list[Row], use_unfinished: bool) -> tuple[Row | None, str]:
    """(the row to use, or None if the run is left out; the reason, as text)."""
    points = [point for point in curve if point.get("val_loss") is not None]
    if row["state"] != "finished":
        if not use_unfinished or not points:
            return None, "left out" if points else "left out, never validated"
        last = points[-1]
        row = {**row, **{key: last[key] for key in ("step", "flops_exact", "val_loss", "val_loss_last", "val_err")}}
        row |= {"images_seen": last["images"], "cooldown": 0}
        return row, f"used up to step {last['step']}, its last validation, without a cooldown"
    if not math.isfinite(row.get("val_loss") or math.nan):
        return None, "left out, its loss is not finite"
    return row, ""


def read_source(source: str) -> list[tuple[Row, list[Row]]]:
    """(row, curve) of each run of a source."""
    if source.startswith("wandb:"):
        return [(row, curve_of(row, logged)) for row, logged in online_runs(source.removeprefix("wandb:"))]
    path = Path(source)
    if path.is_file():
        return read_csv(path)
    runs = []
    for file in sorted(path.rglob("run.json")):
        row = checked_row(load_json(file, "varlab train"), file)
        runs.append((row, curve_of(row, read_curves(file.parent / "metrics.csv"))))
    known = {row.get("run_id") for row, _ in runs}
    for row, logged in offline_runs(path, known):
        runs.append((row, curve_of(row, logged)))
    return runs


def checked_row(row: Row, file: Path) -> Row:
    """The row. Raises ValueError naming the file and the field that the fits need and that is missing or of another kind."""
    return checked(row, VARRow if row.get("kind") == "var" else RunRow, file)


def curve_of(row: Row, logged: dict[str, dict[int, float]]) -> list[Row]:
    """The steps at which a run logged a loss. Counters are the trainer's, interpolated between logged steps."""
    steps = sorted({*logged.get("train/loss", {}), *logged.get("val/loss", {})})
    columns: dict[str, dict[int, float]] = {name: logged.get(key, {}) for name, key in CURVES.items()}
    for name in ("images", "flops_exact"):
        known = {0: 0.0, **columns[name]}
        if len(known) > 1:
            values = np.interp(steps, list(known), list(known.values()))
            columns[name] = dict(zip(steps, map(float, values), strict=True))
    held = float(row.get("images_seen", 0)) - float(row.get("cooldown") or 0)
    return [
        {"run_id": row.get("run_id", row["name"]), "step": step}
        | {name: column.get(step) for name, column in columns.items()}
        | {"in_cooldown": columns["images"].get(step, 0.0) > held}
        for step in steps
    ]


def read_csv(path: Path) -> list[tuple[Row, list[Row]]]:
    """Rows of a table, with the curves in `curves.csv` in the same folder, if it exists."""
    rows, curves = [checked_row(row, path) for row in read_table(path)], {}
    file = path.with_name("curves.csv")
    for point in read_table(file) if file.is_file() else []:
        curves.setdefault(point["run_id"], []).append(point)
    return [(row, curves.get(row.get("run_id", row.get("name")), [])) for row in rows]


def read_table(path: Path) -> list[Row]:
    """A CSV with units in its header."""
    return [
        {key.split(" [")[0]: parse(key.split(" [")[0], value) for key, value in row.items() if value != ""}
        for row in read_rows(path)
    ]


def parse(column: str, text: str) -> Any:
    """A CSV cell as number, list or text; ids stay text, even if they look like numbers."""
    if column.endswith("_id") or column in ("name", "parent_run"):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def check_same(rows: Sequence[Row]) -> None:
    """Raises ValueError if runs of different tokenizers, data, pyramids or token orders would be fitted together."""
    for key in SAME:
        values = {json.dumps(row.get(key)): row["name"] for row in rows}
        if len(values) > 1:
            named = ", ".join(f"{name}: {value}" for value, name in values.items())
            raise ValueError(f"runs of different {key} cannot be fitted together ({named})")


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Writes a table with units in its header."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with atomic_write(path) as partial, open(partial, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([f"{column} [{unit(column)}]" if unit(column) else column for column in columns])
        for row in rows:
            writer.writerow([cell(row[column]) if column in row else "" for column in columns])


def cell(value: Any) -> str:
    """A CSV cell, the inverse of `parse`."""
    return value if isinstance(value, str) else json.dumps(value)
