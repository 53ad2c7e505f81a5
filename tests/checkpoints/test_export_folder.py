"""A trained model leaves varlab and comes back: safetensors, released layout, programs; hostile files do nothing."""

import json
import shutil

import pytest
import torch
from hypothesis import given
from safetensors.torch import load_file, save_file
from support.fixtures import OLD
from support.fuzz import FUZZ, damaged, forged, is_read_or_refused, write
from support.networks import CLASS_NAMES

from varlab.checkpoints.export_folder import load_pretrained
from varlab.pipeline import VARPipeline


def test_the_folder_gives_back_the_same_networks(export_folder, tokenizer, var):
    again, transformer, names = load_pretrained(export_folder)
    assert names == CLASS_NAMES and transformer is not None
    for a, b in [(tokenizer, again), (var, transformer)]:
        for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
            assert torch.equal(x, y), name
    card = (export_folder / "README.md").read_text()
    assert "16 px" in card and "3 classes" in card and "val_loss: 3.2" in card and "VARPipeline.from_pretrained" in card


def test_weights_of_other_sizes_name_the_first_tensor_that_does_not_fit(export_folder):
    state = load_file(export_folder / "var.safetensors")
    save_file({**state, "blocks.0.attention.proj.weight": torch.zeros(3, 3)}, export_folder / "var.safetensors")
    message = r"var.safetensors: tensor 'blocks.0.attention.proj.weight' has shape \(3, 3\), expected \(32, 32\)"
    with pytest.raises(ValueError, match=message):
        load_pretrained(export_folder)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: (f / "var.safetensors").unlink(), "var.safetensors is missing: the folder is incomplete"),
        (
            lambda f: (f / "var.safetensors").write_bytes(b"x" * 100),
            "var.safetensors is not a safetensors file, or it is damaged",
        ),
        (lambda f: (f / "config.json").write_text("{"), "config.json is not valid JSON"),
        (
            lambda f: (f / "config.json").write_text(json.dumps({"format": 0})),
            "has format 0, this version reads 1 to 2: make it again",
        ),
    ],
)
def test_a_broken_folder_is_named(break_it, message, export_folder):
    break_it(export_folder)
    with pytest.raises(ValueError, match=message):
        VARPipeline.from_pretrained(export_folder)


CONFIG = json.loads((OLD / "exported/config.json").read_text())


@pytest.fixture
def exported(tmp_path):
    return shutil.copytree(OLD / "exported", tmp_path / "exported")


@FUZZ
@given(value=forged(CONFIG))
def test_forged_configs(value, exported):
    write(exported / "config.json", value)
    assert is_read_or_refused(lambda: load_pretrained(exported), exported / "config.json")


@FUZZ
@given(content=damaged((OLD / "exported/var.safetensors").read_bytes()))
def test_damaged_weights(content, exported):
    (exported / "var.safetensors").write_bytes(content)
    assert is_read_or_refused(lambda: load_pretrained(exported), exported / "var.safetensors")


@pytest.mark.parametrize(
    ("name", "size"), [("depth", 10**6), ("depth", 10**15), ("width", 10**9), ("num_heads", 2**40)]
)
def test_a_network_much_larger_than_its_weights_is_refused_before_it_is_built(name, size, exported):
    changed = json.loads(json.dumps(CONFIG))
    changed["var"][name] = size
    write(exported / "config.json", changed)
    with pytest.raises(ValueError, match="far fewer tensors|is out of range|has shape"):
        load_pretrained(exported)
