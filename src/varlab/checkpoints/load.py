"""Loading networks: training checkpoints, export folders and the released files -> tokenizer, VAR.

A training checkpoint holds, under `varlab`, the classes and arguments of its networks as plain values, so it loads
anywhere with weights_only=True, without Lightning or Hydra. A sharded run (FSDP2) writes a folder: weights, averages
and optimizer in files of torch.distributed.checkpoint, the rest in `meta.pt`.
"""

import pickle
import shutil
import struct
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from varlab.checkpoints.export_folder import (
    is_pretrained,
    load_pretrained,
    load_weights,
    read_config,
    tokenizer_fingerprint,
)
from varlab.checkpoints.formats import CHECKPOINT_FORMAT, upgrade_checkpoint
from varlab.checkpoints.released_layout import is_released_tokenizer, load_released
from varlab.models import scales
from varlab.models.custom_classes import Trust, build, describe, named_classes
from varlab.models.msvqvae import MSVQVAE
from varlab.models.quantizer import MultiScaleQuantizer
from varlab.models.var import VAR

META_FILE = "meta.pt"  # of a sharded checkpoint, Lightning's name for it


def networks_entry(tokenizer: MSVQVAE, var: VAR | None = None, class_names: list[str] | None = None) -> dict[str, Any]:
    """The `varlab` entry of a training checkpoint. Raises ValueError for a network that cannot be rebuilt from it."""
    return {
        "format": CHECKPOINT_FORMAT,
        "tokenizer": describe(tokenizer),
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        "var": None if var is None else describe(var),
        "class_names": class_names,
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
    if not path.exists() and old.exists():
        old.rename(path)
    return path if path.exists() else None


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

    for name in (".metadata", META_FILE):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is not a checkpoint: {name} is missing")
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".consolidating.") as temporary:
        try:
            dcp_to_torch_save(folder, Path(temporary) / "whole.pt")
        except Exception as error:  # torch wraps exceptions of its threads in its own types
            raise ValueError(f"{folder} is damaged: {str(error).splitlines()[0]}") from None
        sharded = read_file(Path(temporary) / "whole.pt")  # memory-mapped, so it stays valid after the file is deleted
    optimizers = [key for key in sorted(sharded) if key.startswith("optimizer_")]
    return {
        **read_file(folder / META_FILE),
        "state_dict": sharded["state_dict"],
        **({"ema": sharded["ema"]} if sharded.get("ema") else {}),
        "optimizer_states": [optimizer_state_by_number(sharded[key]) for key in optimizers],
    }


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint file or a sharded checkpoint's folder, in the current format; nothing but tensors and plain values
    is unpickled.

    Raises ValueError naming file and reason.
    """
    path = Path(path)
    return upgrade_checkpoint(consolidated(path) if path.is_dir() else read_file(path))


def check_whole(path: Path) -> None:
    """Raises ValueError if the content of a file of torch.save differs from what was written, by the CRC-32 of each of its
    records. Files in older formats of torch have none."""
    with open(path, "rb") as file:
        if file.read(2) != b"PK":
            return
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except (zipfile.BadZipFile, EOFError, RuntimeError, ValueError, struct.error) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if broken is not None:
        raise ValueError(f"{path} is damaged: the content of {broken} is not what was written")


def read_file(path: Path) -> dict[str, Any]:
    """A file of tensors and plain values, unconverted. Raises ValueError naming file and reason."""
    if not path.is_file():
        raise ValueError(f"checkpoint {path} does not exist")
    check_whole(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{path} is not a checkpoint of tensors and plain values, or it is damaged: {reason}"
        ) from None


def entry_of(checkpoint: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """The `varlab` entry of a checkpoint. Raises ValueError if it is missing or of an unknown format."""
    entry = checkpoint.get("varlab")
    if entry is None or entry.get("format") != CHECKPOINT_FORMAT:
        found = "no varlab entry" if entry is None else f"format {entry.get('format')}"
        raise ValueError(f"{path} is not a varlab checkpoint of format {CHECKPOINT_FORMAT} or older: it has {found}")
    return entry


def weights(checkpoint: dict[str, Any], prefix: str, use_ema: bool) -> dict[str, Tensor]:
    """Weights of one network, without `prefix`; averaged if `use_ema` and the checkpoint has averages."""
    state = dict(checkpoint["state_dict"])
    if use_ema and "ema" in checkpoint:
        state.update(checkpoint["ema"])
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def load_tokenizer(
    path: str | Path,
    patch_nums: scales.PatchNums | None = None,
    use_ema: bool = True,
    trust_code: bool = False,
) -> MSVQVAE:
    """The tokenizer of a training checkpoint (of either module), of an export folder, or the released
    `vae_ch160v4096z32.pth`.

    `patch_nums`: for the released file, which does not store them (default: 256 px). `trust_code`: see `load`.
    """
    return load_any(path, use_ema, patch_nums, tokenizer_only=True, trust_code=trust_code)[0]


def load_any(
    path: str | Path,
    use_ema: bool = True,
    patch_nums: scales.PatchNums | None = None,
    tokenizer_only: bool = False,
    trust_code: bool = False,
) -> tuple[MSVQVAE, VAR | None, list[str] | None]:
    """(tokenizer, transformer, class names) of any supported file or folder; None for what it does not contain."""
    if is_pretrained(path):
        return load_pretrained(path, trust_code)
    checkpoint = read_checkpoint(path)
    if is_released_tokenizer(checkpoint):
        tokenizer = load_released(checkpoint, patch_nums=patch_nums or scales.RELEASED_256)
        assert isinstance(tokenizer, MSVQVAE)
        return tokenizer.eval(), None, None
    entry = entry_of(checkpoint, path)
    trust = Trust(str(path), trust_code)
    tokenizer = build(MSVQVAE, entry["tokenizer"], trust)
    load_weights(tokenizer, weights(checkpoint, "net." if entry["var"] is None else "tokenizer.", use_ema), path)
    if entry["var"] is None or tokenizer_only:
        return tokenizer.eval(), None, entry["class_names"]
    var = build(VAR, entry["var"], trust)
    load_weights(var, weights(checkpoint, "net.", use_ema), path)
    return tokenizer.eval(), var.eval(), entry["class_names"]


def contains_var(path: str | Path) -> bool:
    """Whether a checkpoint or export folder contains a transformer in addition to its tokenizer."""
    if is_pretrained(path):
        return read_config(path)["var"] is not None
    checkpoint = read_checkpoint(path)
    return not is_released_tokenizer(checkpoint) and entry_of(checkpoint, path)["var"] is not None


def load(path: str | Path, use_ema: bool = True, trust_code: bool = False) -> tuple[MSVQVAE, VAR, list[str]]:
    """(tokenizer, transformer, class names) of a VAR's training checkpoint or export folder, on the CPU, in evaluation
    mode.

    `use_ema`: use the averaged weights if a training checkpoint has them. `trust_code`: import classes outside of varlab
    that the file names, which runs their code; code in the file's own folder is never run. Raises ValueError naming file
    and reason if it is missing, damaged, contains no VAR, or names such a class.
    """
    tokenizer, var, class_names = load_any(path, use_ema, trust_code=trust_code)
    if var is None:
        raise ValueError(f"{path} holds a tokenizer only; give the checkpoint of a VAR")
    return tokenizer, var, class_names or []


def check_same_arguments(
    what: str, found: dict[str, Any], network: MSVQVAE | VAR, path: str | Path = "the checkpoint"
) -> None:
    """Raises ValueError naming the first argument, other than `changeable` ones, in which a described network differs
    from this one."""
    base = MSVQVAE if isinstance(network, MSVQVAE) else VAR
    with torch.device("meta"):
        trust = Trust(str(path), classes=named_classes(describe(network)))
        complete = describe(
            build(base, found, trust)
        )  # fills in defaults of arguments that an older version did not have
    compare_arguments(what, complete, describe(network), base.changeable | network.changeable, path)


def compare_arguments(
    what: str, found: dict[str, Any], expected: dict[str, Any], changeable: frozenset[str], path: str | Path
) -> None:
    """Compares two descriptions, recursing into nested networks."""
    for key in [*expected, *(found.keys() - expected.keys())]:
        mine, theirs = expected.get(key), found.get(key)
        if isinstance(mine, dict) and isinstance(theirs, dict) and key not in changeable:
            compare_arguments(what, theirs, mine, changeable | MultiScaleQuantizer.changeable, path)
        elif key not in changeable and mine != theirs:
            raise ValueError(f"{path} holds a {what} with {key}={theirs}, but this run has {key}={mine}")


def check_same_networks(checkpoint: dict[str, Any], tokenizer: MSVQVAE, var: VAR | None) -> None:
    """Raises ValueError if the networks of a checkpoint to be resumed differ from those of the run."""
    entry = entry_of(checkpoint, "the checkpoint")
    if (entry["var"] is None) != (var is None):
        raise ValueError(
            f"the checkpoint holds a {'VAR' if entry['var'] else 'tokenizer'}, but this run trains a {'VAR' if var else 'tokenizer'}"
        )
    check_same_arguments("tokenizer", entry["tokenizer"], tokenizer)
    if var is not None:
        check_same_arguments("VAR", entry["var"], var)
        if entry["tokenizer_fingerprint"] != tokenizer_fingerprint(tokenizer):
            raise ValueError("the checkpoint was trained with a different tokenizer than this run")
