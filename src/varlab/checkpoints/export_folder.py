"""The export folder: tokenizer and transformer for use anywhere, without Lightning, Hydra or unpickling.

config.json              classes and arguments of both networks, class names, fingerprints
tokenizer.safetensors    weights
var.safetensors          weights; absent if only a tokenizer was exported
README.md                model card: description, training facts, usage, metadata for the Hugging Face Hub
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from varlab import __version__
from varlab.checkpoints.formats import EXPORT_FORMAT, checked_entry, renamed
from varlab.files import atomic_folder, flat, load_json, save_json
from varlab.models.conditioning import TextEmbedder
from varlab.models.custom_classes import RecordedModule, Trust, as_plain, build, class_of, class_path, describe
from varlab.models.digits import MOST_CODES
from varlab.models.msvqvae import MSVQVAE
from varlab.models.quantizer import MultiScaleQuantizer
from varlab.models.var import VAR

Network = TypeVar("Network", bound=nn.Module)
LARGEST = 2**22  # of any number among a network's arguments but that of codes, which need not have rows or logits
# arguments that version 0.1 did not have; left out of fingerprints where they have these values
ADDED = {"bases": None, "codes_by_scale": None, "position": "learned"}
PLAIN_CLASSES = (MSVQVAE, MultiScaleQuantizer, VAR)
CARD = """---
library_name: varlab
{license}tags: [image-generation, next-scale-prediction, VAR, "arxiv:2404.02905"]
---

# {title}

Visual autoregression by next-scale prediction (VAR, arXiv 2404.02905) at {size} px, made with varlab {varlab}, torch {torch}.

{bullets}
{usage}
Permitted use depends on the data it was trained on.
"""
USAGE = """
```python
from varlab import VARPipeline

images = VARPipeline.from_pretrained("{name}")({condition}, cfg_scale=1.5, seed=0)
```
"""
EXAMPLES = {
    "label": "labels=[0, 1]",
    "text": 'text=["a red heart", "a cat"]',
    "vector": "condition=vectors",
    "image": "condition=images",
}


def tokenizer_fingerprint(tokenizer: MSVQVAE) -> str:
    """Identity of what a tokenizer computes: its arguments and weights, without loss weights, dropout and usage counts;
    16 hex digits."""
    return fingerprint(tokenizer)


def fingerprint(network: MSVQVAE | VAR) -> str:
    """Hash of a network's arguments, except changeable ones, and of its weights; 16 hex digits."""
    digest = hashlib.sha256(repr(sorted(identity(network).items())).encode())
    for name, value in sorted(network.named_parameters()):
        digest.update(name.encode())
        digest.update(value.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def identity(network: RecordedModule) -> dict[str, Any]:
    """The arguments that determine what a network computes, flattened. Built-in classes are not named, so that
    fingerprints match those of version 0.1."""
    found: dict[str, Any] = {} if class_of(network) in PLAIN_CLASSES else {"class": class_path(class_of(network))}
    for name, value in {**network.arguments, **network.resolved()}.items():
        if name in network.changeable or (name in ADDED and value == ADDED[name]):
            continue
        if isinstance(value, RecordedModule):
            inner = identity(value)
            found |= {f"{name}.{key}": entry for key, entry in inner.items()} if "class" in inner else inner
        else:
            found[name] = as_plain(value, name)
    return found


def check_weights(network: nn.Module, state: dict[str, Tensor], path: str | Path) -> None:
    """Raises ValueError naming the first tensor that does not fit."""
    expected = network.state_dict()
    for key in sorted(expected.keys() | state.keys()):
        if key not in state or key not in expected:
            raise ValueError(
                f"{path}: tensor {key!r} is {'missing' if key in expected else 'unknown'}: was it made by another version?"
            )
        if state[key].shape != expected[key].shape:
            raise ValueError(
                f"{path}: tensor {key!r} has shape {tuple(state[key].shape)}, expected {tuple(expected[key].shape)}"
            )


def load_weights(network: nn.Module, state: dict[str, Tensor], path: str | Path) -> None:
    """Loads weights strictly. Raises ValueError naming the first tensor that does not fit."""
    check_weights(network, state, path)
    network.load_state_dict(state)


def build_with(
    base: type[Network], description: dict[str, Any], state: dict[str, Tensor], trust: Trust, path: str | Path
) -> Network:
    """The network of a description with these weights. Unless it is trusted, it is built without memory first, so that a
    description of another size than the weights is refused before anything is allocated."""
    if not trust.trust_code:
        for key, value in flat(description).items():
            largest = MOST_CODES if key.split(".")[-1] == "codebook_size" else LARGEST
            if isinstance(value, int | float) and abs(value) > largest:
                raise ValueError(f"{path}: {key}={value} is out of range")
        with torch.device("meta"), at_most(2 * len(state) + 100, path):
            check_weights(build(base, description, trust), state, path)
    network = build(base, description, trust)
    load_weights(network, state, path)
    return network


@contextmanager
def at_most(num_parameters: int, path: str | Path) -> Iterator[None]:
    """Within the block, building networks of more parameters than that raises ValueError."""
    count = 0

    def check(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal count
        count += 1
        if count > num_parameters:
            raise ValueError(f"{path} holds far fewer tensors than the networks that it describes")

    hook = register_module_parameter_registration_hook(check)
    try:
        yield
    finally:
        hook.remove()


def is_pretrained(path: str | Path) -> bool:
    """Whether this is an export folder."""
    return (Path(path) / "config.json").is_file()


def save_pretrained(
    folder: Path,
    tokenizer: MSVQVAE,
    var: VAR | None,
    class_names: list[str] | None,
    facts: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    name: str | None = None,
) -> None:
    """Writes an export folder atomically. `facts`: lines of the model card about the training. `dtype`: of the weights in
    the files; in bf16 they take half the space. The networks are rounded too, so that fingerprints describe the files.
    `name`: by which the card loads the model; None is the folder's."""
    for network in (tokenizer, var):
        if network is not None and dtype != torch.float32:
            network.to(dtype).float()  # what will be loaded
    config = {
        "format": EXPORT_FORMAT,
        "varlab": __version__,
        "tokenizer": describe(tokenizer),
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        "var": None if var is None else describe(var),
        "class_names": class_names,
    }
    with atomic_folder(folder) as partial:
        for kind, network in [("tokenizer", tokenizer), ("var", var)]:
            if network is not None:
                state = {key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}
                state = {
                    key: value.to(dtype) if value.dtype == torch.float32 else value for key, value in state.items()
                }
                save_file(state, partial / f"{kind}.safetensors", metadata={"format": "pt"})
        save_json(partial / "config.json", config)
        card = model_card(name or folder.name, tokenizer, var, class_names, facts)
        (partial / "README.md").write_text(card, encoding="utf-8")


def load_pretrained(folder: str | Path, trust_code: bool = False) -> tuple[MSVQVAE, VAR | None, list[str] | None]:
    """(tokenizer, transformer if there is one, class names). `trust_code`: see `load`. Raises ValueError naming file and
    reason."""
    folder, config = Path(folder), read_config(folder)
    trust = Trust(str(folder), trust_code)
    file = folder / "tokenizer.safetensors"
    tokenizer = build_with(MSVQVAE, config["tokenizer"], read_safetensors(file), trust, file)
    if config["var"] is None:
        return tokenizer.eval(), None, config["class_names"]
    file = folder / "var.safetensors"
    var = build_with(VAR, config["var"], renamed(read_safetensors(file)), trust, file)
    return tokenizer.eval(), var.eval(), config["class_names"]


def read_config(folder: str | Path) -> dict[str, Any]:
    """An export folder's config.json, in the current format. Raises ValueError for a format that this version cannot
    read."""
    file = Path(folder) / "config.json"
    return checked_entry(load_json(file, "varlab export"), EXPORT_FORMAT, file)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file. Raises ValueError naming the file if it is missing or damaged."""
    if not path.is_file():
        raise ValueError(f"{path} is missing: the folder is incomplete")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a safetensors file, or it is damaged: {error}") from None


def described_condition(var: VAR | None, class_names: list[str] | None) -> list[str]:
    """What images are conditioned on, for a model card."""
    if var is not None and isinstance(var.embedder, TextEmbedder):
        return [f"conditioned on text, by the encoder {var.embedder.encoder} ({var.embedder.fingerprint})"]
    if var is not None and var.embedder.kind == "vector":
        return [f"conditioned on vectors of shape {var.embedder.condition_shape}"]
    if var is not None and var.embedder.kind == "image":
        return ["conditioned on images of {} x {} pixels in [-1, 1]".format(*var.embedder.condition_shape[1:])]
    return [f"{len(class_names)} classes"] if class_names else []


def model_card(
    name: str, tokenizer: MSVQVAE, var: VAR | None, class_names: list[str] | None, facts: dict[str, Any]
) -> str:
    """The text of README.md."""
    networks = {"tokenizer": tokenizer, "transformer": var}
    params = {kind: sum(p.numel() for p in network.parameters()) for kind, network in networks.items() if network}
    quantizer, maps = tokenizer.quantizer, ", ".join(str(pn) for pn in tokenizer.patch_nums)
    bullets = [
        *(f"{kind}: {count / 1e6:,.1f} M parameters" for kind, count in params.items()),
        f"token maps of {maps}; {quantizer.codebook_size} codes of {quantizer.codebook_dim} dims",
        *described_condition(var, class_names),
        *(f"{key}: {value}" for key, value in facts.items()),
    ]
    listed = "\n".join(f"- {bullet}" for bullet in bullets)
    usage = "" if var is None else USAGE.format(name=name, condition=EXAMPLES[var.embedder.kind])
    return CARD.format(
        title=name.split("/")[-1],
        license=f"license: {license.lower()}\n" if (license := facts.get("license of the weights")) else "",
        size="{} x {}".format(*tokenizer.image_size),
        varlab=__version__,
        torch=torch.__version__,
        bullets=listed,
        usage=usage,
    )
