"""Checkpoint files and folders: nothing in them runs, and damage is noticed."""

import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from support.fixtures import OLD
from support.fuzz import FUZZ, VALUES, damaged, forged, is_read_or_refused

from varlab.checkpoints.checkpoint_files import CHECKSUMS, META_FILE, check_sharded
from varlab.checkpoints.load import load, load_any
from varlab.files import sha256

PLAIN = {key: value for key, value in torch.load(OLD / "var.ckpt", weights_only=True)["varlab"].items()}


class Hostile:
    """Would touch a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.fixture
def sharded(tmp_path):
    return shutil.copytree(OLD / "var_sharded.ckpt", tmp_path / "last.ckpt")


@FUZZ
@given(content=damaged((OLD / "var.ckpt").read_bytes()))
def test_damaged_checkpoints(content, tmp_path):
    (tmp_path / "last.ckpt").write_bytes(content)
    assert is_read_or_refused(lambda: load(tmp_path / "last.ckpt"), tmp_path / "last.ckpt")


@FUZZ
@given(entry=forged(PLAIN))
def test_forged_checkpoints(entry, tmp_path):
    saved = torch.load(OLD / "var.ckpt", weights_only=True)
    torch.save({**saved, "varlab": entry}, tmp_path / "last.ckpt")
    assert is_read_or_refused(lambda: load(tmp_path / "last.ckpt"), tmp_path / "last.ckpt")


@FUZZ
@given(value=VALUES)
@pytest.mark.parametrize("key", ["state_dict", "ema", "varlab", None])
def test_checkpoints_of_something_else(key, value, tmp_path):
    saved = torch.load(OLD / "var.ckpt", weights_only=True)
    torch.save(value if key is None else {**saved, key: value}, tmp_path / "last.ckpt")
    assert is_read_or_refused(lambda: load(tmp_path / "last.ckpt"), tmp_path / "last.ckpt")


@FUZZ
@given(content=damaged((OLD / "var_sharded.ckpt/.metadata").read_bytes()))
def test_damaged_lists_of_sharded_checkpoints(content, sharded):
    (sharded / ".metadata").write_bytes(content)
    assert is_read_or_refused(lambda: load_any(sharded), sharded / ".metadata")


def rewrite(sharded, change):
    """Changes the list of a sharded checkpoint's contents."""
    listed = pickle.loads((sharded / ".metadata").read_bytes())
    (sharded / ".metadata").write_bytes(pickle.dumps(change(listed) or listed))


def test_the_list_of_a_sharded_checkpoint_runs_no_code(sharded, tmp_path):
    marker = tmp_path / "was-here"
    rewrite(sharded, lambda listed: Hostile(marker))
    with pytest.raises(ValueError, match="last.ckpt is damaged, or no checkpoint .*: it names pathlib.Path.touch"):
        load(sharded)
    assert not marker.exists()


def test_a_name_within_an_allowed_module_is_not_allowed(sharded):
    """Protocol 4 resolves dotted names: a module that imports os would give os.system."""
    code = b"\x80\x04\x8c\x25torch.distributed.checkpoint.metadata\x8c\x09os.system\x93\x8c\x04true\x85R."
    (sharded / ".metadata").write_bytes(code)
    with pytest.raises(ValueError, match="it names torch.distributed.checkpoint.metadata.os.system"):
        load(sharded)


def test_the_values_of_a_sharded_checkpoint_run_no_code(sharded, tmp_path):
    """Values that are no tensors lie in the files as pickles of their own."""
    marker = tmp_path / "was-here"
    listed = pickle.loads((sharded / ".metadata").read_bytes())
    place, info = next((p, i) for p, i in listed.storage_data.items() if "param_groups.0.lr" in p.fqn)
    file = sharded / info.relative_path
    torch.save(Hostile(marker), tmp_path / "hostile.pt")
    offset, content = file.stat().st_size, (tmp_path / "hostile.pt").read_bytes()
    file.write_bytes(file.read_bytes() + content)

    def point_there(listed):
        listed.storage_data[place].offset, listed.storage_data[place].length = offset, len(content)

    rewrite(sharded, point_there)
    with pytest.raises(ValueError, match="no checkpoint of tensors and plain values"):
        load(sharded)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["../secret.distcp", "/etc/passwd", "__0_0.distcp/../x"])
def test_a_sharded_checkpoint_lists_files_of_its_own_folder_only(name, sharded):
    def elsewhere(listed):
        for info in listed.storage_data.values():
            info.relative_path = name

    rewrite(sharded, elsewhere)
    with pytest.raises(ValueError, match=f"it lists the file '{name}'"):
        load(sharded)


def test_a_sharded_checkpoint_is_no_larger_than_its_files(sharded):
    def enlarge(listed):
        entry = next(entry for entry in listed.state_dict_metadata.values() if hasattr(entry, "properties"))
        entry.size = torch.Size([10**9, 10**6])

    rewrite(sharded, enlarge)
    with pytest.raises(ValueError, match="smaller than the tensors"):
        load(sharded)


@pytest.mark.parametrize("name", ["__1_0.distcp", ".metadata"])
def test_a_flipped_bit_of_a_sharded_checkpoint_is_noticed(name, sharded):
    checksums = {file: sha256(sharded / file) for file in os.listdir(sharded) if file != META_FILE}
    torch.save({**torch.load(sharded / META_FILE, weights_only=True), CHECKSUMS: checksums}, sharded / META_FILE)
    check_sharded(sharded, is_verified=True)
    content = bytearray((sharded / name).read_bytes())
    content[len(content) // 2] ^= 1
    (sharded / name).write_bytes(content)
    with pytest.raises(ValueError, match="last.ckpt is damaged"):
        check_sharded(sharded, is_verified=True)


def test_a_list_that_is_missing_is_named(sharded):
    (sharded / ".metadata").unlink()
    with pytest.raises(ValueError, match=r"last.ckpt is not a checkpoint: .metadata is missing"):
        load(sharded)
