"""Remote shards: object stores and web servers through fsspec, with whole shards cached on local disk.

A file is downloaded in ranges, so a broken connection costs one range, not the file. Files in the cache are named by
their content hash: processes, runs and data sets on one machine share them. A partial download has a different name.
"""

import hashlib
import logging
import os
import random
import re
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any

import fsspec
from braceexpand import braceexpand
from filelock import FileLock, Timeout

from varlab.files import sha256

RANGE_BYTES = 8 << 20
LONGEST_PAUSE = 30.0
WHOLE = re.compile("[0-9a-f]{64}")  # names in the cache; no other files are removed
PARTIAL = re.compile(r"[0-9a-f]{64}\.\d+\.partial")
TRANSIENT_STATUS = {408, 425, 429}
log = logging.getLogger(__name__)
jitter = random.Random()  # not the global one: training must not depend on how often a server failed


def is_remote(path: str | Path) -> bool:
    """Whether a path is a URL (s3://, gs://, https://, ...)."""
    return "://" in str(path)


def join(folder: str | Path, name: str) -> str:
    """Path or URL of a file in a folder; a name that is a URL or an absolute path is returned unchanged."""
    if is_remote(name) or os.path.isabs(name):
        return name
    return f"{str(folder).rstrip('/')}/{name}"


def is_final(error: Exception) -> bool:
    """Whether an error is permanent, so that retrying cannot help."""
    status = getattr(error, "status", None)
    if isinstance(status, int) and 400 <= status < 500:
        return status not in TRANSIENT_STATUS
    return isinstance(error, FileNotFoundError | PermissionError | ImportError | ValueError)


@dataclass(frozen=True)
class RemoteFile:
    """A remote file: its URL, size and content hash."""

    url: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class Storage:
    """Access to remote files and their local cache.

    `cache_gb`: maximum size of the cache in 10^9 bytes; the least recently used files are evicted first. `retries`:
    attempts after the first, with pauses of 0.5 s, 1 s, ... 30 s. `timeout`: seconds without data after which a
    connection counts as broken. `downloads`: concurrent downloads per process. `options`: passed to fsspec (key,
    secret, endpoint_url, ...).
    """

    cache_dir: str = "~/.cache/varlab/shards"
    cache_gb: float = 200.0
    retries: int = 8
    timeout: float = 60.0
    downloads: int = 4
    options: dict[str, Any] | None = None

    @property
    def folder(self) -> Path:
        """The cache folder."""
        return Path(self.cache_dir).expanduser()

    def open(self, url: str) -> tuple[Any, str]:
        """(file system, path in it). Raises ValueError naming the missing package or the unknown protocol."""
        options = dict(self.options or {})
        protocol = url.split("://")[0]
        if protocol in ("http", "https"):
            from aiohttp import ClientTimeout

            timeout = ClientTimeout(total=None, sock_connect=self.timeout, sock_read=self.timeout)
            options.setdefault("client_kwargs", {"timeout": timeout})
        elif protocol == "s3":
            options.setdefault("config_kwargs", {"connect_timeout": self.timeout, "read_timeout": self.timeout})
        try:
            return fsspec.core.url_to_fs(url, **options)
        except (ImportError, ValueError) as error:
            extra = {"s3": "s3", "gs": "gcs", "gcs": "gcs"}.get(protocol)
            hint = f": pip install 'varlab[{extra}]'" if extra and isinstance(error, ImportError) else f" ({error})"
            raise ValueError(f"{url} cannot be opened{hint}") from None

    def attempt(self, what: str, call: Callable[[], Any]) -> Any:
        """The result of `call`, retried with exponential backoff. Raises OSError naming what failed."""
        for attempt in range(self.retries + 1):
            try:
                return call()
            except Exception as error:  # every file system raises its own exceptions
                reason = f"{type(error).__name__}: {error}".rstrip(": ")
                if is_final(error) or attempt == self.retries:
                    tries = f" after {attempt + 1} attempts" if attempt else ""
                    raise OSError(f"{what} cannot be read{tries}: {reason}") from error
                pause = min(LONGEST_PAUSE, 0.5 * 2**attempt) * jitter.uniform(0.5, 1.0)
                log.warning("%s: %s; attempt %d of %d in %.1f s", what, reason, attempt + 2, self.retries + 1, pause)
                time.sleep(pause)

    def read(self, url: str) -> bytes:
        """The content of a small file."""
        fs, path = self.open(url)
        return self.attempt(url, lambda: fs.cat_file(path))

    def size(self, url: str) -> int:
        """Size of a remote file in bytes."""
        fs, path = self.open(url)
        size = self.attempt(url, lambda: fs.info(path))["size"]
        if size is None:
            raise OSError(f"{url}: the server does not report the file's size")
        return size

    def expand(self, pattern: str) -> list[str]:
        """Files that match a path, glob, brace pattern or URL, sorted. Raises ValueError if there are none."""
        found: list[str] = []
        for name in braceexpand(pattern):
            if not any(sign in name for sign in "*?["):
                found.append(name)
            elif is_remote(name):
                fs, path = self.open(name)
                found += [
                    fs.unstrip_protocol(match) for match in self.attempt(name, lambda fs=fs, path=path: fs.glob(path))
                ]
            else:
                found += glob(name, recursive=True)
        if not found:
            raise ValueError(f"{pattern} matches no file")
        return sorted(set(found))

    def fetch(self, file: RemoteFile) -> Path:
        """The local copy of a file, downloaded if missing. Raises OSError if it is not available or its checksum
        differs."""
        local = self.folder / file.sha256
        if not touch_if_exists(local):
            local.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / f"{file.sha256}.lock"):
                if not touch_if_exists(local):
                    partial = self.folder / f"{file.sha256}.{file.num_bytes}.partial"
                    self.make_room(file.num_bytes, partial)
                    self.download(file.url, file.num_bytes, partial)
                    if sha256(partial) != file.sha256:
                        partial.unlink()
                        raise OSError(f"{file.url} is not the file that the manifest describes (checksum differs)")
                    partial.replace(local)
        return local

    def fetch_new(self, url: str) -> tuple[RemoteFile, Path]:
        """Downloads a remote file of unknown content; returns its description and its local copy."""
        num_bytes = self.size(url)
        self.folder.mkdir(parents=True, exist_ok=True)
        name = hashlib.sha256(url.encode()).hexdigest()
        with FileLock(self.folder / f"{name}.lock"):
            partial = self.folder / f"{name}.{num_bytes}.partial"
            self.make_room(num_bytes, partial)
            self.download(url, num_bytes, partial)
            file = RemoteFile(url, num_bytes, sha256(partial))
            partial.replace(self.folder / file.sha256)
        return file, self.folder / file.sha256

    def fetch_all(self, files: Iterable[RemoteFile]) -> None:
        """Downloads the files that are not cached, several at a time."""
        missing = [file for file in files if not (self.folder / file.sha256).is_file()]
        if missing:
            with ThreadPoolExecutor(self.downloads) as pool:
                list(pool.map(self.fetch, missing))

    def download(self, url: str, num_bytes: int, partial: Path) -> None:
        """Appends to `partial` until it holds the whole file."""
        fs, path = self.open(url)
        with open(partial, "ab") as stream:
            while (start := stream.tell()) < num_bytes:
                stop = min(start + RANGE_BYTES, num_bytes)
                content = self.attempt(
                    f"{url} (bytes {start} to {stop} of {num_bytes})",
                    lambda start=start, stop=stop: exact_range(fs, path, start, stop, num_bytes),
                )
                stream.write(content)

    def make_room(self, num_bytes: int, own: Path) -> None:
        """Evicts the least recently used files until the cache has room for `num_bytes` more.

        Files that other processes are downloading count with their full size; partial files of killed processes are
        removed.
        """
        allowed = int(self.cache_gb * 1e9)
        if num_bytes > allowed:
            raise OSError(
                f"cache_gb={self.cache_gb} cannot hold a single shard of {num_bytes / 1e9:.3g} GB: increase it"
            )
        while True:
            with FileLock(self.folder / "room.lock"):
                sizes = {path: status for path in self.folder.iterdir() if (status := stat_of(path))}
                others = [path for path in sizes if PARTIAL.fullmatch(path.name) and path != own]
                whole = [path for path in sizes if WHOLE.fullmatch(path.name)]
                kept = sorted(whole, key=lambda path: sizes[path].st_mtime_ns)
                total = num_bytes + sum(int(path.suffixes[-2][1:]) for path in others)
                total += sum(sizes[path].st_size for path in kept)
                for path in kept:
                    if total <= allowed:
                        break
                    path.unlink(missing_ok=True)
                    total -= sizes[path].st_size
                if total <= allowed:
                    own.touch()  # from now on other processes count it
                    return
                removed = [path for path in others if remove_if_left(path)]
            if not removed:
                time.sleep(0.2)  # wait for another process to finish its download


def touch_if_exists(file: Path) -> bool:
    """Whether the file exists; if so, marks it as used now."""
    try:
        os.utime(file)
    except FileNotFoundError:
        return False
    return True


def stat_of(path: Path) -> os.stat_result | None:
    """The file's status, or None if it no longer exists."""
    try:
        return path.stat()
    except FileNotFoundError:
        return None


def remove_if_left(partial: Path) -> bool:
    """Removes a partial file unless a process is still downloading it; returns whether it was removed."""
    lock = FileLock(partial.with_name(partial.name.split(".")[0] + ".lock"))
    try:
        with lock.acquire(blocking=False):
            partial.unlink(missing_ok=True)
            return True
    except Timeout:
        return False


def exact_range(fs: Any, path: str, start: int, stop: int, num_bytes: int) -> bytes:
    """Bytes start to stop of a file; a server without range support sends the whole file. Raises OSError if the
    response has the wrong length."""
    content = fs.cat_file(path, start=start, end=stop)
    if len(content) == num_bytes:
        return content[start:stop]
    if len(content) != stop - start:
        raise OSError(f"the response has {len(content)} bytes, expected {stop - start}")
    return content
