"""Parameters and FLOPs by formula, by hand and by torch."""

import pytest
import torch
from support.networks import PATCH_NUMS, make_var

from varlab.cost.flops import parameter_counts, training_flops
from varlab.models import scales
from varlab.models.var import VAR


@pytest.mark.parametrize("depth", [2, 3, 6, 16])
@pytest.mark.parametrize("shared", [False, True])
def test_counted_flops_are_those_of_the_written_formula(depth, shared):
    with torch.device("meta"):
        sizes = VAR(depth, [1, 2, 3, 4, 5, 6, 8, 10, 13, 16], 4096, 32, 1000, shared_adaln=shared).sizes
    w, d, length, seen, pairs = 64 * depth, depth, 680, 0, 0
    for pn in sizes["patch_nums"]:
        seen += pn * pn
        pairs += pn * pn * seen
    adaln = 12 * w * w * (1 if shared else d)
    expected = 3 * (length * (24 * w * w * d + 2 * w * 4096) + 679 * 2 * 32 * w + adaln + 4 * w * w + 4 * w * d * pairs)
    assert training_flops(sizes) == expected


@torch.no_grad()
def test_counted_flops_are_those_that_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        var, tokens = VAR(3, PATCH_NUMS, 64, 8, 5).eval(), 30
        with FlopCounterMode(display=False) as counter:
            var(torch.empty(1, 29, 8), torch.zeros(1, dtype=torch.long))
    causal = sum(pn**2 * sum(q**2 for q in PATCH_NUMS[: k + 1]) for k, pn in enumerate(PATCH_NUMS))
    counted = counter.get_total_flops()
    dense_attention = 4 * var.width * 3 * tokens**2
    without_attention = training_flops(var.sizes) // 3 - 4 * var.width * 3 * causal
    assert counted in (
        without_attention,
        without_attention + dense_attention,
    )  # torch leaves attention out on some devices


@torch.no_grad()
def test_a_head_of_digits_costs_its_logits():
    plain, digits = (make_var(codebook_size=2**12, bases=bases) for bases in (None, [2] * 12))
    for var in (plain, digits):
        assert parameter_counts(var.sizes)["params_total"] == sum(p.numel() for p in var.parameters())
    saved = training_flops(plain.sizes) - training_flops(digits.sizes)
    assert saved == 3 * 30 * 2 * plain.width * (2**12 - 24)


def test_published_ratios_to_6nd():
    for depth, ratio in [(2, 1.93), (4, 1.07), (8, 0.82), (16, 0.73), (30, 0.70)]:
        with torch.device("meta"):
            sizes = VAR(depth, [1, 2, 3, 4, 5, 6, 8, 10, 13, 16], 4096, 32, 1000).sizes
        paper_n = 18 * depth * (64 * depth) ** 2
        assert training_flops(sizes) / (6 * paper_n * 680) == pytest.approx(ratio, abs=0.006)


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
