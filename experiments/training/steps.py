"""How fast does a VAR of each depth train here, how much memory does it need, and does `plan=true` predict it?

    python experiments/training/steps.py                                             (two CPU cores, about ten minutes)
    python experiments/training/steps.py --device cuda --depths 12 16 20 24 30       (largest batch that fits, bf16, compiled)

Each line is measured in a separate process: steps of forward, backward, clip and AdamW on cached tokens of 256 px
images, and the same with the tokenizer encoding the images first. MFU is exact FLOPs per second divided by the rate of
a large matrix product measured in the same process.
"""

import argparse
import csv
import json
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).parent
PATCH_NUMS = [1, 2, 3, 4, 5, 6, 8, 10, 13, 16]


def ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a product of two square matrices."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / min(timed(lambda: a @ b, device) for _ in range(6))


def timed(work, device: torch.device) -> float:
    """Seconds of one call."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(depth: int, batch: int, from_images: bool, arguments: argparse.Namespace) -> dict:
    """One line of the table."""
    from varlab.cost.flops import tokenizer_flops, training_flops
    from varlab.models import losses
    from varlab.models.msvqvae import MSVQVAE
    from varlab.models.var import VAR
    from varlab.training.optimizers import parameter_groups

    device = torch.device(arguments.device)
    is_bf16 = arguments.precision == "bf16"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.manual_seed(0)
    tokenizer = MSVQVAE()
    tokenizer = tokenizer.eval().requires_grad_(False).to(device)
    var = (
        VAR(depth=depth, patch_nums=PATCH_NUMS, codebook_size=4096, codebook_dim=32, num_classes=1000)
        .train()
        .to(device)
    )
    for block in var.blocks:
        block.recompute = arguments.recompute
        if arguments.compile:
            block.forward = torch.compile(block.forward)
    optimizer = torch.optim.AdamW(parameter_groups(var), lr=1e-4, fused=device.type == "cuda")
    labels = torch.randint(1000, (batch,), device=device)
    images = torch.rand(batch, 3, 256, 256, device=device) * 2 - 1 if from_images else None
    cached = [torch.randint(4096, (batch, pn * pn), device=device) for pn in PATCH_NUMS]

    def step() -> None:
        token_maps = cached if images is None else tokenizer.encode(images)
        inputs = tokenizer.quantizer.teacher_forcing_inputs(token_maps)
        with torch.autocast(device.type, torch.bfloat16, enabled=is_bf16):
            loss = losses.cross_entropy(var(inputs, labels), torch.cat(token_maps, dim=1)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(var.parameters(), 2.0)
        optimizer.step()
        optimizer.zero_grad()

    step()
    before = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    seconds = sorted(timed(step, device) for _ in range(arguments.repeats))
    median = seconds[len(seconds) // 2]
    flops = batch * (training_flops(var.sizes) + (tokenizer_flops(tokenizer)["encode"] if from_images else 0))
    peak = (
        max(before, torch.cuda.max_memory_allocated())
        if device.type == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    top = ceiling(device, torch.bfloat16 if is_bf16 else torch.float32)
    return {
        "depth": depth,
        "batch": batch,
        "road": "images" if from_images else "tokens",
        "precision": arguments.precision,
        "recompute": arguments.recompute,
        "step [s]": f"{median:.4g}",
        "spread [%]": f"{100 * (seconds[-1] - seconds[0]) / median:.2g}",
        "images/s": f"{batch / median:.4g}",
        "GFLOP/s": f"{flops / median / 1e9:.4g}",
        "matmul [GFLOP/s]": f"{top / 1e9:.4g}",
        "MFU [%]": f"{100 * flops / median / top:.3g}",
        "peak memory [GB]": f"{peak / 1e9:.3g}",
        "planned [GB]": f"{planned(var.sizes, batch, arguments):.3g}",
        "device": torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"{platform.machine()}, {torch.get_num_threads()} cores",
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def planned(sizes: dict, batch: int, arguments: argparse.Namespace) -> float:
    """Memory in GB as `plan=true` estimates it."""
    from varlab.cost.plan import Layout, PlannedRun, memory

    precision = "bf16-mixed" if arguments.precision == "bf16" else "32-true"
    return sum(
        memory(PlannedRun("step", sizes, 1, 1, batch, precision, Layout(recompute=arguments.recompute))).values()
    )


def in_own_process(depth: int, batch: int, road: str, argv: list[str]) -> dict | None:
    """The line, or None if it ran out of memory."""
    command = [sys.executable, __file__, "--one", str(depth), str(batch), road, *argv]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        if "out of memory" in answer.stderr.lower() or answer.returncode < 0:
            return None
        sys.exit(answer.stderr)
    return json.loads(answer.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 4, 6, 8, 12, 16])
    parser.add_argument("--precision", choices=["fp32", "bf16"])
    parser.add_argument("--recompute", default="none")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="+", help="tried in order; the last one that fits is reported")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    is_gpu = arguments.device != "cpu"
    arguments.precision = arguments.precision or ("bf16" if is_gpu else "fp32")
    arguments.compile = is_gpu if arguments.compile is None else arguments.compile
    if arguments.one:
        depth, batch, road = arguments.one
        print(json.dumps(measure(int(depth), int(batch), road == "images", arguments)))
        return
    argv, file, rows = sys.argv[1:], HERE / ("steps_gpu.csv" if is_gpu else "steps.csv"), []
    batches = arguments.batches or ([16, 32, 48, 64, 96, 128, 192, 256] if is_gpu else [2])
    for depth in arguments.depths:
        for road in ("tokens", "images"):
            best = None
            for batch in batches:
                row = in_own_process(depth, batch, road, argv)
                if row is None:
                    break
                best = row
            if best is not None:
                print(best, flush=True)
                rows.append(best)
                with open(file, "w", encoding="utf-8", newline="") as lines:
                    writer = csv.DictWriter(lines, list(best))
                    writer.writeheader()
                    writer.writerows(rows)


if __name__ == "__main__":
    main()
