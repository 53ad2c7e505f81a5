"""Packing: whole or not at all, readable by others, and every damage named."""

import errno
import tarfile

import pytest
from support.shards import make_shards

from varlab.data import shards as format


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
