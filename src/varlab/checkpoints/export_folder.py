"""The export folder: tokenizer and transformer for use anywhere, without Lightning, Hydra or unpickling.

config.json              sizes of both networks, class names, fingerprints
tokenizer.safetensors    weights
var.safetensors          weights; absent when a tokenizer was exported alone
model_card.md            what it is, what it was made from, how to use it
"""

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from varlab import __version__
from varlab.files import atomic_folder, load_json, save_json
from varlab.models.custom_classes import build
from varlab.models.msvqvae import MSVQVAE
from varlab.models.var import VAR

FORMAT = 1
CARD = """# {name}

Visual autoregression by next-scale prediction (VAR, arXiv 2404.02905) at {side} px, made with varlab {varlab}, torch {torch}.

{bullets}
{usage}
What may be done with it follows from the data it was trained on.
"""
USAGE = """
```python
from varlab.pipeline import VARPipeline

images = VARPipeline.from_pretrained("{name}")(labels=[0, 1], cfg_scale=4.0, seed=0)
```
"""


def tokenizer_fingerprint(tokenizer: MSVQVAE) -> str:
    """Identity of what a tokenizer computes: its sizes and weights; usage counts do not matter. 16 hex digits."""
    return fingerprint(tokenizer, without=("beta", "dropout"))


def fingerprint(network: MSVQVAE | VAR, without: tuple[str, ...] = ("drop_path", "label_dropout")) -> str:
    """Identity of a network's sizes, but for those `without`, and weights; 16 hex digits."""
    digest = hashlib.sha256(
        repr(sorted((key, value) for key, value in network.sizes.items() if key not in without)).encode()
    )
    for name, value in sorted(network.named_parameters()):
        digest.update(name.encode())
        digest.update(value.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def fill(network: nn.Module, state: dict[str, Tensor], path: str | Path) -> None:
    """Loads weights strictly. Raises ValueError naming the first tensor that does not fit."""
    expected = network.state_dict()
    for key in sorted(expected.keys() | state.keys()):
        if key not in state or key not in expected:
            raise ValueError(
                f"{path}: tensor {key!r} is {'missing' if key in expected else 'unknown'}: made by another version?"
            )
        if state[key].shape != expected[key].shape:
            raise ValueError(
                f"{path}: tensor {key!r} has shape {tuple(state[key].shape)}, expected {tuple(expected[key].shape)}"
            )
    network.load_state_dict(state)


def is_pretrained(path: str | Path) -> bool:
    """Whether this is an export folder."""
    return (Path(path) / "config.json").is_file()


def save_pretrained(
    folder: Path, tokenizer: MSVQVAE, var: VAR | None, class_names: list[str] | None, facts: dict[str, Any]
) -> None:
    """Writes an export folder, whole or not at all. `facts`: what the model card says of its training."""
    config = {
        "format": FORMAT,
        "varlab": __version__,
        "tokenizer": tokenizer.sizes,
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        "var": None if var is None else var.sizes,
        "class_names": class_names,
    }
    with atomic_folder(folder) as partial:
        for name, network in [("tokenizer", tokenizer), ("var", var)]:
            if network is not None:
                state = {key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}
                save_file(state, partial / f"{name}.safetensors", metadata={"format": "pt"})
        save_json(partial / "config.json", config)
        (partial / "model_card.md").write_text(model_card(folder.name, tokenizer, var, class_names, facts))


def load_pretrained(folder: str | Path) -> tuple[MSVQVAE, VAR | None, list[str] | None]:
    """(tokenizer, transformer if there is one, class names). Raises ValueError naming file and reason."""
    folder, config = Path(folder), read_config(folder)
    tokenizer = build(MSVQVAE, config["tokenizer"])
    fill(tokenizer, read_safetensors(folder / "tokenizer.safetensors"), folder / "tokenizer.safetensors")
    var = None
    if config["var"] is not None:
        var = build(VAR, config["var"])
        fill(var, read_safetensors(folder / "var.safetensors"), folder / "var.safetensors")
        var.eval()
    return tokenizer.eval(), var, config["class_names"]


def read_config(folder: str | Path) -> dict[str, Any]:
    """An export folder's config.json. Raises ValueError when it is of another format."""
    file = Path(folder) / "config.json"
    config = load_json(file, "varlab export")
    if config.get("format") != FORMAT:
        raise ValueError(f"{file} has format {config.get('format')!r}, this version reads {FORMAT}: export it again")
    return config


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file. Raises ValueError naming the file when it is missing or none."""
    if not path.is_file():
        raise ValueError(f"{path} is missing: the folder is not whole")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no safetensors file, or it is damaged: {error}") from None


def model_card(
    name: str, tokenizer: MSVQVAE, var: VAR | None, class_names: list[str] | None, facts: dict[str, Any]
) -> str:
    """What is in the folder, in words."""
    networks = {"tokenizer": tokenizer, "transformer": var}
    params = {kind: sum(p.numel() for p in network.parameters()) for kind, network in networks.items() if network}
    sizes, maps = tokenizer.sizes, ", ".join(str(pn) for pn in tokenizer.patch_nums)
    bullets = [
        *(f"{kind}: {count / 1e6:,.1f} M parameters" for kind, count in params.items()),
        f"token maps of {maps}; {sizes['codebook_size']} codes of {sizes['codebook_dim']} dims",
        *([f"{len(class_names)} classes"] if class_names else []),
        *(f"{key}: {value}" for key, value in facts.items()),
    ]
    listed = "\n".join(f"- {bullet}" for bullet in bullets)
    usage = "" if var is None else USAGE.format(name=name)
    return CARD.format(
        name=name,
        side=tokenizer.image_size[0],
        varlab=__version__,
        torch=torch.__version__,
        bullets=listed,
        usage=usage,
    )
