"""Tables of paths and labels."""

import pytest
from PIL import Image

from varlab.data.shards import ShardReader
from varlab.data.sources.csv_table import csv_source
from varlab.data.write_shards import PackOptions


@pytest.fixture
def table(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(6):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"images/{i}.png")
    lines = [f"images/{i}.png,{'bee' if i % 2 else 'ant'},x" for i in range(6)]
    (tmp_path / "t.csv").write_text("path,insect,other\n" + "\n".join(lines) + "\n,ant,\nimages/0.png,,\n")
    return tmp_path / "t.csv"


def test_a_table_of_paths_and_labels_is_packed(table, tmp_path):
    source = csv_source(str(table), image_column="path", label_column="insect", val_share=0.34)
    source.write(tmp_path / "out", PackOptions())
    assert source.class_names == ["ant", "bee"] and source.notes == [
        f"{table}: 2 rows without a path or label are left out"
    ]
    reader = ShardReader(tmp_path / "out", "train")
    for i in range(len(reader)):
        assert f"{table.parent}/images/" in reader.name_of(i)
        assert int(reader.name_of(i)[-5]) % 2 == reader.labels[i]
    unlabeled = csv_source(str(table), str(table), image_column="path", label_column=None)
    assert unlabeled.class_names == ["image"] and [len(items) for items in unlabeled.splits.values()] == [7, 7]


def test_tabs_and_names_of_classes(table):
    table.with_suffix(".tsv").write_text("image\tlabel\nimages/0.png\tb\nimages/1.png\ta\n")
    (table.parent / "names.txt").write_text("b\na\n")
    source = csv_source(str(table.with_suffix(".tsv")), class_names=str(table.parent / "names.txt"), val_share=0.0)
    assert source.class_names == ["b", "a"] and [item.label for item in source.splits["train"]] == [0, 1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"image,label\nnowhere.png,1\n", r"t.csv line 2: there is no file .*nowhere.png"),
        (b"file,label\n", r"t.csv has no column 'image', only \['file', 'label'\]"),
        (b"", r"t.csv has no column 'image', only \[\]"),
        (b"image,label\n\xff\xfe,1\n", r"t.csv 'utf-8' codec can't decode"),
        (b"image,label\n", "t holds no images"),
        (b'image,label\n"' + b"x" * 200_000 + b'",1\n', "t.csv field larger than field limit"),
    ],
)
def test_a_table_that_cannot_be_used_is_named(content, message, table):
    table.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        csv_source(str(table))


def test_a_missing_table_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere.csv does not exist"):
        csv_source(str(tmp_path / "nowhere.csv"))
    with pytest.raises(ValueError, match="needs train=FILE.csv"):
        csv_source(None)
