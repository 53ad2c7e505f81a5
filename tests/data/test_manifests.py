"""Manifests and arrays of data sets: forged and damaged ones are refused in one line, before anything is allocated."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.fixtures import OLD
from support.fuzz import FUZZ, damaged, forged, is_read_or_refused, write

from varlab.data.manifests import TokensManifest, open_array, spot_check
from varlab.data.shards import ShardReader, load_manifest
from varlab.data.token_datamodule import TokenDataModule
from varlab.files import load_json

SHARDS, TOKENS = OLD / "shards", OLD / "tokens"
SHARDS_MANIFEST = json.loads((SHARDS / "manifest.json").read_text())
TOKENS_MANIFEST = json.loads((TOKENS / "manifest.json").read_text())


@pytest.fixture
def shards(tmp_path):
    return shutil.copytree(SHARDS, tmp_path / "shards")


@pytest.fixture
def tokens(tmp_path):
    return shutil.copytree(TOKENS, tmp_path / "tokens")


def read_all(folder):
    """Every image and batch of a split."""
    reader = ShardReader(folder, "train")
    return [reader.read(i) for i in range(len(reader))]


def train_on(folder):
    data = TokenDataModule(str(folder), global_batch_size=8)
    data.setup()
    return list(data.train_dataloader()), data.marginal_entropies()


@FUZZ
@given(value=forged(SHARDS_MANIFEST))
def test_forged_manifests_of_shards(value, shards):
    write(shards / "manifest.json", value)
    assert is_read_or_refused(lambda: read_all(shards), shards / "manifest.json")


@FUZZ
@given(content=damaged((SHARDS / "manifest.json").read_bytes()))
def test_damaged_manifests_of_shards(content, shards):
    (shards / "manifest.json").write_bytes(content)
    assert is_read_or_refused(lambda: read_all(shards), shards / "manifest.json")


@FUZZ
@given(content=damaged((SHARDS / "train.index.npy").read_bytes()))
def test_damaged_indices(content, shards):
    (shards / "train.index.npy").write_bytes(content)
    assert is_read_or_refused(lambda: read_all(shards), shards / "train.index.npy")


@FUZZ
@given(value=forged(TOKENS_MANIFEST))
def test_forged_manifests_of_tokens(value, tokens):
    write(tokens / "manifest.json", value)
    assert is_read_or_refused(lambda: train_on(tokens), tokens / "manifest.json")


@FUZZ
@given(content=damaged((TOKENS / "train.tokens.npy").read_bytes()), name=st.sampled_from(["tokens", "labels"]))
def test_damaged_token_arrays(content, name, tokens):
    (tokens / f"train.{name}.npy").write_bytes(content)
    assert is_read_or_refused(lambda: train_on(tokens), tokens / f"train.{name}.npy")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("shard", 9, "in none of the 3 shards"),
        ("offset", 2**63, "in none of the 3 shards"),
        ("offset", 10**6, "in none of the 3 shards"),
        ("size", 2**32 - 1, "in none of the 3 shards"),
        ("label", 10, "label 10 is out of range, the manifest names 10 classes"),
    ],
)
def test_an_index_row_out_of_range_is_named_at_the_start(field, value, message, shards):
    rows = np.load(shards / "train.index.npy")
    rows[field][3] = value
    np.save(shards / "train.index.npy", rows)
    with pytest.raises(ValueError, match=f"train.index.npy.*{message}"):
        ShardReader(shards, "train")


@pytest.mark.parametrize(("name", "value"), [("tokens", 12), ("labels", 10), ("labels", -1)])
@pytest.mark.parametrize("is_checked_at_the_start", [True, False])
def test_tokens_and_labels_out_of_range_are_named(name, value, is_checked_at_the_start, tokens, monkeypatch):
    rows = np.load(tokens / f"train.{name}.npy")
    rows[3] = value
    np.save(tokens / f"train.{name}.npy", rows)
    if not is_checked_at_the_start:  # as in caches of more than four million rows
        monkeypatch.setattr("varlab.data.token_datamodule.spot_check", lambda num: slice(0, 1))
    with pytest.raises(
        ValueError, match=rf"train.{name}.npy is damaged: it holds .*, expected 0 to {[9, 11][name == 'tokens']}"
    ):
        train_on(tokens)


def test_a_checksum_is_no_path(tmp_path):
    """It names a file in the cache of downloads."""
    changed = json.loads(json.dumps(SHARDS_MANIFEST))
    changed["splits"]["train"]["shards"][0]["sha256"] = "../outside"
    write(tmp_path / "manifest.json", changed)
    with pytest.raises(ValueError, match=r"splits.train.shards.0.sha256 is '../outside', String should match"):
        load_manifest(tmp_path)


def test_json_that_is_no_object_or_too_deep_is_named(tmp_path):
    file = tmp_path / "manifest.json"
    for content in ("[1]", "[" * 100_000, "1" * 10_000, '{"kind": "\udcff"}', "{"):
        file.write_bytes(content.encode("utf-8", "surrogateescape"))
        with pytest.raises(ValueError, match="manifest.json (is not valid JSON|holds a list)"):
            load_json(file, "varlab tokenize", TokensManifest)


def test_arrays_are_mapped_and_checked(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((3, 2), dtype=np.uint8))
    assert isinstance(open_array(tmp_path / "a.npy", (None, 2), np.uint8), np.memmap)
    assert open_array(tmp_path / "a.npy").shape == (3, 2)
    for shape, dtype in [((3,), None), ((3, 3), None), ((3, 2), np.uint16)]:
        with pytest.raises(ValueError, match=r"a.npy holds an array \(3, 2\) of uint8, expected"):
            open_array(tmp_path / "a.npy", shape, dtype)
    np.save(tmp_path / "a.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(ValueError, match="cannot be read as an array: .*Python objects"):
        open_array(tmp_path / "a.npy")
    np.save(tmp_path / "a.npy", np.array(["text"]))
    with pytest.raises(ValueError, match="of <U4, expected"):
        open_array(tmp_path / "a.npy")
    with pytest.raises(ValueError, match="cannot be read as an array"):
        open_array(tmp_path / "missing.npy")


def test_all_rows_of_usual_files_are_checked_and_some_of_large_ones():
    assert len(range(10**6)[spot_check(10**6)]) == 10**6
    assert 64 <= len(range(10**9)[spot_check(10**9)]) <= 65
