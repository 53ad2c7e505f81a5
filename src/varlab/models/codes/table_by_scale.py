"""A table for each scale, each of its own size: coarse maps need few codes."""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from varlab.models import scales
from varlab.models.quantizer import MultiScaleQuantizer


class TableByScaleQuantizer(MultiScaleQuantizer):
    """`codebook_sizes`: of the table of each scale, coarse to fine."""

    def __init__(
        self, patch_nums: scales.PatchNums, codebook_sizes: Sequence[int], codebook_dim: int = 32, **table: Any
    ) -> None:
        """`table`: further arguments of `MultiScaleQuantizer`. Raises ValueError unless there is a size for each scale."""
        sizes = [int(size) for size in codebook_sizes]
        if len(sizes) != len(patch_nums) or min(sizes) < 1:
            raise ValueError(f"codebook_sizes={sizes}: give a positive size for each of {len(patch_nums)} scales")
        super().__init__(patch_nums, max(sizes), codebook_dim, **table)
        self.codebook_sizes = sizes
        self.codebook = nn.ModuleList(nn.Embedding(size, codebook_dim) for size in sizes)

    def init_weights(self) -> None:
        bound = 1 / (36 * self.codebook_dim**0.5)
        for codes in self.codebook:
            nn.init.uniform_(codes.weight, -bound, bound)

    def undecayed(self) -> list[Tensor]:
        return [codes.weight for codes in self.codebook]

    def table(self, k: int) -> Float[Tensor, "_ C"]:
        return self.codebook[k].weight

    def size_of(self, k: int) -> int:
        return self.codebook_sizes[k]
