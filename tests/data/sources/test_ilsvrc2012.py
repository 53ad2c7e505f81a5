"""The archives of ImageNet."""

import pytest
from support.image_files import make_ilsvrc

from varlab.data import shards as format
from varlab.data import write_shards as packing
from varlab.data.sources.ilsvrc2012 import ilsvrc2012_source


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
