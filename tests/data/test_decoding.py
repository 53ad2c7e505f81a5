"""One way to open images: the same odd files through every road give the same pixels, or a reason."""

import io

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image, features

from varlab.app.session import read_upload
from varlab.data.decoding import missing_decoder, open_image, open_mask
from varlab.data.images import Crop, ImageDataset, preprocess
from varlab.data.shards import ShardReader
from varlab.data.sources.folder import folder_source
from varlab.data.sources.items import Item, reencode
from varlab.data.sources.parquet import ParquetSource
from varlab.data.write_shards import PackOptions, Source, pack
from varlab.evaluation.image_sets import ImageSet

SIDE = 16


def encoded(image: Image.Image, kind: str, **kwargs) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **kwargs)
    return buffer.getvalue()


def transposed() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    return exif


def ramp() -> Image.Image:
    return Image.fromarray(np.arange(SIDE * SIDE * 3, dtype=np.uint32).reshape(SIDE, SIDE, 3).astype(np.uint8))


DEEP = np.linspace(0, 65535, SIDE * SIDE).reshape(SIDE, SIDE).astype(np.uint16)
ODD = {  # name: (file, the color at its upper left corner)
    "plain.png": (encoded(ramp(), "png"), (0, 1, 2)),
    "cmyk.jpg": (encoded(Image.new("CMYK", (SIDE, SIDE), (0, 255, 255, 0)), "jpeg"), None),
    "deep.png": (encoded(Image.fromarray(DEEP), "png"), (0, 0, 0)),
    "deep.tif": (encoded(Image.fromarray(np.full((SIDE, SIDE), 51400, dtype=np.uint16)), "tiff"), (200, 200, 200)),
    "float.tif": (encoded(Image.fromarray(np.full((SIDE, SIDE), 0.2, dtype=np.float32)), "tiff"), (51, 51, 51)),
    "clear.png": (encoded(Image.new("RGBA", (SIDE, SIDE), (255, 0, 0, 0)), "png"), (255, 255, 255)),
    "half.png": (encoded(Image.new("LA", (SIDE, SIDE), (0, 128)), "png"), (127, 127, 127)),
    "palette.png": (encoded(ramp().quantize(8), "png", transparency=0), None),
    "bits.png": (encoded(Image.new("1", (SIDE, SIDE), 1), "png"), (255, 255, 255)),
    "turned.jpg": (encoded(Image.new("RGB", (2 * SIDE, SIDE), (9, 9, 9)), "jpeg", exif=transposed()), (9, 9, 9)),
    "moves.gif": (
        encoded(Image.new("RGB", (SIDE, SIDE), "red"), "gif", save_all=True, append_images=[Image.new("RGB", (SIDE, SIDE), "blue")]),
        (255, 0, 0),
    ),
}  # fmt: skip
BROKEN = {
    "empty.png": b"",
    "text.png": b"no image",
    "cut.png": ODD["plain.png"][0][:60],
    "twelve bits.png": encoded(Image.fromarray((DEEP // 17).clip(0, 4000)), "png"),
    "large floats.tif": encoded(Image.fromarray(np.full((SIDE, SIDE), 200.0, dtype=np.float32)), "tiff"),
}


@pytest.mark.parametrize("name", ODD)
def test_training_scoring_uploads_and_parquet_see_the_same_pixels(name, tmp_path):
    content, corner = ODD[name]
    expected = open_image(content)
    assert expected.mode == "RGB"
    if corner is not None:
        assert np.abs(np.subtract(expected.getpixel((0, 0)), corner)).max() <= 1
    if name == "turned.jpg":
        assert expected.size == (SIDE, 2 * SIDE)
    square = preprocess(expected, SIDE, 1.0, Crop())
    folder = tmp_path / "images/a"
    folder.mkdir(parents=True)
    (folder / name).write_bytes(content)
    assert (ImageSet(folder).pixels(0) == np.asarray(expected)).all() if is_scored(name) else True
    assert (np.asarray(read_upload(folder / name, SIDE)) == square).all()
    smaller = reencode(expected, SIDE // 2, 100)
    assert min(open_image(smaller).size) == SIDE // 2
    assert abs(np.asarray(open_image(smaller)).mean() - np.asarray(expected).mean()) < 3
    table = pyarrow.table({"image": [{"bytes": content}] * 4, "label": [0, 0, 1, 1]})
    pyarrow.parquet.write_table(table, tmp_path / "images.parquet")
    source = ParquetSource(train=str(tmp_path / "images.parquet"), val=str(tmp_path / "images.parquet"))
    source.write(tmp_path / "shards", PackOptions(shard_images=4))
    dataset = ImageDataset(ShardReader(tmp_path / "shards", "train"), SIDE, 1.0, random_crop=False, random_flip=False)
    assert (dataset.image(0, Crop()) == square).all()


def is_scored(name: str) -> bool:
    return name.endswith((".png", ".jpg"))


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_decoded_or_understood_is_named_by_every_road(name, tmp_path):
    (tmp_path / name).write_bytes(BROKEN[name])
    reason = {"twelve bits.png": "largest value is 3855 of 65535", "large floats.tif": "floats from 200 to 200"}.get(
        name, ""
    )
    with pytest.raises(ValueError, match=f"x cannot be decoded: .*{reason}"):
        open_image(BROKEN[name], "x")
    with pytest.raises(ValueError, match="this file cannot be decoded"):
        read_upload(tmp_path / name, SIDE)
    items = [Item(0, "png", BROKEN[name], name="x"), Item(0, "png", ODD["plain.png"][0])]
    for short_side in (None, 4):
        Source("test", "test", ["a"], {"train": items}).write(
            tmp_path / f"{short_side}", PackOptions(short_side=short_side)
        )
        assert (tmp_path / f"{short_side}/skipped.txt").read_text().startswith("x cannot be decoded")
        assert len(ShardReader(tmp_path / f"{short_side}", "train")) == 1
    if is_scored(name):
        with pytest.raises(ValueError, match=f"{name} cannot be decoded"):
            ImageSet(tmp_path).pixels(0)


def test_an_image_larger_than_allowed_is_refused_before_it_is_decoded():
    with pytest.raises(ValueError, match="has 100 x 90 pixels, more than 8,000"):
        open_image(encoded(Image.new("1", (100, 90)), "png"), max_pixels=8000)


def test_masks_are_black_and_white_whatever_their_file_says(tmp_path):
    region = np.zeros((8, 8), dtype=bool)
    region[:3] = True
    palette = Image.fromarray(region.astype(np.uint8), "P")
    palette.putpalette([0, 0, 0, 128, 0, 0])  # as of segmentation data sets
    opaque = Image.merge("LA", [Image.fromarray(255 * region.astype(np.uint8)), Image.new("L", (8, 8), 255)])
    for number, mask in enumerate([
        Image.fromarray(255 * region.astype(np.uint8)), Image.fromarray(region), Image.fromarray(region.astype(np.uint8)),
        Image.fromarray(65535 * region.astype(np.uint16)), palette, opaque, Image.fromarray(255 * region.astype(np.uint8)).convert("RGB"),
    ]):  # fmt: skip
        mask.save(tmp_path / f"{number}.png")
        assert (open_mask(tmp_path / f"{number}.png") == region).all(), number
    clear = Image.merge("LA", [Image.new("L", (8, 8)), Image.fromarray(255 * region.astype(np.uint8))])
    for name, mask, message in [
        ("clear", clear, "transparent in places"),
        ("gray", Image.new("L", (8, 8), 100), "its largest value is 100, not 1, 255 or 65535"),
    ]:
        mask.save(tmp_path / f"{name}.png")
        with pytest.raises(ValueError, match=f"{name}.png cannot be used: .*{message}"):
            open_mask(tmp_path / f"{name}.png")


def test_a_folder_with_odd_files_packs_and_names_what_training_will_replace(tmp_path):
    for label in ("a", "b"):
        (tmp_path / "in" / label).mkdir(parents=True)
        for name in ("plain.png", "clear.png"):
            (tmp_path / "in" / label / name).write_bytes(ODD[name][0])
    pack(folder_source(tmp_path / "in", 0.5), tmp_path / "out", shard_images=4, seed=0, short_side=8)
    reader = ShardReader(tmp_path / "out", "train")
    means = sorted(np.asarray(open_image(reader.read(i))).mean() for i in range(len(reader)))
    assert len(means) == 2 and means[-1] > 100  # the transparent one is white, not black


@pytest.mark.parametrize(("brand", "package"), [(b"heic", "pillow-heif"), (b"avif", "pillow>=11.3"), (b"qt  ", None)])
def test_a_missing_decoder_is_named(brand, package, tmp_path):
    content = b"\0\0\0\x18ftyp" + brand + bytes(40)
    (tmp_path / "a.heic").write_bytes(content)
    for source in (content, tmp_path / "a.heic"):
        assert missing_decoder(source) == package
    assert missing_decoder(b"") is None
    if package == "pillow-heif" and "HEIF" not in Image.OPEN:
        with pytest.raises(ValueError, match="a.heic cannot be decoded: pip install 'pillow-heif'"):
            open_image(tmp_path / "a.heic", "a.heic")


def test_what_is_no_image_is_told_without_an_address_in_memory():
    with pytest.raises(ValueError, match="x cannot be decoded: it is not an image of a known format$"):
        open_image(b"no image", "x")


def test_avif_is_read_where_pillow_can(tmp_path):
    if not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    Image.new("RGB", (8, 8), (200, 30, 10)).save(tmp_path / "a.avif")
    assert np.abs(np.subtract(open_image(tmp_path / "a.avif").getpixel((4, 4)), (200, 30, 10))).max() < 6
