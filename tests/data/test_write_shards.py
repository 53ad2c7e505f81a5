"""Packing: whole or not at all, readable by others, and every damage named."""

import errno
import io
import json
import tarfile

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import webdataset
from PIL import Image
from support.image_files import make_ilsvrc, make_parquet
from support.runs import config
from support.shards import digits, make_shards

from varlab.commands import pack as pack_verb
from varlab.data import images as image_data
from varlab.data import shards as format
from varlab.data import write_shards as packing
from varlab.data.dataset_card import write_card
from varlab.data.images import Crop, ImageDataModule, ImageDataset, open_rgb, preprocess
from varlab.data.order import SampleRequest
from varlab.data.sources import parquet
from varlab.data.sources.folder import folder_source
from varlab.data.sources.ilsvrc2012 import ilsvrc2012_source
from varlab.data.sources.items import Item, reencode


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
    urls = [shard.url for shard in reader.shards]
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
    assert sorted(file.name for file in tmp_path.iterdir()) == ["packing.json", "train-000000.tar"]
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
    with pytest.raises(ValueError, match=r"1 files are broken: .*train-000000.tar: its content changed since packing"):
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
    index = format.index_shard(file, 0)
    assert not len(index.rows) and index.problems == ["key 'a' holds ['png'], expected one image and one .cls"]


def test_a_corrupt_image_is_replaced_by_its_neighbor_and_counted(tmp_path, caplog):
    source = digits(40)
    items = source.splits["train"]
    items[7] = Item(items[7].label, "png", content=b"no image")
    packing.pack(source, tmp_path, shard_images=20, seed=0)
    reader = format.ShardReader(tmp_path, "train")
    bad = next(i for i in range(40) if reader.read(i) == b"no image")
    dataset = ImageDataset(reader, 16, 1.0, random_crop=False, random_flip=False)
    batch = dataset.__getitems__([SampleRequest(i, 0, True) for i in range(40)])
    assert batch.skipped.tolist() == [int(i == bad) for i in range(40)]
    assert np.array_equal(batch.images[bad], batch.images[(bad + 1) % 40])
    assert batch.condition[bad] == reader.labels[(bad + 1) % 40]
    assert "cannot be decoded" in caplog.text
    assert len(batch.condition) == 40


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


def test_labels_beyond_the_class_names_are_refused(broken):
    manifest = json.loads((broken / "manifest.json").read_text())
    manifest["class_names"] = manifest["class_names"][:3]
    (broken / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="label 9 is out of range, the manifest names 3 classes"):
        format.ShardReader(broken, "train")


@pytest.mark.parametrize("size", [(60, 40), (40, 61), (100, 33), (16, 16), (5, 9), (3, 400)])
@pytest.mark.parametrize("crop", [Crop(), Crop(0.0, 0.0), Crop(1.0, 1.0, is_flipped=True)])
@pytest.mark.parametrize("has_kernel", [True, False])
def test_preprocessing_is_flip_resize_crop(size, crop, has_kernel, monkeypatch):
    """Pillow's resize of the whole image, then the cut, is the reference for torch's kernel and for resizing the cut only."""
    if has_kernel and not image_data.HAS_LANCZOS:
        pytest.skip("this torch has no Lanczos kernel")
    monkeypatch.setattr(image_data, "HAS_LANCZOS", has_kernel)
    noise = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((size[0], size[1]), Image.Resampling.BOX)
    ours = preprocess(image, 16, 1.125, crop).astype(int)
    if crop.is_flipped:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    width, height = (max(18, round(side * 18 / min(size))) for side in size)
    top, left = round(crop.top * (height - 16)), round(crop.left * (width - 16))
    whole = np.asarray(image.resize((width, height), Image.Resampling.LANCZOS)).astype(int)
    difference = np.abs(ours - whole[top : top + 16, left : left + 16])
    assert difference[3:-3, 3:-3].max() <= (2 if has_kernel else 1)
    assert difference.mean() < 1


def test_augmentation_depends_on_seed_epoch_and_sample_alone(packed):
    dataset = ImageDataset(format.ShardReader(packed, "train"), 16, 1.5, random_crop=True, random_flip=True, seed=1)
    crops = {dataset.crop_of(SampleRequest(sample, epoch, True)) for sample in range(20) for epoch in range(20)}
    assert len(crops) == 400
    assert {crop.is_flipped for crop in crops} == {True, False}
    assert dataset.crop_of(SampleRequest(3, 4, True)) == dataset.crop_of(SampleRequest(3, 4, True))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_do_not_depend_on_workers(packed, num_workers):
    def batches(workers: int) -> list[list[float]]:
        data = ImageDataModule(str(packed), 16, 8, num_workers=workers, resize_ratio=1.25, lanes=4, window=6)
        data.setup()
        return [batch.images.sum(dim=(1, 2, 3)).tolist() for batch in data.train_dataloader()]

    assert batches(num_workers) == batches(0)


@pytest.mark.parametrize(("num_ranks", "num_workers"), [(1, 3), (4, 0), (4, 2), (8, 1)])
@pytest.mark.parametrize(("num_train", "num_val"), [(48, 11), (9, 3)])
def test_every_rank_gets_as_many_batches_and_validation_sees_each_image_once(
    num_train, num_val, num_ranks, num_workers, tmp_path_factory
):
    """Fewer shards than ranks (3 or 1 for 4 and 8), and fewer validation images than ranks x workers."""
    folder = make_shards(tmp_path_factory.mktemp("few"), num_train, num_val)

    def of_rank(rank):
        data = ImageDataModule(str(folder), 16, 8, num_workers=num_workers, resize_ratio=1.0)
        data.ranks = lambda: (rank, num_ranks)
        data.trainer = Alone
        data.setup()
        return list(data.train_dataloader()), list(data.val_dataloader())

    class Alone:
        accumulate_grad_batches = 1

    def real_images(batches):
        return [image.numpy().tobytes() for batch in batches for image in batch.images[batch.weight > 0]]

    train, val = zip(*(of_rank(rank) for rank in range(num_ranks)), strict=True)
    assert {len(batches) for batches in train} == {num_train // 8}
    seen = [image for batches in train for image in real_images(batches)]
    assert len(seen) == len(set(seen)) == num_train // 8 * 8
    assert len({len(batches) for batches in val}) == 1
    counted = [image for batches in val for image in real_images(batches)]
    assert len(counted) == len(set(counted)) == num_val


def test_a_rank_without_images_is_an_error_at_the_start(packed):
    data = ImageDataModule(str(packed), 16, 96, num_workers=0)
    data.setup()
    with pytest.raises(ValueError, match="48 images, fewer than one batch of 96"):
        data.train_dataloader()


def test_more_replaced_images_than_allowed_stop_the_run(packed):
    data = ImageDataModule(str(packed), 16, 8, num_workers=0, max_skipped_share=0.05)
    data.setup()
    batch = next(iter(data.train_dataloader()))

    class Training:
        training = True

    data.trainer = Training()
    data.on_before_batch_transfer(batch._replace(skipped=batch.skipped + 0), 0)
    data.on_before_batch_transfer(
        batch._replace(skipped=batch.skipped.index_fill(0, batch.condition.new_tensor([0, 1]), 1)), 0
    )
    assert data.skipped == 2
    with pytest.raises(ValueError, match=r"3 images could not be read, but max_skipped_share=0.05 allows 2 of 48"):
        data.on_before_batch_transfer(
            batch._replace(skipped=batch.skipped.index_fill(0, batch.condition.new_tensor([0]), 1)), 0
        )


@pytest.mark.parametrize("num_workers", [1, 2])
def test_the_imagenet_archives_are_packed_without_unpacking(num_workers, tmp_path):
    expected = make_ilsvrc(tmp_path / "in")
    source = ilsvrc2012_source(*(tmp_path / "in" / name for name in ("train.tar", "val.tar", "devkit.tar.gz")))
    assert source.class_names == ["ant (n01)", "bee (n02)", "cat (n03)"]
    packing.pack(source, tmp_path / "out", shard_images=5, seed=0, num_workers=num_workers)
    for split in ("train", "val"):
        reader = format.ShardReader(tmp_path / "out", split)
        assert sorted((reader.read(i), int(reader.labels[i])) for i in range(len(reader))) == sorted(expected[split])
    assert format.verify(tmp_path / "out") == 17
    assert not list((tmp_path / "out").glob("*.JPEG"))


def test_archives_that_do_not_belong_together_are_refused(tmp_path):
    make_ilsvrc(tmp_path / "in")
    train, val, devkit = (tmp_path / "in" / name for name in ("train.tar", "val.tar", "devkit.tar.gz"))
    with pytest.raises(ValueError, match=r"n03.tar', for which the devkit has no label|holds 'n03.tar'"):
        ilsvrc2012_source(train, train, devkit)
    with pytest.raises(ValueError, match="holds no meta.mat"):
        ilsvrc2012_source(train, val, val)
    with pytest.raises(ValueError, match="nowhere does not exist"):
        ilsvrc2012_source(tmp_path / "nowhere", val, devkit)


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


def add_member(tar, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def test_keys_of_foreign_shards_that_cannot_be_used_are_left_out_and_named(tmp_path, caplog):
    image = digits(1, 1).splits["train"][0].load()
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        add_member(tar, "../../outside.png", image)  # a path that leads out: only bytes are read, nothing is unpacked
        add_member(tar, "../../outside.cls", b"1")
        for name, content in [("a.png", image), ("a.cls", b"2"), ("a.json", b"{}"), ("b.png", image), ("c.cls", b"0")]:
            add_member(tar, name, content)
        for name, content in [("d.png", image), ("d.cls", b"1"), ("d.png", image), ("e.PNG", image), ("e.cls", b"cat")]:
            add_member(tar, name, content)
    shards = [f"train={tmp_path / 't.tar'}", f"val={tmp_path / 't.tar'}", "num_workers=1"]
    settings = ["source=shards", f"out={tmp_path / 'out'}", *shards]
    with pytest.raises(ValueError, match=r"4 keys cannot be used and 2 can, but max_skipped_share=0.001"):
        pack_verb.run(config(tmp_path, *settings, verb="pack"))
    pack_verb.run(config(tmp_path, *settings, "max_skipped_share=2.0", verb="pack"))
    reader = format.ShardReader(tmp_path / "out", "train")
    assert reader.labels.tolist() == [1, 2] and reader.read(1) == image
    assert reader.manifest["splits"]["train"]["skipped"] == 4
    for problem in (
        "'b' holds ['png']",
        "'c' holds ['cls']",
        "'d' holds two files of type .png",
        "'e' holds label b'cat'",
    ):
        assert f"t.tar: key {problem}" in caplog.text
    assert not (tmp_path.parent.parent / "outside.png").exists()
    names = tmp_path / "names.txt"
    names.write_text("one\ntwo")
    with pytest.raises(ValueError, match="label 2 is out of range, class_names has 2 names"):
        pack_verb.run(config(tmp_path, *settings, "max_skipped_share=2.0", f"class_names={names}", verb="pack"))


@pytest.mark.parametrize("kept", [0.3, 0.6])
def test_a_foreign_shard_that_is_cut_off_is_refused(kept, packed, tmp_path):
    content = (packed / "train-000000.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(content[: int(kept * len(content)) // 512 * 512 - 100])
    settings = [
        "source=shards",
        f"train={tmp_path / 'cut.tar'}",
        f"val={tmp_path / 'cut.tar'}",
        f"out={tmp_path / 'out'}",
    ]
    with pytest.raises(ValueError, match=r"cut.tar is damaged"):
        pack_verb.run(config(tmp_path, *settings, "num_workers=1", verb="pack"))
    with pytest.raises(ValueError, match="nothing-[*].tar matches no file"):
        pack_verb.run(config(tmp_path, *settings, f"train={tmp_path}/nothing-*.tar", verb="pack"))


def test_verify_names_everything_that_is_broken(broken, capsys):
    settings = ["verify=true", f"path={broken}"]
    pack_verb.run(config(broken, *settings, verb="pack"))
    assert "59 images verified" in capsys.readouterr().out
    (broken / "train-000001.tar").unlink()
    (broken / "val-000000.tar").write_bytes(b"short")
    index = np.load(broken / "train.index.npy")
    index["label"][0] = 3 - index["label"][0] % 2
    np.save(broken / "train.index.npy", index)
    with pytest.raises(ValueError) as caught:
        pack_verb.run(config(broken, *settings, verb="pack"))
    assert "3 files are broken" in str(caught.value)
    for problem in (
        "train-000001.tar is missing",
        "val-000000.tar has 5 bytes",
        "train.index.npy: its content changed",
    ):
        assert problem in str(caught.value)


def test_shards_of_about_a_size_in_megabytes(tmp_path):
    settings = ["source=mnist5k", f"out={tmp_path}", "shard_size=0.5", "num_workers=1"]
    pack_verb.run(config(tmp_path, *settings, verb="pack"))
    sizes = [shard["num_bytes"] for shard in format.load_manifest(tmp_path)["splits"]["train"]["shards"]]
    assert len(sizes) > 5
    assert sizes[:-1] == pytest.approx([5e5] * (len(sizes) - 1), rel=0.15)


def test_large_images_are_reencoded_to_the_short_side(tmp_path):
    make_ilsvrc(tmp_path / "in")
    source = ilsvrc2012_source(*(tmp_path / "in" / name for name in ("train.tar", "val.tar", "devkit.tar.gz")))
    packing.pack(source, tmp_path / "out", shard_images=5, seed=0, short_side=20, quality=95)
    reader = format.ShardReader(tmp_path / "out", "train")
    for i in range(len(reader)):
        image = Image.open(io.BytesIO(reader.read(i)))
        assert min(image.size) == 20 and image.size[1] in (27, 28, 29, 30)
    assert reader.manifest["reencoded"] == {"short_side": 20, "quality": 95}
    assert reencode(b"no image", 20, 95) == (b"no image", "")
    with pytest.raises(ValueError, match="packed with different reencoded"):
        packing.pack(source, tmp_path / "out", shard_images=5, seed=0, short_side=24)


def saved(image, kind, **kwargs) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, kind, **kwargs)
    return open_rgb(Image.open(io.BytesIO(buffer.getvalue())))


def test_odd_images_become_upright_rgb():
    assert saved(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "jpeg").getpixel((1, 1))[0] > 200
    gray = Image.fromarray(np.full((3, 3), 51400, dtype=np.uint16))
    assert saved(gray, "png").getpixel((0, 0)) == (200, 200, 200)
    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert saved(clear, "png").getpixel((0, 0)) == (255, 255, 255)
    half = Image.new("LA", (2, 2), (0, 128))
    assert saved(half, "png").getpixel((0, 0))[0] == pytest.approx(127, abs=1)
    frames = [Image.new("RGB", (5, 5), color) for color in ("red", "blue")]
    assert saved(frames[0], "gif", save_all=True, append_images=frames[1:]).getpixel((0, 0)) == (255, 0, 0)
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    assert saved(Image.new("RGB", (8, 4)), "jpeg", exif=exif).size == (4, 8)
    pixel = preprocess(saved(Image.new("RGB", (1, 1), (9, 9, 9)), "png"), 16, 1.125, Crop())
    assert pixel.shape == (16, 16, 3) and (pixel == 9).all()


def test_the_card_describes_the_shards(tmp_path):
    make_shards(tmp_path)
    write_card(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "| train | 48 | 3 |" in text and "| val | 11 | 1 |" in text and "| 28 x 28 | 48 |" in text
    assert Image.open(tmp_path / "samples.png").size[0] > 500
