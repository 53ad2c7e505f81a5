"""Runs cut short on purpose: branches of a longer run, runs of a given compute, next-token runs on the same tokens."""

import json

import pytest
import torch
from support.networks import PATCH_NUMS, make_tokenizer, make_var
from support.runs import fit, weights

from varlab.checkpoints.load import load
from varlab.checkpoints.released_layout import to_released
from varlab.sampling.generate import KeptTokens, generate, generate_tokens
from varlab.sampling.token_sampling import SamplingSettings
from varlab.training.schedules import WSD


def test_a_branch_equals_a_run_of_its_length(tmp_path, study):
    """With what it costs: the counters go on from the checkpoint."""
    fit(tmp_path / "trunk", *study, f"trunk={tmp_path / 'trunk'}")
    saved = sorted(file.name for file in (tmp_path / "trunk/checkpoints").glob("branch-*"))
    assert [name.split("-")[1] for name in saved] == ["0.125", "0.25", "0.5"]
    assert int(saved[2].split("-")[2].removesuffix(".ckpt")) == WSD(2.0).branch_step(20)
    for name, trunk in [("branched", tmp_path / "trunk"), ("alone", tmp_path / "nowhere")]:
        fit(tmp_path / name, *study, f"trunk={trunk}", "branch=0.5", "ckpt_path=last")
    for (name, a), b in zip(weights(tmp_path / "branched").items(), weights(tmp_path / "alone").values(), strict=True):
        assert torch.equal(a, b), name
    branched, alone = (json.loads((tmp_path / name / "run.json").read_text()) for name in ("branched", "alone"))
    for key in ("step", "images_seen", "flops_exact", "val_loss", "lr_peak", "warmup", "cooldown"):
        assert branched[key] == alone[key], key
    assert branched["step"] == 20 and branched["state"] == "finished" and branched["parent_run"] == "trunk"
    assert branched["cooldown"] == 4 * 8 and branched["warmup"] == 2 * 8


@torch.no_grad()
def test_in_raster_order_a_token_sees_exactly_the_ones_before(labels):
    raster = make_var(order="raster").eval()
    inputs = torch.randn(2, 29, 6)
    before = raster(inputs, labels)
    for i in (0, 5, 28):
        changed = inputs.clone()
        changed[:, i] += 1
        after = raster(changed, labels)
        assert torch.equal(before[:, : i + 1], after[:, : i + 1])
        assert not torch.allclose(before[:, i + 1], after[:, i + 1])


@torch.no_grad()
def test_raster_tokens_drawn_one_by_one_are_those_of_the_masked_forward(tokenizer, labels):
    """Greedy draws equal the arg max of one forward over what was drawn; guided and not."""
    raster = make_var(order="raster").eval()
    for guidance in (0.0, 1.5):
        _, token_maps = generate_tokens(raster, tokenizer, labels, SamplingSettings(guidance, "constant", top_k=1))
        inputs = tokenizer.quantizer.teacher_forcing_inputs(token_maps, "raster")
        torch.testing.assert_close(inputs, tokenizer.quantizer.codebook(torch.cat(token_maps, dim=1)[:, :-1]))
        logits = raster(inputs, labels)
        if guidance:
            logits = logits + guidance * (logits - raster(inputs, torch.full_like(labels, raster.null_label)))
        assert torch.equal(logits.argmax(dim=-1), torch.cat(token_maps, dim=1))
    images, again = (generate(raster, tokenizer, labels, top_k=5, seed=3) for _ in range(2))
    assert torch.equal(images, again)


def test_what_raster_order_cannot_do_is_said(tokenizer, labels, token_maps):
    raster = make_var(order="raster").eval()
    kept = KeptTokens(token_maps, [torch.ones(pn * pn, dtype=torch.bool) for pn in PATCH_NUMS])
    for settings, editing in [(SamplingSettings(smooth=True), None), (SamplingSettings(), kept)]:
        with pytest.raises(ValueError, match="token by token"):
            generate_tokens(raster, tokenizer, labels, settings, kept=editing)
    with pytest.raises(ValueError, match="no network with order=raster"):
        to_released(raster)
    with pytest.raises(ValueError, match="order='spiral'"):
        make_var(order="spiral")


def test_a_raster_network_trains_on_the_same_tokens_and_loads_again(tmp_path, still):
    settings = [*still, "model.order=raster"]
    first = fit(tmp_path / "short", *settings, "steps=1")
    last = fit(tmp_path / "run", *settings)
    assert last < first
    tokenizer, net, _ = load(tmp_path / "run/checkpoints/last.ckpt")
    assert net.order == "raster" and generate(net, tokenizer, torch.tensor([0, 1])).shape[0] == 2
    with pytest.raises(ValueError, match="order=raster has no such steps"):
        fit(tmp_path / "wrong", *settings, "module.progressive={_target_: varlab.training.schedules.Progressive}")


def test_a_tokenizer_of_one_scale_serves_the_classical_raster(labels):
    tokenizer = make_tokenizer(patch_nums=[4]).eval()
    raster = make_var(order="raster", patch_nums=[4]).eval()
    assert generate(raster, tokenizer, labels, cfg_scale=1.5, cfg_schedule="constant").shape == (2, 3, 16, 16)
