"""Parquet files as hubs store them."""

import pyarrow
import pyarrow.parquet
import pytest
from support.image_files import make_parquet
from support.runs import config

from varlab.commands import pack as pack_verb
from varlab.data import shards as format
from varlab.data.sources import parquet


def pack_parquet(folder, *settings):
    patterns = [f"train='{folder}/train-{{0,1}}.parquet'", f"val='{folder}/val-*.parquet'", "shard_images=5"]
    pack_verb.run(
        config(folder, "source=parquet", f"out={folder / 'out'}", *patterns, "num_workers=1", *settings, verb="pack")
    )
    return folder / "out"


def test_parquet_files_of_a_hub_are_packed(tmp_path):
    expected = make_parquet(tmp_path, names=["ant", "bee", "cat"])
    out = pack_parquet(tmp_path)
    for split in ("train", "val"):
        reader = format.ShardReader(out, split)
        assert sorted((reader.read(i), int(reader.labels[i])) for i in range(len(reader))) == sorted(expected[split])
        assert reader.shard_counts == [5] * (len(reader) // 5) + [len(reader) % 5] * (len(reader) % 5 > 0)
    assert reader.manifest["class_names"] == ["ant", "bee", "cat"]
    assert not (out / "staging").exists()


def test_a_killed_reading_of_parquet_files_goes_on_where_it_was(tmp_path, monkeypatch):
    make_parquet(tmp_path)
    original, read = parquet.write_flat, []

    def write_flat(file):
        read.append(file.parquet.name)
        if len(read) == 3:
            raise KeyboardInterrupt
        original(file)

    monkeypatch.setattr(parquet, "write_flat", write_flat)
    with pytest.raises(KeyboardInterrupt):
        pack_parquet(tmp_path)
    pack_parquet(tmp_path)
    assert read == ["train-0.parquet", "train-1.parquet", "val-0.parquet", "val-0.parquet", "val-1.parquet"]
    assert format.load_manifest(tmp_path / "out")["class_names"] == ["0", "1", "2"]


def test_parquet_files_without_the_columns_or_labels_are_refused(tmp_path):
    make_parquet(tmp_path)
    with pytest.raises(ValueError, match=r"train-0.parquet has no column 'img', only \['image', 'label'\]"):
        pack_parquet(tmp_path, "image_column=img")
    unlabelled = pyarrow.table({"image": [b"x"], "label": [-1]})
    pyarrow.parquet.write_table(unlabelled, tmp_path / "train-1.parquet")
    with pytest.raises(
        ValueError,
        match="train-1.parquet, row 0: expected an encoded image and a label of at least 0, found bytes and -1",
    ):
        pack_parquet(tmp_path)
    (tmp_path / "train-1.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match=r"train-1.parquet is not a parquet file"):
        pack_parquet(tmp_path)
