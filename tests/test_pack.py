"""Packing: whole or not at all, readable by others, and every damage named."""

import errno
import io
import json
import tarfile

import numpy as np
import pytest
import webdataset
from PIL import Image
from shards import digits, make_shards

from varlab.data import pack as packing
from varlab.data import shards as format
from varlab.data.imagenet import Crop, ImageDataset, ImageNetDataModule, preprocess
from varlab.data.order import Draw


@pytest.fixture(scope="session")
def packed(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture
def broken(tmp_path):
    return make_shards(tmp_path / "broken")


def test_packed_images_come_back_with_their_labels(packed):
    source, reader = digits(), format.ShardReader(packed, "train")
    expected = sorted((item.load(), item.label) for item in source.splits["train"])
    assert sorted((reader.read(i), int(reader.labels[i])) for i in range(len(reader))) == expected
    assert format.verify(packed) == 59
    assert reader.manifest["class_names"] == [str(digit) for digit in range(10)]


def test_the_webdataset_library_reads_the_shards(packed):
    reader = format.ShardReader(packed, "train")
    urls = [str(shard) for shard in reader.shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    assert [sample["png"] for sample in samples] == [reader.read(i) for i in range(len(reader))]
    assert [int(sample["cls"]) for sample in samples] == reader.labels.tolist()


def test_packing_twice_gives_the_same_bytes_and_keeps_finished_shards(packed, tmp_path):
    again = make_shards(tmp_path)
    assert (again / "manifest.json").read_text() == (packed / "manifest.json").read_text()
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
    assert sorted(file.name for file in tmp_path.iterdir()) == ["train-000000.tar"]
    with pytest.raises(ValueError, match="manifest.json does not exist"):
        format.ShardReader(tmp_path, "train")
    monkeypatch.undo()
    make_shards(tmp_path)
    assert format.verify(tmp_path) == 59


def test_a_missing_or_truncated_shard_is_named_at_once(broken):
    shard = broken / "train-000001.tar"
    content = shard.read_bytes()
    shard.write_bytes(content[:5000])
    with pytest.raises(ValueError, match=r"train-000001.tar has 5000 bytes, the manifest says \d+"):
        format.ShardReader(broken, "train")
    shard.unlink()
    with pytest.raises(ValueError, match=r"train-000001.tar is missing"):
        format.ShardReader(broken, "train")


def test_changed_bytes_are_noticed(broken):
    reader = format.ShardReader(broken, "train")
    shard, offset = broken / "train-000000.tar", int(reader.index[3]["offset"])
    content = bytearray(shard.read_bytes())
    content[offset + 40] ^= 0xFF
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=f"the image at byte {offset} is damaged"):
        format.ShardReader(broken, "train").read(3)
    with pytest.raises(ValueError, match=r"1 shards changed since packing: train-000000.tar"):
        format.verify(broken)


def test_a_damaged_tar_or_a_lonely_key_is_refused_by_the_index(tmp_path):
    file = tmp_path / "x.tar"
    file.write_bytes(b"no tar" * 500)
    with pytest.raises(ValueError, match=r"x.tar is damaged"):
        format.index_shard(file, 0)
    with tarfile.open(file, "w") as tar:
        info = tarfile.TarInfo("a.png")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    with pytest.raises(ValueError, match=r"key 'a' holds \['png'\]"):
        format.index_shard(file, 0)


def test_a_corrupt_image_is_replaced_by_its_neighbor_and_counted(tmp_path, caplog):
    source = digits(40)
    items = source.splits["train"]
    items[7] = packing.Item(items[7].label, "png", lambda: b"no image")
    packing.pack(source, tmp_path, shard_images=20, seed=0)
    reader = format.ShardReader(tmp_path, "train")
    bad = next(i for i in range(40) if reader.read(i) == b"no image")
    dataset = ImageDataset(reader, 16, 1.0, random_crop=False, random_flip=False)
    batch = dataset.__getitems__([Draw(i, 0, True) for i in range(40)])
    assert batch.skipped.tolist() == [int(i == bad) for i in range(40)]
    assert np.array_equal(batch.images[bad], batch.images[(bad + 1) % 40])
    assert batch.labels[bad] == reader.labels[(bad + 1) % 40]
    assert "cannot be decoded" in caplog.text
    assert len(batch.labels) == 40


def test_folders_of_classes_are_packed_by_sorted_name(tmp_path):
    for name, value in [("zebra", 10), ("ant", 200)]:
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(10):
            Image.new("RGB", (20, 30), (value, i, 0)).save(tmp_path / "images" / name / f"{i}.jpg")
    (tmp_path / "images" / "ant" / "notes.txt").write_text("not an image")
    source = packing.folder_source(tmp_path / "images", val_share=0.2, seed=0)
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
        packing.folder_source(tmp_path, 0.1, 0)
    with pytest.raises(ValueError, match="is not a folder"):
        packing.folder_source(tmp_path / "nowhere", 0.1, 0)


def test_labels_beyond_the_class_names_are_refused(broken):
    manifest = json.loads((broken / "manifest.json").read_text())
    manifest["class_names"] = manifest["class_names"][:3]
    (broken / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="label 9 is out of range, the manifest names 3 classes"):
        format.ShardReader(broken, "train")


def test_preprocessing_is_the_recipe():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))
    center = preprocess(image, 16, 1.125, Crop())
    by_hand = np.asarray(image.resize((27, 18), Image.Resampling.LANCZOS))[1:17, 6:22]
    assert np.array_equal(center, by_hand)
    flipped = preprocess(image, 16, 1.125, Crop(0.0, 0.0, True))
    assert np.array_equal(
        flipped,
        np.asarray(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).resize((27, 18), Image.Resampling.LANCZOS))[
            :16, :16
        ],
    )


def test_augmentation_depends_on_seed_epoch_and_sample_alone(packed):
    dataset = ImageDataset(format.ShardReader(packed, "train"), 16, 1.5, random_crop=True, random_flip=True, seed=1)
    crops = {dataset.crop_of(Draw(sample, epoch, True)) for sample in range(20) for epoch in range(20)}
    assert len(crops) == 400
    assert {crop.is_flipped for crop in crops} == {True, False}
    assert dataset.crop_of(Draw(3, 4, True)) == dataset.crop_of(Draw(3, 4, True))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_do_not_depend_on_workers(packed, num_workers):
    def batches(workers: int) -> list[list[float]]:
        data = ImageNetDataModule(str(packed), 16, 8, num_workers=workers, resize_ratio=1.25, lanes=4, window=6)
        data.setup()
        return [batch.images.sum(dim=(1, 2, 3)).tolist() for batch in data.train_dataloader()]

    assert batches(num_workers) == batches(0)


def test_more_replaced_images_than_allowed_stop_the_run(packed):
    data = ImageNetDataModule(str(packed), 16, 8, num_workers=0, max_skipped_share=0.05)
    data.setup()
    batch = next(iter(data.train_dataloader()))

    class Training:
        training = True

    data.trainer = Training()
    data.on_before_batch_transfer(batch._replace(skipped=batch.skipped + 0), 0)
    data.on_before_batch_transfer(
        batch._replace(skipped=batch.skipped.index_fill(0, batch.labels.new_tensor([0, 1]), 1)), 0
    )
    assert data.skipped == 2
    with pytest.raises(ValueError, match=r"3 images could not be read, max_skipped_share=0.05 allows 2 of 48"):
        data.on_before_batch_transfer(
            batch._replace(skipped=batch.skipped.index_fill(0, batch.labels.new_tensor([0]), 1)), 0
        )
