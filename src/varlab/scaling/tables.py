"""Tables of runs as CSV: varlab's own, W&B's web export, and those of others, with units in the header.

Needed are N (`params_main`), the loss (`val_loss`), and D (`images_seen`, or tokens) or C (`flops_exact`); everything
else is optional.
"""

import contextlib
import csv
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from varlab.files import atomic_write, delimiter_of, read_rows

Row = dict[str, Any]
SYMBOLS = {"N": "params_main", "D": "images_seen", "L": "val_loss", "C": "flops_exact"}
NEEDED = {"params_main": "N", "val_loss": "L"}
EXPORTED = {"Name": "name", "State": "state", "ID": "run_id"}  # columns of W&B's web export
STATES = {"crashed": "failed", "killed": "stopped"}  # W&B's words
FACTORS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12, "p": 1e15, "e": 1e18, "z": 1e21} | {
    word + end: 10.0**power
    for word, power in (("thousand", 3), ("million", 6), ("billion", 9), ("trillion", 12))
    for end in ("", "s")
}
KINDS = {  # unit without its factor -> how much of ours it is, by kind of column
    "loss": {unit + per: value for unit, value in (("nat", 1.0), ("nats", 1.0), ("bit", math.log(2)), ("bits", math.log(2)))
             for per in ("", "/token")},
    "error": {"percent": 1.0, "%": 1.0, "fraction": 100.0},
    "compute": {"": 1.0, "flop": 1.0, "flops": 1.0, "f-days": 86400.0, "flop-days": 86400.0},
    "time": {"s": 1.0, "seconds": 1.0, "min": 60.0, "h": 3600.0, "hours": 3600.0},
    "count": dict.fromkeys(("", "images", "tokens", "parameters", "params"), 1.0),
}  # fmt: skip
OURS = {"loss": "nat/token", "error": "percent", "compute": "FLOP", "time": "s"}
IMAGES = ("batch", "warmup", "cooldown")


def kind_of(column: str) -> str | None:
    """The kind of unit that a column has; None for text and for columns that no fit reads."""
    if column.startswith(("val_loss", "train_loss", "entropy")):
        return "loss"
    if column.startswith("val_err"):
        return "error"
    if column.startswith("flops_"):
        return "compute"
    if column.startswith("params_") or column in (*IMAGES, "images_seen", "tokens_seen", "unique_images", "images"):
        return "count"
    return "time" if column == "device_seconds" else None


def unit(column: str) -> str:
    """Unit of a column, empty for counts and text."""
    kind = kind_of(column)
    return "nat" if column.startswith("entropy") else "images" if column in IMAGES else OURS.get(kind or "", "")


def factor_of(column: str, given: str) -> float:
    """What a value in the given unit is multiplied by. Raises ValueError for a unit that is not known."""
    known = KINDS[kind_of(column) or "count"]
    text = given.strip().lower()
    if text in known:
        return known[text]
    numeric = re.match(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)\s*(.*)", text)
    factors = {numeric[1]: float(numeric[1])} if numeric else FACTORS
    for prefix in sorted(factors, key=len, reverse=True):
        rest = text.removeprefix(prefix).strip()
        if prefix and text.startswith(prefix) and rest in known and kind_of(column) in ("count", "compute"):
            return factors[prefix] * known[rest]
    raise ValueError(f"[{given}] is no unit of it: {', '.join(name for name in known if name)}")


def number(value: Any, decimal_comma: bool = False) -> float | None:
    """A cell as a finite number, or None."""
    if isinstance(value, str):
        text = value.strip()
        value = text.replace(",", ".") if decimal_comma and text.count(",") == 1 and "." not in text else text
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return found if math.isfinite(found) and not isinstance(value, bool) else None


def parse(column: str, text: str) -> Any:
    """A CSV cell as number, list or text; ids stay text, even if they look like numbers."""
    if column.endswith("_id") or column in ("name", "parent_run"):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def read_runs(path: Path, columns: Mapping[str, str] | None = None) -> tuple[list[Row], str]:
    """(one row per run, what D counts: images or tokens); see `read_table`. Rows that name no kind and no state are VARs
    that finished. Raises ValueError for a table without N, D or loss as well."""
    rows, meaning = read_table(path, columns, is_of_runs=True)
    contents: dict[str, str] = {}
    for i, row in enumerate(rows):
        content = json.dumps(row, sort_keys=True)
        row.setdefault("name", f"row {i + 1}")
        row.setdefault("run_id", hashlib.sha256(content.encode()).hexdigest()[:8])
        if contents.setdefault(str(row["run_id"]), content) != content:
            row["run_id"] = f"{row['run_id']}-{i + 1}"  # the same id for different rows
        if "kind" not in meaning.values():
            row["kind"] = "var"
        if row.get("kind") == "var":
            state = str(row.get("state", "finished")).lower()
            row["state"] = STATES.get(state, state)
        row.setdefault("step", 0)
    header = next((header for header, ours in meaning.items() if ours == "images_seen"), None)
    is_theirs = header is None and columns is not None and bool(columns)
    return rows, "tokens" if is_theirs or "token" in (header or "").lower() else "images"


def read_table(
    path: Path, columns: Mapping[str, str] | None = None, is_of_runs: bool = False
) -> tuple[list[Row], dict[str, str]]:
    """(the rows under our names and in our units; the name of each header).

    `columns`: our name, or N, D, L or C, of columns with other names. Empty cells, nan and inf are left out of a row.
    `is_of_runs`: N, D or C, and the loss are needed, unless a column `kind` says that no row is a VAR. Raises one
    ValueError that names every column that is missing or has an unusable unit.
    """
    raw, decimal_comma = read_rows(path), delimiter_of(path) != ","
    if not raw:
        return [], {}
    named = {str(key).strip(): SYMBOLS.get(str(value), str(value)) for key, value in (columns or {}).items()}
    split = {header: name_and_unit(header) for header in raw[0] if header}
    names = {name for name, _ in split.values()}
    absent = [f"columns={key}: there is no such column" for key in named if key not in split and key not in names]
    taken = {ours for key, ours in named.items() if key in split or key in names}
    problems, meaning = [], {}
    for header, (name, given) in split.items():
        ours = named.get(header, named.get(name))
        if ours is None:
            ours = EXPORTED.get(name, name)
            if ours in taken:  # another column was named for it
                continue
        factor = 1.0
        if given and kind_of(ours) is not None:
            try:
                factor = factor_of(ours, given)
            except ValueError as error:
                problems.append(f"{header}: {error}")
        if any(ours == other for other, _ in meaning.values()):
            problems.append(f"{header}: another column is {ours} as well")
        meaning[header] = (ours, factor)
    have = {ours for ours, _ in meaning.values()}
    missing = []
    if is_of_runs and any(cells.get("kind", "var") == "var" for cells in raw):
        missing = [f"no column for {symbol} ({name})" for name, symbol in NEEDED.items() if name not in have]
        missing += [] if have & {"images_seen", "flops_exact"} else ["no column for D (images_seen) or C (flops_exact)"]
    is_ours = len(absent) == len(named) and not missing  # one of several tables may have our names
    problems += [*([] if is_ours else absent), *missing]
    if problems:
        raise ValueError(
            f"{path}: {'; '.join(problems)}; the columns are {', '.join(split)}: name them, without their units, as in"
            " columns={params: N, tokens: D, loss: L}"
        )
    rows: list[Row] = []
    for cells in raw:
        row: Row = {}
        for header, cell in cells.items():
            text = cell.strip()
            if text == "" or header not in meaning:
                continue
            ours, factor = meaning[header]
            if kind_of(ours) is None:
                row[ours] = parse(ours, text)
            elif (value := number(text, decimal_comma)) is not None:
                row[ours] = as_given(text, value, factor)
            elif text != "null" and ours in SYMBOLS.values():
                row[ours] = text  # named when the run is left out
        rows.append(row)
    return rows, {header: ours for header, (ours, _) in meaning.items()}


def name_and_unit(header: str) -> tuple[str, str]:
    """The name of a column and its unit, in brackets or, if it is a known one, in parentheses."""
    found = re.fullmatch(r"(.*?)\s*\[(.*)\]\s*|(.*?)\s*\((.*)\)\s*", header)
    if found is None:
        return header.strip(), ""
    if found[1] is not None:
        return found[1].strip(), found[2]
    for column in ("val_loss", "val_err", "params_main", "flops_exact"):
        with contextlib.suppress(ValueError):
            factor_of(column, found[4])
            return found[3].strip(), found[4]
    return header.strip(), ""


def as_given(cell: str, value: float, factor: float) -> float | int:
    """A converted number; whole numbers stay whole."""
    scaled = value * factor
    return int(cell) if factor == 1 and re.fullmatch(r"-?\d+", cell.strip()) else scaled


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
