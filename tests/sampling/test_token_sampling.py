"""Drawing a token: guidance, filters, temperature."""

import pytest
import torch

from varlab.sampling import token_sampling
from varlab.sampling.token_sampling import (
    SamplingSettings,
    ScaleSettings,
    filter_logits,
    guide,
    sample_filtered,
    sample_tokens,
    sample_top_k,
)


def test_draws_follow_the_distribution():
    logits = torch.log(torch.tensor([0.1, 0.0, 0.6, 0.3]))
    uniform = (torch.arange(1000) + 0.5) / 1000
    tokens = sample_tokens(logits.expand(1, 1000, 4), uniform[None])
    assert torch.bincount(tokens[0], minlength=4).tolist() == [100, 0, 600, 300]
    edges = sample_tokens(logits.expand(1, 2, 4), torch.tensor([[0.0, 1 - 2**-24]]))
    assert edges.tolist() == [[0, 3]]


def test_a_code_of_zero_probability_is_never_drawn():
    logits = filter_logits(torch.randn(1, 500, 40), top_k=3)
    tokens = sample_tokens(logits, torch.rand(1, 500))
    assert (logits.gather(-1, tokens[..., None]) > -torch.inf).all()


def test_a_device_without_float64_gives_the_same_tokens(monkeypatch):
    """Its numbers are drawn on the CPU. The device itself is not here: this is its branch of the code."""
    logits, uniform, settings = torch.randn(2, 50, 40), torch.rand(2, 50), ScaleSettings(0.0, 0.9, 7, 0.8, 0.0)
    before = sample_tokens(logits, uniform), sample_top_k(logits, uniform, settings)
    moved = []
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: moved.append(x.dtype) or x)
    monkeypatch.setattr(token_sampling, "DEVICES_WITHOUT_FLOAT64", ("cpu",))
    after = sample_tokens(logits, uniform), sample_top_k(logits, uniform, settings)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert moved == [torch.float32] * 4, "nothing is widened before it has left the device"


def test_top_p_keeps_the_smallest_set_that_exceeds_p():
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    for top_p, kept in [(0.4, 1), (0.6, 2), (0.9, 3), (0.96, 4)]:
        assert (filter_logits(probabilities.log(), top_p=top_p) > -torch.inf).sum() == kept


def test_guidance_of_zero_is_the_conditional_distribution():
    cond, uncond = torch.randn(1, 2, 5), torch.randn(1, 2, 5)
    assert torch.equal(guide(cond, uncond, 0.0), cond)
    torch.testing.assert_close(guide(cond, uncond, 1.0), 2 * cond - uncond)


GRID = (torch.arange(20_000) + 0.5)[None] / 20_000


@pytest.mark.parametrize("how", [(0.7, 5, 0.0, 0.0), (1.0, 9, 0.6, 0.0), (1.3, 8, 0.0, 0.2), (0.9, 7, 0.8, 0.3)])
def test_drawing_from_the_top_codes_follows_the_filtered_distribution(how):
    """Every code comes as often as when the whole codebook is filtered, sorted and summed."""
    how = ScaleSettings(0.0, *how)
    logits = torch.randn(1, 1, 40).expand(1, GRID.shape[1], 40)
    fast, slow = sample_top_k(logits, GRID, how), sample_filtered(logits, GRID, how)[0]
    counts = [torch.bincount(tokens[0], minlength=40) for tokens in (fast, slow)]
    assert (counts[0] - counts[1]).abs().max() <= 2  # numbers at the borders
    assert 1 < (counts[0] > 0).sum() <= how.top_k


def test_min_p_keeps_what_is_likely_enough():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()[None, None]
    for min_p, kept in [(0.0, 4), (0.2, 3), (0.5, 2), (0.9, 1)]:
        assert (
            sample_filtered(logits, torch.zeros(1, 1), ScaleSettings(0.0, 1.0, 0, 0.0, min_p))[1] > -torch.inf
        ).sum() == kept


def test_temperature_sharpens_and_flattens():
    logits = torch.tensor([0.8, 0.2]).log().expand(1, GRID.shape[1], 2)
    shares = [
        sample_filtered(logits, GRID, ScaleSettings(0.0, t, 0, 0.0, 0.0))[0].float().mean().item()
        for t in (0.5, 1.0, 2.0)
    ]
    assert shares == pytest.approx([0.04 / 0.68, 0.2, 1 / 3], abs=1e-3)


def test_guidance_schedules():
    guided = {
        name: [how.guidance for how in SamplingSettings(2.0, name).by_scale(5, 9)]
        for name in ("linear", "cosine", "constant")
    }
    assert guided["linear"] == [0.0, 0.5, 1.0, 1.5, 2.0]
    assert guided["cosine"] == pytest.approx([0.0, 0.2929, 1.0, 1.7071, 2.0], abs=1e-4)
    assert guided["constant"] == [2.0] * 5
    assert [how.guidance for how in SamplingSettings(2.0, cfg_from=3).by_scale(5, 9)] == [0.0, 0.0, 0.0, 1.5, 2.0]
    assert [how.guidance for how in SamplingSettings([4.0, 0.0, 1.0]).by_scale(3, 9)] == [4.0, 0.0, 1.0]


def test_filters_are_off_unless_asked_for():
    logits = torch.tensor([[0.0, -200.0, 1.0]])
    assert torch.equal(filter_logits(logits), logits)
    assert (filter_logits(torch.zeros(1, 4), top_p=0.5) > -torch.inf).sum() == 2
    for settings in ({"top_p": 1.5}, {"top_k": 4}):
        with pytest.raises(
            ValueError, match=f"{next(iter(settings))}={next(iter(settings.values()))}: must be between 0"
        ):
            filter_logits(logits, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 10}, "top_k=10: must be between 0 and 9, the codebook size"),
        ({"top_p": 1.5}, r"top_p=1.5: must be between 0 and 1$"),
        ({"min_p": 1.5}, r"min_p=1.5: must be between 0 and 1$"),
        ({"temperature": 0.0}, "temperature=0.0: must be above 0"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        SamplingSettings(2.0, **settings).by_scale(3, 9)
