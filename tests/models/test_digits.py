"""Tokens digit by digit, against all codes at once."""

import itertools

import pytest
import torch
from support.networks import make_var

from varlab.models.digits import digits_of, most_likely, over_digits, tokens_of
from varlab.models.losses import cross_entropy, token_errors, token_scores
from varlab.sampling.token_sampling import ScaleSettings, sample_digits

BASES = [3, 2, 4]


def all_logits(logits, bases):
    """Logits of all codes, sums of those of their digits."""
    parts = logits.log_softmax(-1) if len(bases) == 1 else [p.log_softmax(-1) for p in logits.split(bases, -1)]
    codes = [tokens_of(torch.tensor(d), bases).item() for d in itertools.product(*map(range, bases))]
    values = [
        sum(part[..., i] for part, i in zip(parts, d, strict=True)) for d in itertools.product(*map(range, bases))
    ]
    return torch.stack(
        [value for _, value in sorted(zip(codes, values, strict=True), key=lambda pair: pair[0])], dim=-1
    )


def test_digits_and_tokens_are_one_another():
    tokens = torch.arange(24)
    digits = digits_of(tokens, BASES)
    assert torch.equal(tokens_of(digits, BASES), tokens) and digits[7].tolist() == [1, 0, 1]
    large = torch.tensor([2**32 - 1, 2**31 + 5])
    assert torch.equal(tokens_of(digits_of(large, [2] * 32), [2] * 32), large)


def test_losses_errors_and_the_most_likely_token_are_those_over_all_codes():
    logits, tokens = torch.randn(2, 30, sum(BASES)), torch.randint(24, (2, 30))
    whole = all_logits(logits, BASES)
    torch.testing.assert_close(over_digits(cross_entropy, logits, tokens, BASES), cross_entropy(whole, tokens))
    found, probability = most_likely(logits, BASES)
    assert torch.equal(found, whole.argmax(-1))
    torch.testing.assert_close(probability, whole.softmax(-1).amax(-1))
    assert torch.equal(token_errors(logits, tokens, BASES), token_errors(whole, tokens))
    scores = [token_scores(x, tokens, [1, 2, 3, 4], bases) for x, bases in ((logits, BASES), (whole, None))]
    for a, b in zip(*scores, strict=True):
        torch.testing.assert_close(a, b)


def test_one_digit_is_the_token_itself_to_the_bit():
    logits, tokens = torch.randn(2, 5, 12), torch.randint(12, (2, 5))
    assert torch.equal(over_digits(cross_entropy, logits, tokens, [12]), cross_entropy(logits, tokens))


def test_sampled_digits_have_the_probabilities_of_all_codes():
    torch.manual_seed(0)
    logits = torch.randn(1, 1, sum(BASES))
    expected = all_logits(logits, BASES)[0, 0].softmax(-1)
    plain = ScaleSettings(0.0, 1.0, 0, 0.0, 0.0)
    tokens = sample_digits(logits.expand(1, 40_000, -1), torch.rand(1, 40_000, 3), plain, BASES)
    shares = torch.bincount(tokens[0], minlength=24) / 40_000
    assert (shares - expected).abs().max() < 0.01
    greedy = sample_digits(logits, torch.rand(1, 1, 3), plain._replace(top_k=1), BASES)
    assert greedy.item() == expected.argmax().item()
    cut = sample_digits(logits.expand(1, 5_000, -1), torch.rand(1, 5_000, 3), plain._replace(top_k=2), BASES)
    assert {len(digits_of(cut, BASES)[..., i].unique()) for i in range(3)} == {2}


def test_a_head_of_digits_is_small_and_must_match_the_codes():
    var = make_var(codebook_size=2**20, codebook_dim=20, bases=[2] * 20)
    assert var.head.weight.shape[0] == 40
    for bases in ([2] * 3, [1, 12], [4, 4]):
        with pytest.raises(ValueError, match="2 or more whose product is the number of codes, 12"):
            make_var(bases=bases)


@pytest.mark.parametrize("setting", [{"temperature": 1e-4}, {"top_p": 1e-6}, {"min_p": 1.0}, {"top_k": 1}])
def test_every_filter_works_on_digits(setting):
    logits = torch.randn(3, 50, sum(BASES))
    settings = ScaleSettings(0.0, 1.0, 0, 0.0, 0.0)._replace(**setting)
    assert torch.equal(sample_digits(logits, torch.rand(3, 50, 3), settings, BASES), most_likely(logits, BASES)[0])
