"""The largest batch of each depth on 80 and 141 GB as estimated by `plan=true`: 256 px, cached tokens, bf16-mixed, one
GPU.

python experiments/performance/batches.py        (any machine, about two minutes)

Estimates, within 5 % of the sum over all tensors on a CPU (tests/cost/test_plan.py); not measured on a GPU. Writes
batches.csv and prints a table.
"""

import csv
from bisect import bisect
from functools import partial
from pathlib import Path

import torch

from varlab.cost.activation_memory import activation_bytes
from varlab.cost.plan import GPUS, RESERVED, Layout, PlannedRun, memory
from varlab.models.var import VAR

RESULTS = Path(__file__).with_name("batches.csv")
PATCH_NUMS = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
DEPTHS = (12, 16, 20, 24, 30, 36)
LAYOUTS = [("none", 1), ("none", 8), ("selective", 8), ("all", 8)]
PRECISION = "bf16-mixed"


def main() -> None:
    rows = []
    for depth in DEPTHS:
        sizes = sizes_of(depth)
        for recompute, chunks in LAYOUTS:
            layout = Layout(recompute=recompute, loss_chunks=chunks)
            kept = activation_bytes(sizes, PRECISION, recompute, chunks) / 1e6
            for gpu in ("h100", "h200"):
                room = GPUS[gpu].memory - RESERVED
                largest = bisect(range(1, 1 << 14), room, key=partial(total, sizes, layout))
                rows.append([depth, recompute, chunks, f"{kept:.0f}", GPUS[gpu].memory, largest])
        print(depth, [row[-1] for row in rows[-2 * len(LAYOUTS) :]], flush=True)
    with open(RESULTS, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(
            [["depth", "recompute", "loss_chunks", "kept an image [MB]", "memory [GB]", "largest batch"], *rows]
        )
    for depth in DEPTHS:
        own = [row for row in rows if row[0] == depth]
        print(
            f"| {depth} | "
            + " | ".join(f"{a[3]}: {a[5]}, {b[5]}" for a, b in zip(own[::2], own[1::2], strict=True))
            + " |"
        )


def total(sizes: dict, layout: Layout, batch: int) -> float:
    """GB at the peak of a step, without the tokenizer: the tokens are cached and its codebook is small."""
    run = PlannedRun(
        "largest", sizes, num_images=1, steps=1, batch=batch, precision=PRECISION, layout=layout, tokenizer_params=0
    )
    return sum(memory(run).values())


def sizes_of(depth: int) -> dict:
    """Sizes of the paper's network."""
    with torch.device("meta"):
        return VAR(depth, PATCH_NUMS, 4096, 32, 1000).sizes


if __name__ == "__main__":
    main()
