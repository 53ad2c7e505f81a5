"""What every member of the quantizer family does. A member of your own: add it to MEMBERS, and its settings to COMMANDS."""

import json
import math

import numpy as np
import pytest
import torch
from support.networks import CLASS_NAMES, PATCH_NUMS, make_pair
from support.runs import (
    SHORT,
    TOKENIZER,
    VAR,
    command,
    config,
    draw,
    fit,
    kill_at,
    log_to,
    logged_losses,
    mean_of_ranks,
    weights,
)

from varlab.checkpoints import programs
from varlab.checkpoints.export_folder import load_pretrained, save_pretrained, tokenizer_fingerprint
from varlab.commands import edit as edit_command
from varlab.commands import export, tokenize
from varlab.evaluation.likelihood import likelihood_scores
from varlab.models.codes.binary import BinarySphericalQuantizer, LookupFreeQuantizer
from varlab.models.codes.finite_scalar import FiniteScalarQuantizer
from varlab.models.codes.simvq import SimVQQuantizer
from varlab.models.codes.table_by_scale import TableByScaleQuantizer
from varlab.models.digits import digits_of, most_likely, with_errors
from varlab.models.quantizer import MultiScaleQuantizer
from varlab.sampling.editing import edit
from varlab.sampling.generate import generate
from varlab.sampling.sample_folder import write_samples
from varlab.sampling.search import likelihoods
from varlab.sampling.token_sampling import SamplingSettings
from varlab.training.codebook_callbacks import CollapseAlarm, learns_table
from varlab.training.tuning import ConditionContrast

MEMBERS = {
    "residual": lambda: MultiScaleQuantizer(PATCH_NUMS, 12, 6),
    "bsq": lambda: BinarySphericalQuantizer(PATCH_NUMS, bits=4),
    "lfq": lambda: LookupFreeQuantizer(PATCH_NUMS, bits=4),
    "fsq": lambda: FiniteScalarQuantizer(PATCH_NUMS, levels=[4, 3, 2]),
    "simvq": lambda: SimVQQuantizer(PATCH_NUMS, 12, 6),
    "by_scale": lambda: TableByScaleQuantizer(PATCH_NUMS, [3, 4, 5, 12], 6),
}
COMMANDS = {
    "residual": [],
    "bsq": ["model.quantizer.bits=20"],  # no softmax over a million codes
    "lfq": ["model.quantizer.bits=4"],
    "fsq": ["model.quantizer.levels=[4,3,2]"],
    "simvq": ["model.quantizer.codebook_size=12", "model.quantizer.codebook_dim=6"],
    "by_scale": ["model.quantizer.codebook_sizes=[3,4,5,12]", "model.quantizer.codebook_dim=6"],
}


@pytest.fixture(params=MEMBERS)
def networks(request):
    """A tokenizer with this member, and a VAR for its codes."""
    return make_pair(MEMBERS[request.param]())


@torch.no_grad()
def test_each_token_is_the_nearest_to_its_vector(networks):
    quantizer = networks[0].quantizer
    for k in range(quantizer.num_scales):
        tokens = torch.arange(quantizer.size_of(k))[None]
        assert torch.equal(quantizer.nearest(quantizer.embed(tokens, k), k), tokens)
        z = torch.randn(1, 50, quantizer.codebook_dim)
        exact = torch.cdist(z, quantizer.embed(tokens, k)).argmin(dim=2)
        distance = (z - quantizer.embed(quantizer.nearest(z, k), k)).norm(dim=2)
        torch.testing.assert_close(distance, (z - quantizer.embed(exact, k)).norm(dim=2))


@torch.no_grad()
def test_encoding_decoding_and_training_agree(networks):
    quantizer = networks[0].quantizer
    f = torch.randn(3, quantizer.codebook_dim, 4, 4)
    token_maps = quantizer.encode(f)
    sums = quantizer.partial_sums(token_maps)
    quantized = quantizer(f)
    assert all(torch.equal(a, b) for a, b in zip(token_maps, quantized.token_maps, strict=True))
    torch.testing.assert_close(sums[-1], quantized.f_hat, atol=1e-5, rtol=1e-5)
    errors = [(f - f_hat).square().mean() for f_hat in sums]
    assert errors[-1] < f.square().mean()
    assert all(tokens.max() < quantizer.size_of(k) for k, tokens in enumerate(token_maps))
    inputs = quantizer.teacher_forcing_inputs(token_maps)
    torch.testing.assert_close(inputs[:, :4], quantizer.at_scale(sums[0], 1))


def test_mixed_precision_changes_no_code(networks):
    """Under bf16 autocast, as in training with bf16-mixed and sampling with bf16 weights, the quantizer stays fp32."""
    quantizer = networks[0].quantizer.train()
    f = torch.randn(3, quantizer.codebook_dim, 4, 4, requires_grad=True)
    plain = quantizer(f)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = quantizer(f)
        assert all(torch.equal(*pair) for pair in zip(mixed.token_maps, plain.token_maps, strict=True))
        assert torch.equal(mixed.f_hat, plain.f_hat) and torch.equal(mixed.vq_loss, plain.vq_loss)
        assert torch.equal(*(quantizer.teacher_forcing_inputs(q.token_maps) for q in (mixed, plain)))
        assert all(quantizer.embed(tokens, k).dtype == torch.float32 for k, tokens in enumerate(mixed.token_maps))
    (mixed.vq_loss + mixed.f_hat.square().mean()).backward()
    assert torch.isfinite(f.grad).all()


def test_what_is_trained_gets_a_gradient(networks):
    quantizer = networks[0].quantizer.train()
    f = torch.randn(3, quantizer.codebook_dim, 4, 4, requires_grad=True)
    quantized = quantizer(f)
    (quantized.vq_loss + quantized.f_hat.square().mean()).backward()
    assert f.grad is not None and torch.isfinite(f.grad).all() and f.grad.abs().sum() > 0
    missing = [name for name, p in quantizer.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []
    undecayed = {id(parameter) for parameter in quantizer.undecayed()}
    named = {name for name, parameter in quantizer.named_parameters() if id(parameter) not in undecayed}
    assert all(name.startswith("phis.") or name == "codebook.weight" for name in named), named


@torch.no_grad()
def test_sampling_sees_what_teacher_forcing_sees(networks, tmp_path):
    """With top_k=1, every sampled token is the most likely one given the sequence itself."""
    tokenizer, var = networks
    labels = torch.tensor([0, 1, 2])
    _, token_maps = generate(var, tokenizer, labels, cfg_scale=0.0, top_k=1, return_tokens=True)
    logits = var(tokenizer.quantizer.teacher_forcing_inputs(token_maps), labels)
    for k, (part, tokens) in enumerate(zip(logits.split([1, 4, 9, 16], dim=1), token_maps, strict=True)):
        if len(var.bases) == 1:
            part = part[..., : tokenizer.quantizer.size_of(k)]
        assert torch.equal(most_likely(part, [part.shape[2]] if len(var.bases) == 1 else var.bases)[0], tokens)
    for settings in ({"top_k": 5, "top_p": 0.9}, {"smooth": True}, {"cfg_scale": 2.0, "min_p": 0.1}):
        if "smooth" in settings and len(var.bases) > 1:
            with pytest.raises(ValueError, match="smooth=true mixes the rows of a table"):
                generate(var, tokenizer, labels, smooth=True)
            with pytest.raises(ValueError, match="smooth=true mixes the rows of a table"):
                write_samples(tmp_path / "out", tokenizer, var, [0, 1], SamplingSettings(smooth=True))
            assert not (tmp_path / "out").exists()
            continue
        images, token_maps = generate(var, tokenizer, labels, seed=1, return_tokens=True, **settings)
        assert torch.isfinite(images).all()
        assert all(tokens.max() < tokenizer.quantizer.size_of(k) for k, tokens in enumerate(token_maps))


@torch.no_grad()
def test_editing_keeps_what_it_is_told_to_keep(networks):
    tokenizer, var = networks
    images, labels = torch.rand(2, 3, 16, 16) * 2 - 1, torch.tensor([0, 1])
    kept = edit(var, tokenizer, images, torch.ones(4, 4), labels)
    torch.testing.assert_close(kept, tokenizer.decode(tokenizer.encode(images)) / 2 + 0.5, atol=1e-4, rtol=1e-4)
    for blend in ("tokens", "latents"):
        assert torch.isfinite(edit(var, tokenizer, images, torch.zeros(4, 4), labels, blend=blend)).all()


@torch.no_grad()
def test_an_export_folder_holds_it(networks, tmp_path):
    tokenizer, var = networks
    save_pretrained(tmp_path / "model", tokenizer, var, CLASS_NAMES, {})
    again, transformer, _ = load_pretrained(tmp_path / "model")
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(tokenizer)
    labels = torch.tensor([0, 1])
    assert torch.equal(generate(var, tokenizer, labels, seed=3), generate(transformer, again, labels, seed=3))
    described = json.loads((tmp_path / "model/config.json").read_text())["tokenizer"]["quantizer"]
    assert described["class"].startswith("varlab.models.")


@torch.no_grad()
def test_finer_scales_correct_errors(networks):
    quantizer = networks[0].quantizer
    f = torch.randn(64, quantizer.codebook_dim, 4, 4)
    plain = quantizer.encode(f)
    for rates in (None, torch.zeros(64)):
        found, seen = quantizer.encode_with_errors(f, rates)
        assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(plain, found, seen, strict=True))
    rates = torch.tensor([0.0, 1.0]).repeat(32)
    found, seen = quantizer.encode_with_errors(f, rates)
    for k, (a, b, c) in enumerate(zip(plain, found, seen, strict=True)):
        assert torch.equal(a[::2], b[::2]) and torch.equal(a[::2], c[::2])  # without errors
        bases = quantizer.bases_of(k)
        assert (digits_of(b[1::2], bases) != digits_of(c[1::2], bases)).all()  # every digit is wrong
        assert c.min() >= 0 and c.max() < quantizer.size_of(k)
    f_hat = torch.zeros_like(f)
    for k, sums in enumerate(quantizer.partial_sums(seen)):  # what is to be predicted is what the errors left over
        assert torch.equal(found[k], quantizer.nearest(quantizer.at_scale(f - f_hat, k), k))
        f_hat = sums
    _, seen = quantizer.encode_with_errors(f, torch.full((64,), 0.1))
    share = torch.cat([(a != b).flatten() for a, b in zip(seen, found, strict=True)]).float().mean()
    assert share > 0.05
    uncorrected = [
        with_errors(a, quantizer.bases, torch.full((64,), 0.1)) % quantizer.size_of(k) for k, a in enumerate(plain)
    ]
    errors = [(f - quantizer.partial_sums(maps)[-1]).square().mean() for maps in (plain, seen, uncorrected)]
    assert errors[0] < errors[1] < errors[2]


@torch.no_grad()
def test_exported_programs_hold_it(networks, tmp_path):
    tokenizer, var = networks
    programs.write(tmp_path / "programs", tokenizer, var, is_onnx=False)
    decoder = torch.export.load(tmp_path / "programs/decoder.pt2").module()
    f_hat = tokenizer.quantizer.partial_sums(tokenizer.encode(torch.rand(2, 3, 16, 16) * 2 - 1))[-1]
    torch.testing.assert_close(decoder(f_hat), tokenizer.decode_features(f_hat) / 2 + 0.5, atol=1e-5, rtol=1e-5)
    step = torch.export.load(tmp_path / "programs/step_03.pt2").module()
    example = [torch.randn_like(x) if x.is_floating_point() else x for x in programs.step_example(var, 3)]
    logits = programs.StepProgram(var, 3)(*example)[0]
    assert logits.shape == (2, 16, sum(var.bases))
    torch.testing.assert_close(step(*example)[0], logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_codes_that_are_all_used_count_as_100_percent(networks):
    quantizer = networks[0].quantizer
    for k in range(quantizer.num_scales):
        maps = [torch.zeros(1, 0, dtype=torch.long)] * quantizer.num_scales
        maps[k] = torch.arange(quantizer.size_of(k))[None]
        quantizer.hits[k] = quantizer.count(maps)[k]
    assert quantizer.codebook_usage(1).tolist() == [100] * quantizer.num_scales
    assert quantizer.overall().usage == 100
    sizes = [quantizer.size_of(k) for k in range(quantizer.num_scales)]
    assert quantizer.perplexity().tolist() == pytest.approx(sizes, rel=1e-4)


@torch.no_grad()
def test_no_probability_is_lost_to_codes_that_a_scale_does_not_have(networks):
    """An untrained head knows nothing, so its loss is the logarithm of the number of codes."""
    tokenizer, var = networks
    var.head.weight.zero_()
    sequence = torch.cat(tokenizer.encode(torch.rand(3, 3, 16, 16) * 2 - 1), dim=1)
    found = likelihood_scores(var, tokenizer.quantizer, [(sequence, torch.tensor([0, 1, 2]))])
    sizes = [tokenizer.quantizer.size_of(k) for k in range(4)]
    assert found["by_scale"]["loss"] == pytest.approx([math.log(size) for size in sizes], rel=1e-5)
    log_p, _ = likelihoods(var, tokenizer.quantizer, sequence, torch.tensor([0, 1, 2]))
    torch.testing.assert_close(log_p, torch.full((3,), -found["loss"]))


def test_alignment_compares_likelihoods_of_these_codes(networks):
    tokenizer, var = networks
    var.embedder.dropout = 0.0
    var.drop_path = 0.0
    sequence = torch.cat(tokenizer.encode(torch.rand(3, 3, 16, 16) * 2 - 1), dim=1)
    inputs = tokenizer.quantizer.teacher_forcing_inputs(list(sequence.split([1, 4, 9, 16], dim=1)))
    objective = ConditionContrast(beta=0.3, weight=2.0)
    objective.prepare(var)
    labels = torch.tensor([0, 1, 2])
    before, _ = likelihoods(var, tokenizer.quantizer, sequence, labels)
    with torch.no_grad():
        var.head.bias.add_(0.1 * torch.randn_like(var.head.bias))
        _, _, values = objective(var, inputs.detach(), sequence, labels)
    after, _ = likelihoods(var, tokenizer.quantizer, sequence, labels)
    assert values["train/ratio_own"].item() == pytest.approx(30 * (after - before).mean().item(), rel=1e-2, abs=1e-3)


def test_remedies_for_tables_are_refused_where_no_table_is_learned(networks):
    quantizer = networks[0].quantizer
    if type(quantizer) is MultiScaleQuantizer:
        assert learns_table(quantizer, "kmeans") is quantizer
        return
    with pytest.raises(ValueError, match=r"Quantizer learns no table of codes: set callbacks.kmeans=null"):
        learns_table(quantizer, "kmeans")
    (message,) = CollapseAlarm().check(torch.tensor([3.0, 1.0, 3.0, 3.0]), 100, quantizer)
    assert "callbacks" not in message and "model.quantizer.gradient=rotation" in message


@pytest.mark.parametrize(
    "name", ["bsq", "by_scale", *(pytest.param(n, marks=pytest.mark.slow) for n in ("lfq", "fsq", "simvq"))]
)
def test_the_whole_way_from_images_to_samples(name, tmp_path, digits_folder):
    """Tokenizer, killed and continued bit by bit; tokens; transformer; samples, an edit, an export."""
    chosen = [f"quantizer@model.quantizer={name}", *COMMANDS[name]]
    plain = [setting for setting in TOKENIZER if not setting.startswith("model.quantizer.")]
    settings = [*plain, *chosen, *SHORT, f"data.path={digits_folder}", "ckpt_path=last"]
    fit(tmp_path / "whole", *settings, *log_to(tmp_path / "whole.log"))
    command(tmp_path / "killed", *settings, *log_to(tmp_path / "killed.log"), *kill_at(5))
    fit(tmp_path / "killed", *settings, *log_to(tmp_path / "killed.log"))
    assert logged_losses(tmp_path / "killed.log") == logged_losses(tmp_path / "whole.log")
    whole, killed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(value, killed[key]) for key, value in whole.items())
    tokenizer, tokens = tmp_path / "whole/checkpoints/last.ckpt", tmp_path / "tokens"
    made = [f"tokenizer={tokenizer}", f"shards={digits_folder}", f"out={tokens}", "resize_ratio=1.0"]
    tokenize.run(config(tmp_path, *made, verb="tokenize"))
    fit(tmp_path / "var", *VAR, *SHORT, f"data.path={tokens}", f"tokenizer={tokenizer}")
    checkpoint = tmp_path / "var/checkpoints/last.ckpt"
    dtype = {"bsq": np.uint32}.get(name, np.uint8)
    assert np.load(tokens / "train.tokens.npy").dtype == dtype and checkpoint.stat().st_size < 3e6
    images = draw(checkpoint, tmp_path / "samples")
    export.run(config(tmp_path, f"checkpoint={checkpoint}", f"out={tmp_path / 'model'}", verb="export"))
    again = draw(tmp_path / "model", tmp_path / "again")
    assert len(images) == 7 and all((images[file] == again[file]).all() for file in images)
    photo = next((tmp_path / "samples/images").glob("*.png"))
    edited = [
        f"checkpoint={checkpoint}",
        f"image={photo}",
        "box=[0.2,0.2,0.8,0.8]",
        "label=3",
        f"out={tmp_path / 'edited'}",
    ]
    edit_command.run(config(tmp_path, *edited, verb="edit"))


@pytest.mark.parametrize("name", ["bsq", *(pytest.param(n, marks=pytest.mark.slow) for n in MEMBERS if n != "bsq")])
def test_two_processes_equal_one_with_the_same_global_batch(name, tmp_path, digits_folder):
    """Also where a loss looks at the whole batch, as the entropy of bits does."""
    plain = [setting for setting in TOKENIZER if not setting.startswith("model.quantizer.")]
    settings = [*plain, f"quantizer@model.quantizer={name}", *COMMANDS[name], *SHORT, f"data.path={digits_folder}"]
    fit(tmp_path / "one", *settings, *log_to(tmp_path / "one.log"))
    two = ["trainer.devices=2", "trainer.strategy=ddp", *log_to(tmp_path / "two.log")]
    finished = command(tmp_path / "two", *settings, *two, processes=2)
    assert finished.returncode == 0, finished.stderr[-3000:]
    one = [float.fromhex(loss) for loss in logged_losses(tmp_path / "one.log").values()]
    assert mean_of_ranks(tmp_path / "two.log") == pytest.approx(one, rel=1e-4)


@torch.no_grad()
def test_codes_of_32_bits_are_kept_and_loaded(tmp_path):
    tokenizer, var = make_pair(BinarySphericalQuantizer(PATCH_NUMS, bits=32))
    save_pretrained(tmp_path / "model", tokenizer, var, CLASS_NAMES, {})
    again, transformer, _ = load_pretrained(tmp_path / "model")
    images, token_maps = generate(transformer, again, torch.tensor([0, 1]), return_tokens=True)
    assert torch.equal(images, generate(var, tokenizer, torch.tensor([0, 1])))
    assert token_maps[-1].max() > 2**31


def test_networks_of_other_digits_do_not_belong_together():
    _, var = make_pair(FiniteScalarQuantizer(PATCH_NUMS, levels=[8, 4]))
    tokenizer, _ = make_pair(FiniteScalarQuantizer(PATCH_NUMS, levels=[4, 8]))
    with pytest.raises(ValueError, match=r"the VAR has bases=\[8, 4\], the tokenizer \[4, 8\]"):
        generate(var, tokenizer, torch.tensor([0]))
