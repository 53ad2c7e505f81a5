"""Each image depends on its own seed and label; what is drawn follows the filtered distribution."""

import pytest
import torch
from support.networks import make_tokenizer, make_var

from varlab.models.transformer import BlockCache
from varlab.sampling.editing import edit
from varlab.sampling.generate import generate
from varlab.sampling.token_sampling import (
    SamplingSettings,
    ScaleSettings,
    filter_logits,
    guide,
    sample_filtered,
    sample_tokens,
    sample_top_k,
)


def test_an_image_does_not_depend_on_its_batch(var, tokenizer):
    labels = torch.tensor([0, 1, 2, 0, 1])
    images, tokens = generate(var, tokenizer, labels, cfg_scale=2.0, top_k=6, top_p=0.9, seed=7, return_tokens=True)
    for i in range(5):
        alone, own = generate(
            var, tokenizer, labels[i : i + 1], cfg_scale=2.0, top_k=6, top_p=0.9, seed=[7 + i], return_tokens=True
        )
        assert all(torch.equal(ours[0], theirs[i]) for ours, theirs in zip(own, tokens, strict=True))
        torch.testing.assert_close(alone[0], images[i], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(images[0], images[3])  # same label, other seed


def test_the_same_seed_gives_the_same_image_and_leaves_torch_alone(var, tokenizer, labels):
    state = torch.get_rng_state()
    first, second = (generate(var, tokenizer, labels, cfg_scale=1.0, seed=3) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(state, torch.get_rng_state())
    assert first.min() >= 0 and first.max() <= 1


def test_decoded_tokens_are_the_image(var, tokenizer, labels):
    images, token_maps = generate(var, tokenizer, labels, cfg_scale=1.0, return_tokens=True)
    with torch.no_grad():
        torch.testing.assert_close(tokenizer.decode(token_maps) / 2 + 0.5, images)


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


def test_top_p_keeps_the_smallest_set_that_exceeds_p():
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    for top_p, kept in [(0.4, 1), (0.6, 2), (0.9, 3), (0.96, 4)]:
        assert (filter_logits(probabilities.log(), top_p=top_p) > -torch.inf).sum() == kept


def test_guidance_of_zero_is_the_conditional_distribution():
    cond, uncond = torch.randn(1, 2, 5), torch.randn(1, 2, 5)
    assert torch.equal(guide(cond, uncond, 0.0), cond)
    torch.testing.assert_close(guide(cond, uncond, 1.0), 2 * cond - uncond)


@pytest.mark.parametrize(
    ("kwargs", "message"), [({"top_k": 13}, "top_k=13.*12"), ({"top_k": -1}, "top_k=-1"), ({"top_p": 1.5}, "top_p=1.5")]
)
def test_filters_out_of_range_are_named(kwargs, message, var, tokenizer, labels):
    with pytest.raises(ValueError, match=message):
        generate(var, tokenizer, labels, cfg_scale=1.0, **kwargs)


@pytest.mark.parametrize("label", [-1, 4])
def test_a_label_out_of_range_says_how_many_classes_there_are(label, var, tokenizer):
    with pytest.raises(ValueError, match=f"label {label} is out of range: there are 3 classes"):
        generate(var, tokenizer, torch.tensor([label]), cfg_scale=1.0)


def test_a_transformer_of_another_tokenizer_is_refused(var, labels):
    with pytest.raises(ValueError, match="codebook_size=12, the tokenizer 13"):
        generate(var, make_tokenizer(codebook_size=13), labels, cfg_scale=1.0)


def test_kept_tokens_stay(var, tokenizer, labels):
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        everything = edit(var, tokenizer, images, torch.ones(4, 4), labels, cfg_scale=1.0)
        torch.testing.assert_close(
            everything, tokenizer.decode(tokenizer.encode(images)) / 2 + 0.5, rtol=1e-4, atol=1e-5
        )


def test_one_scale_is_sampled_without_dividing_by_zero(labels):
    images = generate(make_var(patch_nums=[4]), make_tokenizer(patch_nums=[4]), labels, cfg_scale=2.0)
    assert images.isfinite().all()


def test_the_cache_grows_scale_by_scale():
    cache = BlockCache(torch.zeros(1, 1, 5, 2), torch.zeros(1, 1, 5, 2))
    cache.append(torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2))
    keys, values = cache.append(2 * torch.ones(1, 1, 4, 2), 3 * torch.ones(1, 1, 4, 2))
    assert keys[0, 0, :, 0].tolist() == [1, 2, 2, 2, 2]
    assert values[0, 0, :, 0].tolist() == [1, 3, 3, 3, 3]


def test_the_last_scale_is_not_kept():
    cache = BlockCache(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2))
    cache.append(torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2))
    keys, values = cache.append(2 * torch.ones(1, 1, 4, 2), 3 * torch.ones(1, 1, 4, 2))
    assert keys[0, 0, :, 0].tolist() == [1, 2, 2, 2, 2] and values[0, 0, :, 0].tolist() == [1, 3, 3, 3, 3]
    assert cache.keys.shape[2] == cache.length == 1


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


def test_every_number_may_be_given_for_each_scale(var, tokenizer, labels):
    """Greedy at all scales but the last is the same as greedy up to there."""
    _, greedy = generate(var, tokenizer, labels, cfg_scale=1.0, top_k=1, return_tokens=True)
    _, mixed = generate(
        var, tokenizer, labels, cfg_scale=1.0, top_k=[1, 1, 1, 0], temperature=[1, 1, 1, 2.0], return_tokens=True
    )
    assert [torch.equal(a, b) for a, b in zip(greedy, mixed, strict=True)] == [True, True, True, False]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": [1, 2]}, r"top_k=\[1, 2\] has 2 entries, but the pyramid has 4 scales"),
        ({"temperature": 0.0}, r"temperature=0.0: must be above 0 \(top_k=1 takes the most likely code\)"),
        ({"min_p": 1.5}, "min_p=1.5: must be between 0 and 1"),
        ({"cfg_schedule": "square"}, "cfg_schedule='square': choose one of linear, cosine, constant"),
    ],
)
def test_settings_out_of_range_are_named(settings, message, var, tokenizer, labels):
    with pytest.raises(ValueError, match=message):
        generate(var, tokenizer, labels, **settings)
