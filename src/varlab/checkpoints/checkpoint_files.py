"""Checkpoint files: reading them runs no code, and notices damage.

A checkpoint is a file of torch.save, or, of a sharded run (FSDP2), a folder: weights, averages and optimizer in files of
torch.distributed.checkpoint, whose contents `.metadata` lists, the rest in `meta.pt`.
"""

import io
import pickle
import re
import shutil
import tempfile
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from varlab.files import reason_of, sha256

META_FILE = "meta.pt"  # of a sharded checkpoint, Lightning's name for it
CHECKSUMS = "sha256"  # key in META_FILE: hash of each other file of the folder
METADATA = "torch.distributed.checkpoint.metadata"
DTYPES = "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool complex64 complex128"
PLAIN_CLASSES = {  # what a list of a sharded checkpoint's contents consists of
    *(
        (METADATA, name)
        for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "_MEM_FORMAT_ENCODING")
    ),
    *((METADATA, name) for name in ("TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata")),
    *(("torch", name) for name in (*DTYPES.split(), "Size")),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    *(("pathlib", name) for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")),
}


def swap_paths(path: Path) -> tuple[Path, Path]:
    """(temporary path of a folder before it is renamed to `path`, backup path of its predecessor during the rename)."""
    return path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.old")


def replace_folder(partial: Path, path: Path, old: Path) -> None:
    """Renames `partial` to `path`. If interrupted between the two renames, `latest_checkpoint` restores `old`."""
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    partial.rename(path)
    shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint that a run in `folder` continues from, or None."""
    path = folder / "last.ckpt"
    _, old = swap_paths(path)
    if not path.exists():
        with suppress(FileNotFoundError):  # there is none, or another process was faster
            old.rename(path)
    return path if path.exists() else None


def check_whole(path: Path) -> None:
    """Raises ValueError if the content of a file of torch.save differs from what was written, by the CRC-32 of each of its
    records. Files in older formats of torch have none."""
    with open(path, "rb") as file:
        if file.read(2) != b"PK":
            return
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except Exception as error:  # zipfile raises errors of many kinds for broken files
        raise ValueError(f"{path} is damaged: {reason_of(error)}") from None
    if broken is not None:
        raise ValueError(f"{path} is damaged: the content of {broken} is not what was written")


def read_file(path: Path) -> dict[str, Any]:
    """A file of tensors and plain values, unconverted. Raises ValueError naming file and reason."""
    if not path.is_file():
        raise ValueError(f"checkpoint {path} does not exist")
    check_whole(path)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # the restricted unpickler raises errors of many kinds
        raise ValueError(
            f"{path} is not a checkpoint of tensors and plain values, or it is damaged: {reason_of(error)}"
        ) from None
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise ValueError(f"{path} is not a checkpoint: it holds a {type(found).__name__} without names")
    return found


class PlainUnpickler(pickle._Unpickler):
    """Unpickles the list of a sharded checkpoint's contents, and nothing else: torch's own reader runs any code in it. In
    Python, since the one in C allocates whatever size a forged file names."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in PLAIN_CLASSES:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which would run code")
        return super().find_class(module, name)


def check_sharded(folder: Path, is_verified: bool = False) -> None:
    """Checks a sharded checkpoint before torch reads it: that its files are there, lie in the folder, are as large as the
    tensors they hold, and contain nothing but tensors and plain values; if `is_verified`, also their checksums.

    Raises ValueError naming folder and reason.
    """
    for name in (".metadata", META_FILE):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is not a checkpoint: {name} is missing")
    for name, digest in read_file(folder / META_FILE).get(CHECKSUMS, {}).items() if is_verified else ():
        if not (folder / name).is_file() or sha256(folder / name) != digest:
            raise ValueError(f"{folder} is damaged: {name} is missing, or not what was written")
    try:
        content = (folder / ".metadata").read_bytes()
        unpickler = PlainUnpickler(io.BytesIO(content))
        listed = unpickler.load()
        if max(unpickler.memo, default=0) > len(content):  # pyright: ignore[reportAttributeAccessIssue]
            raise ValueError("it is longer than its file")
        num_bytes = sum(file.stat().st_size for file in folder.glob("*.distcp"))
        tensors = [entry for entry in listed.state_dict_metadata.values() if hasattr(entry, "properties")]
        if sum(entry.size.numel() * entry.properties.dtype.itemsize for entry in tensors) > num_bytes:
            raise ValueError("its files are smaller than the tensors that they should hold")
        for place, info in listed.storage_data.items():
            name = str(info.relative_path)
            if not re.fullmatch(r"__\d+_\d+\.distcp", name) or info.transform_descriptors:
                raise ValueError(f"it lists the file {name!r}")
            if not hasattr(listed.state_dict_metadata[place.fqn], "properties"):  # torch's reader would run code in it
                with open(folder / name, "rb") as file:
                    file.seek(info.offset)
                    torch.load(io.BytesIO(file.read(info.length)), weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{folder} is damaged, or no checkpoint of tensors and plain values: {reason_of(error)}"
        ) from None


def optimizer_state_by_name(state: dict[str, Any], groups: list[list[str]]) -> dict[str, Any]:
    """An optimizer's state dict with parameters by name, as in sharded checkpoints, instead of by number."""
    names = [name for group in groups for name in group]
    return {
        "state": {names[i]: value for i, value in state["state"].items()},
        "param_groups": [
            {**group, "params": named} for group, named in zip(state["param_groups"], groups, strict=True)
        ],
    }


def optimizer_state_by_number(state: dict[str, Any]) -> dict[str, Any]:
    """The inverse: parameters numbered in the order of the groups, as in a regular optimizer's state dict."""
    names = [name for group in state["param_groups"] for name in group["params"]]
    numbers = {name: i for i, name in enumerate(names)}
    return {
        "state": {numbers[name]: value for name, value in state["state"].items()},
        "param_groups": [
            {**group, "params": [numbers[name] for name in group["params"]]} for group in state["param_groups"]
        ],
    }


def consolidated(folder: Path) -> dict[str, Any]:
    """A sharded checkpoint as an unsharded one. Raises ValueError naming the folder if it is incomplete."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    check_sharded(folder)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".consolidating.") as temporary:
        try:
            dcp_to_torch_save(folder, Path(temporary) / "whole.pt")
        except Exception as error:  # torch wraps exceptions of its threads in its own types
            raise ValueError(f"{folder} is damaged: {reason_of(error)}") from None
        sharded = read_file(Path(temporary) / "whole.pt")  # memory-mapped, so it stays valid after the file is deleted
    optimizers = [key for key in sorted(sharded) if key.startswith("optimizer_")]
    return {
        **read_file(folder / META_FILE),
        "state_dict": sharded["state_dict"],
        **({"ema": sharded["ema"]} if sharded.get("ema") else {}),
        "optimizer_states": [optimizer_state_by_number(sharded[key]) for key in optimizers],
    }
