"""From bytes to the square that a network sees."""

import numpy as np
import pytest
from PIL import Image
from support.shards import digits

from varlab.data import images as image_data
from varlab.data import shards as format
from varlab.data import write_shards as packing
from varlab.data.images import Crop, ImageDataModule, ImageDataset, preprocess
from varlab.data.order import SampleRequest
from varlab.data.resolutions import height_and_width, resolution_of
from varlab.data.sources.items import Item


def test_a_corrupt_image_is_replaced_by_its_neighbor_and_counted(tmp_path, caplog):
    source = digits(40)
    items = source.splits["train"]
    items[7] = Item(items[7].label, "png", content=b"no image")
    packing.pack(source, tmp_path, shard_images=20, seed=0, check=False)
    reader = format.ShardReader(tmp_path, "train")
    bad = next(i for i in range(40) if reader.read(i) == b"no image")
    dataset = ImageDataset(reader, 16, 1.0, random_crop=False, random_flip=False)
    batch = dataset.__getitems__([SampleRequest(i, 0, True) for i in range(40)])
    assert batch.skipped.tolist() == [int(i == bad) for i in range(40)]
    assert np.array_equal(batch.images[bad], batch.images[(bad + 1) % 40])
    assert batch.condition[bad] == reader.labels[(bad + 1) % 40]
    assert "cannot be decoded" in caplog.text
    assert len(batch.condition) == 40


def test_no_name_is_looked_up_for_images_that_can_be_decoded(digits_folder, monkeypatch):
    """The list of names is read from its start; for every image this would take longer than a training step."""
    dataset = ImageDataset(format.ShardReader(digits_folder, "train"), 16, 1.0, random_crop=False, random_flip=False)
    monkeypatch.delattr(format.ShardReader, "name_of")
    assert dataset.__getitems__([SampleRequest(i, 0, True) for i in range(8)]).skipped.sum() == 0


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


@pytest.mark.parametrize("given", [(40, 20), (20, 40), (24, 16), (300, 10)])
@pytest.mark.parametrize("has_kernel", [True, False])
def test_a_rectangle_is_covered_and_cut_in_its_middle(given, has_kernel, monkeypatch):
    if has_kernel and not image_data.HAS_LANCZOS:
        pytest.skip("this torch has no Lanczos kernel")
    monkeypatch.setattr(image_data, "HAS_LANCZOS", has_kernel)
    width, height = given
    ramp = np.linspace(0, 255, width)[None, :, None].repeat(height, 0).repeat(3, 2).astype(np.uint8)
    cut = preprocess(Image.fromarray(ramp), (16, 24), 1.0, Crop()).astype(int)
    assert cut.shape == (16, 24, 3)
    shown = min(1.0, 24 / (width * max(16 / height, 24 / width)))  # share of the width
    assert cut[8, 12, 0] == pytest.approx(127.5, abs=8)
    assert cut[8, 20, 0] - cut[8, 4, 0] == pytest.approx(255 * shown * 16 / 24, abs=12)
    mirrored = preprocess(Image.fromarray(ramp), (16, 24), 1.0, Crop(is_flipped=True))
    assert np.abs(mirrored[:, ::-1].astype(int) - cut).max() <= 255 * shown / 24 + 3
    corner = preprocess(Image.fromarray(ramp), [16, 24], 1.25, Crop(0.0, 0.0))
    assert corner.shape == (16, 24, 3) and corner[8, 0, 0] < 12


def test_a_size_is_a_side_or_a_pair():
    assert height_and_width(16) == (16, 16) and height_and_width([16, 24]) == (16, 24)
    assert resolution_of((16, 16)) == 16 and resolution_of((16, 24)) == [16, 24]
    for wrong in ([16], [16, 24, 3], [0, 16], 0):
        with pytest.raises(ValueError, match=r"give the side of a square, or \[height, width\], in pixels"):
            height_and_width(wrong)


def test_augmentation_depends_on_seed_epoch_and_sample_alone(digits_folder):
    dataset = ImageDataset(
        format.ShardReader(digits_folder, "train"), 16, 1.5, random_crop=True, random_flip=True, seed=1
    )
    crops = {dataset.crop_of(SampleRequest(sample, epoch, True)) for sample in range(20) for epoch in range(20)}
    assert len(crops) == 400
    assert {crop.is_flipped for crop in crops} == {True, False}
    assert dataset.crop_of(SampleRequest(3, 4, True)) == dataset.crop_of(SampleRequest(3, 4, True))


def test_more_replaced_images_than_allowed_stop_the_run(digits_folder):
    data = ImageDataModule(str(digits_folder), 16, 8, num_workers=0, max_skipped_share=0.05)
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
