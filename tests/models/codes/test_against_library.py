"""The arithmetic of the codes, against vector-quantize-pytorch."""

import pytest
import torch
from torch.nn import functional as F
from vector_quantize_pytorch import FSQ, LFQ, SimVQ, VectorQuantize
from vector_quantize_pytorch.vector_quantize_pytorch import rotate_to

from varlab.models.codes.binary import BinarySphericalQuantizer, LookupFreeQuantizer, entropy
from varlab.models.codes.finite_scalar import FiniteScalarQuantizer
from varlab.models.codes.simvq import SimVQQuantizer
from varlab.models.quantizer import MultiScaleQuantizer, rotated

BITS, TEMPERATURE = 5, 2.0


def vectors(dims):
    return torch.randn(3, 40, dims, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("member", [LookupFreeQuantizer, BinarySphericalQuantizer])
def test_bits_and_their_entropies(member):
    is_spherical = member is BinarySphericalQuantizer
    quantizer = member([1, 2], bits=BITS, entropy_weight=0.3, temperature=TEMPERATURE)
    size = BITS**-0.5 if is_spherical else 1.0  # of a code in each dim
    with torch.no_grad():
        quantizer.log_length.fill_(torch.tensor(size).log())
    z = vectors(BITS)
    library = LFQ(dim=BITS, spherical=is_spherical, entropy_loss_weight=1.0)
    (codes, indices, _), found = library(z, inv_temperature=1 / TEMPERATURE, return_loss_breakdown=True)
    tokens = quantizer.nearest(z, 0)
    torch.testing.assert_close(quantizer.embed(tokens, 0), codes)
    reversed_bits = [
        int(f"{int(i):0{BITS}b}"[::-1], 2) for i in indices.flatten()
    ]  # the library's first bit is the highest
    assert tokens.flatten().tolist() == reversed_bits
    probability = quantizer.logits_of_bits(z, 0).sigmoid()
    torch.testing.assert_close(entropy(probability).sum(dim=-1).mean(), found.per_sample_entropy, rtol=1e-3, atol=1e-3)
    scaled = F.normalize(z, dim=-1) if is_spherical else z
    bit = LFQ(dim=1, codebook_scale=size, entropy_loss_weight=1.0)
    parts = [bit(scaled[..., i : i + 1], inv_temperature=1 / TEMPERATURE).entropy_aux_loss for i in range(BITS)]
    torch.testing.assert_close(quantizer.regularizer(z, 0), 0.3 * sum(parts), rtol=1e-3, atol=1e-4)


def test_levels():
    quantizer = FiniteScalarQuantizer([1, 2], levels=[8, 5, 3, 2])
    with torch.no_grad():
        quantizer.log_length.zero_()
    codes, indices = FSQ([8, 5, 3, 2], preserve_symmetry=True, bound_hard_clamp=True)(vectors(4))
    tokens = quantizer.nearest(vectors(4), 0)
    assert torch.equal(tokens, indices.long())
    torch.testing.assert_close(quantizer.embed(tokens, 0), codes)


def test_a_linear_map_over_a_fixed_table():
    quantizer = SimVQQuantizer([1, 2], codebook_size=24, codebook_dim=6)
    library = SimVQ(6, 24, rotation_trick=False)
    with torch.no_grad():
        quantizer.codebook.weight.copy_(library.frozen_codebook)
        quantizer.map.weight.copy_(library.code_transform.weight)
    codes, indices, _ = library(vectors(6))
    tokens = quantizer.nearest(vectors(6), 0)
    assert torch.equal(tokens, indices)
    torch.testing.assert_close(quantizer.embed(tokens, 0), codes)


@pytest.mark.parametrize("lookup", ["l2", "cosine"])
def test_the_nearest_row(lookup):
    quantizer = MultiScaleQuantizer([1, 2], 24, 6, lookup=lookup)
    library = VectorQuantize(6, codebook_size=24, use_cosine_sim=lookup == "cosine").eval()
    with torch.no_grad():
        quantizer.codebook.weight.copy_(library.codebook)
    _, indices, _ = library(vectors(6))
    assert torch.equal(quantizer.nearest(vectors(6)), indices)


def test_the_rotation_trick():
    z, codes = vectors(6)[:1], vectors(6)[1:2]
    mine, theirs = z.clone().requires_grad_(), z.clone().requires_grad_()
    weight = vectors(6)[2:]
    (rotated(mine.mT[..., None], codes.mT[..., None]) * weight.mT[..., None]).sum().backward()
    (rotate_to(theirs, codes) * weight).sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-5)
