"""Labels as people have them (numbers, text, booleans, none) -> class numbers and class names."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from varlab.data.manifests import MAX_CLASSES
from varlab.data.sources.items import Item, split_off
from varlab.data.write_shards import Source

UNLABELED = ["image"]  # the only class of a set without labels
Rows = list[tuple[Any, Item]]  # (label as found, image)


def number_of(value: Any) -> int | None:
    """A label that is a whole number, also as a float or as text; None for any other."""
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return int(value)
    if isinstance(value, float | np.floating):
        return int(value) if float(value).is_integer() else None
    is_digits = isinstance(value, str) and len(value) < 19 and value.strip().isdecimal()
    return int(value) if is_digits else None


def class_numbers(
    values: Sequence[Any], names: list[str] | None, where: Callable[[int], str]
) -> tuple[list[int], list[str]]:
    """(class number of each label, class names). Whole numbers are class numbers; text and booleans are class names,
    numbered as in `names`, by default sorted. `where`: what messages call the image of a label, by its place.

    Raises ValueError naming the first image whose label is out of range, unknown, or of another kind.
    """
    numbers = [number_of(value) for value in values]
    if None not in numbers:
        bound = MAX_CLASSES if names is None else len(names)
        for i, number in enumerate(numbers):
            if number is not None and not 0 <= number < bound:
                raise ValueError(
                    f"{where(i)}: label {number} is out of range: labels number the classes from 0 to {bound - 1}"
                )
        return numbers, names or [str(i) for i in range(max(numbers, default=0) + 1)]  # pyright: ignore[reportReturnType, reportOperatorIssue, reportOptionalOperand, reportArgumentType]
    for i, value in enumerate(values):
        if not isinstance(value, str | bool | np.bool_) and numbers[i] is None:
            raise ValueError(f"{where(i)}: the label {value!r} is neither a whole number nor text")
    texts = [str(value) for value in values]
    names = sorted(set(texts)) if names is None else names
    known = {name: i for i, name in enumerate(names)}
    for i, text in enumerate(texts):
        if text not in known:
            raise ValueError(f"{where(i)}: the label {text!r} is not among the {len(names)} class names")
    return [known[text] for text in texts], names


def read_names(file: str | Path | None) -> list[str] | None:
    """Class names, one per line of a file; None without a file."""
    return None if file is None else Path(file).read_text(encoding="utf-8-sig").splitlines()


def labeled(
    kind: str,
    name: str,
    splits: dict[str, Rows],
    names: list[str] | None,
    val_share: float,
    seed: int,
    notes: list[str],
) -> Source:
    """A source from rows of label and image. Without a validation split, `val_share` of each class becomes one."""
    rows = [row for members in splits.values() for row in members]
    if not rows:
        raise ValueError(f"{name} holds no images")
    numbers, names = class_numbers([label for label, _ in rows], names, lambda i: rows[i][1].where)
    items = [replace(item, label=number) for number, (_, item) in zip(numbers, rows, strict=True)]
    found = {"train": items[: len(splits["train"])]}
    found = {**found, "val": items[len(splits["train"]) :]} if splits.get("val") else split_off(items, val_share, seed)
    if missing := sorted(set(range(len(names))) - set(numbers)):
        listed = ", ".join(names[i] for i in missing[:5]) + (", ..." if len(missing) > 5 else "")
        notes = [*notes, f"{len(missing)} of {len(names)} classes have no images: {listed}"]
    return Source(kind, name, names, found, notes)
