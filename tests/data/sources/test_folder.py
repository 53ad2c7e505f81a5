"""Folders of classes."""

import io

import numpy as np
import pytest
from PIL import Image

from varlab.data import shards as format
from varlab.data import write_shards as packing
from varlab.data.sources.folder import folder_source


def test_folders_of_classes_are_packed_by_sorted_name(tmp_path):
    for name, value in [("zebra", 10), ("ant", 200)]:
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(10):
            Image.new("RGB", (20, 30), (value, i, 0)).save(tmp_path / "images" / name / f"{i}.jpg")
    (tmp_path / "images" / "ant" / "notes.txt").write_text("not an image")
    source = folder_source(tmp_path / "images", val_share=0.2, seed=0)
    assert source.class_names == ["ant", "zebra"]
    assert [len(source.splits[split]) for split in ("train", "val")] == [16, 4]
    packing.pack(source, tmp_path / "out", shard_images=6, seed=0)
    reader = format.ShardReader(tmp_path / "out", "train")
    for i in range(16):
        red = np.asarray(Image.open(io.BytesIO(reader.read(i))).convert("RGB"))[0, 0, 0]
        assert (red > 100) == (reader.labels[i] == 0)


def test_folders_without_images_say_what_is_expected(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no images: expected one folder for each class"):
        folder_source(tmp_path, 0.1, 0)
    with pytest.raises(ValueError, match="is not a folder"):
        folder_source(tmp_path / "nowhere", 0.1, 0)


def image(file):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 20)).save(file)


def test_a_folder_of_images_without_labels_is_one_class(tmp_path):
    for i in range(6):
        image(tmp_path / f"in/{i}.png")
    (tmp_path / "in/.hidden.png").write_bytes(b"")
    source = folder_source(tmp_path / "in", 0.5)
    assert source.class_names == ["image"] and [len(source.splits[split]) for split in ("train", "val")] == [3, 3]
    assert "has no class folders: its images have no labels" in source.notes[0] and len(source.notes) == 1
    for i in range(4):
        image(tmp_path / f"splits/train/{i}.png")
        image(tmp_path / f"splits/val/{i}.png")
    source = folder_source(tmp_path / "splits")
    assert source.class_names == ["image"] and [len(source.splits[split]) for split in ("train", "val")] == [4, 4]


def test_files_of_systems_and_editors_are_no_classes_and_what_is_left_out_is_said(tmp_path, capsys):
    for name in ("cat/1.png", "cat/deep/2.png", "dog/1.png", "__MACOSX/cat/1.png", ".ipynb_checkpoints/1.png"):
        image(tmp_path / "in" / name)
    image(tmp_path / "elsewhere/3.png")
    (tmp_path / "in/dog/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in/cat/._1.png").write_bytes(b"resource fork")
    (tmp_path / "in/cat/notes.txt").write_text("no image")
    (tmp_path / "in/bird").mkdir()
    source = folder_source(tmp_path / "in", 0.5)
    assert source.class_names == ["cat", "dog"] and sum(map(len, source.splits.values())) == 4
    assert [note.partition(": ")[2] for note in source.notes] == [
        "classes without images are left out: bird", "files left out: 1 .txt",
    ]  # fmt: skip
    source.write(tmp_path / "out", packing.PackOptions())
    assert "in: 2 train, 2 val images of 2 classes (cat, dog)" in capsys.readouterr().out
    assert format.ShardReader(tmp_path / "out", "train").manifest["notes"] == source.notes


def test_names_that_are_numbers_are_sorted_as_numbers(tmp_path):
    for name in ("10", "2", "0", "1"):
        image(tmp_path / name / "a.png")
        image(tmp_path / name / "b.png")
    assert folder_source(tmp_path).class_names == ["0", "1", "2", "10"]


@pytest.mark.parametrize(
    ("names", "val"), [(("train", "test"), "test"), (("train", "valid", "test"), "valid"), (("training",), None)]
)
def test_splits_go_by_their_usual_names(names, val, tmp_path):
    for split in (*names, "extra"):
        for label in ("a", "b"):
            for i in range(4 if split.startswith("train") else 1):
                image(tmp_path / split / label / f"{i}.png")
    source = folder_source(tmp_path, 0.25)
    assert source.class_names == ["a", "b"] and len(source.splits["val"]) == 2
    assert len(source.splits["train"]) == (6 if val is None else 8)
    if val:
        assert source.splits["val"][0].file.parts[-3] == val and f"{tmp_path / val} is the split val" in source.notes
    assert f"{tmp_path}: folders left out beside the splits: extra" in source.notes


def test_images_without_labels_have_captions_too_and_other_texts_are_told(tmp_path):
    for i in range(4):
        image(tmp_path / f"in/{i}.png")
    (tmp_path / "in/0.txt").write_text("\ufeffa dog\n\n  two dogs \n", encoding="utf-8")
    (tmp_path / "in/notes.txt").write_text("not of an image", encoding="utf-8")
    source = folder_source(tmp_path / "in", 0.0)
    assert [item.captions for item in source.splits["train"]] == [("a dog", "two dogs"), (), (), ()]
    assert source.notes[-2:] == [
        f"{tmp_path / 'in'}: files left out: 1 .txt",
        "images with captions, in text files of their names: 1",
    ]
