"""One way to load, and what it refuses."""

import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support import warm
from support.fixtures import OLD

from varlab.checkpoints.export_folder import tokenizer_fingerprint
from varlab.checkpoints.formats import upgrade_checkpoint
from varlab.checkpoints.load import load, load_any, load_tokenizer, read_checkpoint, read_file
from varlab.models.custom_classes import build
from varlab.models.msvqvae import MSVQVAE
from varlab.models.var import VAR
from varlab.pipeline import VARPipeline


class Hostile:
    """Would touch a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("name", ["evil.pth", "evil.ckpt"])
def test_a_hostile_file_is_refused_unread(name, tmp_path):
    marker = tmp_path / "was-here"
    torch.save({"state_dict": Hostile(marker)}, tmp_path / name)
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Hostile(marker)))
    for file in (tmp_path / name, tmp_path / "plain.pth"):
        with pytest.raises(ValueError, match="is not a checkpoint of tensors and plain values, or it is damaged"):
            load_any(file)
        with pytest.raises(ValueError, match="is not a checkpoint of tensors and plain values"):
            load_tokenizer(file)
    assert not marker.exists()


EXPECTED = json.loads((OLD / "expected.json").read_text())


@pytest.mark.parametrize("name", ["var.ckpt", "var_sharded.ckpt"])
def test_a_checkpoint_holds_the_networks_it_held(name):
    tokenizer, var, class_names = load(OLD / name)
    assert tokenizer_fingerprint(tokenizer) == EXPECTED["tokenizer_fingerprint"]
    assert (var.depth, var.width, var.num_heads, len(class_names)) == (2, 16, 2, 10)
    assert read_checkpoint(OLD / name)["varlab"]["format"] == 2


def test_a_custom_class_of_0_1_keeps_its_name():
    entry = {"format": 1, "class_names": None, "tokenizer_fingerprint": "", **dict.fromkeys(("tokenizer", "var"))}
    old = load(OLD / "var.ckpt")
    flat = {
        "patch_nums": [1, 2, 3, 4], "codebook_size": 12, "codebook_dim": 6, "channels": 4, "channel_mult": [1, 2, 2], "num_blocks": 1,
        "num_groups": 4, "num_phis": 4, "phi_ratio": 0.5, "lookup": "l2", "beta": 0.25, "dropout": 0.0,
    }  # fmt: skip
    entry |= {"tokenizer": flat, "var": {**old[1].sizes, "class": "nowhere.Net"}}
    upgraded = upgrade_checkpoint({"varlab": entry, "state_dict": {"net.class_embedding.weight": 1}})
    assert upgraded["state_dict"] == {"net.embedder.embedding.weight": 1}
    assert type(build(MSVQVAE, upgraded["varlab"]["tokenizer"])) is MSVQVAE
    with pytest.raises(ValueError, match="names the class nowhere.Net, which is not part of varlab"):
        build(VAR, upgraded["varlab"]["var"])


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, var_overrides, tokenizer_run):
    junk = tmp_path / "junk.ckpt"
    junk.write_bytes(b"junk" * 100)
    with pytest.raises(ValueError, match=r"junk.ckpt is not a checkpoint"):
        load_tokenizer(junk)
    with pytest.raises(ValueError, match="holds a tokenizer only"):
        load(tokenizer_run / "checkpoints/last.ckpt")


EVIL = """
from pathlib import Path
Path(__file__).with_name("was_run").touch()
from varlab.models.var import VAR
from varlab.pipeline import VARPipeline
class Evil(VAR):
    pass
"""


@pytest.fixture
def hostile_folder(tmp_path, export_folder, monkeypatch):
    """An export folder whose config names a class beside it or in it, in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def make(module: str):
        for path in (tmp_path / "evil.py", export_folder / "evil.py"):
            path.write_text(EVIL)
        config = json.loads((export_folder / "config.json").read_text())
        config["var"]["class"] = f"{module}.Evil"
        (export_folder / "config.json").write_text(json.dumps(config))
        for name in ("evil", "model", "model.evil"):
            sys.modules.pop(name, None)
        return export_folder

    return make


@pytest.mark.parametrize("module", ["evil", pytest.param("model.evil", marks=pytest.mark.slow)])
def test_no_code_that_a_file_names_is_run_without_a_word(module, hostile_folder, tmp_path):
    folder = hostile_folder(module)
    for call in (load, load_any, VARPipeline.from_pretrained):
        with pytest.raises(ValueError, match=f"model names the class {module}.Evil, which is not part of varlab"):
            call(folder)
    for verb in ("sample", "edit", "evaluate", "export", "app"):
        more = {"edit": ["image=x", "box=[0,0,1,1]"], "evaluate": ["shards=x"], "export": []}.get(verb, [])
        out = [] if verb == "app" else [f"out={tmp_path / 'out'}"]
        answer = warm.run([sys.executable, "-m", "varlab", verb, f"checkpoint={folder}", *more, *out])
        assert answer.returncode == 1 and "trust_code=true" in answer.stdout + answer.stderr, (verb, answer)
    assert not list(tmp_path.rglob("was_run"))


def test_trusted_code_is_run_but_never_that_of_the_folder_itself(hostile_folder, tmp_path):
    _, var, _ = load(hostile_folder("evil"), trust_code=True)
    assert type(var).__name__ == "Evil" and (tmp_path / "was_run").is_file()
    folder = hostile_folder("model.evil")
    with pytest.raises(ValueError, match="whose code lies in its own folder: it is not run"):
        load(folder, trust_code=True)
    assert not (folder / "was_run").exists()


def test_a_checkpoint_that_names_a_class_of_others_is_refused(tmp_path):
    saved = torch.load(OLD / "var.ckpt", weights_only=True)
    saved["varlab"]["tokenizer"]["class"] = "os.path.join"
    torch.save(saved, tmp_path / "last.ckpt")
    for call in (load, load_tokenizer):
        with pytest.raises(ValueError, match=r"last.ckpt names the class os.path.join, which is not part of varlab"):
            call(tmp_path / "last.ckpt")


def test_no_flipped_bit_changes_what_is_loaded(tmp_path):
    """Each is either noticed or lies in padding: 120 random bits of a file."""
    content, random = (OLD / "var.ckpt").read_bytes(), np.random.default_rng(0)
    good, noticed = torch.load(OLD / "var.ckpt", weights_only=True)["state_dict"], 0
    for position in random.integers(len(content), size=120):
        flipped = bytearray(content)
        flipped[position] ^= 1 << random.integers(8)
        (tmp_path / "flipped.ckpt").write_bytes(flipped)
        try:
            found = read_file(tmp_path / "flipped.ckpt")["state_dict"]
            assert all(torch.equal(value, found[key]) for key, value in good.items())
        except ValueError as error:
            assert "damaged" in str(error)
            noticed += 1
    assert noticed > 80
