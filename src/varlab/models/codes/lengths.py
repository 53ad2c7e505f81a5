"""Codes of a fixed shape, with a learned length for each scale: residuals get smaller from scale to scale."""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from varlab.models import scales
from varlab.models.quantizer import ResidualQuantizer


class LengthByScaleQuantizer(ResidualQuantizer):
    """Vectors of scale k are multiples of `length(k)`, which falls by half from the coarsest to the finest scale at first."""

    first_length: float = 1.0

    def __init__(self, patch_nums: scales.PatchNums, **residual: Any) -> None:
        """`residual`: further arguments of `ResidualQuantizer`."""
        super().__init__(patch_nums, **residual)
        self.log_length = nn.Parameter(torch.zeros(self.num_scales))

    def init_weights(self) -> None:
        progress = [scales.progress(k, self.num_scales) for k in range(self.num_scales)]
        with torch.no_grad():
            self.log_length.copy_(math.log(self.first_length) - math.log(2) * torch.tensor(progress))

    def undecayed(self) -> list[Tensor]:
        return [self.log_length]

    def length(self, k: int) -> Float[Tensor, ""]:
        """The length of scale k, above 0."""
        return self.log_length[k].exp()
