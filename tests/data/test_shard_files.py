"""Single shards: what is written into them and found in them."""

import io
import tarfile

import numpy as np
import pytest
from hypothesis import given
from support.fuzz import FUZZ, damaged, is_read_or_refused

from varlab.data.shard_files import Members, Sample, index_shard, write_shard
from varlab.data.sources.index_existing import decompress


def add_member(tar, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def test_a_shard_is_indexed_as_it_was_written(tmp_path):
    vector = np.arange(3, dtype=np.float32)
    samples = [Sample(f"{i:08d}", b"image" * i, "png", i, vector * i) for i in range(1, 4)]
    write_shard(tmp_path / "a.tar", samples)
    index = index_shard(tmp_path / "a.tar", 5)
    content = (tmp_path / "a.tar").read_bytes()
    assert index.keys == [sample.key for sample in samples] and not index.problems
    assert index.labels == ["1", "2", "3"] and index.rows["label"].tolist() == [1, 2, 3]
    assert index.rows["shard"].tolist() == [5] * 3 and (index.conditions == [vector, vector * 2, vector * 3]).all()
    for sample, row in zip(samples, index.rows, strict=True):
        assert content[row["offset"] : row["offset"] + row["size"]] == sample.image


def test_the_files_of_a_key_are_chosen_by_extension(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in (
            ("a.left.png", b"l"),
            ("a.right.png", b"r"),
            ("a.cls", b"7"),
            ("a.json", b'{"n": 3, "x": []}'),
        ):
            add_member(tar, name, content)
    assert index_shard(tmp_path / "a.tar", 0).keys == [] and len(index_shard(tmp_path / "a.tar", 0).problems) == 3
    assert index_shard(tmp_path / "a.tar", 0, Members("right.png")).labels == ["7"]
    assert index_shard(tmp_path / "a.tar", 0, Members("left.png", "json:n")).labels == [3]
    assert index_shard(tmp_path / "a.tar", 0, Members("left.png", None)).labels == [0]
    assert "no label" in index_shard(tmp_path / "a.tar", 0, Members("left.png", "json:x")).problems[0]
    assert "no such field" in index_shard(tmp_path / "a.tar", 0, Members("left.png", "json:y")).problems[0]


def test_a_damaged_tar_or_a_lonely_key_is_refused_by_the_index(tmp_path):
    file = tmp_path / "x.tar"
    file.write_bytes(b"no tar" * 500)
    with pytest.raises(ValueError, match=r"x.tar is damaged"):
        index_shard(file, 0)
    with tarfile.open(file, "w") as tar:
        info = tarfile.TarInfo("a.png")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    index = index_shard(file, 0)
    assert not len(index.rows) and index.problems == ["key 'a' holds ['png'], expected one image and one .cls"]


TAR = io.BytesIO()
with tarfile.open(fileobj=TAR, mode="w") as tar:
    for member, content in (("a.jpg", b"abc"), ("a.cls", b"1"), ("b.jpg", b"abc"), ("b.json", b"{}"), ("b.cls", b"0")):
        add_member(tar, member, content)


@FUZZ
@given(content=damaged(TAR.getvalue()))
def test_damaged_tars(content, tmp_path):
    (tmp_path / "t.tar").write_bytes(content)
    assert is_read_or_refused(lambda: index_shard(tmp_path / "t.tar", 0), tmp_path / "t.tar")
    assert is_read_or_refused(lambda: decompress(tmp_path / "t.tar", tmp_path / "u.tar"), tmp_path / "t.tar")
