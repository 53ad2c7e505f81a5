"""A table for each scale, each of its own size: coarse maps need few codes."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from varlab.models import scales
from varlab.models.quantizer import MultiScaleQuantizer


class TableByScaleQuantizer(MultiScaleQuantizer):
    """`codebook_sizes`: of the table of each scale, coarse to fine."""

    codebook: nn.ParameterList  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(
        self, patch_nums: scales.PatchNums, codebook_sizes: Sequence[int], codebook_dim: int = 32, **table: Any
    ) -> None:
        """`table`: further arguments of `MultiScaleQuantizer`. Raises ValueError unless there is a size for each scale."""
        sizes = [int(size) for size in codebook_sizes]
        if len(sizes) != len(patch_nums) or min(sizes) < 1 or max(sizes) < 2:
            raise ValueError(
                f"codebook_sizes={sizes}: give a positive size for each of {len(patch_nums)} scales, above 1 for one of them"
            )
        super().__init__(patch_nums, max(sizes), codebook_dim, **table)
        self.codebook_sizes = sizes
        self.codebook = nn.ParameterList(torch.empty(size, codebook_dim) for size in sizes)  # pyright: ignore[reportAttributeAccessIssue]

    def init_weights(self) -> None:
        bound = 1 / (36 * self.codebook_dim**0.5)
        for codes in self.codebook:
            nn.init.uniform_(codes, -bound, bound)

    def undecayed(self) -> list[Tensor]:
        return list(self.codebook)

    def table(self, k: int) -> Float[Tensor, "_ C"]:
        return self.codebook[k]

    def size_of(self, k: int) -> int:
        return self.codebook_sizes[k]

    def hits_of_all(self, hits: Float[Tensor, "K S"]) -> list[Float[Tensor, " _"]]:
        """Hits of the rows of all tables."""
        return [torch.cat([hits[k, :size] for k, size in enumerate(self.codebook_sizes)])]

    def head_arguments(self) -> dict[str, Any]:
        return {"codes_by_scale": self.codebook_sizes}
