"""Packing: whole or not at all, readable by others, and every damage named."""

import errno
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from support.shards import digits, make_shards

from varlab.data import shards as format
from varlab.data import write_shards as packing
from varlab.data.sources.items import Item


def test_packing_twice_gives_the_same_bytes_and_keeps_finished_shards(digits_folder, tmp_path):
    again = make_shards(tmp_path)
    assert (again / "manifest.json").read_text() == (digits_folder / "manifest.json").read_text()
    first = again / "train-000000.tar"
    before = first.stat().st_mtime_ns
    (again / "train-000001.tar").unlink()
    (again / "manifest.json").unlink()
    make_shards(tmp_path)
    assert first.stat().st_mtime_ns == before
    assert format.verify(again) == 59


def test_a_full_disk_leaves_nothing_that_looks_whole(tmp_path, monkeypatch):
    written = []
    original = tarfile.TarFile.addfile

    def addfile(self, info, fileobj=None):
        written.append(info)
        if len(written) > 70:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(self, info, fileobj)

    monkeypatch.setattr(tarfile.TarFile, "addfile", addfile)
    with pytest.raises(OSError, match=r"train-000001.tar could not be written: No space left on device"):
        make_shards(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["packing.json", "train-000000.tar"]
    with pytest.raises(ValueError, match="manifest.json does not exist"):
        format.ShardReader(tmp_path, "train")
    monkeypatch.undo()
    make_shards(tmp_path)
    assert format.verify(tmp_path) == 59


def test_labels_and_extensions_are_checked_before_anything_is_written(tmp_path):
    items = digits(4, 2).splits
    for changed, message in (({"label": True}, "label True is not a number from 0 to 9"), ({"label": 10}, "label 10 is not"),
                             ({"extension": "txt"}, "extension 'txt' is none of")):  # fmt: skip
        with pytest.raises(ValueError, match=f"fifth: {message}"):
            packing.Source(
                "a", "a", list("0123456789"), {**items, "val": [replace(items["val"][0], name="fifth", **changed)]}
            )
    with pytest.raises(ValueError, match="the class name .* is not text, or not in this locale"):
        packing.Source("a", "a", ["\udcff"], {})


def test_what_cannot_be_decoded_is_left_out_named_and_counted(tmp_path):
    source = digits(40)
    source.splits["train"][7] = replace(source.splits["train"][7], content=b"no image", name="the seventh")
    for _ in range(2):  # the second time nothing is written anew
        manifest = packing.pack(source, tmp_path, shard_images=10, seed=0)
        assert manifest["splits"]["train"]["num_images"] == 39 and manifest["splits"]["train"]["skipped"] == 1
        (tmp_path / "manifest.json").unlink()
    assert (tmp_path / "skipped.txt").read_text().startswith("the seventh cannot be decoded")
    only = {"train": [Item(0, "png", b"x", name="mine")], "val": [Item(0, "png", b"x")]}
    with pytest.raises(
        ValueError, match="none of the 1 images of split 'train' can be used; the first: mine cannot be decoded"
    ):
        packing.pack(packing.Source("a", "a", ["a"], only), tmp_path / "b", shard_images=10, seed=0)


def test_a_file_that_cannot_be_read_is_an_error_of_reading(tmp_path):
    gone = {"train": [Item(0, "png", file=tmp_path / "gone.png")], "val": [Item(0, "png", file=tmp_path / "gone.png")]}
    with pytest.raises(ValueError, match="gone.png cannot be read: No such file"):
        packing.pack(packing.Source("a", "a", ["a"], gone), tmp_path / "out", shard_images=10, seed=0, check=False)


def test_training_names_the_users_file(tmp_path):
    items = digits(4, 2).splits["train"]
    for i, item in enumerate(items):
        (tmp_path / f"{i}.png").write_bytes(item.load())
    files = {split: [Item(0, "png", file=tmp_path / f"{i}.png") for i in range(4)] for split in ("train", "val")}
    packing.pack(packing.Source("a", "a", ["a"], files), tmp_path / "out", shard_images=10, seed=0)
    reader = format.ShardReader(tmp_path / "out", "val")
    for i in range(4):
        name = reader.name_of(i).rpartition(", from ")[2]
        assert reader.read(i) == Path(name).read_bytes()
