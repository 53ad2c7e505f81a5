"""Codes of bits: no table, no lookup, no dead codes. A code is the signs of its vector."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from varlab.models import scales
from varlab.models.codes.lengths import LengthByScaleQuantizer
from varlab.models.digits import MOST_CODES

MOST_BITS = MOST_CODES.bit_length() - 1


class BinaryQuantizer(LengthByScaleQuantizer):
    """Bit i of a token is the sign of dim i; the vector is +-`length`_k in each dim, learned for each scale, because the
    residuals of fine scales are smaller.

    `entropy_weight` w, `temperature`: each bit is taken as a probability p(bit = 1 | z). The regularizer is w (E[H(p)] - H(E[p])):
    small for each vector, large over a batch (of all ranks). Over independent bits the entropy of a code is the sum
    of those of its bits, so nothing is summed over the 2^bits codes; H(E[p]) is then an upper bound.
    """

    place: Tensor

    def __init__(
        self,
        patch_nums: scales.PatchNums,
        bits: int = 12,
        entropy_weight: float = 0.1,
        temperature: float = 1.0,
        **residual: Any,
    ) -> None:
        """`residual`: arguments of `ResidualQuantizer`. Raises ValueError for more than 32 bits, a negative weight, or a temperature
        that is not above 0."""
        if not 1 <= bits <= MOST_BITS:
            raise ValueError(f"bits={bits}: give 1 to {MOST_BITS}")
        if entropy_weight < 0 or temperature <= 0:
            raise ValueError(
                f"entropy_weight={entropy_weight}, temperature={temperature}: give a weight of at least 0 and a temperature above 0"
            )
        super().__init__(patch_nums, codebook_size=2**bits, codebook_dim=bits, bases=[2] * bits, **residual)
        self.bits, self.entropy_weight, self.temperature = bits, entropy_weight, temperature
        self.first_length = bits**-0.5  # on the unit sphere
        self.register_buffer("place", 2 ** torch.arange(bits), persistent=False)

    def nearest(self, z: Float[Tensor, "B l C"], k: int) -> Int[Tensor, "B l"]:
        return ((z > 0) * self.place).sum(dim=-1)

    def embed(self, tokens: Int[Tensor, "*rows"], k: int) -> Float[Tensor, "*rows C"]:
        signs = 2.0 * (tokens[..., None] & self.place).bool() - 1
        return signs * self.length(k)

    def logits_of_bits(self, z: Float[Tensor, "B l C"], k: int) -> Float[Tensor, "B l C"]:
        """Log-odds of each bit being 1."""
        raise NotImplementedError

    def regularizer(self, z: Float[Tensor, "B l C"], k: int) -> Float[Tensor, ""] | None:
        if self.entropy_weight == 0:
            return None
        with torch.autocast(z.device.type, enabled=False):
            probability = self.logits_of_bits(z.float(), k).sigmoid().flatten(0, 1)
            certain, even = entropy(probability).sum(dim=1).mean(), entropy(mean_of_ranks(probability)).sum()
            return self.entropy_weight * (certain - even)


class BinarySphericalQuantizer(BinaryQuantizer):
    """Binary spherical quantization (Zhao et al. 2024, arXiv 2406.07548): vectors are projected onto the unit sphere, whose
    codes are the corners of a cube; the probability of a corner falls with its distance there."""

    def logits_of_bits(self, z: Float[Tensor, "B l C"], k: int) -> Float[Tensor, "B l C"]:
        return 4 * F.normalize(z, dim=-1) / (self.bits**0.5 * self.temperature)


class LookupFreeQuantizer(BinaryQuantizer):
    """Lookup-free quantization (Yu et al. 2023, arXiv 2310.05737): the probability of a code falls with its squared distance to
    the vector, in units of the scale's length."""

    def logits_of_bits(self, z: Float[Tensor, "B l C"], k: int) -> Float[Tensor, "B l C"]:
        return 4 * z / (self.length(k) * self.temperature)


def mean_of_ranks(x: Float[Tensor, "n C"]) -> Float[Tensor, " C"]:
    """Mean over the rows of all ranks, of which each has as many. The gradient is that of this rank's rows; averaged over ranks, as
    in DDP, it is that of the mean."""
    mean = x.mean(dim=0)
    if not (dist.is_available() and dist.is_initialized()):
        return mean
    of_all = mean.detach().clone()
    dist.all_reduce(of_all)
    return mean + (of_all / dist.get_world_size() - mean.detach())


def entropy(probability: Float[Tensor, "*rows"]) -> Float[Tensor, "*rows"]:
    """Entropy of a bit in nats."""
    probability = probability.clamp(1e-6, 1 - 1e-6)
    return -(probability * probability.log() + (1 - probability) * (1 - probability).log())
