"""Tokens as numbers with digits, so that a head predicts each digit instead of each of their V values.

`bases`: of the digits, the lowest first: [2] * 16 for codes of 16 bits, [8, 5, 5, 5] for levels, [V] for the rows of a table,
whose only digit is the token itself. Given the hidden state, the digits of a token are predicted independently (Infinity,
Han et al. 2024, arXiv 2412.04431): sum(bases) logits in place of their product.
"""

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

Bases = Sequence[int]
MOST_CODES = 2**32  # whose tokens fit the largest type of a cache, uint32


def digits_of(tokens: Int[Tensor, "*rows"], bases: Bases) -> Int[Tensor, "*rows n"]:
    """The digits of tokens."""
    return torch.stack([tokens // math.prod(bases[:i]) % base for i, base in enumerate(bases)], dim=-1)


def tokens_of(digits: Int[Tensor, "*rows n"], bases: Bases) -> Int[Tensor, "*rows"]:
    """The tokens of digits."""
    return sum(
        (digits[..., i] * math.prod(bases[:i]) for i in range(len(bases))), start=torch.zeros_like(digits[..., 0])
    )


def with_errors(tokens: Int[Tensor, "B l"], bases: Bases, rates: Float[Tensor, " B"]) -> Int[Tensor, "B l"]:
    """Tokens of which each digit is replaced by another of its values, all equally likely, with a probability of its image's
    `rates`."""
    digits = digits_of(tokens, bases)
    steps = [torch.randint(1, max(base, 2), tokens.shape, device=tokens.device) for base in bases]
    others = torch.stack([(digits[..., i] + steps[i]) % base for i, base in enumerate(bases)], dim=-1)
    is_wrong = torch.rand(digits.shape, device=tokens.device) < rates[:, None, None]
    return tokens_of(torch.where(is_wrong, others, digits), bases)


def over_digits(
    score: Callable[[Tensor, Tensor], Tensor], logits: Float[Tensor, "B l S"], tokens: Int[Tensor, "B l"], bases: Bases
) -> Float[Tensor, "B l"]:
    """Sum over digits of `score(logits of a digit, the digit)`: a loss of tokens from one of codes."""
    if len(bases) == 1:
        return score(logits, tokens)
    digits = digits_of(tokens, bases)
    parts = logits.split(list(bases), dim=-1)
    return torch.stack([score(part, digits[..., i]) for i, part in enumerate(parts)]).sum(dim=0)


def most_likely(logits: Float[Tensor, "*rows S"], bases: Bases) -> tuple[Int[Tensor, "*rows"], Float[Tensor, "*rows"]]:
    """(the most likely tokens, their probabilities)."""
    found = [part.float().softmax(dim=-1).max(dim=-1) for part in logits.split(list(bases), dim=-1)]
    probability = torch.stack([values for values, _ in found]).prod(dim=0)
    return tokens_of(torch.stack([digits for _, digits in found], dim=-1), bases), probability
