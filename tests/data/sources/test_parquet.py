"""Parquet files as hubs store them."""

import shutil

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from support.fuzz import FUZZ, damaged, is_read_or_refused
from support.image_files import make_parquet
from support.runs import config
from support.shards import digits

from varlab.commands import pack as pack_verb
from varlab.data import shards as format
from varlab.data.sources import parquet
from varlab.data.write_shards import PackOptions


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
        read.append(file.source.name)
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
        match="train-1.parquet, row 0: label -1 is out of range: labels number the classes from 0 to",
    ):
        pack_parquet(tmp_path)
    (tmp_path / "train-1.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match=r"train-1.parquet is not a parquet file"):
        pack_parquet(tmp_path)


PNG = digits(1, 1).splits["train"][0].load()


def pack_tables(folder, tables, *settings):
    """Packs tables given as {file: columns}."""
    for name, columns in tables.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        table = pyarrow.table(columns)
        if name.endswith(".arrow"):
            with pyarrow.ipc.new_stream(str(folder / name), table.schema) as stream:
                stream.write_table(table)
        else:
            pyarrow.parquet.write_table(table, folder / name)
    given = ["source=parquet", f"out={folder / 'out'}", f"path={folder}", "num_workers=1", "val_share=0.5", *settings]
    pack_verb.run(config(folder, *given, verb="pack"))
    return format.ShardReader(folder / "out", "train")


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["b", "a", "b", "a"], ["a", "b"]),
        ([True, False, True, False], ["False", "True"]),
        ([1.0, 0.0, 1.0, 0.0], ["0", "1"]),
        (pyarrow.array(["b", "a", "b", "a"]).dictionary_encode(), ["a", "b"]),
        (pyarrow.array([1, 0, 1, 0], pyarrow.uint8()), ["0", "1"]),
    ],
)
def test_labels_of_any_kind(labels, names, tmp_path):
    reader = pack_tables(tmp_path, {"train.parquet": {"image": [PNG] * 4, "label": labels}})
    assert reader.manifest["class_names"] == names and sorted(reader.labels) == [0, 1]


def test_chosen_columns_null_rows_and_paths(tmp_path, capsys):
    (tmp_path / "digit.png").write_bytes(PNG)
    images = [{"bytes": None, "path": "digit.png"}, {"bytes": PNG, "path": None}, None, {"bytes": PNG, "path": None}]
    columns = {"picture": images * 2, "kind": ["a", "b", "a", None] * 2, "other": [1] * 8}
    reader = pack_tables(tmp_path, {"train.parquet": columns}, "image_column=picture", "label_column=kind")
    assert reader.read(0) == PNG and len(reader) == 2
    assert "4 rows of train without an image or label are left out" in capsys.readouterr().out
    unlabeled = pack_tables(
        tmp_path, {"train.parquet": columns}, "image_column=picture", "label_column=null", f"out={tmp_path / 'none'}"
    )
    assert unlabeled.manifest["class_names"] == ["a", "b"]
    assert format.ShardReader(tmp_path / "none", "train").manifest["class_names"] == ["image"]


def test_other_columns_are_read_anew(tmp_path):
    columns = {"image": [PNG] * 4, "first": ["a", "b"] * 2, "second": ["c", "d"] * 2}
    with pytest.raises(ValueError, match="has no column 'label'"):
        pack_tables(tmp_path, {"train.parquet": columns})
    with pytest.raises(ValueError, match="the label 'a' is not among the 1 class names"):
        (tmp_path / "names").write_text("x\n")
        pack_tables(tmp_path, {"train.parquet": columns}, "label_column=first", f"class_names={tmp_path / 'names'}")
    assert pack_tables(tmp_path, {"train.parquet": columns}, "label_column=second").manifest["class_names"] == [
        "c",
        "d",
    ]


def test_a_saved_data_set_is_read_by_its_splits(tmp_path, capsys):
    few = {"image": [PNG] * 2, "label": [0, 1]}
    tables = {"train/data-00000-of-00001.arrow": few, "test/data-00000-of-00001.arrow": few, "train/cache-1.arrow": few}
    assert len(pack_tables(tmp_path / "saved", tables)) == 2
    assert "the split test is used for validation" in capsys.readouterr().out
    hub = {f"data/{split}-00000-of-00001.parquet": few for split in ("train", "validation", "test")}
    assert len(pack_tables(tmp_path / "hub", hub)) == 2
    assert "1 files are left out: they are the split test" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"holds no .parquet or .arrow files of a training split"):
        pack_tables(tmp_path / "none", {"test.parquet": few})


def table_bytes(columns):
    """A parquet file."""
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table(columns), sink)
    return sink.getvalue().to_pybytes()


@FUZZ
@given(content=damaged(table_bytes({"image": [PNG] * 4, "label": [0, 1, 0, 1]})))
def test_damaged_parquet_files(content, tmp_path):
    (tmp_path / "train.parquet").write_bytes(content)
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    source = parquet.ParquetSource(train=str(tmp_path / "train.parquet"), val_share=0.5)
    assert is_read_or_refused(lambda: source.write(tmp_path / "out", PackOptions()), tmp_path / "train.parquet")
