"""Reading shards: whole, or an error that names the shard."""

import json

import pytest
import torch
import webdataset
from support.shards import digits

from varlab.data import shards as format
from varlab.data.images import CenterCrops
from varlab.data.shards import ShardReader


def test_images_are_spread_evenly_over_the_split(digits_folder):
    reader = ShardReader(digits_folder, "val")
    assert CenterCrops(reader, 16, 1.0, None, 4, torch.device("cpu")).samples == list(range(11))
    few = CenterCrops(reader, 16, 1.0, 3, 2, torch.device("cpu"))
    assert few.samples == [0, 5, 10] and [len(batch) for batch in few] == [2, 1] and len(few) == 2
    assert torch.equal(torch.cat(list(few)), few.read([0, 5, 10]))


def test_packed_images_come_back_with_their_labels(digits_folder):
    source, reader = digits(), format.ShardReader(digits_folder, "train")
    expected = sorted((item.load(), item.label) for item in source.splits["train"])
    assert sorted((reader.read(i), int(reader.labels[i])) for i in range(len(reader))) == expected
    assert format.verify(digits_folder) == 59
    assert reader.manifest["class_names"] == [str(digit) for digit in range(10)]


def test_the_webdataset_library_reads_the_shards(digits_folder):
    reader = format.ShardReader(digits_folder, "train")
    urls = [shard.url for shard in reader.shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    assert [sample["png"] for sample in samples] == [reader.read(i) for i in range(len(reader))]
    assert [int(sample["cls"]) for sample in samples] == reader.labels.tolist()


def test_a_missing_or_truncated_shard_is_named_at_once(broken_shards):
    shard = broken_shards / "train-000001.tar"
    content = shard.read_bytes()
    shard.write_bytes(content[:5000])
    with pytest.raises(ValueError, match=r"train-000001.tar has 5000 bytes, the manifest says \d+"):
        format.ShardReader(broken_shards, "train")
    shard.unlink()
    with pytest.raises(ValueError, match=r"train-000001.tar is missing"):
        format.ShardReader(broken_shards, "train")


def test_changed_bytes_are_noticed(broken_shards):
    reader = format.ShardReader(broken_shards, "train")
    shard, offset = broken_shards / "train-000000.tar", int(reader.index[3]["offset"])
    content = bytearray(shard.read_bytes())
    content[offset + 40] ^= 0xFF
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=f"the image at byte {offset} is damaged"):
        format.ShardReader(broken_shards, "train").read(3)
    with pytest.raises(ValueError, match=r"1 files are broken: .*train-000000.tar: its content changed since packing"):
        format.verify(broken_shards)


def test_labels_beyond_the_class_names_are_refused(broken_shards):
    manifest = json.loads((broken_shards / "manifest.json").read_text())
    manifest["class_names"] = manifest["class_names"][:3]
    (broken_shards / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="label 9 is out of range, the manifest names 3 classes"):
        format.ShardReader(broken_shards, "train")
