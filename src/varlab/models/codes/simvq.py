"""SimVQ (Zhu et al. 2024, arXiv 2411.02038): a frozen table under a learned linear map, so that a step moves all codes."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from varlab.models import scales
from varlab.models.quantizer import MultiScaleQuantizer


class SimVQQuantizer(MultiScaleQuantizer):
    """Codes are the rows of a fixed random table times a learned matrix, which begins as the identity."""

    def __init__(
        self, patch_nums: scales.PatchNums, codebook_size: int = 4096, codebook_dim: int = 32, **table: Any
    ) -> None:
        """`table`: further arguments of `MultiScaleQuantizer`."""
        super().__init__(patch_nums, codebook_size, codebook_dim, **table)
        self.codebook.requires_grad_(False)
        self.map = nn.Linear(codebook_dim, codebook_dim, bias=False)

    def init_weights(self) -> None:
        """Rows of length about 1."""
        nn.init.normal_(self.codebook.weight, std=self.codebook_dim**-0.5)
        nn.init.eye_(self.map.weight)

    def undecayed(self) -> list[Tensor]:
        return [self.map.weight]

    def table(self, k: int) -> Float[Tensor, "V C"]:
        with torch.autocast(self.codebook.weight.device.type, enabled=False):  # codes are not rounded
            return self.map(self.codebook.weight)
