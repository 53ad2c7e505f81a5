"""Runs stored by W&B: online through its API, offline in its files. Each has the run's row (the contents of run.json),
which the trainer wrote into the summary, and its logged values as {name: {step: value}}."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Logged = dict[str, dict[int, float]]
STEP = "trainer/global_step"
STATES = {"finished": "finished", "running": "running", "crashed": "failed", "failed": "failed", "killed": "stopped"}


def row_of(summary: dict[str, Any], run_id: str, name: str, state: str | None = None) -> dict[str, Any]:
    """The run's row in a summary; a summary without one (older runs, other projects) gives a row that fits ignore."""
    row: dict[str, Any] = {}
    for key, value in summary.items():
        if "/" not in key and not key.startswith("_"):
            whole, _, part = key.partition(".")  # W&B's files store sizes.depth for {sizes: {depth: ...}}
            if part:
                row.setdefault(whole, {})[part] = value
            else:
                row[whole] = value
    if "kind" not in row:
        return {"run_id": run_id, "name": name, "kind": None}
    if state is not None and row.get("state") == "running":
        row["state"] = STATES.get(state, state)
    return row


def add(logged: Logged, entry: dict[str, Any]) -> None:
    """Adds one entry of a history. For a step that was repeated after a restart, the last entry counts."""
    step = entry.get(STEP)
    if not isinstance(step, int | float):
        return
    for name, value in entry.items():
        if isinstance(value, int | float) and not name.startswith("_") and name != STEP:
            logged.setdefault(name, {})[int(step)] = float(value)


def online_runs(place: str) -> list[tuple[dict[str, Any], Logged]]:
    """Runs of `ENTITY/PROJECT` or `ENTITY/PROJECT/sweeps/ID` on the W&B server. Raises ValueError if they cannot be
    read."""
    import wandb
    from wandb.errors import Error as WandbError

    try:
        api = wandb.Api(timeout=60)
        is_sweep = "/sweeps/" in place
        runs = api.sweep(place.replace("/sweeps/", "/")).runs if is_sweep else api.runs(place, per_page=100)
        found = []
        for run in runs:
            logged: Logged = {}
            for entry in run.scan_history():
                add(logged, entry)
            found.append((row_of(plain(run.summary), run.id, run.name, run.state), logged))
    except (WandbError, ValueError, TypeError) as error:
        raise ValueError(f"source=wandb:{place} cannot be read: {error} (wandb login, ENTITY/PROJECT)") from None
    return found


def plain(summary: Any) -> dict[str, Any]:
    """W&B's summary as a plain dict."""
    return json.loads(json.dumps(dict(summary), default=dict))


def offline_runs(folder: Path, known: set[Any]) -> list[tuple[dict[str, Any], Logged]]:
    """Runs in W&B's files (`run-ID.wandb`) below a folder, except `known` ones; parts of a resumed run are merged."""
    found: dict[str, tuple[dict[str, Any], Logged]] = {}
    for file in sorted(folder.rglob("run-*.wandb"), key=lambda file: file.parent.name):  # by time, as W&B names them
        run_id = file.stem.removeprefix("run-")
        if run_id in known:
            continue
        summary, logged = found.setdefault(run_id, ({}, {}))
        for kind, entry in records(file):
            if kind == "summary":
                summary.update(entry)
            else:
                add(logged, entry)
    return [(row_of(summary, run_id, run_id), logged) for run_id, (summary, logged) in found.items()]


def records(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("history" or "summary", entry) in order, from W&B's reader; for a killed run, everything that it had written."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", str(file.parent), "--json"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode and not answer.stdout:
        raise ValueError(f"{file} cannot be read: {answer.stderr.strip() or 'W&B printed no message'}")
    for line in answer.stdout.splitlines():
        record = json.loads(line) if line.startswith("{") else {}
        if record.get("type") == "history":
            yield "history", record["history"].get("item", {})
        elif record.get("type") == "summary":
            yield "summary", record["summary"].get("update", {})
