"""Activation memory of a VAR's training step, from its sizes alone.

Activations are measured on small versions of the network, which run anywhere, and extrapolated linearly: they are
proportional to the number of images and grow linearly with width and depth.
"""

import itertools
from contextlib import nullcontext
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from varlab.cost.flops import num_logits
from varlab.models import losses, scales
from varlab.models.custom_classes import build
from varlab.models.transformer import COSTLY, AdaLNBlock
from varlab.models.var import VAR


def linear_weights(sizes: dict[str, Any]) -> int:
    """Number of weights in Linear layers, of which autocast keeps a copy until the backward pass."""
    with torch.device("meta"):
        var = build(VAR, sizes)
    return sum(module.weight.numel() for module in var.modules() if isinstance(module, nn.Linear))


def activation_bytes(sizes: dict[str, Any], precision: str, recompute: str, loss_chunks: int = 1) -> float:
    """Bytes saved per image for the backward pass.

    Measured on networks of one and two blocks, widths 64 and 128, and a tenth of the logits, then extrapolated
    linearly in each of the three: no term per image is quadratic in the width.
    """
    codes = max(num_logits(sizes) // 10, 2)
    at = partial(small_network_bytes, kept_sizes(sizes), precision, recompute, loss_chunks)
    base, coded = at(1, 1, codes), at(1, 1, 2 * codes)
    width = sizes["width"] / 64 - 1
    first_block = base + (at(1, 2, codes) - base) * width
    by_code = (coded - base) / codes
    return (
        first_block
        + block_bytes(sizes, precision, recompute, loss_chunks) * (sizes["depth"] - 1)
        + by_code * (num_logits(sizes) - codes)
    )


def block_bytes(sizes: dict[str, Any], precision: str, recompute: str, loss_chunks: int = 1) -> float:
    """Bytes saved per image by one additional block."""
    codes = max(num_logits(sizes) // 10, 2)
    at = partial(small_network_bytes, kept_sizes(sizes), precision, recompute, loss_chunks)
    narrow, wide = (at(2, heads, codes) - at(1, heads, codes) for heads in (1, 2))
    return narrow + (wide - narrow) * (sizes["width"] / 64 - 1)


def kept_sizes(sizes: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """The arguments that the small networks share with the large one."""
    names = ("codebook_dim", "num_classes", "mlp_ratio", "shared_adaln", "qk_norm", "drop_path")
    return (("patch_nums", tuple(scales.sides(sizes["patch_nums"]))), *((name, sizes[name]) for name in names))


@cache
def small_network_bytes(
    shared: tuple[tuple[str, Any], ...],
    precision: str,
    recompute: str,
    loss_chunks: int,
    depth: int,
    num_heads: int,
    codebook_size: int,
) -> int:
    """`saved_bytes` of a network with head dim 64."""
    var = VAR(**dict(shared), depth=depth, width=64 * num_heads, num_heads=num_heads, codebook_size=codebook_size)
    return saved_bytes(var, precision, recompute, loss_chunks)


def saved_bytes(var: VAR, precision: str, recompute: str, loss_chunks: int) -> int:
    """Bytes of one additional image: those of two images minus those of one."""
    for block in var.train().blocks:
        assert isinstance(block, AdaLNBlock)
        block.recompute = recompute  # pyright: ignore[reportAttributeAccessIssue]
    if precision == "bf16-true":
        var.to(torch.bfloat16)
    found = [saved_by(var, num_images, precision, loss_chunks) for num_images in (1, 2)]
    return found[1] - found[0]


class Products(TorchDispatchMode):
    """Keeps the outputs of matrix products and attention within blocks, which selective recomputation stores outside of
    autograd's saved tensors."""

    def __init__(self, var: VAR) -> None:
        super().__init__()
        self.outputs: list[Tensor] = []
        self.is_inside = False
        for block in var.blocks:
            block.register_forward_pre_hook(lambda *_: setattr(self, "is_inside", True))
            block.register_forward_hook(lambda *_: setattr(self, "is_inside", False))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if self.is_inside and func in COSTLY:
            self.outputs += [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        return result


def saved_by(var: VAR, num_images: int, precision: str, loss_chunks: int) -> int:
    """Bytes of all tensors that a step keeps between forward and backward, except parameters."""
    kept: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x
        return x

    is_selective = any(block.recompute == "selective" for block in var.blocks)
    products = Products(var) if is_selective else nullcontext()
    length, codebook_dim = scales.num_tokens(var.patch_nums), var.codebook_dim
    inputs = torch.randn(num_images, length - var.step_bounds[0][1], codebook_dim)
    sequence = torch.zeros(num_images, length, dtype=torch.long)

    def loss_fn(logits: Tensor, token_slice: slice) -> Tensor:
        return losses.cross_entropy(logits, sequence[:, token_slice])

    with (
        torch.random.fork_rng(devices=[]),
        products,
        torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
        torch.autocast("cpu", torch.bfloat16, enabled="bf16" in precision),
    ):
        hidden = var(inputs, sequence[:, 0], returns_hidden=True)
        loss = losses.in_chunks(partial(var.predict, vector=hidden.vector), hidden.x, loss_fn, loss_chunks).mean()
    if isinstance(products, Products):
        for x in products.outputs:
            keep(x)
    own = {p.untyped_storage().data_ptr() for p in itertools.chain(var.parameters(), var.buffers())}
    del loss
    return sum(x.untyped_storage().nbytes() for pointer, x in kept.items() if pointer not in own)
