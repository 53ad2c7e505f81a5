"""A VAR starts from the weights of a trained one."""

import json
import shutil

import pytest
import torch
from support.networks import CLASS_NAMES, PATCH_NUMS, make_pair, make_tokenizer, make_var
from support.runs import command, config, fit, kill_at, weights

from varlab.checkpoints.export_folder import save_pretrained
from varlab.checkpoints.released_layout import to_released
from varlab.commands import train
from varlab.models.codes.binary import BinarySphericalQuantizer, LookupFreeQuantizer
from varlab.models.codes.finite_scalar import FiniteScalarQuantizer
from varlab.training.initial_weights import Source, class_rows, encoding_of, freeze, start_from

ENCODING = encoding_of(make_tokenizer())


def source(class_names=CLASS_NAMES, encoding=ENCODING, **sizes) -> Source:
    torch.manual_seed(1)
    return Source("trained.ckpt", make_var(**sizes).eval(), class_names, encoding)


def test_the_same_network_is_copied_whole(token_maps, labels, tokenizer):
    given, net = source(), make_var().eval()
    assert start_from(given, net, CLASS_NAMES, ENCODING) == []
    inputs = tokenizer.quantizer.teacher_forcing_inputs(token_maps)
    assert torch.equal(net(inputs, labels), given.var(inputs, labels))


def test_classes_are_matched_by_name_and_new_ones_start_from_the_mean():
    given, net = source(), make_var(num_classes=4)
    notes = start_from(given, net, ["tabby cat", "owl", "golden retriever", "newt"], ENCODING)
    old, new = given.var.embedder.embedding.weight, net.embedder.embedding.weight
    assert torch.equal(new[0], old[2]) and torch.equal(new[2], old[1])
    torch.testing.assert_close(new[1], old[:3].mean(dim=0))
    assert torch.equal(new[3], new[1])
    assert torch.equal(new[4], old[3]), "the null class stays the null class"
    assert "2 of 4 classes" in notes[0]


def test_classes_without_names_are_the_same_if_their_number_is():
    table = torch.randn(4, 8)
    assert torch.equal(class_rows(table, [], ["a", "b", "c"], 3)[0], table)
    assert class_rows(table, [], ["a", "b"], 2)[1] == 0


def test_positions_of_another_pyramid_are_resized():
    """Scales of the same size are copied; a new one is resized from the nearest."""
    given, net = source(), make_var(patch_nums=[1, 2, 4, 6])
    notes = start_from(given, net, CLASS_NAMES, ENCODING)
    old, new = given.var.position[0], net.position[0]
    assert torch.equal(new[:5], old[:5])
    torch.testing.assert_close(new[5:21], old[14:30])  # the map of 4 is the last of the source, the third here
    corner, edge = old[14:30].view(4, 4, -1), new[21:].view(6, 6, -1)
    torch.testing.assert_close(edge[0, 0], corner[0, 0])
    torch.testing.assert_close(edge[5, 5], corner[3, 3])
    assert torch.equal(net.scale_embedding.weight, given.var.scale_embedding.weight[[0, 1, 3, 3]])
    assert torch.equal(net.start_position, given.var.start_position)
    assert "resized" in notes[0]


@pytest.mark.parametrize(
    ("sizes", "named"),
    [
        ({"depth": 3}, "depth=2.*depth=3"),
        ({"width": 64}, "width=32.*width=64"),
        ({"codebook_size": 24}, "codebook_size"),
    ],
)
def test_another_size_is_refused_by_name(sizes, named):
    with pytest.raises(ValueError, match=f"trained.ckpt.*{named}"):
        start_from(source(), make_var(**sizes), CLASS_NAMES, ENCODING)


def test_tokens_of_another_tokenizer_are_refused_unless_their_parts_start_anew():
    for changed in ("quantizer.codebook.weight", "quantizer.phis.1.weight", "encoder.conv_in.weight"):
        other = {**ENCODING, changed: torch.randn_like(ENCODING[changed])}
        with pytest.raises(ValueError, match="another tokenizer.*reinitialized"):
            start_from(source(), make_var(), CLASS_NAMES, other)
    rounded = {name: value.bfloat16().float() for name, value in ENCODING.items()}
    start_from(source(), make_var(), CLASS_NAMES, rounded)
    given, net = source(), make_var(codebook_size=24)
    before = net.head.weight.clone()
    notes = start_from(
        given, net, CLASS_NAMES, encoding_of(make_tokenizer(codebook_size=24)), ["head.*", "word_embed.*"]
    )
    assert torch.equal(net.head.weight, before)
    assert torch.equal(net.blocks[0].attention.qkv.weight, given.var.blocks[0].attention.qkv.weight)
    assert "4 parameters start anew" in notes[0]


def test_codes_without_a_table_are_compared_too():
    bits, lookup_free = (member(PATCH_NUMS, bits=4) for member in (BinarySphericalQuantizer, LookupFreeQuantizer))
    (mine, trained), (theirs, _) = make_pair(bits), make_pair(lookup_free)
    given = Source("trained.ckpt", trained, CLASS_NAMES, encoding_of(mine))
    with pytest.raises(ValueError, match="another tokenizer"):
        start_from(given, make_pair(lookup_free)[1], CLASS_NAMES, encoding_of(theirs))
    levels, net = make_pair(FiniteScalarQuantizer(PATCH_NUMS, levels=[4, 4]))
    with pytest.raises(ValueError, match="codebook_dim"):
        start_from(given, net, CLASS_NAMES, encoding_of(levels))
    start_from(given, net, CLASS_NAMES, encoding_of(levels), ["head.*", "word_embed.*"])


def test_a_pattern_that_matches_nothing_is_refused():
    with pytest.raises(ValueError, match=r"module.reinitialized.*'heads.\*'.*word_embed"):
        start_from(source(), make_var(), CLASS_NAMES, ENCODING, ["heads.*"])
    with pytest.raises(ValueError, match="module.frozen"):
        freeze(make_var(), ["block.*"])
    with pytest.raises(ValueError, match="nothing is left"):
        freeze(make_var(), ["*"])


def test_a_released_transformer_is_read_without_its_tokenizer(tmp_path):
    trained = make_var().eval()
    torch.save(to_released(trained), tmp_path / "var_d2.pth")
    given, net = Source.read(str(tmp_path / "var_d2.pth"), trained.patch_nums), make_var()
    notes = start_from(given, net, CLASS_NAMES, ENCODING)
    assert torch.equal(net.head.weight, trained.head.weight)
    assert "not checked" in notes[0]


def test_a_run_starts_from_weights_and_continues_without_them(tmp_path, var_overrides):
    """Averages are taken over; frozen parts stay; after a kill, the run continues though the source is gone."""
    averaged = [*var_overrides, "callbacks.ema={_target_: varlab.training.ema.EMA, decay: 0.5}"]
    fit(tmp_path / "trained", *averaged)
    trained = torch.load(tmp_path / "trained/checkpoints/last.ckpt", weights_only=True)["ema"]
    shutil.copytree(tmp_path / "trained", tmp_path / "source")
    settings = [
        *var_overrides,
        f"module.init_from={tmp_path / 'source/checkpoints/last.ckpt'}",
        "module.frozen=[blocks.0.*]",
        "ckpt_path=last",
    ]
    fit(tmp_path / "still", *settings, "module.base_lr=0.0", "module.schedule.warmup=0.0")
    for name, value in weights(tmp_path / "still").items():
        if name.startswith("net."):
            torch.testing.assert_close(value, trained.get(name, value))
    fit(tmp_path / "whole", *settings)
    tuned = weights(tmp_path / "whole")
    assert torch.equal(tuned["net.blocks.0.attention.qkv.weight"], trained["net.blocks.0.attention.qkv.weight"])
    assert not torch.equal(tuned["net.blocks.1.attention.qkv.weight"], trained["net.blocks.1.attention.qkv.weight"])
    row = json.loads((tmp_path / "whole/run.json").read_text())
    assert row["step"] == 9 and row["init_from"].endswith("source/checkpoints/last.ckpt")
    assert row["params_trained"] < row["params_total"]
    command(tmp_path / "killed", *settings, *kill_at(5))
    shutil.rmtree(tmp_path / "source")
    fit(tmp_path / "killed", *settings)
    assert all(torch.equal(value, tuned[name]) for name, value in weights(tmp_path / "killed").items())
    assert json.loads((tmp_path / "killed/run.json").read_text())["init_from"] == row["init_from"]


def test_a_missing_source_is_named_before_training(tmp_path, var_overrides):
    with pytest.raises(ValueError, match="absent.ckpt does not exist"):
        train.run(config(tmp_path, *var_overrides, "module.init_from=absent.ckpt"))
    save_pretrained(tmp_path / "tokenizer", make_tokenizer(), None, None, {})
    with pytest.raises(ValueError, match="tokenizer only"):
        train.run(config(tmp_path, *var_overrides, f"module.init_from={tmp_path / 'tokenizer'}"))
