"""A step moves all codes of a frozen table."""

import torch

from varlab.models.codes.simvq import SimVQQuantizer


def test_one_used_code_moves_all_codes():
    quantizer = SimVQQuantizer([1, 2], codebook_size=8, codebook_dim=4)
    quantizer.init_weights()
    before, raw = quantizer.table(0).detach().clone(), quantizer.codebook.weight.clone()
    assert torch.equal(before, raw) and abs(raw.norm(dim=1).mean() - 1) < 0.3
    quantizer.embed(torch.tensor([[3]]), 0).square().sum().backward()
    with torch.no_grad():
        quantizer.map.weight -= 0.1 * quantizer.map.weight.grad
    assert torch.equal(quantizer.codebook.weight, raw) and not quantizer.codebook.weight.requires_grad
    assert ((quantizer.table(0) - before).norm(dim=1) > 0).all()
