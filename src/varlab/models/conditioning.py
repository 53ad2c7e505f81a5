"""Condition embedders: the condition of each image -> the vector that starts the sequence and modulates every block.

A custom embedder subclasses `ConditionEmbedder`; VAR builds it with `num_classes`, `width` and `dropout` in addition to
its own arguments. A class label is one kind of condition, one number per image; a vector, such as the embedding of a text, is
another; an image is a third.
"""

import difflib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from varlab.models import scales


class ConditionEmbedder(nn.Module):
    """Base class of condition embedders.

    `condition_shape`: shape of the condition of one image, () for a class label. `dropout`: probability of replacing a
    condition by the null condition in training mode, for classifier-free guidance. `num_prefix`: tokens that `prefix` gives
    for an image, to which all scales attend; 0 for none.
    """

    condition_shape: tuple[int, ...] = ()
    num_prefix: int = 0

    @property
    def kind(self) -> Literal["label", "vector", "text", "image"]:
        """The kind of condition in data sets."""
        return "vector" if self.condition_shape else "label"

    def __init__(self, dropout: float) -> None:
        super().__init__()
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout={dropout} of the condition: give a probability between 0 and 1")
        self.dropout = dropout

    @classmethod
    def arguments_from(cls, shape: tuple[int, ...], text: dict[str, Any] | None) -> dict[str, Any]:
        """Arguments that follow from the data: the shape of an image's condition, and the text encoder of a token cache."""
        return {}

    def forward(self, condition: Tensor) -> Float[Tensor, "B D"]:
        """Vectors of the transformer's width."""
        raise NotImplementedError

    def prefix(self, condition: Tensor) -> Float[Tensor, "B p D"]:
        """The tokens before those of the image."""
        raise NotImplementedError

    def at_tokens(self, condition: Tensor, patch_nums: scales.PatchNums) -> Float[Tensor, "B L D"] | None:
        """What is added to the embeddings of the tokens of all maps; None for nothing."""
        return None

    def null(self, condition: Tensor) -> Tensor:
        """The null condition ("no condition"), repeated for each row of `condition`."""
        raise NotImplementedError

    def check(self, condition: Tensor) -> None:
        """Raises ValueError for a condition that cannot be embedded. Called once per `generate`, not while training."""
        if tuple(condition.shape[1:]) != self.condition_shape:
            raise ValueError(
                f"the condition of an image has shape {tuple(condition.shape[1:])}, {type(self).__name__} takes {self.condition_shape}"
            )

    def check_data(self, shape: tuple[int, ...], text: dict[str, Any] | None, data: str) -> None:
        """Raises ValueError if the conditions of a data set have another shape, or its captions were encoded by another encoder, than
        those that the network was trained with."""
        if shape != self.condition_shape:
            raise ValueError(
                f"{data} gives conditions of shape {shape}, but {type(self).__name__} takes {self.condition_shape}"
            )

    def drop(self, condition: Tensor) -> Tensor:
        """Conditions, each replaced by the null condition with probability `dropout` in training mode."""
        if not self.training or self.dropout == 0:
            return condition
        is_dropped = torch.rand(len(condition), device=condition.device) < self.dropout
        return torch.where(is_dropped.view(-1, *[1] * len(self.condition_shape)), self.null(condition), condition)


class ClassEmbedder(ConditionEmbedder):
    """Class labels, 0 to num_classes - 1; `num_classes` itself is the null label, the last row of the table (as
    released)."""

    def __init__(self, num_classes: int, width: int, dropout: float = 0.1) -> None:
        super().__init__(dropout)
        self.num_classes = num_classes
        self.embedding = nn.Embedding(num_classes + 1, width)

    def forward(self, condition: Int[Tensor, " B"]) -> Float[Tensor, "B D"]:
        return self.embedding(condition)

    def null(self, condition: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
        return torch.full_like(condition, self.num_classes)

    def check(self, condition: Int[Tensor, " B"]) -> None:
        super().check(condition)
        wrong = [label for label in condition.tolist() if not 0 <= label <= self.num_classes]
        if wrong:
            raise ValueError(
                f"label {wrong[0]} is out of range: there are {self.num_classes} classes, 0..{self.num_classes - 1}"
                f" (and {self.num_classes} for none)"
            )


class VectorEmbedder(ConditionEmbedder):
    """Vectors of `dim` numbers, any embedding of the user's, by a linear map; zeros are the null condition."""

    def __init__(self, num_classes: int, width: int, dim: int, dropout: float = 0.1) -> None:
        super().__init__(dropout)
        self.condition_shape = (dim,)
        self.linear = nn.Linear(dim, width)

    @classmethod
    def arguments_from(cls, shape: tuple[int, ...], text: dict[str, Any] | None) -> dict[str, Any]:
        if len(shape) != 1:
            raise ValueError(
                f"{cls.__name__} takes a vector per image, the data give conditions of shape {shape}: set data.condition=vector or text"
            )
        return {"dim": shape[0]}

    def forward(self, condition: Float[Tensor, "B C"]) -> Float[Tensor, "B D"]:
        return self.linear(condition)

    def null(self, condition: Float[Tensor, "B *rows C"]) -> Float[Tensor, "B *rows C"]:
        return torch.zeros_like(condition)


class TextEmbedder(VectorEmbedder):
    """Vectors of texts. `encoder` and `fingerprint` name the encoder (`models.text_encoder`) that made them, so that a checkpoint
    can be given words. With `tokens`, a condition is the vector of a text and, in further rows, vectors of this many of its tokens,
    zeros after its end: a prefix to which all scales attend."""

    def __init__(
        self,
        num_classes: int,
        width: int,
        dim: int,
        encoder: str,
        fingerprint: str,
        tokens: int = 0,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(num_classes, width, dim, dropout)
        self.encoder, self.fingerprint, self.num_prefix = encoder, fingerprint, tokens
        self.of_tokens = nn.Linear(dim, width) if tokens else None
        if tokens:
            self.condition_shape = (1 + tokens, dim)

    @property
    def kind(self) -> Literal["label", "vector", "text", "image"]:
        return "text"

    @classmethod
    def arguments_from(cls, shape: tuple[int, ...], text: dict[str, Any] | None) -> dict[str, Any]:
        if text is None:
            raise ValueError(
                "model.embedder=text takes texts: set data.condition=text, and data.path to a cache of `varlab tokenize text=minilm`"
            )
        names = ("encoder", "fingerprint", "tokens")
        return {"dim": shape[-1], **{name: text[name] for name in names}}

    def forward(self, condition: Float[Tensor, "B *rows C"]) -> Float[Tensor, "B D"]:
        return self.linear(condition[:, 0] if self.num_prefix else condition)

    def prefix(self, condition: Float[Tensor, "B n C"]) -> Float[Tensor, "B p D"]:
        assert self.of_tokens is not None
        return self.of_tokens(condition[:, 1:])

    def check_data(self, shape: tuple[int, ...], text: dict[str, Any] | None, data: str) -> None:
        super().check_data(shape, text, data)
        self.check_text(text, data)

    def check_text(self, text: dict[str, Any] | None, data: str) -> None:
        """Raises ValueError if texts were encoded by another encoder than the network was trained with."""
        if text is not None and text["fingerprint"] != self.fingerprint:
            raise ValueError(
                f"{data}: vectors of {text['encoder']} ({text['fingerprint']}), but the network takes those of"
                f" {self.encoder} ({self.fingerprint})"
            )


class ImageEmbedder(ConditionEmbedder):
    """Smaller versions of the images, for super-resolution: `image_size` (height, width) in pixels, values in [-1, 1]. What lies
    under a token is added to its embedding, resized (area) to `patch` x `patch` values, and the whole image, of this size, modulates
    every block. Gray (zeros) is the null condition."""

    def __init__(
        self, num_classes: int, width: int, image_size: Sequence[int], patch: int = 8, dropout: float = 0.1
    ) -> None:
        super().__init__(dropout)
        if patch < 1:
            raise ValueError(f"patch={patch} of the condition: give 1 or more values per side of a token")
        self.condition_shape, self.patch = (3, *image_size), patch
        self.whole, self.part = nn.Linear(3 * patch**2, width), nn.Linear(3 * patch**2, width, bias=False)

    @property
    def kind(self) -> Literal["label", "vector", "text", "image"]:
        return "image"

    @classmethod
    def arguments_from(cls, shape: tuple[int, ...], text: dict[str, Any] | None) -> dict[str, Any]:
        if len(shape) != 3:
            raise ValueError(
                "model.embedder=image takes images: set data.condition=image, and data.path to a cache of `varlab tokenize low_res=2`"
            )
        return {"image_size": shape[1:]}

    def patches(self, condition: Float[Tensor, "B 3 H W"], h: int, w: int) -> Float[Tensor, "B l c"]:
        """What lies under each token of a map."""
        resized = F.interpolate(condition, size=(h * self.patch, w * self.patch), mode="area")
        return rearrange(resized, "B c (h a) (w b) -> B (h w) (c a b)", h=h, w=w)

    def forward(self, condition: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        return self.whole(self.patches(condition, 1, 1)[:, 0])

    def at_tokens(self, condition: Float[Tensor, "B 3 H W"], patch_nums: scales.PatchNums) -> Float[Tensor, "B L D"]:
        return self.part(torch.cat([self.patches(condition, h, w) for h, w in scales.sides(patch_nums)], dim=1))

    def null(self, condition: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
        return torch.zeros_like(condition)

    def check(self, condition: Float[Tensor, "B 3 H W"]) -> None:
        super().check(condition)
        if not condition.isfinite().all() or condition.abs().max() > 1 + 1e-3:
            raise ValueError(
                f"the images of the condition have values from {condition.min():g} to {condition.max():g}: give -1 to 1"
            )


def embedder_arguments(
    make_net: Callable[..., Any], shape: Sequence[int], text: dict[str, Any] | None
) -> dict[str, Any]:
    """The argument `embedder` of a partial of a VAR, with those arguments of its class that follow from the data; nothing if there
    are none."""
    embedder: Any = getattr(make_net, "keywords", {}).get("embedder")
    cls, given = (
        getattr(embedder, "func", embedder),
        getattr(embedder, "keywords", {}),
    )  # of a class or a partial of one
    found = cls.arguments_from(tuple(shape), text) if hasattr(cls, "arguments_from") else {}
    return {"embedder": partial(cls, **{**found, **given})} if found else {}


def label_of(label: int | str, class_names: Sequence[str], num_classes: int) -> int:
    """The number of a class, given its number or name. An entry of `class_names` may hold several names separated by
    commas; any of them is accepted, in any case unless classes differ only in case. Text is looked up as a name first, then
    as a number; a number that is the name of another class is refused.

    Raises ValueError listing the nearest names if the name is unknown.
    """
    if isinstance(label, int):
        if not 0 <= label <= num_classes:
            raise ValueError(
                f"label {label} is out of range: there are {num_classes} classes, 0..{num_classes - 1} (and {num_classes} for none)"
            )
        if str(label) in class_names and class_names[label : label + 1] != [str(label)]:
            other = list(class_names).index(str(label))
            raise ValueError(
                f"{label} is the name of class {other}, but number {label} is another class or none: give names in quotes, ['{label}']"
            )
        return label
    wanted = label.strip()
    exact: dict[str, int] = {}
    for number, names in enumerate(class_names):
        for name in [names, *names.split(",")]:
            exact.setdefault(name.strip(), number)
    if wanted in exact:
        return exact[wanted]
    numbers = {name.casefold(): number for name, number in reversed(exact.items())}
    wanted = wanted.casefold()
    if wanted in numbers:
        return numbers[wanted]
    if wanted.isdigit():
        return label_of(int(wanted), class_names, num_classes)
    near = difflib.get_close_matches(wanted, numbers, n=5, cutoff=0.4)
    hint = (
        f"the nearest are {', '.join(repr(name) for name in near)}" if near else f"there are {len(class_names)} names"
    )
    raise ValueError(f"no class is called {label!r}: {hint}")
