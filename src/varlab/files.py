"""File utilities: atomic writes, hashes, JSON, the log of a run."""

import csv
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder that is renamed to `path` if the block succeeds, and removed if it fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise OSError(f"{path} could not be written: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder next to `path` that is renamed to it if the block succeeds. Raises ValueError if `path`
    exists."""
    if path.exists():
        raise ValueError(f"{path} already exists: remove it, or choose another out=...")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield partial
        partial.chmod(0o755)
        partial.rename(path)
    except OSError as error:
        raise OSError(f"{path} could not be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def sha256(path: Path) -> str:
    """Hash of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically."""
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(value, indent=2) + "\n")


def load_json(path: Path, made_by: str) -> dict[str, Any]:
    """Reads a JSON file. If it is missing or invalid, raises ValueError naming it and the command that makes it."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist: make it with `{made_by}`")
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): make it again with `{made_by}`") from None


def json_hash(value: Any) -> str:
    """Hash of a JSON value that does not depend on the order of keys; 16 hex digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """A nested mapping as a flat one with dotted keys."""
    if not isinstance(node, dict):
        return {prefix: node}
    found: dict[str, Any] = {}
    for key, value in node.items():
        found |= flat(value, f"{prefix}.{key}".lstrip("."))
    return found


def read_curves(file: Path) -> dict[str, dict[int, float]]:
    """metrics.csv as {name: {step: value}}. For a step that was repeated after a restart, the last row counts."""
    curves: dict[str, dict[int, float]] = {}
    if file.is_file():
        with open(file, newline="") as lines:
            for row in csv.DictReader(lines):
                for name, value in row.items():
                    if value and row["step"] and name not in ("step", "epoch"):
                        curves.setdefault(name, {})[int(row["step"])] = float(value)
    return {name: dict(sorted(curve.items())) for name, curve in curves.items()}
