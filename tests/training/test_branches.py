"""Runs cut short on purpose: branches of a longer run, runs of a given compute, next-token runs on the same tokens."""

import json

import pytest
import torch
from support.networks import PATCH_NUMS, make_tokenizer, make_var
from support.runs import command, config, fit, weights

from varlab.checkpoints.load import load, load_tokenizer, read_checkpoint
from varlab.checkpoints.released_layout import to_released
from varlab.commands import train
from varlab.cost.flops import parameter_counts, training_flops
from varlab.evaluation.likelihood import likelihood_scores
from varlab.models import scales
from varlab.sampling.generate import KeptTokens, generate, generate_tokens
from varlab.sampling.token_sampling import SamplingSettings
from varlab.training.optimizers import is_hidden_matrix
from varlab.training.schedules import WSD


@pytest.fixture
def study(still):
    """The sweep's own settings at test size; 40 steps, warm-up of 2."""
    wanted = {"experiment": "depth_scaling", "model.drop_path": 0.0}
    kept = [setting for setting in still if setting.split("=")[0] not in wanted]
    settings = [f"{key}={value}" for key, value in wanted.items()]
    return [*settings, *kept, "steps=40", "val_every=20", "save_every=10", "module.warmup_tokens=1.0"]


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


def test_a_branch_that_would_not_share_its_first_steps_is_refused(tmp_path, study):
    for wrong in (
        "schedule@module.schedule=linear",
        "module.weight_decay_end=0.1",
        "steps=-1",
        "module.warmup_tokens=null",
    ):
        with pytest.raises(ValueError, match=r"branch=0.5: a branch shares its first steps|needs the length"):
            fit(tmp_path, *study, "branch=0.5", "epochs=1", wrong)
    with pytest.raises(ValueError, match=r"branch=1.5: give the length"):
        fit(tmp_path, *study, "branch=1.5")


def test_the_warm_up_follows_the_size_up_to_a_twentieth():
    schedule = WSD(3.0, final_ratio=0.0)
    shares = [schedule(step, 103) for step in range(103)]
    assert shares[0] < shares[1] < shares[2] < 1 and shares[3] == 1
    start = schedule.branch_step(103)
    assert all(share == 1 for share in shares[3:start]) and shares[start + 1] < 1
    assert shares[-1] == pytest.approx(0)
    longer = [schedule(step, 400) for step in range(start)]
    assert longer == shares[:start]


def test_compute_buys_steps(tmp_path, study):
    cfg = config(tmp_path, *study, "compute=2e9")
    train.set_steps(cfg)
    tokenizer = load_tokenizer(cfg.tokenizer)
    var = make_var(codebook_size=tokenizer.quantizer.codebook_size, patch_nums=tokenizer.patch_nums, num_classes=10)
    flops = training_flops(var.sizes) * cfg.data.global_batch_size
    assert cfg.steps == round(2e9 / flops) > 2
    with pytest.raises(ValueError, match="less than one step"):
        train.set_steps(config(tmp_path, *study, "compute=1e3"))


def test_a_planned_sweep_says_what_all_its_jobs_cost(tmp_path, study):
    answer = command(tmp_path, *study, "plan=true", "branch=1,0.5", "seed=0,1", "planned_flops=1e9", "--multirun")
    assert answer.returncode == 0, answer.stderr
    assert "all 4 jobs:" in answer.stdout
    var = json.loads(json.dumps(answer.stdout.split("all 4 jobs: ")[1].split(" FLOP")[0]))
    single = [
        float(line.split(" FLOP in total")[0].split()[-1])
        for line in answer.stdout.splitlines()
        if "FLOP in total" in line
    ]
    assert float(var) == pytest.approx(sum(single), rel=0.01) and len(single) == 4
    assert min(single) == pytest.approx(max(single) * 4 / 40, rel=0.01)  # a branch costs its cooldown alone


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


def test_raster_counts_its_own_parameters_and_attention():
    raster, var = make_var(order="raster", patch_nums=[2, 4]), make_var(patch_nums=[2, 4])
    counts = parameter_counts(raster.sizes)
    assert counts["params_total"] == sum(parameter.numel() for parameter in raster.parameters())
    assert parameter_counts(var.sizes)["params_total"] == sum(p.numel() for p in var.parameters())
    pairs = {"raster": 20 * 21 // 2, "scales": 4 * 4 + 16 * 20}
    gap = training_flops(var.sizes) - training_flops(raster.sizes)
    start = 3 * 3 * 2 * 6 * 32  # four start tokens of the coarsest scale against one
    assert gap == 3 * 4 * 32 * 2 * (pairs["scales"] - pairs["raster"]) - start
    assert scales.step_bounds([1, 2], "raster") == [(i, i + 1) for i in range(5)]


def test_a_raster_network_trains_on_the_same_tokens_and_loads_again(tmp_path, still):
    settings = [*still, "model.order=raster"]
    first = fit(tmp_path / "short", *settings, "steps=1")
    last = fit(tmp_path / "run", *settings)
    assert last < first
    tokenizer, net, _ = load(tmp_path / "run/checkpoints/last.ckpt")
    assert net.order == "raster" and generate(net, tokenizer, torch.tensor([0, 1])).shape[0] == 2
    with pytest.raises(ValueError, match="order=raster has no such steps"):
        fit(tmp_path / "wrong", *settings, "module.progressive={_target_: varlab.training.schedules.Progressive}")


@torch.no_grad()
def test_likelihood_of_a_raster_network_is_that_of_its_forward(tokenizer, token_maps):
    raster, labels = make_var(order="raster").eval(), torch.tensor([0, 1])
    sequence = torch.cat(token_maps, dim=1)
    found = likelihood_scores(raster, tokenizer.quantizer, [(sequence, labels)])
    logits = raster(tokenizer.quantizer.codebook(sequence[:, :-1]), labels)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), sequence.flatten())
    assert found["loss"] == pytest.approx(float(expected), rel=1e-5)


def test_a_tokenizer_of_one_scale_serves_the_classical_raster(labels):
    tokenizer = make_tokenizer(patch_nums=[4]).eval()
    raster = make_var(order="raster", patch_nums=[4]).eval()
    assert generate(raster, tokenizer, labels, cfg_scale=1.5, cfg_schedule="constant").shape == (2, 3, 16, 16)


def test_muP_like_rates_slow_the_matrices_that_read_the_width_alone(tmp_path, study):
    settings = [
        *study,
        "steps=3",
        "module.lr_reference_depth=1",
        "module.mup_lr_scaling=true",
        "module.warmup_tokens=null",
    ]
    fit(tmp_path / "run", *settings, "module.schedule.warmup=0.0")
    saved = read_checkpoint(tmp_path / "run/checkpoints/last.ckpt")
    rates = [group.get("lr_multiplier", 1.0) for group in saved["optimizer_states"][0]["param_groups"]]
    assert rates == [1.0, 1.0, 0.5]
    net = make_var()
    slowed = {name for name, parameter in net.named_parameters() if is_hidden_matrix(name, parameter)}
    assert {name.split(".")[-1] for name in slowed} == {"weight"}
    assert {"head.weight", "blocks.0.attention.qkv.weight", "head_modulation.linear.weight"} <= slowed
    assert not slowed & {"word_embed.weight", "class_embedding.weight", "position", "blocks.0.attention.q_bias"}
