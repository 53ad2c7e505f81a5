"""Parts of a VAR's training that need no run."""

from types import SimpleNamespace

import pytest
import torch
from support.networks import PATCH_NUMS

from varlab.data.token_datamodule import TokenBatch
from varlab.models import scales
from varlab.training.var_module import VARModule


def test_the_standard_error_of_the_loss_is_over_images():
    """`val/loss_se` is the standard deviation of the images' losses over the root of their number."""
    losses = torch.tensor([1.0, 2.0, 4.0, 5.0, 8.0])
    num_scales, logged = len(PATCH_NUMS), {}
    means = torch.cat([losses.mean().expand(num_scales), torch.zeros(num_scales), losses.square().mean()[None]])
    module = SimpleNamespace(
        net=SimpleNamespace(patch_nums=PATCH_NUMS),
        data=SimpleNamespace(num_val=len(losses)),
        log_scores=lambda split, loss, error, others: logged.update(others),
    )
    VARModule.log_validation(module, "val", means)
    assert float(logged["val/loss_se"]) == pytest.approx(float(losses.std(correction=0)) / len(losses) ** 0.5, rel=1e-5)


def test_only_the_newest_scale_of_progressive_training_is_faded_in(tokenizer, var, token_maps, labels):
    """Each token costs 1 here; 1 + 4 tokens are trained, the four newest with weight 0.25, of 30 in all."""
    sequence = torch.cat(token_maps, dim=1)
    module = SimpleNamespace(
        net=var,
        tokens=lambda batch: (sequence, token_maps),
        inputs=lambda maps: tokenizer.quantizer.teacher_forcing_inputs(maps),
        active_scales=lambda: (2, 0.25),
        loss=lambda logits, tokens: torch.ones(tokens.shape),
        loss_chunks=1,
        is_logged=False,
    )
    loss = VARModule.training_step(module, TokenBatch(sequence, labels, torch.ones(2)), 0)
    assert float(loss) == pytest.approx((1 + 0.25 * 4) / scales.num_tokens(PATCH_NUMS))
