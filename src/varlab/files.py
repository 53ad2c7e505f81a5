"""File utilities: atomic writes, the lock of an output folder, hashes, JSON, the log of a run."""

import csv
import hashlib
import json
import os
import shutil
import socket
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError


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


def remove_partials(folder: Path) -> None:
    """Removes what killed processes left of half-written files. Only for the holder of the folder's lock; subfolders with
    a lock of their own are left alone."""
    for root, folders, files in os.walk(folder):
        if Path(root) != folder and ".lock" in files:
            folders.clear()
            continue
        for name in [*folders, *files]:
            if name.startswith(".") and (name.endswith(".partial") or name.startswith(".consolidating.")):
                path = Path(root) / name
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        folders[:] = [name for name in folders if (Path(root) / name).is_dir()]


class FolderLock:
    """Exclusive use of an output folder, also between hosts that share a file system.

    `.lock` in the folder names its holder (host, process, SLURM job), who renews its modification time every `BEAT`
    seconds. It binds nobody any more once its process is gone from this host, once its SLURM job starts again, or, for
    another host, `STALE` seconds after it was last renewed. What killed processes left half written is removed.

    `rank`, `num_ranks`: of the processes that fill the folder together; only the first holds the lock. Raises ValueError
    naming the holder if the folder is in use.
    """

    BEAT, STALE = 15.0, 120.0

    def __init__(self, folder: Path, command: str, rank: int = 0, num_ranks: int = 1) -> None:
        self.file, self.command = folder / ".lock", command
        self.rank, self.num_ranks = rank, num_ranks
        self.content, self.released, self.is_new = b"", threading.Event(), False

    def __enter__(self) -> "FolderLock":
        if self.rank:
            return self
        self.is_new = not self.file.parent.exists()
        self.file.parent.mkdir(parents=True, exist_ok=True)
        pid = os.getpid()
        process = {"host": this_host(), "pid": pid, "started": process_start(pid)}
        job = os.environ.get("SLURM_JOB_ID")
        self.content = json.dumps({**process, "slurm_job": job, "command": self.command}).encode()
        while True:
            try:
                with os.fdopen(os.open(self.file, os.O_CREAT | os.O_EXCL | os.O_WRONLY), "wb") as file:
                    file.write(self.content)
                break
            except FileExistsError:
                self.remove_if_void()
        threading.Thread(target=self.renew, daemon=True).start()
        if self.num_ranks == 1:
            remove_partials(self.file.parent)
        return self

    def __exit__(self, *error: Any) -> None:
        self.released.set()
        if self.is_mine():
            self.file.unlink(missing_ok=True)
        if self.is_new:
            with suppress(OSError):
                self.file.parent.rmdir()  # if nothing was written

    def is_mine(self) -> bool:
        """Whether the lock still is that of this object."""
        return self.file.is_file() and self.file.read_bytes() == self.content

    def remove_if_void(self) -> None:
        """Removes the lock of a holder that is gone. Raises ValueError if the holder is there."""
        try:
            found, age = self.file.read_bytes(), lock_age(self.file)
        except FileNotFoundError:
            return
        if holder := living_holder(found, age):
            folder, wait = self.file.parent, max(self.STALE - age, 0)
            elsewhere = f"; if that host is gone, try again in {wait:.0f} s" if holder["host"] != this_host() else ""
            host = holder["host"].partition("/")[0]
            job = f", SLURM job {holder['slurm_job']}" if holder.get("slurm_job") else ""
            raise ValueError(
                f"{folder} is in use by `{holder['command']}` (process {holder['pid']} on {host}{job}): wait for it, or"
                f" choose another folder{elsewhere}"
            )
        aside = self.file.with_name(f".lock.{uuid.uuid4().hex}")
        with suppress(FileNotFoundError):
            self.file.rename(aside)
            if aside.read_bytes() != found:  # another process had already replaced it
                with suppress(FileExistsError):
                    os.link(aside, self.file)
            aside.unlink()

    def renew(self) -> None:
        """Keeps the lock alive; ends the process if another one took the folder while this one was suspended."""
        while not self.released.wait(self.BEAT):
            if self.is_mine():
                os.utime(self.file)
            elif not self.released.is_set():
                print(f"{self.file} was taken over by another process: this one ends", file=sys.stderr, flush=True)
                os._exit(1)


def lock_holder(folder: Path) -> dict[str, Any] | None:
    """Who uses an output folder (host, process, SLURM job, command); None if nobody does."""
    try:
        return living_holder((folder / ".lock").read_bytes(), lock_age(folder / ".lock"))
    except FileNotFoundError:
        return None


def this_host() -> str:
    """Name of this host and, where the system has one, identity of its start: two machines may have one name."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()}/{boot.read_text(encoding='utf-8').strip() if boot.is_file() else ''}"


def lock_age(file: Path) -> float:
    """Seconds since a lock was renewed, by the clock of its file system."""
    with tempfile.NamedTemporaryFile(dir=file.parent, prefix=".clock.") as now:
        return os.stat(now.name).st_mtime - file.stat().st_mtime


def living_holder(content: bytes, age: float) -> dict[str, Any] | None:
    """The holder that the content of a lock names; None if it is gone."""
    try:
        holder = {key: json.loads(content)[key] for key in ("host", "pid", "started", "slurm_job", "command")}
    except (ValueError, KeyError, TypeError):  # being written, left by a full disk, or not ours
        return {"host": "", "pid": "?", "command": "?"} if age < FolderLock.BEAT else None
    job = os.environ.get("SLURM_JOB_ID")
    if holder["host"] == this_host():
        is_alive = process_start(holder["pid"]) == holder["started"] is not None
    elif job is not None and holder["slurm_job"] == job:  # requeued after its node died
        is_alive = False
    else:
        is_alive = age < FolderLock.STALE
    return holder if is_alive else None


def process_start(pid: int) -> str | None:
    """When a process of this host started, in a unit of its own; None if there is no such process."""
    stat = Path(f"/proc/{pid}/stat")
    if stat.parent.parent.joinpath("self").exists():
        try:
            fields = stat.read_text(encoding="utf-8").rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return None
        return None if fields[0] == "Z" else fields[19]
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "unknown"


def sha256(path: Path) -> str:
    """Hash of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically."""
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def reason_of(error: Exception) -> str:
    """An error in one line: the first of its message, or its kind if it has none."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


class Schema(BaseModel, strict=True, extra="allow"):
    """What a file of ours must say: its fields, their types and ranges. Other fields are ignored."""


def load_json(path: Path, made_by: str, schema: type[Schema] | None = None) -> dict[str, Any]:
    """Reads a JSON object. If it is missing, invalid or not as `schema` says, raises ValueError naming it and the command
    that makes it."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist: make it with `{made_by}`")
    return parse_json(path.read_bytes(), path, made_by, schema)


def parse_json(content: bytes, path: Path | str, made_by: str, schema: type[Schema] | None = None) -> dict[str, Any]:
    """The JSON object of a file's content, see `load_json`."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): make it again with `{made_by}`") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, not an object: make it again with `{made_by}`")
    return value if schema is None else checked(value, schema, path)


def checked(value: dict[str, Any], schema: type[Schema], path: Path | str) -> dict[str, Any]:
    """The value as it is. Raises ValueError naming the file and the first field that differs from the schema."""
    try:
        schema.model_validate_json(json.dumps(value))
    except ValidationError as error:
        first = error.errors()[0]
        found = repr(first["input"])
        found = found if len(found) <= 60 else f"{found[:57]}..."
        reason = first["msg"].replace("Input should be", "expected")
        raise ValueError(f"{path}: {'.'.join(map(str, first['loc']))} is {found}, {reason}") from None
    except (ValueError, TypeError, RecursionError) as error:  # nested too deeply, or of values that JSON does not have
        raise ValueError(f"{path} is not as expected: {error}") from None
    return value


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


def delimiter_of(file: Path) -> str:
    """What separates the cells of a CSV file: the comma, semicolon or tab that its header has most."""
    with open(file, encoding="utf-8-sig", errors="replace", newline="") as lines:
        return max(",;\t", key=lines.readline().count)


def read_rows(file: Path) -> list[dict[str, str]]:
    """The rows of a CSV file with a header, whose cells are separated by commas, semicolons or tabs. Raises ValueError
    naming the file if it is none."""
    try:
        with open(file, encoding="utf-8-sig", newline="") as lines:
            rows = list(csv.DictReader(lines, delimiter=delimiter_of(file)))
    except (csv.Error, ValueError) as error:
        raise ValueError(f"{file} is not a CSV file: {error}") from None
    if any(None in row for row in rows):
        raise ValueError(f"{file} is not a CSV file with a header: a row has more cells than the header")
    return [{key: value for key, value in row.items() if value is not None} for row in rows]


def read_curves(file: Path) -> dict[str, dict[int, float]]:
    """metrics.csv as {name: {step: value}}. For a step that was repeated after a restart, the last row counts."""
    curves: dict[str, dict[int, float]] = {}
    for row in read_rows(file) if file.is_file() else []:
        try:
            for name, value in row.items():
                if value and row.get("step") and name not in ("step", "epoch"):
                    curves.setdefault(name, {})[int(row["step"])] = float(value)
        except ValueError as error:
            raise ValueError(f"{file} is not the log of a run: {error}") from None
    return {name: dict(sorted(curve.items())) for name, curve in curves.items()}
