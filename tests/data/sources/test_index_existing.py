"""Shards of others, used where they lie."""

import io
import tarfile

import pytest
from support.runs import config
from support.shards import digits

from varlab.commands import pack as pack_verb
from varlab.data import shards as format


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
def test_a_foreign_shard_that_is_cut_off_is_refused(kept, digits_folder, tmp_path):
    content = (digits_folder / "train-000000.tar").read_bytes()
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
