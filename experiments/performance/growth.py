"""Does cost grow as counted? Seconds per image of a training step and of sampling against depth, tokens, codes and
batch.

    python experiments/performance/growth.py                    (2 CPU cores, about five minutes)
    python experiments/performance/growth.py --device cuda --depth 16 --batch 32 --bf16

One quantity varies at a time around d4 on 256 px, batch 2. Writes growth.csv and growth.png: points are measured; lines
are the FLOPs counted by varlab.cost.flops at the rate of the middle point. A slope of time against FLOPs above 1 means
that something grows faster than counted.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from bench import FULL
from measure import interleaved, machine, save

from varlab.cost.flops import training_flops
from varlab.models import losses, scales
from varlab.models.msvqvae import MSVQVAE
from varlab.models.quantizer import MultiScaleQuantizer
from varlab.models.var import VAR
from varlab.sampling.generate import generate_tokens
from varlab.sampling.token_sampling import SamplingSettings
from varlab.training.optimizers import parameter_groups

RESULTS = Path(__file__).with_name("growth.csv")
LONG = (*FULL, 20, 25)  # 1,705 tokens
QUANTITIES = {"depth": "depth", "tokens": "tokens per image", "codes": "codes", "batch": "images per batch"}


def setups(base: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The measured configurations: base with one quantity changed."""
    depth = base["depth"]
    depths = sorted({max(1, round(depth * share)) for share in (0.25, 0.5, 0.75, 1, 1.5, 2)})
    batch = base["batch"]
    batches = sorted({max(1, round(batch * share)) for share in (0.5, 1, 2, 4, 8)})
    return {
        "depth": [{**base, "depth": d} for d in depths],
        "tokens": [{**base, "patch_nums": LONG[:k]} for k in (6, 7, 8, 9, 10, 11, 12)],
        "codes": [{**base, "codes": codes} for codes in (512, 2048, 4096, 8192, 16384, 32768)],
        "batch": [{**base, "batch": b} for b in batches],
    }


def measure(setup: dict[str, Any], device: str, is_bf16: bool) -> dict[str, float]:
    """Seconds per image of a training step and of sampling (transformer and token sampling, no decoder)."""
    torch.manual_seed(0)
    patch_nums, codes, batch = setup["patch_nums"], setup["codes"], setup["batch"]
    tokenizer = MSVQVAE(MultiScaleQuantizer(patch_nums, codes), channels=32).to(device).eval()
    var = VAR(setup["depth"], patch_nums, codes, 32, 1000).to(device).train()
    optimizer = torch.optim.AdamW(parameter_groups(var), lr=0.0, fused=True)
    length, labels = scales.num_tokens(patch_nums), torch.arange(batch, device=device)
    inputs = torch.randn(batch, length - 1, 32, device=device)
    sequence = torch.randint(codes, (batch, length), device=device)

    def step() -> None:
        var.train()
        with torch.autocast(device, torch.bfloat16, enabled=is_bf16):
            loss = losses.cross_entropy(var(inputs, labels), sequence).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def sample() -> None:
        var.eval()
        with torch.autocast(device, torch.bfloat16, enabled=is_bf16):
            generate_tokens(var, tokenizer, labels, SamplingSettings(1.5, top_k=min(900, codes)))

    seconds = interleaved({"training": step, "sampling": sample}, device, repeats=5)
    return {name: statistics.median(values) / batch for name, values in seconds.items()}


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Plots measured time and counted FLOPs, one column per quantity."""
    figure, axes = plt.subplots(2, 4, figsize=(13, 6), layout="constrained", sharey="row")
    for line, work in zip(axes, ("training", "sampling"), strict=True):
        for panel, (quantity, label) in zip(line, QUANTITIES.items(), strict=True):
            own = [row for row in rows if row["quantity"] == quantity and row["work"] == work]
            x, y, flops = (np.array([float(row[key]) for row in own]) for key in ("value", "seconds", "flops"))
            middle = len(own) // 2
            panel.loglog(x, y, "o", color="#08519c", label="measured")
            panel.loglog(x, flops * y[middle] / flops[middle], "-", color="#888888", label="FLOPs counted")
            panel.set_xlabel(label)
            panel.set_xticks(x, [f"{value:g}" for value in x], fontsize=8)
            panel.set_xticks([], minor=True)
            panel.set_title(f"{work}: slope {own[0]['slope']}" if own[0]["slope"] else work, fontsize=10)
            panel.spines[["top", "right"]].set_visible(False)
        line[0].set_ylabel("seconds per image")
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--bf16", action="store_true")
    given = parser.parse_args()
    base = {"depth": given.depth, "patch_nums": FULL, "codes": 4096, "batch": given.batch}
    rows: list[dict[str, Any]] = []
    for quantity, varied in setups(base).items():
        found = []
        for setup in varied:
            sizes = VAR(setup["depth"], setup["patch_nums"], setup["codes"], 32, 1000).sizes
            value = scales.num_tokens(setup["patch_nums"]) if quantity == "tokens" else setup[quantity]
            flops = training_flops(sizes)
            seconds = measure(setup, given.device, given.bf16)
            found.append((value, flops, seconds))
            print(f"{quantity:7} {value:6}: {flops / 1e9:8.3g} GFLOP, {seconds}", flush=True)
        for work, share in [("training", 1.0), ("sampling", 2 / 3)]:  # guidance: two forward passes
            flops = np.array([f for _, f, _ in found], dtype=float) * share
            times = np.array([s[work] for _, _, s in found])
            upper = slice(len(found) // 2, None)  # where the fixed cost of a call is negligible
            is_flat = np.ptp(flops) == 0
            slope = "" if is_flat else f"{np.polyfit(np.log(flops[upper]), np.log(times[upper]), 1)[0]:.2f}"
            rows += [
                {
                    "quantity": quantity,
                    "value": value,
                    "work": work,
                    "seconds": f"{s[work]:.4g}",
                    "flops": f"{f * share:.6g}",
                    "slope": slope,
                }
                for value, f, s in found
            ]
    save(RESULTS, rows, given.device)
    draw(rows, RESULTS.with_suffix(".png"))
    print(f"{machine(given.device)}: {RESULTS}")


if __name__ == "__main__":
    main()
