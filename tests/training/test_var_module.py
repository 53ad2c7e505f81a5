"""Parts of a VAR's training that need no run."""

import csv
import json
from types import SimpleNamespace

import pytest
import torch
from hydra.errors import InstantiationException
from support.networks import PATCH_NUMS
from support.runs import (
    command,
    config,
    fit,
    kill_at,
    log_to,
    logged_losses,
)

from varlab.commands import tokenize
from varlab.data.images import ImageBatch
from varlab.data.token_datamodule import TokenBatch
from varlab.models import scales
from varlab.training.schedules import Progressive
from varlab.training.var_module import VARModule


def test_the_standard_error_of_the_loss_is_over_images():
    """`val/loss_se` is the standard deviation of the images' losses over the root of their number."""
    losses = torch.tensor([1.0, 2.0, 4.0, 5.0, 8.0])
    num_scales, logged = len(PATCH_NUMS), {}
    overall = torch.stack([losses.mean(), torch.zeros(()), losses.square().mean()])
    means = torch.cat([losses.mean().expand(num_scales), torch.zeros(num_scales), overall])
    module = SimpleNamespace(
        net=SimpleNamespace(patch_nums=PATCH_NUMS),
        data=SimpleNamespace(num_val=len(losses)),
        log_by_scale=lambda split, loss, error, others: logged.update(others),
    )
    VARModule.log_validation(module, "val", means)
    assert float(logged["val/loss"]) == 4.0
    assert float(logged["val/loss_se"]) == pytest.approx(float(losses.std(correction=0)) / len(losses) ** 0.5, rel=1e-5)


def test_only_the_newest_scale_of_progressive_training_is_faded_in(tokenizer, var, token_maps, labels):
    """Each token costs 1 here; 1 + 4 tokens are trained, the four newest with weight 0.25, of 30 in all."""
    sequence = torch.cat(token_maps, dim=1)
    module = SimpleNamespace(
        net=var,
        objective=None,
        self_correction=0.0,
        tokens=lambda batch, self_correction: (sequence, token_maps),
        of_shape=lambda batch: (var, tokenizer.quantizer),
        active_scales=lambda: (2, 0.25),
        loss=lambda logits, tokens: torch.ones(tokens.shape),
        loss_chunks=1,
        is_logged=False,
    )
    loss = VARModule.training_step(module, TokenBatch(sequence, labels, torch.ones(2)), 0)
    assert float(loss) == pytest.approx((1 + 0.25 * 4) / scales.num_tokens(PATCH_NUMS))


def test_tokens_and_images_give_the_same_loss(tmp_path, digits_folder, tokenizer_run, var_overrides):
    checkpoint = tokenizer_run / "checkpoints/last.ckpt"
    cache = [f"tokenizer={checkpoint}", f"shards={digits_folder}", f"out={tmp_path / 'cache'}", "resize_ratio=1.0"]
    tokenize.run(config(tmp_path, *cache, verb="tokenize"))
    still = [o for o in var_overrides if not o.startswith("data.path")] + ["model.drop_path=0.0", "data.window=null"]
    fit(tmp_path / "tokens", *still, f"data.path={tmp_path / 'cache'}", *log_to(tmp_path / "tokens.log"))
    images = ["data=images", "resolution=16px", "data.resize_ratio=1.0", "data.random_crop=false", "data.num_workers=0"]
    fit(tmp_path / "images", *still, *images, f"data.path={digits_folder}", *log_to(tmp_path / "images.log"))
    from_tokens, from_images = (
        [float.fromhex(loss) for loss in logged_losses(tmp_path / f"{road}.log").values()]
        for road in ("tokens", "images")
    )
    assert len(from_tokens) == 9
    assert from_images == pytest.approx(from_tokens, rel=1e-5)
    rows = [json.loads((tmp_path / road / "run.json").read_text()) for road in ("tokens", "images")]
    assert rows[1]["val_loss"] == pytest.approx(rows[0]["val_loss"], rel=1e-5)
    assert rows[1]["flops_tokenizer"] > 0 == rows[0]["flops_tokenizer"]


def test_a_loss_in_chunks_is_the_same_loss(tmp_path, var_overrides):
    for name, change in [("whole", []), ("chunks", ["module.loss_chunks=3"])]:
        fit(tmp_path / name, *var_overrides, *change, "log_every=1")
    whole, chunks = (
        [
            (row["step"], key, float(row[key]))
            for row in csv.DictReader((tmp_path / name / "metrics.csv").open())
            for key in row
            if key.startswith(("train/loss", "train/err", "val/loss")) and row[key]
        ]
        for name in ("whole", "chunks")
    )
    assert len(whole) > 80
    assert [row[:2] for row in chunks] == [row[:2] for row in whole]
    assert [row[2] for row in chunks] == pytest.approx([row[2] for row in whole], rel=1e-4, abs=1e-4)


PROGRESSIVE = Progressive(share=0.5, first_scales=1)


def test_progressive_training_scores_fewer_tokens_at_their_old_weight(tmp_path, still):
    """The first step sees 1 + 4 of 30 tokens, each with weight 1/30, and costs the FLOPs of those."""
    gradual = "module.progressive={_target_: varlab.training.schedules.Progressive, share: 0.5, first_scales: 1}"
    fit(tmp_path / "gradual", *still, gradual, *log_to(tmp_path / "gradual.log"))
    fit(tmp_path / "plain", *still, *log_to(tmp_path / "plain.log"))
    first, plain = (float.fromhex(logged_losses(tmp_path / f"{name}.log")[1]) for name in ("gradual", "plain"))
    assert first == pytest.approx(plain * 5 / 30, rel=0.02)  # all tokens cost ln V at the start
    rows = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("gradual", "plain")]
    assert rows[0]["tokens_seen"] < rows[1]["tokens_seen"] and rows[0]["flops_exact"] < rows[1]["flops_exact"]
    seen = [PROGRESSIVE.stage(step, 9, 0, len(PATCH_NUMS))[0] for step in range(9)]
    assert rows[0]["tokens_seen"] == 8 * sum(sum(pn * pn for pn in PATCH_NUMS[:n]) for n in seen)
    killed = command(
        tmp_path / "killed", *still, gradual, *log_to(tmp_path / "killed.log"), *kill_at(4), "ckpt_path=last"
    )
    assert killed.returncode == -9
    fit(tmp_path / "killed", *still, gradual, *log_to(tmp_path / "killed.log"), "ckpt_path=last")
    assert logged_losses(tmp_path / "gradual.log") == logged_losses(tmp_path / "killed.log")


def test_self_correction_needs_images_and_leaves_validation_as_it_is(tmp_path, digits_folder, var_overrides):
    with pytest.raises(ValueError, match=r"self_correction=0.2 encodes images anew in each step, but .* holds tokens"):
        fit(tmp_path / "tokens", *var_overrides, "module.self_correction=0.2")
    with pytest.raises(InstantiationException, match=r"self_correction=1.5: give a share of the digits from 0 to 1"):
        fit(tmp_path / "wrong", *var_overrides, "module.self_correction=1.5")
    images = [f"data.path={digits_folder}" if o.startswith("data.path") else o for o in var_overrides]
    images += ["data=images", "resolution=16px", "module.base_lr=0.0", "module.weight_decay=0.0"]
    losses = {}
    for strength in (0.0, 1.0):
        log = tmp_path / f"{strength}.log"
        fit(tmp_path / f"{strength}", *images, f"module.self_correction={strength}", *log_to(log))
        row = json.loads((tmp_path / f"{strength}/run.json").read_text())
        losses[strength] = row["val_loss"], logged_losses(log)
    assert losses[0.0][0] == losses[1.0][0]
    assert losses[0.0][1] != losses[1.0][1]


@torch.no_grad()
def test_self_correction_predicts_what_the_errors_left_over(tokenizer):
    """Each image has its own share of errors, from 0 to the given one; only the network sees them."""
    images = torch.rand(64, 3, 16, 16) * 2 - 1
    batch = ImageBatch(images, torch.zeros(64, dtype=torch.long), torch.ones(64), torch.zeros(64, dtype=torch.long))
    module = SimpleNamespace(tokenizer=tokenizer, device=torch.device("cpu"))
    sequence, seen = VARModule.tokens(module, batch, 1.0)
    quantizer, f = tokenizer.quantizer, tokenizer.features(images)
    found, f_hat = sequence.split([1, 4, 9, 16], dim=1), torch.zeros_like(f)
    for k, after in enumerate(quantizer.partial_sums(seen)):
        assert torch.equal(found[k], quantizer.nearest(quantizer.at_scale(f - f_hat, k), k))
        f_hat = after
    shares = (sequence != torch.cat(seen, dim=1)).float().mean(dim=1)
    assert shares.min() < 0.2 and shares.max() > 0.8 and 0.35 < shares.mean() < 0.65
    sequence, seen = VARModule.tokens(module, batch, 0.0)
    assert torch.equal(sequence, torch.cat(seen, dim=1)) and torch.equal(
        sequence, torch.cat(tokenizer.encode(images), dim=1)
    )
