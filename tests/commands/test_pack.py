"""`varlab pack`: verification and sizes."""

import numpy as np
import pytest
from support.runs import config

from varlab.commands import pack as pack_verb
from varlab.data import shards as format


def test_verify_names_everything_that_is_broken(broken_shards, capsys):
    settings = ["verify=true", f"path={broken_shards}"]
    pack_verb.run(config(broken_shards, *settings, verb="pack"))
    assert "59 images verified" in capsys.readouterr().out
    (broken_shards / "train-000001.tar").unlink()
    (broken_shards / "val-000000.tar").write_bytes(b"short")
    index = np.load(broken_shards / "train.index.npy")
    index["label"][0] = 3 - index["label"][0] % 2
    np.save(broken_shards / "train.index.npy", index)
    with pytest.raises(ValueError) as caught:
        pack_verb.run(config(broken_shards, *settings, verb="pack"))
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
