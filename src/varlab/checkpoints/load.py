"""Networks on disk: training checkpoints and the released files -> tokenizer, VAR.

A training checkpoint holds, under `varlab`, the kind and sizes of its networks as plain values, so it loads anywhere
with weights_only=True, without Lightning or Hydra. A sharded run (FSDP2) leaves a folder: weights, averages and optimizer
in files of torch.distributed.checkpoint, the rest in `meta.pt`.
"""

import pickle
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from varlab.checkpoints.export_folder import fill, is_pretrained, load_pretrained, read_config, tokenizer_fingerprint
from varlab.checkpoints.released_layout import tokenizer_from_released
from varlab.models import scales
from varlab.models.custom_classes import build
from varlab.models.msvqvae import MSVQVAE
from varlab.models.var import VAR

FORMAT = 1
META_FILE = "meta.pt"  # of a sharded checkpoint, by Lightning's name


def networks_entry(tokenizer: MSVQVAE, var: VAR | None = None, class_names: list[str] | None = None) -> dict[str, Any]:
    """What a training checkpoint says about its networks."""
    return {
        "format": FORMAT,
        "tokenizer": tokenizer.sizes,
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        "var": None if var is None else var.sizes,
        "class_names": class_names,
    }


def swap_paths(path: Path) -> tuple[Path, Path]:
    """Where a folder is written before it takes the name `path`, and where its predecessor waits meanwhile."""
    return path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.old")


def replace_folder(partial: Path, path: Path, old: Path) -> None:
    """`partial` takes the name `path`. Between the two renames only `old` exists, which `latest_checkpoint` then gives."""
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    partial.rename(path)
    shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint that a run in `folder` continues from; None where there is none."""
    path = folder / "last.ckpt"
    _, old = swap_paths(path)
    if not path.exists() and old.exists():
        old.rename(path)
    return path if path.exists() else None


def optimizer_state_by_name(state: dict[str, Any], groups: list[list[str]]) -> dict[str, Any]:
    """An optimizer's state dict with parameters named, as sharded checkpoints hold it, in place of numbered."""
    names = [name for group in groups for name in group]
    return {
        "state": {names[i]: value for i, value in state["state"].items()},
        "param_groups": [
            {**group, "params": named} for group, named in zip(state["param_groups"], groups, strict=True)
        ],
    }


def optimizer_state_by_number(state: dict[str, Any]) -> dict[str, Any]:
    """The way back: parameters numbered in the order of the groups, as a plain optimizer wants them."""
    names = [name for group in state["param_groups"] for name in group["params"]]
    numbers = {name: i for i, name in enumerate(names)}
    return {
        "state": {numbers[name]: value for name, value in state["state"].items()},
        "param_groups": [
            {**group, "params": [numbers[name] for name in group["params"]]} for group in state["param_groups"]
        ],
    }


def consolidated(folder: Path) -> dict[str, Any]:
    """A sharded checkpoint as an unsharded one. Raises ValueError naming the folder when it is incomplete."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    for name in (".metadata", META_FILE):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is no checkpoint: {name} is missing")
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".consolidating.") as place:
        try:
            dcp_to_torch_save(folder, Path(place) / "whole.pt")
        except Exception as error:  # torch wraps what its threads raise in exceptions of its own
            raise ValueError(f"{folder} is damaged: {str(error).splitlines()[0]}") from None
        sharded = read_checkpoint(Path(place) / "whole.pt")  # mapped into memory, so it outlives the file's name
    optimizers = [key for key in sorted(sharded) if key.startswith("optimizer_")]
    return {
        **read_checkpoint(folder / META_FILE),
        "state_dict": sharded["state_dict"],
        **({"ema": sharded["ema"]} if sharded.get("ema") else {}),
        "optimizer_states": [optimizer_state_by_number(sharded[key]) for key in optimizers],
    }


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A file of tensors and plain values, never unpickling anything else, or a sharded checkpoint's folder.

    Raises ValueError naming file and reason.
    """
    path = Path(path)
    if path.is_dir():
        return consolidated(path)
    if not path.is_file():
        raise ValueError(f"checkpoint {path} does not exist")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{path} is not a checkpoint of tensors and plain values, or it is damaged: {reason}"
        ) from None


def entry_of(checkpoint: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """The `varlab` entry of a checkpoint."""
    entry = checkpoint.get("varlab")
    if entry is None or entry.get("format") != FORMAT:
        raise ValueError(f"{path} is not a varlab checkpoint of format {FORMAT}")
    return entry


def weights(checkpoint: dict[str, Any], prefix: str, use_ema: bool) -> dict[str, Tensor]:
    """Weights of one network; the averaged ones where the run kept them and they are wanted."""
    state = dict(checkpoint["state_dict"])
    if use_ema and "ema" in checkpoint:
        state.update(checkpoint["ema"])
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def load_tokenizer(path: str | Path, patch_nums: scales.PatchNums | None = None, use_ema: bool = True) -> MSVQVAE:
    """The tokenizer of a training checkpoint (of either module), of an export folder, or the released
    `vae_ch160v4096z32.pth`.

    `patch_nums` is for the released file, which does not hold them (default: 256 px).
    """
    if is_pretrained(path):
        return load_pretrained(path)[0]
    checkpoint = read_checkpoint(path)
    if "quantize.embedding.weight" in checkpoint:
        return tokenizer_from_released(checkpoint, patch_nums or (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)).eval()
    return tokenizer_of(checkpoint, path, use_ema)


def tokenizer_of(checkpoint: dict[str, Any], path: str | Path, use_ema: bool) -> MSVQVAE:
    """The tokenizer of a training checkpoint that was read."""
    entry = entry_of(checkpoint, path)
    tokenizer = build(MSVQVAE, entry["tokenizer"])
    fill(tokenizer, weights(checkpoint, "net." if entry["var"] is None else "tokenizer.", use_ema), path)
    return tokenizer.eval()


def load_any(
    path: str | Path, use_ema: bool = True, patch_nums: scales.PatchNums | None = None
) -> tuple[MSVQVAE, VAR | None, list[str] | None]:
    """Tokenizer, transformer and class names of whatever holds them; a tokenizer's checkpoint has the first alone."""
    if is_pretrained(path):
        return load_pretrained(path)
    checkpoint = read_checkpoint(path)
    if "quantize.embedding.weight" in checkpoint:
        return load_tokenizer(path, patch_nums), None, None
    entry, tokenizer, var = entry_of(checkpoint, path), tokenizer_of(checkpoint, path, use_ema), None
    if entry["var"] is not None:
        var = build(VAR, entry["var"])
        fill(var, weights(checkpoint, "net.", use_ema), path)
        var.eval()
    return tokenizer, var, entry["class_names"]


def contains_var(path: str | Path) -> bool:
    """Whether a checkpoint or export folder holds a transformer beside its tokenizer."""
    if is_pretrained(path):
        return read_config(path)["var"] is not None
    checkpoint = read_checkpoint(path)
    return "quantize.embedding.weight" not in checkpoint and entry_of(checkpoint, path)["var"] is not None


def load(path: str | Path, use_ema: bool = True) -> tuple[MSVQVAE, VAR, list[str]]:
    """Tokenizer, transformer and class names of a VAR's training checkpoint or export folder."""
    tokenizer, var, class_names = load_any(path, use_ema)
    if var is None:
        raise ValueError(f"{path} holds a tokenizer only; give the checkpoint of a VAR")
    return tokenizer, var, class_names or []


def check_sizes(
    what: str, found: dict[str, Any], expected: dict[str, Any], path: str | Path = "the checkpoint"
) -> None:
    """Raises ValueError naming the first size in which two networks differ; rates and loss weights may differ."""
    changeable = {"drop_path", "label_dropout", "dropout", "beta"}
    for key in expected:
        if key not in changeable and found.get(key) != expected[key]:
            raise ValueError(f"{path} holds a {what} with {key}={found.get(key)}, this run has {key}={expected[key]}")


def check_same_networks(checkpoint: dict[str, Any], tokenizer: MSVQVAE, var: VAR | None) -> None:
    """Raises ValueError when a checkpoint to be resumed holds other networks than the run."""
    entry = entry_of(checkpoint, "the checkpoint")
    if (entry["var"] is None) != (var is None):
        raise ValueError(
            f"the checkpoint holds a {'VAR' if entry['var'] else 'tokenizer'}, this run trains a {'VAR' if var else 'tokenizer'}"
        )
    check_sizes("tokenizer", entry["tokenizer"], tokenizer.sizes)
    if var is not None:
        check_sizes("VAR", entry["var"], var.sizes)
        if entry["tokenizer_fingerprint"] != tokenizer_fingerprint(tokenizer):
            raise ValueError("the checkpoint was trained on another tokenizer than this run's")
