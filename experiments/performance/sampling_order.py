"""How much faster is next-scale than next-token prediction, by the number of tokens? The same blocks with random weights:
maps of 1 to s pixels in as many forward passes as there are maps, against the s * s tokens of the last map one by one.

    python experiments/performance/sampling_order.py          (two CPU cores, alone)
    python experiments/performance/sampling_order.py --device cuda

Writes sampling_order.csv and sampling_order.png beside this file. Times include the token maps, not the decoder, which is the
same for both.
"""

import argparse
import platform
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from measure import interleaved

from varlab.models.msvqvae import MSVQVAE
from varlab.models.quantizer import MultiScaleQuantizer
from varlab.models.var import VAR
from varlab.sampling.generate import generate_tokens
from varlab.sampling.token_sampling import SamplingSettings

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from steps import write_table  # noqa: E402

PYRAMIDS = {4: (1, 2, 3, 4), 8: (1, 2, 3, 4, 6, 8), 16: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)}
DEPTHS, REPEATS, CODES = (8, 16), 3, 4096


def networks(patch_nums: tuple[int, ...], depth: int, order: str, device: str) -> tuple[VAR, MSVQVAE]:
    """A VAR with random weights, and a small tokenizer with the same maps."""
    torch.manual_seed(0)
    quantizer = MultiScaleQuantizer(patch_nums=patch_nums, codebook_size=CODES)
    tokenizer = MSVQVAE(quantizer=quantizer, channels=32, channel_mult=(1, 1), num_blocks=1)
    var = VAR(depth=depth, num_classes=1000, patch_nums=patch_nums, codebook_size=CODES, codebook_dim=32, order=order)
    return var.eval().to(device), tokenizer.eval().to(device)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    device = parser.parse_args().device
    rows = []
    for depth in DEPTHS:
        for side, pyramid in PYRAMIDS.items():
            for batch in (1, 16):
                runs = {}
                for order, maps in (("scales", pyramid), ("raster", (side,))):
                    var, tokenizer = networks(maps, depth, order, device)
                    labels = torch.arange(batch, device=device)
                    runs[order] = partial(generate_tokens, var, tokenizer, labels, SamplingSettings(cfg_scale=1.5))
                found = interleaved(runs, device, repeats=1 if side == 16 else REPEATS)
                seconds = {order: statistics.median(values) for order, values in found.items()}
                row = {
                    "depth": depth,
                    "tokens_next_scale": sum(pn * pn for pn in pyramid),
                    "tokens_next_token": side * side,
                    "batch": batch,
                    "seconds_per_image_next_scale": f"{seconds['scales'] / batch:.4f}",
                    "seconds_per_image_next_token": f"{seconds['raster'] / batch:.4f}",
                    "ratio": f"{seconds['raster'] / seconds['scales']:.2f}",
                    "machine": f"{platform.machine()}, {torch.get_num_threads()} threads"
                    if device == "cpu"
                    else torch.cuda.get_device_name(),
                    "date": time.strftime("%Y-%m-%d"),
                }
                print(*row.values(), flush=True)
                rows.append(row)
    write_table(HERE / "sampling_order.csv", rows)
    plot(rows)


def plot(rows: list[dict]) -> None:
    """Ratio of the times by tokens of the last map, one line per depth and batch."""
    figure = Figure(figsize=(5.5, 3.6), layout="constrained")
    axes = figure.subplots()
    for depth in DEPTHS:
        for batch, style in ((1, "o-"), (16, "s--")):
            chosen = [row for row in rows if row["depth"] == depth and row["batch"] == batch]
            x, y = [row["tokens_next_token"] for row in chosen], [float(row["ratio"]) for row in chosen]
            axes.plot(x, y, style, label=f"d{depth}, {'one image' if batch == 1 else f'batches of {batch}'}")
    axes.axhline(1, color="gray", linewidth=0.8)
    axes.axhline(20, color="gray", linewidth=0.8, linestyle=":")
    axes.annotate("20 times, as in the paper", (16, 20), xytext=(0, 3), textcoords="offset points", fontsize=8)
    axes.set(xscale="log", yscale="log", xlabel="tokens of the last map", ylabel="time of next-token / next-scale")
    axes.set_xticks([16, 64, 256], ["16", "64", "256"])
    axes.minorticks_off()
    axes.set_yticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
    axes.legend(fontsize=8)
    figure.savefig(HERE / "sampling_order.png", dpi=130)


if __name__ == "__main__":
    main()
