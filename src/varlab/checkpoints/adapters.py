"""Low-rank adapters (see `varlab.training.tuning.LoRA`) in files: merged into the matrices they adapt, or apart from the model
that they were trained on.

A folder of an adapter holds config.json, which names its base, and adapter.safetensors: the thin matrices, and whole
tensors that differ from the base's, such as embeddings of new classes.
"""

import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from varlab import __version__
from varlab.checkpoints.export_folder import build_with, fingerprint, read_safetensors, tokenizer_fingerprint
from varlab.checkpoints.formats import EXPORT_FORMAT
from varlab.files import atomic_folder, reason_of, save_json
from varlab.models.custom_classes import Trust, describe
from varlab.models.msvqvae import MSVQVAE
from varlab.models.var import VAR

ADAPTED = ".parametrizations.weight."
THIN = ("0.up", "0.down", "0.scale")


def merged(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights in which low-rank adapters are added to the matrices they adapt. Other parametrizations stay as they are."""
    found = dict(state)
    for key in state:
        name, _, rest = key.partition(ADAPTED)
        parts = [f"{name}{ADAPTED}{part}" for part in ("original", *THIN)]
        if rest == "original" and all(part in state for part in parts):
            weight, up, down, scale = (found.pop(part) for part in parts)
            found[f"{name}.weight"] = weight + scale * (up @ down)
    return found


def apart(state: dict[str, Tensor], base: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a network with adapters has beyond its base. Raises ValueError if there are no adapters, or if they were trained on
    another network."""
    found = {}
    for key, value in state.items():
        name, _, rest = key.partition(ADAPTED)
        mine = base.get(f"{name}.weight" if rest == "original" else key)
        if mine is not None and mine.shape == value.shape and torch.equal(mine, value):
            continue
        if rest == "original":
            raise ValueError(f"base: its {name}.weight is not what the adapter was trained on")
        found[key] = value.detach().cpu().contiguous()
    if not any(key.endswith(f"{ADAPTED}0.up") for key in found):
        raise ValueError("to=adapter: the checkpoint has no low-rank adapters (varlab tune method=lora)")
    return found


def save_adapter(
    folder: Path,
    base: str,
    base_networks: tuple[MSVQVAE, VAR],
    state: dict[str, Tensor],
    networks: tuple[MSVQVAE, VAR],
    class_names: list[str],
) -> None:
    """Writes the folder of an adapter atomically. `state`: weights with the adapters apart; `networks`: the merged ones. `base`: a
    folder, checkpoint or name, as every command takes it; a path is recorded relative to the adapter's folder. Raises
    ValueError if `base` is not what was tuned."""
    (tokenizer, base_var), var = base_networks, networks[1]
    tokenizer = tokenizer.at(var.patch_nums)
    if tokenizer_fingerprint(networks[0]) != tokenizer_fingerprint(tokenizer):
        raise ValueError(f"base={base} has another tokenizer than the tuned model: an adapter does not hold one")
    config = {
        "format": EXPORT_FORMAT,
        "varlab": __version__,
        "base": os.path.relpath(base, folder) if Path(base).exists() else base,
        "base_fingerprint": fingerprint(base_var),
        "tokenizer": describe(tokenizer),
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        "var": describe(var),
        "class_names": class_names,
    }
    parts = apart(state, base_var.state_dict())
    with atomic_folder(folder) as partial:
        save_file(parts, partial / "adapter.safetensors", metadata={"format": "pt"})
        save_json(partial / "config.json", config)


def with_adapter(
    folder: Path, config: dict[str, Any], tokenizer: MSVQVAE, base: VAR, trust_code: bool
) -> tuple[MSVQVAE, VAR, list[str] | None]:
    """The networks of an adapter's folder, given those of its base. Raises ValueError if these are not the ones it was trained
    on."""

    def check(network: MSVQVAE | VAR, key: str) -> None:
        if fingerprint(network) != config.get(key):
            raise ValueError(f"{folder} adapts another model than {config['base']} is now: its {key} differs")

    check(base, "base_fingerprint")
    file = folder / "adapter.safetensors"
    parts, state = read_safetensors(file), base.state_dict()
    for key in parts:
        name, _, rest = key.partition(ADAPTED)
        if rest and f"{name}.weight" in state:
            state[f"{name}{ADAPTED}original"] = state.pop(f"{name}.weight")
    try:
        whole = merged({**state, **parts})
    except RuntimeError as error:
        raise ValueError(f"{file} does not fit its base: {reason_of(error)}") from None
    var = build_with(VAR, config["var"], whole, Trust(str(folder), trust_code), file)
    tokenizer = tokenizer.at(var.patch_nums)
    check(tokenizer, "tokenizer_fingerprint")
    return tokenizer.eval(), var.eval(), config["class_names"]
