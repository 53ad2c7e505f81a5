"""Adapters apart from the model that they were trained on."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from support.networks import CLASS_NAMES, make_tokenizer, make_var

from varlab.checkpoints.adapters import merged, save_adapter
from varlab.checkpoints.export_folder import load_pretrained, save_pretrained
from varlab.checkpoints.load import contains_var, load, load_any
from varlab.training.tuning import LoRA


@pytest.fixture
def tuned(tmp_path):
    """A base in a folder, and a network that adapts it: other thin matrices, other class embeddings."""
    tokenizer, var = make_tokenizer(), make_var(width=64, depth=3)
    save_pretrained(tmp_path / "base", tokenizer, var, CLASS_NAMES, {})
    net = make_var(width=64, depth=3)
    net.load_state_dict(var.state_dict())
    LoRA(rank=1).apply(net)
    for name, parameter in net.named_parameters():
        if name.endswith(".up") or name.startswith("embedder."):
            parameter.data += 0.1 * torch.randn_like(parameter)
    whole = make_var(width=64, depth=3)
    whole.load_state_dict(merged(net.state_dict()))
    return tmp_path, net, whole


def saved(folder, net, whole, tokenizer=None):
    base = load_pretrained(folder / "base")[:2]
    networks = (tokenizer or base[0], whole)
    save_adapter(folder / "adapter", str(folder / "base"), base, net.state_dict(), networks, CLASS_NAMES[::-1])
    return folder / "adapter"


def test_an_adapter_and_its_base_are_the_merged_network(tuned):
    folder, net, whole = tuned
    adapter = saved(folder, net, whole)
    size = (adapter / "adapter.safetensors").stat().st_size
    assert size < 0.1 * (folder / "base/var.safetensors").stat().st_size
    tokenizer, var, class_names = load(adapter)
    assert class_names == CLASS_NAMES[::-1] and contains_var(adapter)
    for (name, mine), theirs in zip(var.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-6, msg=name)
    theirs = load_any(folder / "base")[0]
    assert all(torch.equal(a, b) for a, b in zip(tokenizer.parameters(), theirs.parameters(), strict=True))


def test_another_base_is_refused(tuned):
    folder, net, whole = tuned
    adapter = saved(folder, net, whole)
    tokenizer, var, _ = load_pretrained(folder / "base")
    shutil.rmtree(folder / "base")
    with pytest.raises(ValueError, match=r"base does not exist"):
        load(adapter)
    others = {"tokenizer": (make_tokenizer(), var), "base": (tokenizer, make_var(width=64, depth=3))}
    for name, networks in others.items():
        save_pretrained(folder / "base", *networks, CLASS_NAMES, {})
        with pytest.raises(
            ValueError, match=rf"adapts another model than .*base is now: its {name}_fingerprint differs"
        ):
            load(adapter)
        shutil.rmtree(folder / "base")


def test_an_adapter_moves_together_with_its_base(tuned, tmp_path_factory, monkeypatch):
    folder, net, whole = tuned
    saved(folder, net, whole)
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for name in ("adapter", "base"):
        shutil.move(folder / name, elsewhere / name)
    monkeypatch.chdir(folder)
    assert load(elsewhere / "adapter")[2] == CLASS_NAMES[::-1]


def test_what_is_no_adapter_of_the_base_is_not_written(tuned):
    folder, net, whole = tuned
    with pytest.raises(ValueError, match=r"no low-rank adapters"):
        saved(folder, whole, whole)
    with pytest.raises(ValueError, match=r"has another tokenizer than the tuned model"):
        saved(folder, net, whole, make_tokenizer())
    with torch.no_grad():
        net.blocks[0].attention.qkv.parametrizations.weight.original += 1
    with pytest.raises(ValueError, match=r"its blocks.0.attention.qkv.weight is not what the adapter was trained on"):
        saved(folder, net, whole)
    assert not (folder / "adapter").exists()


def test_a_damaged_adapter_is_named(tuned):
    folder, net, whole = tuned
    adapter = saved(folder, net, whole)
    (adapter / "adapter.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"adapter.safetensors is not a safetensors file"):
        load(adapter)
    key = "blocks.0.attention.qkv.parametrizations.weight.0."
    thin = {f"{key}{part}": torch.ones(2, 3) for part in ("up", "down", "scale")}
    save_file(thin, adapter / "adapter.safetensors")
    with pytest.raises(ValueError, match=r"adapter.safetensors does not fit its base"):
        load(adapter)
    config = json.loads((adapter / "config.json").read_text())
    for changed, message in (
        ({"var": None}, "describes no adapter"),
        ({"base": "."}, "describes no adapter"),
        ({"base": 5}, "base"),
    ):
        (adapter / "config.json").write_text(json.dumps({**config, **changed}))
        with pytest.raises(ValueError, match=message):
            load(adapter)
