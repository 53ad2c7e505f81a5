"""Each image depends on its own seed and label; what is drawn follows the filtered distribution."""

import pytest
import torch
from support.networks import make_tokenizer, make_var

from varlab.sampling.generate import generate


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


def test_one_scale_is_sampled_without_dividing_by_zero(labels):
    images = generate(make_var(patch_nums=[4]), make_tokenizer(patch_nums=[4]), labels, cfg_scale=2.0)
    assert images.isfinite().all()


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


def test_guidance_of_one_is_guidance(var, tokenizer, labels):
    unguided, guided = (
        generate(var, tokenizer, labels, cfg_scale=scale, cfg_schedule="constant", seed=1) for scale in (0.0, 1.0)
    )
    assert not torch.equal(unguided, guided)
