"""Counts kernels and bytes of a training step and of sampling on fake CUDA tensors; no GPU is needed, nothing is timed.

    python experiments/performance/launches.py             # writes launches.csv beside this file

A kernel is an operation that computes a tensor (views and allocations are none); its bytes are those of its inputs and
outputs, as if nothing were cached or fused. Fused and compiled code launches fewer; see gpu/ for what a GPU measured.
"""

import csv
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))
FULL = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
ALLOCATIONS = ("empty", "new_empty", "detach", "alias", "lift_fresh", "set_")


class Launches(TorchDispatchMode):
    """Kernels and bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.name().removeprefix("aten::").split(".")[0]
        if (
            not func.is_view
            and any(isinstance(leaf, Tensor) for leaf in tree_leaves(out))
            and not name.startswith(ALLOCATIONS)
        ):
            tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor) and leaf.is_cuda]
            if tensors:
                self.kernels += 1
                self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return out


def counted(work: Callable[[], object]) -> tuple[int, float]:
    """Kernels and gigabytes of the second of two calls."""
    work()
    with Launches() as launches:
        work()
    return launches.kernels, launches.bytes / 1e9


def rows() -> list[dict[str, Any]]:
    """The counts of d16."""
    from support.fake_cuda import CUDA, fake, fake_cuda

    from varlab.models import losses
    from varlab.models.msvqvae import MSVQVAE
    from varlab.models.var import VAR
    from varlab.sampling.acceleration import use_bf16
    from varlab.sampling.generate import generate

    tokenizer, var = MSVQVAE(), VAR(16, FULL, 4096, 32, 1000)
    found = []
    with fake_cuda():
        trained = fake(VAR(16, FULL, 4096, 32, 1000)).train()
        inputs = torch.empty(64, 679, 32, device=CUDA)
        labels = torch.zeros(64, dtype=torch.long, device=CUDA)
        sequence = torch.zeros(64, 680, dtype=torch.long, device=CUDA)
        optimizer = torch.optim.AdamW(trained.parameters(), fused=True)

        def step() -> None:
            with torch.autocast("cuda", torch.bfloat16):
                loss = losses.cross_entropy(trained(inputs, labels), sequence).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        kernels, gigabytes = counted(step)
        found.append({"work": "training step, batch 64, bf16-mixed", "kernels": kernels, "GB": f"{gigabytes:.0f}"})
        fake(tokenizer), fake(var)
        for weights in ("fp32", "bf16"):
            if weights == "bf16":
                use_bf16(tokenizer, var)
            for batch in (1, 64):

                def sample(batch: int = batch) -> None:
                    with torch.autocast("cuda", torch.bfloat16):
                        generate(var, tokenizer, labels[:batch], cfg_scale=1.5, top_k=900, top_p=0.96)

                kernels, gigabytes = counted(sample)
                work = f"sampling and decoder, batch {batch}, {weights} weights under autocast"
                found.append({"work": work, "kernels": kernels, "GB": f"{gigabytes:.1f}"})
    return found


def main() -> None:
    from support.fake_cuda import build

    if not torch.backends.cuda.is_built() and "LD_PRELOAD" not in os.environ:  # a CPU build needs a library first
        library = build(Path(tempfile.mkdtemp()))
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "LD_PRELOAD": str(library)})
    found = rows()
    with (Path(__file__).parent / "launches.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(found[0]))
        writer.writeheader()
        writer.writerows(found)
    for row in found:
        print(*row.values(), sep="\t")


if __name__ == "__main__":
    main()
