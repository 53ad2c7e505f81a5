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
