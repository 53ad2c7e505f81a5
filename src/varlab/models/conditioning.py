"""Condition embedders: the condition of each image -> the vector that starts the sequence and modulates every block.

A custom embedder subclasses `ConditionEmbedder`; VAR builds it with `num_classes`, `width` and `dropout` in addition to
its own arguments. A class label is one kind of condition, one number per image.
"""

import difflib
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


class ConditionEmbedder(nn.Module):
    """Base class of condition embedders.

    `condition_shape`: shape of the condition of one image, () for a class label. `dropout`: probability of replacing a
    condition by the null condition in training mode, for classifier-free guidance.
    """

    condition_shape: tuple[int, ...] = ()

    def __init__(self, dropout: float) -> None:
        super().__init__()
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout={dropout} of the condition: give a probability between 0 and 1")
        self.dropout = dropout

    def forward(self, condition: Tensor) -> Float[Tensor, "B D"]:
        """Vectors of the transformer's width."""
        raise NotImplementedError

    def null(self, condition: Tensor) -> Tensor:
        """The null condition ("no condition"), repeated for each row of `condition`."""
        raise NotImplementedError

    def check(self, condition: Tensor) -> None:
        """Raises ValueError for a condition that cannot be embedded. Called once per `generate`, not while training."""
        if tuple(condition.shape[1:]) != self.condition_shape:
            raise ValueError(
                f"the condition of an image has shape {tuple(condition.shape[1:])}, {type(self).__name__} takes {self.condition_shape}"
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
