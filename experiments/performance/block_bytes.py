"""Bytes that a compiled block of the transformer moves in a training step, as Inductor counts them; nothing is timed.

    python experiments/performance/block_bytes.py

Forward and backward in bf16 on the CPU, at two batch sizes, which separates what grows with the tokens from what grows
with the weights. `cost/plan.py` estimates time from these figures.
"""

from typing import Any

import torch
from torch._inductor.graph import GraphLowering

from varlab.models.transformer import AdaLNBlock
from varlab.models.var import VAR

FULL = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
WIDTH, TOKENS = 1024, 680


def counted(batch: int) -> list[int]:
    """Bytes of forward and backward."""
    found, codegen = [], GraphLowering.codegen

    def and_count(self: GraphLowering) -> Any:
        result = codegen(self)
        found.append(self.count_bytes()[0])
        return result

    GraphLowering.codegen = and_count
    torch.compiler.reset()
    torch.compiler.config.force_disable_caches = True
    block = AdaLNBlock(WIDTH, WIDTH // 64, 4.0, 0.1, False, True).train()
    visible = VAR(2, FULL, 16, 4, 10).visible(TOKENS)
    x, cond = torch.randn(batch, TOKENS, WIDTH, requires_grad=True), torch.randn(batch, WIDTH)
    with torch.autocast("cpu", torch.bfloat16):
        out = torch.compile(block.forward)(x, cond, visible)
    out.sum().backward()
    GraphLowering.codegen = codegen
    return found


def main() -> None:
    small, large = counted(2), counted(6)
    per_image = [(b - a) / 4 for a, b in zip(small, large, strict=True)]
    block = AdaLNBlock(WIDTH, WIDTH // 64, 4.0, 0.1, False, True)
    num_weights = sum(parameter.numel() for parameter in block.parameters())
    for name, a, image in zip(("forward", "backward"), small, per_image, strict=True):
        by_token, by_weight = image / TOKENS / WIDTH, (a - 2 * image) / num_weights
        print(f"{name}: {by_token:.1f} bytes for each token and unit of width, {by_weight:.1f} for each weight")


if __name__ == "__main__":
    main()
