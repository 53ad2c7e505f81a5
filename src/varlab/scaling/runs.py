"""Runs -> two tables: one row per run, as the trainer wrote it (`run.json`), and one row per logged step
(`metrics.csv`).

A source is a folder of runs, a CSV (see tables.py), a folder of offline W&B runs, or `wandb:ENTITY/PROJECT` (a
project) or `wandb:ENTITY/PROJECT/sweeps/ID`. varlab's runs contain the trainer's own counters; nothing is estimated
afterward.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from varlab.files import Schema, checked, load_json, read_curves
from varlab.scaling.tables import read_runs, read_table
from varlab.scaling.wandb_runs import offline_runs, online_runs

Row = dict[str, Any]
POSITIVE = ("params_main", "images_seen", "val_loss")
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

    depth: Annotated[int, Field(ge=1, le=10**6)] | None = None
    params_main: Number
    images_seen: Number  # pyright: ignore[reportGeneralTypeIssues]
    flops_exact: Number


@dataclass(frozen=True)
class Runs:
    """`rows`: one per run. `curves`: one per logged step, with the run's id. `left_out`: runs that were left out or
    used unfinished, with the reason. `counts`: what D counts, `images` or `tokens`. `notes`: on how columns were read."""

    rows: list[Row]
    curves: list[Row]
    left_out: list[str]
    counts: str = "images"
    notes: list[str] = field(default_factory=list)


def collect(
    sources: Sequence[str],
    use_unfinished: bool = False,
    order: str = "scales",
    columns: Mapping[str, str] | None = None,
) -> Runs:
    """All VAR runs of the sources, each once. Unfinished runs are left out and reported, or used up to their last
    validation; so are runs whose N, D, C or loss is not a positive number.

    `columns`: names of a table's columns, see `read_table`. Raises ValueError if a source holds none, and if the runs
    cannot be fitted together (see `check_same`).
    """
    found: dict[str, tuple[Row, list[Row]]] = {}
    left_out, notes, units = [], [], set()
    for source in sources:
        if not source.startswith("wandb:") and not Path(source).exists():
            raise ValueError(f"source={source}: there is no such file or folder")
        runs, counts = read_source(source, columns)
        if not any(row.get("kind") == "var" for row, _ in runs):
            raise ValueError(
                f"source={source} holds no VAR runs: give a multirun folder (with run.json files), a table of runs as CSV, a folder of"
                " offline W&B runs, or wandb:ENTITY/PROJECT"
            )
        units.add(counts)
        for one, curve in runs:
            row = {"order": "scales", **one}
            if row.get("kind") == "var" and row["order"] == order:
                if key_of(row) in found:
                    left_out.append(f"{label(row)} of {source}: left out, it is there twice")
                found.setdefault(key_of(row), (row, curve))
    if len(units) > 1:
        raise ValueError("D counts images in one source and tokens in another: they cannot be fitted together")
    rows: list[Row] = []
    curves: dict[str, list[Row]] = {}
    computed = set()
    for row, curve in found.values():
        computed |= set(completed := by_six_n_d(row)) - set(row)
        usable, reason = usable_row(completed, curve, use_unfinished)
        if reason:
            left_out.append(f"{label(row)}: {reason}")
        if usable is not None:
            rows.append(usable)
            curves[key_of(row)] = curve
    if not rows:
        raise ValueError(
            f"no run with order={order} can be used"
            + "".join(f"; {line}" for line in left_out[:5] or ["there is none"])
        )
    notes += ["C is 6 N D where the table has no flops_exact"] if "flops_exact" in computed else []
    notes += ["D is C / (6 N) where the table has no images_seen"] if "images_seen" in computed else []
    check_same(rows)
    names = Counter(str(row["name"]) for row in rows)
    for row in rows:  # a name stands for a run in what is printed and drawn
        if names[str(row["name"])] > 1:
            row["name"] = f"{row['name']} ({row.get('run_id')})"
    rows.sort(key=lambda row: (row["params_main"], row["flops_exact"], row["name"]))
    return Runs(rows, [point for row in rows for point in curves[key_of(row)]], left_out, units.pop(), notes)


def by_six_n_d(row: Row) -> Row:
    """The row with C from N and D, or D from N and C, if one of them is missing."""
    size, images, compute = (row.get(name) for name in ("params_main", "images_seen", "flops_exact"))
    if not is_positive(size):
        return row
    if compute is None and is_positive(images):
        return row | {"flops_exact": 6.0 * row["params_main"] * row["images_seen"]}
    if images is None and is_positive(compute):
        return row | {"images_seen": row["flops_exact"] / (6.0 * row["params_main"])}
    return row


def label(row: Row) -> str:
    """A run for a message: its name, its size, how far it came."""
    size = f"depth {row['depth']}" if row.get("depth") else f"N {row.get('params_main')}"
    return f"{row['name']} ({size}, {row['state']} at step {row.get('step', 0)})"


def key_of(row: Row) -> str:
    """The identity of a run."""
    return str(row.get("run_id", row["name"]))


def loss_words(loss: float | int) -> str:
    """A loss for display: four decimals, or four digits of a small one."""
    return f"{loss:.4f}" if abs(loss) >= 0.1 else f"{loss:.4g}"


def usable_row(row: Row, curve: list[Row], use_unfinished: bool) -> tuple[Row | None, str]:
    """(the row to use, or None if the run is left out; the reason, as text)."""
    points = [point for point in curve if point.get("val_loss") is not None]
    if row["state"] != "finished" and not points and is_positive(row.get("val_loss")):
        if not use_unfinished:
            return None, "left out (unfinished=use uses it)"
    elif row["state"] != "finished":
        if not use_unfinished or not points:
            return None, "left out" if points else "left out, never validated"
        last = points[-1]
        row = {**row, **{key: last.get(key) for key in ("step", "flops_exact", "val_loss", "val_loss_last", "val_err")}}
        row |= {"images_seen": last.get("images"), "cooldown": 0}
        if not all(is_positive(row.get(name)) for name in POSITIVE):
            return None, "left out, its last validation is not a number"
        return row, f"used up to step {last['step']}, its last validation, without a cooldown"
    bad = [f"{name} is {row.get(name)!r}" for name in POSITIVE if not is_positive(row.get(name))]
    if row.get("flops_exact") is not None and not is_positive(row["flops_exact"]):
        bad.append(f"flops_exact is {row['flops_exact']!r}")
    if bad:
        return None, f"left out, {', '.join(bad)}"
    depth = row.get("depth")
    return {key: value for key, value in row.items() if key != "depth" or isinstance(depth, int)}, ""


def is_positive(value: Any) -> bool:
    """Whether a value is a finite number above zero."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def read_source(source: str, columns: Mapping[str, str] | None = None) -> tuple[list[tuple[Row, list[Row]]], str]:
    """((row, curve) of each run of a source; what D counts)."""
    if source.startswith("wandb:"):
        return [(row, curve_of(row, logged)) for row, logged in online_runs(source.removeprefix("wandb:"))], "images"
    path = Path(source)
    if path.is_file():
        return read_csv(path, columns)
    runs = []
    for file in sorted(path.rglob("run.json")):
        row = checked_row(load_json(file, "varlab train"), file)
        runs.append((row, curve_of(row, read_curves(file.parent / "metrics.csv"))))
    known = {row.get("run_id") for row, _ in runs}
    for row, logged in offline_runs(path, known):
        runs.append((row, curve_of(row, logged)))
    return runs, "images"


def checked_row(row: Row, file: Path) -> Row:
    """The row. Raises ValueError naming the file and the field that the fits need and that is missing or of another kind."""
    found = checked(row, VARRow if row.get("kind") == "var" else RunRow, file)
    return {key: value for key, value in found.items() if key != "stretches"}  # which is no column


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


def read_csv(path: Path, columns: Mapping[str, str] | None) -> tuple[list[tuple[Row, list[Row]]], str]:
    """(rows of a table, with the curves in `curves.csv` in the same folder, if it exists; what D counts)."""
    rows, counts = read_runs(path, columns)
    curves: dict[str, list[Row]] = {}
    file = path.with_name("curves.csv")
    for point in read_table(file)[0] if file.is_file() else []:
        curves.setdefault(str(point.get("run_id")), []).append(point)
    return [(row, curves.get(key_of(row), [])) for row in rows], counts


def check_same(rows: Sequence[Row]) -> None:
    """Raises ValueError if runs of different tokenizers, data, pyramids or token orders would be fitted together."""
    for key in SAME:
        values = {json.dumps(row.get(key)): row["name"] for row in rows}
        if len(values) > 1:
            named = ", ".join(f"{name}: {value}" for value, name in values.items())
            raise ValueError(f"runs of different {key} cannot be fitted together ({named})")
