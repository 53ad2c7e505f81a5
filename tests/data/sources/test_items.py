"""Items of a source."""

import io

import pytest
from PIL import Image
from support.image_files import make_ilsvrc

from varlab.data import shards as format
from varlab.data import write_shards as packing
from varlab.data.sources.ilsvrc2012 import ilsvrc2012_source
from varlab.data.sources.items import reencode


def test_large_images_are_reencoded_to_the_short_side(tmp_path):
    make_ilsvrc(tmp_path / "in")
    source = ilsvrc2012_source(*(tmp_path / "in" / name for name in ("train.tar", "val.tar", "devkit.tar.gz")))
    packing.pack(source, tmp_path / "out", shard_images=5, seed=0, short_side=20, quality=95)
    reader = format.ShardReader(tmp_path / "out", "train")
    for i in range(len(reader)):
        image = Image.open(io.BytesIO(reader.read(i)))
        assert min(image.size) == 20 and image.size[1] in (27, 28, 29, 30)
    assert reader.manifest["reencoded"] == {"short_side": 20, "quality": 95}
    assert reencode(Image.new("RGB", (20, 30)), 20, 95) is None
    with pytest.raises(ValueError, match="packed with different reencoded"):
        packing.pack(source, tmp_path / "out", shard_images=5, seed=0, short_side=24)
