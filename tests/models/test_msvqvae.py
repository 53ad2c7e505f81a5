"""The tokenizer as a whole."""

import pytest
import torch
from support.networks import make_tokenizer


def test_images_of_another_size_are_refused_with_both_sizes(tokenizer):
    with pytest.raises(ValueError, match=r"\(20, 20\).*\(16, 16\)"):
        tokenizer.encode(torch.zeros(1, 3, 20, 20))


@torch.no_grad()
def test_the_filmstrip_ends_with_the_reconstruction(tokenizer):
    token_maps = tokenizer.encode(torch.rand(2, 3, 16, 16) * 2 - 1)
    strip = tokenizer.filmstrip(token_maps)
    assert torch.equal(strip[-1], tokenizer.decode(token_maps))
    assert torch.equal(strip[1], tokenizer.decode(token_maps[:2]))


def test_losses_by_scale_have_the_loss_as_their_mean():
    out = make_tokenizer().quantizer(torch.randn(3, 6, 4, 4))
    assert out.vq_losses.shape == (4,) and torch.equal(out.vq_losses.mean(), out.vq_loss)
