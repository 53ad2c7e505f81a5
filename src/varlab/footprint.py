"""What a training step of a VAR keeps in memory, from its sizes alone.

Activations are measured on copies of the network so small that they run anywhere, and carried on in straight lines: they grow in
proportion to images, and evenly with width and depth.
"""

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from varlab import losses, scales
from varlab.models.transformer import AdaLNBlock
from varlab.models.var import VAR


def linear_weights(sizes: dict[str, Any]) -> int:
    """Weights of the Linears, of which autocast keeps a copy until the backward pass."""
    with torch.device("meta"):
        var = VAR(**sizes)
    return sum(module.weight.numel() for module in var.modules() if isinstance(module, nn.Linear))


def activation_bytes(sizes: dict[str, Any], precision: str, recompute: str) -> float:
    """Bytes that one image keeps for the backward pass.

    Measured on networks of one and two blocks, 64 and 128 wide, and a tenth of the codebook, then carried on in a straight line
    in each of the three: of the network's terms none holds a product of width and width for each image.
    """
    codes = max(sizes["codebook_size"] // 10, 2)
    shared: dict[str, Any] = {
        key: sizes[key] for key in ("patch_nums", "codebook_dim", "num_classes", "mlp_ratio", "shared_adaln", "qk_norm")
    }
    shared["drop_path"] = sizes["drop_path"]

    def at(depth: int, heads: int, codebook_size: int) -> int:
        small: dict[str, Any] = {
            "depth": depth,
            "width": 64 * heads,
            "num_heads": heads,
            "codebook_size": codebook_size,
        }
        return saved_bytes(VAR(**shared, **small), precision, recompute)

    base, wider, deeper, both, coded = (
        at(1, 1, codes),
        at(1, 2, codes),
        at(2, 1, codes),
        at(2, 2, codes),
        at(1, 1, 2 * codes),
    )
    width, depth = sizes["width"] / 64 - 1, sizes["depth"] - 1
    by_width, by_depth, by_both, by_code = (
        wider - base,
        deeper - base,
        both - wider - deeper + base,
        (coded - base) / codes,
    )
    return (
        base
        + by_width * width
        + by_depth * depth
        + by_both * width * depth
        + by_code * (sizes["codebook_size"] - codes)
    )


def saved_bytes(var: VAR, precision: str, recompute: str) -> int:
    """Bytes for one more image: two images' less one's."""
    for block in var.train().blocks:
        assert isinstance(block, AdaLNBlock)
        block.recompute = recompute
    if precision == "bf16-true":
        var.to(torch.bfloat16)
    found = [saved_by(var, num_images, precision) for num_images in (1, 2)]
    return found[1] - found[0]


def saved_by(var: VAR, num_images: int, precision: str) -> int:
    """Bytes of all tensors that a step keeps between forward and backward, parameters apart."""
    kept: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x
        return x

    length, codebook_dim = scales.num_tokens(var.patch_nums), var.sizes["codebook_dim"]
    inputs = torch.randn(num_images, length - var.spans[0][1], codebook_dim)
    sequence = torch.zeros(num_images, length, dtype=torch.long)
    with (
        torch.random.fork_rng(devices=[]),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
        torch.autocast("cpu", torch.bfloat16, enabled="bf16" in precision),
    ):
        loss = losses.cross_entropy(var(inputs, sequence[:, 0]), sequence).mean()
    own = {p.untyped_storage().data_ptr() for p in itertools.chain(var.parameters(), var.buffers())}
    del loss
    return sum(x.untyped_storage().nbytes() for pointer, x in kept.items() if pointer not in own)
