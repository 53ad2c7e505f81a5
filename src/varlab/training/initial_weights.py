"""Starting a VAR from the weights of a trained one: on other classes, on another pyramid, with some parts frozen.

Fine-tuning begins at step 0 with the schedule of the run; nothing but weights is taken over.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from varlab.checkpoints.checkpoint_files import read_file
from varlab.checkpoints.export_folder import load_weights
from varlab.checkpoints.load import compare_arguments, load
from varlab.checkpoints.released_layout import var_from_released
from varlab.models import scales
from varlab.models.conditioning import ClassEmbedder
from varlab.models.custom_classes import Trust, build, describe, named_classes
from varlab.models.msvqvae import MSVQVAE
from varlab.models.var import VAR

CLASS_ROWS = "embedder.embedding.weight"


@dataclass(frozen=True)
class Source:
    """A trained VAR, its class names, and what determines its tokens (see `encoding_of`); None if the file does not hold it."""

    path: str
    var: VAR
    class_names: list[str]
    encoding: dict[str, Tensor] | None

    @classmethod
    def read(cls, path: str, patch_nums: scales.PatchNums, trust_code: bool = False) -> "Source":
        """A training checkpoint (averages, if it has them), an export folder, a pretrained model by name, or a released
        transformer `var_d16.pth`, which is read with the pyramid of the run. Raises ValueError naming file and reason."""
        if Path(path).is_file() and "class_emb.weight" in (state := read_file(Path(path))):
            return cls(path, var_from_released(state, patch_nums), [], None)
        tokenizer, var, class_names = load(path, trust_code=trust_code)
        return cls(path, var, class_names, encoding_of(tokenizer))


def start_from(
    source: Source,
    net: VAR,
    class_names: Sequence[str],
    encoding: dict[str, Tensor],
    reinitialized: Sequence[str] = (),
) -> list[str]:
    """Copies the weights of a trained VAR into `net`; returns what was not a plain copy, one sentence each.

    Class embeddings are matched by name; a class that the source does not know starts from the mean of the source's
    classes. Positions and scale embeddings of another pyramid are resized (bilinear) from the source's scale of the
    nearest size. `encoding`: of the run's tokenizer. `reinitialized`: patterns of parameters that keep their
    new initial values.

    Raises ValueError for a source of another size or with other codes, or a pattern that matches nothing.
    """
    own, state = net.state_dict(), dict(source.var.state_dict())
    kept = matching(own, reinitialized, "module.reinitialized")
    differing = {"num_classes", "patch_nums"} | (
        {"codebook_size", "codebook_dim", "bases", "codes_by_scale"} if "head.weight" in kept else set()
    )
    if all(name in kept for name in own if name.startswith("embedder.")):  # another kind of condition
        differing |= {"embedder"}
        state = {name: value for name, value in state.items() if not name.startswith("embedder.")}
    elif type(source.var.embedder) is not type(net.embedder):
        was, now = (type(var.embedder).__name__ for var in (source.var, net))
        raise ValueError(
            f"{source.path} has a {was}, but this run a {now}: start this part anew with module.reinitialized=[embedder.*]"
        )
    if all(name in kept for name in own if name.split(".")[0] == "position"):  # another kind of position
        differing |= {"position"}
        state = {name: value for name, value in state.items() if name.split(".")[0] != "position"}
    compare_arguments("VAR", describe(source.var), describe(net), net.changeable | differing, source.path)
    if source.encoding is not None and "head.weight" not in kept and not same_encoding(source.encoding, encoding):
        raise ValueError(
            f"{source.path} was trained with another tokenizer, so its tokens mean something else: tokenize the data with"
            f" tokenizer={source.path}, or start these parts anew: module.reinitialized=[head.*,word_embed.*]"
        )
    notes = []
    if isinstance(net.embedder, ClassEmbedder) and CLASS_ROWS not in kept:
        state[CLASS_ROWS], known = class_rows(state[CLASS_ROWS], source.class_names, list(class_names), net.num_classes)
        if known < net.num_classes:
            notes.append(
                f"{known} of {net.num_classes} classes are known by name, the others start from the mean of all classes"
            )
    if net.patch_nums != source.var.patch_nums:
        state |= resized(state, source.var.patch_nums, net.patch_nums, tuple(own["start_position"].shape))
        notes.append(f"positions of {source.var.patch_nums} are resized to {net.patch_nums}")
    if source.encoding is None:
        notes.append("it does not name its tokenizer: whether it is this one was not checked")
    if kept:
        notes.append(f"{len(kept)} parameters start anew: {', '.join(sorted(kept))}")
    load_weights(net, {**state, **{name: own[name] for name in kept}}, source.path)
    return notes


def like(checkpoint: str, trust_code: bool = False, **given: Any) -> VAR:
    """A newly initialized network of the class and sizes of a trained one, but for the arguments given."""
    _, var, _ = load(checkpoint, trust_code=trust_code)
    description = describe(var)
    changed = {name: value for name, value in given.items() if value is not None}
    return build(VAR, {**description, **changed}, Trust(classes=named_classes(description)))


def encoding_of(tokenizer: MSVQVAE) -> dict[str, Tensor]:
    """All parameters that decide which tokens an image has: those of the encoder and the quantizer."""
    parts = ("encoder.", "pre_conv.", "quantizer.")
    return {name: value.detach() for name, value in tokenizer.named_parameters() if name.startswith(parts)}


def same_encoding(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two tokenizers give the same tokens, up to the rounding of an export in bf16."""
    return a.keys() == b.keys() and all(
        a[name].shape == b[name].shape and bool((a[name] - b[name].to(a[name])).norm() <= 0.01 * a[name].norm())
        for name in a
    )


def class_rows(
    table: Float[Tensor, "_ D"], known: list[str], wanted: list[str], num_classes: int
) -> tuple[Float[Tensor, "_ D"], int]:
    """(class embeddings of the new classes, the null class last; how many of them are known by name). Without names on
    either side, equal numbers of classes are taken to be the same classes."""
    if wanted == known or (not (wanted and known) and num_classes == len(table) - 1):
        return table, num_classes
    rows = table[:-1].mean(dim=0).repeat(num_classes + 1, 1)
    rows[-1] = table[-1]
    found = [(new, known.index(name)) for new, name in enumerate(wanted) if name in known]
    for new, old in found:
        rows[new] = table[old]
    return rows, len(found)


def resized(
    state: dict[str, Tensor], old: scales.PatchNums, new: scales.PatchNums, start_shape: tuple[int, ...]
) -> dict[str, Tensor]:
    """Positions (those of coordinates stay), start position and scale embeddings for another pyramid, each scale from the old one
    of the nearest area."""
    old_sides, bounds = scales.sides(old), scales.scale_bounds(old)
    position, rows, maps = state.get("position"), [], []
    for h, w in scales.sides(new):
        nearest = min(
            range(len(old_sides)), key=lambda k: abs((old_sides[k][0] * old_sides[k][1]) ** 0.5 - (h * w) ** 0.5)
        )
        first, last = bounds[nearest]
        if position is not None:
            maps.append(resize_map(position[:, first:last], old_sides[nearest], (h, w)))
        rows.append(nearest)
    start = state["start_position"]
    if start.shape != start_shape:
        start = resize_map(start, old_sides[0], scales.sides(new)[0])
    return {
        **({"position": torch.cat(maps, dim=1)} if maps else {}),
        "start_position": start,
        "scale_embedding.weight": state["scale_embedding.weight"][rows],
    }


def resize_map(x: Float[Tensor, "1 l D"], old: tuple[int, int], new: tuple[int, int]) -> Float[Tensor, "1 m D"]:
    """A map of vectors at another size."""
    grid = x.transpose(1, 2).unflatten(2, old)
    return F.interpolate(grid, size=new, mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)


def matching(names: Sequence[str] | dict[str, Tensor], patterns: Sequence[str], setting: str) -> set[str]:
    """The names that match one of the patterns (as of a shell: * and ?). Raises ValueError for a pattern that matches
    none."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            parts = sorted({name.split(".")[0] for name in names})
            raise ValueError(f"{setting}: no parameter matches {pattern!r}; the network's parts are {', '.join(parts)}")
    return {name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)}


def freeze(net: nn.Module, patterns: Sequence[str]) -> None:
    """Excludes parameters that match a pattern from training. Raises ValueError if a pattern matches none, or if nothing
    is left to train."""
    parameters = dict(net.named_parameters())
    frozen = matching(list(parameters), patterns, "module.frozen")
    if len(frozen) == len(parameters):
        raise ValueError(f"module.frozen={list(patterns)} freezes all parameters: nothing is left to train")
    for name in frozen:
        parameters[name].requires_grad_(False)
