"""A table for each scale."""

import math
from types import SimpleNamespace

import pytest
import torch
from support.networks import PATCH_NUMS, make_pair, make_var

from varlab.data.token_datamodule import TokenBatch
from varlab.models.codes.table_by_scale import TableByScaleQuantizer
from varlab.models.losses import TokenCrossEntropy
from varlab.training.codebook_callbacks import CollapseAlarm
from varlab.training.var_module import VARModule


def test_each_scale_looks_up_its_own_table():
    quantizer = TableByScaleQuantizer([1, 2, 4], codebook_sizes=[2, 16, 4], codebook_dim=3)
    quantizer.init_weights()
    assert [quantizer.size_of(k) for k in range(3)] == [2, 16, 4] and quantizer.codebook_size == 16
    for k in range(3):
        assert torch.equal(quantizer.embed(torch.tensor([1]), k)[0], quantizer.codebook[k][1])
        assert quantizer.nearest(torch.randn(1, 100, 3), k).max() < quantizer.size_of(k)


@pytest.mark.parametrize("sizes", [[2, 16], [2, 0, 4]])
def test_a_size_for_each_scale_is_required(sizes):
    with pytest.raises(ValueError, match="give a positive size for each of 3 scales"):
        TableByScaleQuantizer([1, 2, 4], codebook_sizes=sizes)


def test_loss_in_training_and_sampling_know_the_size_of_each_table():
    tokenizer, var = make_pair(TableByScaleQuantizer(PATCH_NUMS, [1, 4, 8, 12], 6), drop_path=0.0, label_dropout=0.0)
    torch.nn.init.zeros_(var.head.weight)
    token_maps = tokenizer.encode(torch.rand(2, 3, 16, 16) * 2 - 1)
    sequence = torch.cat(token_maps, dim=1)
    for chunks in (1, 3):
        module = SimpleNamespace(
            net=var, objective=None, self_correction=0.0, tokens=lambda batch, strength: (sequence, token_maps),
            of_shape=lambda batch: (var, tokenizer.quantizer), active_scales=lambda: (4, 1.0), loss=TokenCrossEntropy(),
            loss_chunks=chunks, is_logged=False,
        )  # fmt: skip
        loss = VARModule.training_step(module, TokenBatch(sequence, torch.tensor([0, 1]), torch.ones(2)), 0)
        expected = sum(n * math.log(size) for n, size in zip([1, 4, 9, 16], [1, 4, 8, 12], strict=True)) / 30
        assert loss.item() == pytest.approx(expected, rel=1e-5)
    cache = var.start_cache(torch.tensor([0, 1]))
    assert var.predict_scale(0, None, cache).softmax(-1)[..., 0].min() == 1
    module = SimpleNamespace(
        net=var, data=SimpleNamespace(condition_shape=()), loss=TokenCrossEntropy(0.1), objective=None, adapter=None,
        device_mesh=None, progressive=None,
    )  # fmt: skip
    with pytest.raises(ValueError, match="module.loss.label_smoothing spreads over all codes"):
        VARModule.check_net(module)


def test_a_scale_of_one_code_is_no_collapse():
    quantizer = TableByScaleQuantizer(PATCH_NUMS, [1, 4, 8, 12], 6)
    assert CollapseAlarm().check(torch.tensor([1.0, 3.0, 5.0, 5.0]), 100, quantizer) == []
    for wrong in ([1, 1, 1, 1], [1, 2, 3], [0, 1, 2, 3]):
        with pytest.raises(ValueError, match="a positive size for each of 4 scales, above 1 for one of them"):
            TableByScaleQuantizer(PATCH_NUMS, wrong, 6)
    with pytest.raises(ValueError, match="one number for each of 4 scales, the largest 12"):
        make_var(codes_by_scale=[1, 2, 12])
