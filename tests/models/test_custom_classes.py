"""Networks of a user's own: the ones that the documentation shows, saved, found again, and refused where they are not what they say."""

import sys

import pytest
import torch
from support.docs import ROOT, code
from support.networks import make_tokenizer, make_var

from varlab.checkpoints.export_folder import load_pretrained, save_pretrained
from varlab.models.custom_classes import build
from varlab.models.msvqvae import MSVQVAE
from varlab.models.quantizer import MultiScaleQuantizer
from varlab.models.var import VAR


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The page's files, importable."""
    for title, text in code(ROOT / "docs/extend.md", "python"):
        (tmp_path / title).write_text(text)
        monkeypatch.delitem(sys.modules, title.removesuffix(".py"), raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    return __import__("binary_spherical"), __import__("gated_attention")


def sizes_of(network, **changes) -> dict:
    return {**network.sizes, **changes}


def test_the_signs_of_a_vector_name_the_nearest_corner(own):
    tokenizer = own[0].BinarySphericalTokenizer(**sizes_of(make_tokenizer(), codebook_size=64))
    z = torch.randn(3, 50, 6)
    assert torch.equal(tokenizer.quantizer.nearest(z), MultiScaleQuantizer.nearest(tokenizer.quantizer, z))
    assert torch.allclose(tokenizer.quantizer.codebook.weight.norm(dim=1), torch.ones(64))
    with pytest.raises(ValueError, match="codebook_size=12: 6 signs make 64 codes"):
        own[0].BinarySphericalTokenizer(**make_tokenizer().sizes)


@torch.no_grad()
def test_an_open_gate_changes_nothing_and_cached_steps_give_the_same(own, labels):
    plain, gated = make_var().eval(), own[1].GatedVAR(**make_var().sizes).eval()
    gated.load_state_dict(plain.state_dict(), strict=False)
    inputs = torch.randn(2, 29, 6)
    assert not torch.allclose(gated(inputs, labels), plain(inputs, labels), atol=1e-3)
    whole, cache = gated(inputs, labels), gated.start_cache(2)
    steps = [
        gated.predict_scale(k, None if k == 0 else inputs[:, first - 1 : last - 1], labels, cache)
        for k, (first, last) in enumerate(gated.step_bounds)
    ]
    assert torch.allclose(torch.cat(steps, dim=1), whole, atol=1e-5)
    for block in gated.blocks:
        torch.nn.init.zeros_(block.attention.gate.weight)
        torch.nn.init.constant_(block.attention.gate.bias, 30.0)
    assert torch.allclose(gated(inputs, labels), plain(inputs, labels), atol=1e-6)


@torch.no_grad()
def test_a_saved_network_is_of_its_own_class_again(own, tmp_path, labels):
    gated = own[1].GatedVAR(**make_var().sizes).eval()
    save_pretrained(tmp_path / "saved", make_tokenizer(), gated, None, {})
    var = load_pretrained(tmp_path / "saved")[1]
    assert type(var) is own[1].GatedVAR
    inputs = torch.randn(2, 29, 6)
    assert torch.equal(var(inputs, labels), gated(inputs, labels))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.Net", "holds a nowhere.Net, which cannot be imported .*put its folder on PYTHONPATH"),
        ("varlab.models.var.Nothing", "cannot be imported"),
        ("Net", "cannot be imported"),
        ("varlab.models.msvqvae.MSVQVAE", "which is no VAR"),
        ("os.system", "which is no VAR"),
    ],
)
def test_what_cannot_be_found_or_is_something_else_is_refused(var, name, message):
    with pytest.raises(ValueError, match=message):
        build(VAR, sizes_of(var, **{"class": name}))


def test_plain_networks_name_no_class(var, tokenizer):
    assert "class" not in var.sizes and "class" not in tokenizer.sizes
    assert type(build(VAR, var.sizes)) is VAR and type(build(MSVQVAE, tokenizer.sizes)) is MSVQVAE
