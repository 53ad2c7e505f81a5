"""What a token stands for in each member of the quantizer family, in two dims: regions of one color have the same token, dots are
the vectors that replace them; above the coarsest scale, below the finest.

    python experiments/codes/picture.py

Writes docs/images/codes.png.
"""

from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from varlab.models.codes.binary import BinarySphericalQuantizer
from varlab.models.codes.finite_scalar import FiniteScalarQuantizer
from varlab.models.codes.simvq import SimVQQuantizer
from varlab.models.codes.table_by_scale import TableByScaleQuantizer
from varlab.models.quantizer import MultiScaleQuantizer, ResidualQuantizer

PATCH_NUMS, REACH, PIXELS = [1, 2, 3], 1.4, 300
OUT = Path(__file__).parents[2] / "docs/images/codes.png"


def members() -> dict[str, ResidualQuantizer]:
    """Two dims, and as many codes as can be seen."""
    torch.manual_seed(3)
    found = {
        "residual: a table": MultiScaleQuantizer(PATCH_NUMS, 16, 2),
        "by_scale: a table per scale": TableByScaleQuantizer(PATCH_NUMS, [4, 8, 24], 2),
        "simvq: a mapped table": SimVQQuantizer(PATCH_NUMS, 16, 2),
        "bsq, lfq: signs": BinarySphericalQuantizer(PATCH_NUMS, bits=2),
        "fsq: levels": FiniteScalarQuantizer(PATCH_NUMS, levels=[5, 4]),
    }
    for quantizer in found.values():
        quantizer.init_weights()
        for name, parameter in quantizer.named_parameters():
            if "codebook" in name and parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.6)
            if name == "map.weight":
                parameter.data = torch.tensor([[0.9, 0.5], [-0.2, 0.6]])
    return found


@torch.no_grad()
def main() -> None:
    found = members()
    line = torch.linspace(-REACH, REACH, PIXELS)
    y, x = torch.meshgrid(line, line, indexing="ij")
    plane = torch.stack([x, y], dim=-1).view(1, -1, 2)
    figure = Figure(figsize=(2.2 * len(found), 4.6), layout="constrained")
    for column, (name, quantizer) in zip(figure.subplots(2, len(found)).T, found.items(), strict=True):
        for axes, k in zip(column, (0, len(PATCH_NUMS) - 1), strict=True):
            tokens = quantizer.nearest(plane, k).view(PIXELS, PIXELS)
            shade = 0.75 + 0.25 * ((tokens.numpy() * 0.618034) % 1)
            extent = (-REACH, REACH, -REACH, REACH)
            axes.imshow(shade, cmap="gray", vmin=0, vmax=1, origin="lower", extent=extent)
            vectors = quantizer.embed(torch.arange(quantizer.size_of(k)), k).numpy()
            axes.plot(*np.transpose(vectors), "o", ms=4, color="tab:red")
            axes.set(xlim=extent[:2], ylim=extent[2:], xticks=[], yticks=[])
        column[0].set_title(name, fontsize=10)
    figure.savefig(OUT, dpi=110)


if __name__ == "__main__":
    main()
