"""Custom networks: those that the documentation shows, recorded, rebuilt, and refused where they are not what they say."""

import pytest
import torch
from support.networks import make_tokenizer, make_var
from torch import nn

from varlab.checkpoints.export_folder import load_pretrained, save_pretrained
from varlab.models.conditioning import ClassEmbedder
from varlab.models.custom_classes import RecordedModule, Trust, build, describe, rebuilt
from varlab.models.msvqvae import MSVQVAE
from varlab.models.var import VAR

TRUST = Trust(trust_code=True)
SIZES = {
    "width": 32,
    "num_heads": 2,
    "patch_nums": [1, 2, 3, 4],
    "codebook_size": 12,
    "codebook_dim": 6,
    "num_classes": 3,
}


def test_directions_on_circles_name_the_nearest_code(extend_page):
    quantizer = extend_page("circles").CirclesQuantizer([1, 2, 3, 4], circles=2, directions=8)
    tokenizer = MSVQVAE(quantizer, channels=8, channel_mult=(1, 1, 2), num_groups=4)
    for k in range(4):
        codes, z = quantizer.embed(torch.arange(64), k), torch.randn(3, 50, 4)
        unit = torch.nn.functional.normalize(z.unflatten(2, (2, 2)), dim=3).flatten(2)
        assert torch.equal(tokenizer.quantizer.nearest(z, k), torch.cdist(unit, codes).argmin(dim=2))
    again = build(MSVQVAE, describe(tokenizer), TRUST)
    assert type(again.quantizer) is type(quantizer) and again.quantizer.codebook_size == 64


@torch.no_grad()
def test_an_open_gate_changes_nothing_and_cached_steps_give_the_same(extend_page, labels):
    plain, gated = (
        make_var().eval(),
        extend_page("gated_attention").GatedVAR(2, **SIZES, init_adaln_gamma=0.5, init_head=1.0).eval(),
    )
    gated.load_state_dict(plain.state_dict(), strict=False)
    inputs = torch.randn(2, 29, 6)
    assert not torch.allclose(gated(inputs, labels), plain(inputs, labels), atol=1e-3)
    whole, cache = gated(inputs, labels), gated.start_cache(labels)
    steps = [
        gated.predict_scale(k, None if k == 0 else inputs[:, first - 1 : last - 1], cache)
        for k, (first, last) in enumerate(gated.step_bounds)
    ]
    assert torch.allclose(torch.cat(steps, dim=1), whole, atol=1e-5)
    for block in gated.blocks:
        torch.nn.init.zeros_(block.attention.gate.weight)
        torch.nn.init.constant_(block.attention.gate.bias, 30.0)
    assert torch.allclose(gated(inputs, labels), plain(inputs, labels), atol=1e-6)


@torch.no_grad()
def test_an_argument_of_a_custom_network_survives_saving(extend_page, tmp_path, labels):
    gated = (
        extend_page("gated_attention").GatedVAR(2, gate_scale=5.0, **SIZES, init_adaln_gamma=0.5, init_head=1.0).eval()
    )
    save_pretrained(tmp_path / "saved", make_tokenizer(), gated, None, {})
    var = load_pretrained(tmp_path / "saved", trust_code=True)[1]
    assert type(var) is type(gated) and var.blocks[0].attention.gate_scale == 5.0
    inputs = torch.randn(2, 29, 6)
    assert torch.equal(var(inputs, labels), gated(inputs, labels))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.Net", "holds nowhere.Net, which cannot be imported .*add that folder to PYTHONPATH"),
        ("varlab.models.var.Nothing", "cannot be imported"),
        ("Net", "cannot be imported"),
        ("varlab.models.msvqvae.MSVQVAE", "which is not a subclass of VAR"),
        ("os.system", "which is not a subclass of VAR"),
    ],
)
def test_what_cannot_be_found_or_is_something_else_is_refused(var, name, message):
    with pytest.raises(ValueError, match=message):
        build(VAR, {**describe(var), "class": name}, TRUST)


def test_arguments_that_the_class_does_not_take_are_an_error(var):
    with pytest.raises(ValueError, match="varlab.models.var.VAR cannot be built from the checkpoint: .*gate_scale"):
        build(VAR, {**describe(var), "gate_scale": 5.0})


class Recorded(RecordedModule):
    def __init__(self, a, b=2, *, c=None, **rest):
        super().__init__()


def test_arguments_are_recorded_as_given_with_defaults_and_rest():
    assert Recorded(1, c=[1, (2, 3)], d="x").arguments == {"a": 1, "b": 2, "c": [1, (2, 3)], "d": "x"}
    described = describe(Recorded(1, c=[1, (2, 3)], d={"e": None}, f=ClassEmbedder))
    assert described["c"] == [1, [2, 3]] and described["d"] == {"e": None}
    assert described["f"] == {"partial": "varlab.models.conditioning.ClassEmbedder"}


def test_a_value_that_a_checkpoint_cannot_hold_is_named():
    with pytest.raises(ValueError, match=r"Recorded\(a=...\) is a Linear, which a checkpoint cannot hold"):
        describe(Recorded(nn.Linear(1, 1)))
    with pytest.raises(ValueError, match="torch.nn.modules.linear.Linear does not record its arguments"):
        describe(nn.Linear(1, 1))


def test_what_follows_from_depth_is_recorded_as_it_was():
    described = describe(VAR(3, [1, 2], 8, 4, 2))
    assert (described["width"], described["num_heads"], described["shared_adaln"]) == (192, 3, False)
    assert described["init_adaln_gamma"] == 1e-3 and described["drop_path"] == pytest.approx(0.0125)


def test_a_value_outside_of_its_choices_is_named_before_anything_is_built():
    with pytest.raises(ValueError, match="order='rows': choose one of 'scales', 'raster'"):
        make_var(order="rows")


def test_a_network_of_a_custom_class_is_rebuilt_without_asking(extend_page):
    gated = extend_page("gated_attention").GatedVAR(2, gate_scale=5.0, **SIZES)
    again = rebuilt(gated)
    assert type(again) is type(gated) and describe(again) == describe(gated)
