"""Loading networks: training checkpoints, export folders, pretrained models and the released files -> tokenizer, VAR.

A training checkpoint holds, under `varlab`, the classes and arguments of its networks as plain values, so it loads
anywhere with weights_only=True, without Lightning or Hydra.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from varlab.checkpoints import hub
from varlab.checkpoints.adapters import merged, with_adapter
from varlab.checkpoints.checkpoint_files import consolidated, read_file
from varlab.checkpoints.export_folder import (
    build_with,
    is_pretrained,
    load_pretrained,
    read_config,
    tokenizer_fingerprint,
)
from varlab.checkpoints.formats import CHECKPOINT_FORMAT, upgrade_checkpoint
from varlab.checkpoints.released_layout import is_released_tokenizer, load_released
from varlab.models import scales
from varlab.models.custom_classes import Trust, build, describe, named_classes
from varlab.models.msvqvae import MSVQVAE
from varlab.models.quantizer import ResidualQuantizer
from varlab.models.var import VAR

PRETRAINED = Path(__file__).parents[1] / "pretrained"  # export folders that are installed with varlab


def pretrained_models() -> list[str]:
    """Names of the models that are installed with varlab, for `from_pretrained` and `checkpoint=`."""
    return sorted(folder.name for folder in PRETRAINED.glob("*") if is_pretrained(folder))


def located(path: str | Path) -> Path:
    """A file or folder that exists, otherwise the pretrained model of that name, otherwise a model on the Hugging Face Hub
    (`user/name`). Raises ValueError naming what there is."""
    if Path(path).exists():
        return Path(path)
    names = pretrained_models()
    if str(path) in names:
        return PRETRAINED / path
    if hub.is_hub_name(path):
        return hub.download(str(path))
    raise ValueError(f"checkpoint {path} does not exist; pretrained models are {', '.join(names)}")


def networks_entry(tokenizer: MSVQVAE, var: VAR | None = None, class_names: list[str] | None = None) -> dict[str, Any]:
    """The `varlab` entry of a training checkpoint. Raises ValueError for a network that cannot be rebuilt from it."""
    return {
        "format": CHECKPOINT_FORMAT,
        "tokenizer": describe(tokenizer),
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        "var": None if var is None else describe(var),
        "class_names": class_names,
    }


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint file or a sharded checkpoint's folder, in the current format; nothing but tensors and plain values
    is unpickled.

    Raises ValueError naming file and reason.
    """
    path = Path(path)
    checkpoint = consolidated(path) if path.is_dir() else read_file(path)
    for name in ("state_dict", "ema"):
        state = checkpoint.get(name, {})
        if "varlab" in checkpoint and not (
            isinstance(state, dict) and all(isinstance(key, str) and isinstance(state[key], Tensor) for key in state)
        ):
            raise ValueError(f"{path} is not a varlab checkpoint: its {name} is not a dictionary of tensors")
    return upgrade_checkpoint(checkpoint, path)


def entry_of(checkpoint: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """The `varlab` entry of a checkpoint. Raises ValueError if it is missing."""
    if "varlab" not in checkpoint:
        raise ValueError(f"{path} is not a varlab checkpoint: it has no varlab entry")
    return checkpoint["varlab"]


def weights(checkpoint: dict[str, Any], prefix: str, use_ema: bool) -> dict[str, Tensor]:
    """Weights of one network, without `prefix`; averaged if `use_ema` and the checkpoint has averages. Adapters are apart."""
    state = dict(checkpoint.get("state_dict", {}))
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
    """(tokenizer, transformer, class names) of anything that `located` finds; None for what it does
    not contain."""
    path = located(path)
    if is_pretrained(path):
        config = read_config(path)
        if (base := config.get("base")) is None:
            return load_pretrained(path, trust_code)
        beside = path / base
        if config["var"] is None or beside.resolve() == path.resolve():
            raise ValueError(f"{path}/config.json describes no adapter: its base={base}, var={config['var']}")
        tokenizer, var, _ = load(beside if beside.exists() else base, trust_code=trust_code)
        return with_adapter(path, config, tokenizer, var, trust_code)
    checkpoint = read_checkpoint(path)
    if is_released_tokenizer(checkpoint):
        tokenizer = load_released(checkpoint, patch_nums=patch_nums or scales.RELEASED_256)
        assert isinstance(tokenizer, MSVQVAE)
        return tokenizer.eval(), None, None
    entry = entry_of(checkpoint, path)
    trust = Trust(str(path), trust_code)
    state = weights(checkpoint, "net." if entry["var"] is None else "tokenizer.", use_ema)
    tokenizer = build_with(MSVQVAE, entry["tokenizer"], merged(state), trust, path)
    if entry["var"] is None or tokenizer_only:
        return tokenizer.eval(), None, entry["class_names"]
    var = build_with(VAR, entry["var"], merged(weights(checkpoint, "net.", use_ema)), trust, path)
    return tokenizer.eval(), var.eval(), entry["class_names"]


def contains_var(path: str | Path) -> bool:
    """Whether a checkpoint, export folder or pretrained model contains a transformer in addition to its tokenizer."""
    path = located(path)
    if is_pretrained(path):
        return read_config(path)["var"] is not None
    checkpoint = read_checkpoint(path)
    return not is_released_tokenizer(checkpoint) and entry_of(checkpoint, path)["var"] is not None


def load(path: str | Path, use_ema: bool = True, trust_code: bool = False) -> tuple[MSVQVAE, VAR, list[str]]:
    """(tokenizer, transformer, class names) of a VAR's training checkpoint, export folder, pretrained model (by name)
    or model on the Hugging Face Hub (`user/name`), on the CPU, in evaluation mode.

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
            compare_arguments(what, theirs, mine, changeable | ResidualQuantizer.changeable, path)
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
