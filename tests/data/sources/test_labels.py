"""Labels as people have them."""

import numpy as np
import pytest

from varlab.data.manifests import MAX_CLASSES
from varlab.data.sources.items import Item
from varlab.data.sources.labels import class_numbers, labeled, number_of, read_names


def numbers(values, names=None):
    return class_numbers(values, names, lambda i: f"image {i}")


@pytest.mark.parametrize(
    ("values", "names", "expected"),
    [
        ([0, 2, 1], None, ([0, 2, 1], ["0", "1", "2"])),
        ([0.0, np.int64(1), "1"], None, ([0, 1, 1], ["0", "1"])),
        (["dog", "cat", "dog"], None, ([1, 0, 1], ["cat", "dog"])),
        ([True, False], None, ([1, 0], ["False", "True"])),
        (["dog", "cat"], ["dog", "cat", "owl"], ([0, 1], ["dog", "cat", "owl"])),
        ([1, 0], ["dog", "cat", "owl"], ([1, 0], ["dog", "cat", "owl"])),
        (["1", "x"], None, ([0, 1], ["1", "x"])),
    ],
)
def test_numbers_number_and_text_names_the_classes(values, names, expected):
    assert numbers(values, names) == expected


@pytest.mark.parametrize(
    ("values", "names", "message"),
    [
        ([0, -1], None, f"image 1: label -1 is out of range: labels number the classes from 0 to {MAX_CLASSES - 1}"),
        ([0, 2_000_000_000], None, "image 1: label 2000000000 is out of range"),
        ([3], ["a", "b"], "image 0: label 3 is out of range: labels number the classes from 0 to 1"),
        ([0, 10**400], None, "image 1: label 1000"),
        ([0, 0.5], None, "image 1: the label 0.5 is neither a whole number nor text"),
        ([None], None, "image 0: the label None is neither"),
        (["a", "c"], ["a", "b"], "image 1: the label 'c' is not among the 2 class names"),
        (["9" * 5000], ["a"], "is not among the 1 class names"),
    ],
)
def test_labels_that_cannot_be_are_named(values, names, message):
    with pytest.raises(ValueError, match=message):
        numbers(values, names)


def test_whole_numbers_are_recognized():
    assert [number_of(value) for value in (3, 3.0, "3", " 3 ", np.float32(3))] == [3] * 5
    assert [number_of(value) for value in (True, 3.5, "3.5", "", None, float("nan"), float("inf"), "9" * 30)] == [
        None
    ] * 8


def test_rows_become_a_source_and_missing_classes_are_noted(tmp_path):
    (tmp_path / "names.txt").write_text("\ufeffant\nbee\ncat\n", encoding="utf-8")
    names = read_names(tmp_path / "names.txt")
    assert names == ["ant", "bee", "cat"] and read_names(None) is None
    rows = [(i % 2, Item(0, "png", b"")) for i in range(8)]
    source = labeled("test", "few", {"train": rows}, names, 0.25, 0, ["one"])
    assert [[item.label for item in source.splits[split]] for split in ("train", "val")] == [[0, 0, 0, 1, 1, 1], [0, 1]]
    assert source.notes == ["one", "1 of 3 classes have no images: cat"]
    with pytest.raises(ValueError, match="few holds no images"):
        labeled("test", "few", {"train": []}, None, 0.25, 0, [])
