"""Shards of others, used where they lie."""

import io
import tarfile

import pytest
import webdataset
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
        "'e' holds label 'cat', expected a number",
    ):
        assert f"t.tar: key {problem}" in caplog.text
    assert not (tmp_path.parent.parent / "outside.png").exists()
    names = tmp_path / "names.txt"
    names.write_text("one\ntwo")
    with pytest.raises(ValueError, match="label 2 is out of range: labels number the classes from 0 to 1"):
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


PNG = digits(1, 1).splits["train"][0].load()


def index(folder, members, *settings, name="t.tar", mode="w"):
    """Indexes one tar of these members for both splits."""
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / name, mode) as tar:
        for member, content in members:
            add_member(tar, member, content)
    given = [
        "source=shards",
        f"out={folder / 'out'}",
        f"train={folder / name}",
        f"val={folder / name}",
        "num_workers=1",
    ]
    pack_verb.run(config(folder, *given, *settings, verb="pack"))
    return format.ShardReader(folder / "out", "train")


def test_members_are_chosen_by_name(tmp_path):
    members = [
        (f"{i:03}.{extension}", content)
        for i in range(4)
        for extension, content in (("input.jpg", PNG), ("output.jpg", b"other"), ("target.cls", b"%d" % (i % 2)))
    ]
    reader = index(tmp_path, members, "image_member=input.jpg", "label_member=target.cls")
    assert reader.labels.tolist() == [0, 1, 0, 1] and reader.read(3) == PNG
    assert [sample["input.jpg"] for sample in webdataset.WebDataset(str(tmp_path / "t.tar"), shardshuffle=False)] == [
        PNG
    ] * 4


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_labels_in_json_are_numbers_or_text_also_in_compressed_tars(mode, tmp_path):
    members = [
        member
        for i in range(4)
        for member in (
            (f"{i}.jpg", PNG),
            (f"{i}.json", b'{"label": "%s", "caption": 7}' % (b"owl", b"cat")[i % 2]),
            (f"{i}.txt", b""),
        )
    ]
    reader = index(tmp_path / "a", members, "label_member=json:label", mode=mode)
    assert reader.manifest["class_names"] == ["cat", "owl"] and reader.labels.tolist() == [1, 0, 1, 0]
    assert reader.read(0) == PNG and format.verify(tmp_path / "a/out") == 8
    reader = index(tmp_path / "b", members, "label_member=json:caption", mode=mode)
    assert len(reader.manifest["class_names"]) == 8 and set(reader.labels.tolist()) == {7}
    reader = index(tmp_path / "c", members, "label_member=null", mode=mode)
    assert reader.manifest["class_names"] == ["image"]
    with pytest.raises(ValueError, match=r"4 keys cannot be used and 0 can, .* key '0' holds label .*: no such field"):
        index(tmp_path / "d", members, "label_member=json:none", mode=mode)
    reader = index(tmp_path / "d", members, "label_member=json:label", mode=mode)  # nothing of the attempt is used
    assert reader.manifest["class_names"] == ["cat", "owl"] and len(reader) == 4


def test_keys_with_dots_and_text_labels(tmp_path):
    members = [
        (f"img.v{i}.{extension}", content) for i in range(4) for extension, content in (("jpg", PNG), ("cls", b"a b\n"))
    ]
    reader = index(tmp_path, members)
    assert reader.manifest["class_names"] == ["a b"] and len(reader) == 4
    assert reader.manifest["notes"] == [
        "4 train, 4 val images of 1 classes (a b)", "keys end at the last dot of a name, since names up to the first are not unique",
    ]  # fmt: skip


def test_a_label_is_bounded(tmp_path):
    with pytest.raises(ValueError, match="t.tar: key 'a': label 2000000000 is out of range"):
        index(tmp_path, [("a.jpg", PNG), ("a.cls", b"2000000000")])
    with pytest.raises(ValueError, match="1 keys cannot be used and 1 can"):
        index(tmp_path / "b", [("a.jpg", PNG), ("a.cls", b"9" * 5000), ("b.jpg", PNG), ("b.cls", b"1")])
