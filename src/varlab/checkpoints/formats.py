"""Formats of checkpoints and export folders: converts files of version 0.1 to the current format."""

from pathlib import Path
from typing import Any

from varlab.files import Schema, checked

CHECKPOINT_FORMAT = 2  # of the `varlab` entry of training checkpoints
EXPORT_FORMAT = 2  # of config.json in export folders
QUANTIZER_ARGUMENTS = ("patch_nums", "codebook_size", "codebook_dim", "num_phis", "phi_ratio", "lookup", "beta")
CONVERTED_CLASSES = {"ImageNetDataModule": "ImageDataModule"}
CONVERTED_CALLBACKS = {"ReviveCodes": "ResetDeadCodes"}


class NetworksEntry(Schema):
    """The networks that a checkpoint or an export folder holds, as plain values."""

    format: int
    tokenizer: dict[str, Any]
    tokenizer_fingerprint: str
    var: dict[str, Any] | None
    class_names: list[str] | None
    base: str | None = None  # of an adapter


def checked_entry(entry: Any, newest: int, path: str | Path) -> dict[str, Any]:
    """An entry of the current format. Raises ValueError naming the file for one that this version cannot read."""
    version = entry.get("format") if isinstance(entry, dict) else None
    if version not in (1, newest):
        raise ValueError(
            f"{path} has format {version!r}, this version reads 1 to {newest}: make it again with this version"
        )
    checked(entry, NetworksEntry, path)
    try:
        return entry if version == newest else upgrade_networks(entry)
    except KeyError as error:
        raise ValueError(f"{path} has format 1, but lacks {error}") from None


def upgrade_checkpoint(checkpoint: dict[str, Any], path: str | Path = "the checkpoint") -> dict[str, Any]:
    """Converts a training checkpoint of format 1 to the current format; returns any other unchanged. Raises ValueError
    naming the file if its entry `varlab` is not as its format says."""
    if "varlab" not in checkpoint:
        return checkpoint
    entry = checked_entry(checkpoint["varlab"], CHECKPOINT_FORMAT, path)
    if checkpoint["varlab"]["format"] == CHECKPOINT_FORMAT:
        return checkpoint
    upgraded = {CONVERTED_CLASSES.get(key, key): value for key, value in checkpoint.items()}
    upgraded["varlab"] = {**entry, "format": CHECKPOINT_FORMAT}
    upgraded["state_dict"] = renamed(checkpoint["state_dict"])
    if "ema" in checkpoint:
        upgraded["ema"] = renamed(checkpoint["ema"])
    upgraded["optimizer_states"] = [upgrade_optimizer(state) for state in checkpoint.get("optimizer_states", [])]
    callbacks = checkpoint.get("callbacks", {})
    upgraded["callbacks"] = {CONVERTED_CALLBACKS.get(key, key): state for key, state in callbacks.items()}
    if "adversary" in upgraded:
        upgraded["discriminator"] = upgraded.pop("adversary")
    return upgraded


def upgrade_networks(entry: dict[str, Any]) -> dict[str, Any]:
    """The descriptions of both networks in the current format, from a checkpoint's entry or a config.json of format 1."""
    tokenizer = dict(entry["tokenizer"])
    name = tokenizer.pop("class", "varlab.models.msvqvae.MSVQVAE")
    quantizer = {key: tokenizer.pop(key) for key in QUANTIZER_ARGUMENTS}
    quantizer = {"class": "varlab.models.quantizer.MultiScaleQuantizer", **quantizer}
    var = None if entry["var"] is None else {"class": "varlab.models.var.VAR", **entry["var"]}
    return {**entry, "tokenizer": {"class": name, **tokenizer, "quantizer": quantizer}, "var": var}


def upgrade_optimizer(state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state with `lr_share` renamed to `lr_multiplier` in its groups."""
    groups = [
        {("lr_multiplier" if key == "lr_share" else key): value for key, value in group.items()}
        for group in state["param_groups"]
    ]
    return {**state, "param_groups": groups}


def renamed(weights: dict[str, Any]) -> dict[str, Any]:
    """Weights under their current names."""
    return {key.replace("class_embedding.", "embedder.embedding."): value for key, value in weights.items()}
