"""Shared by all benchmarks here: interleaved timing, memory, bytes moved, and the limits of the device."""

import csv
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

REPEATS = 7
GB = 1e9


@dataclass
class Candidate:
    """One implementation of a task. `run` does it once, for `count` units at `flops` FLOPs; ratios are relative to the
    candidate for the same task and network that is marked `is_reference`."""

    what: str
    network: str
    code: str
    precision: str
    run: Callable[[], object]
    count: float
    unit: str = "images"
    flops: float = 0.0
    is_reference: bool = False
    is_compiled: bool = False


def synchronize(device: str) -> None:
    """Waits until the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()


def timed(run: Callable[[], object], device: str) -> float:
    """Seconds of one call."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def interleaved(
    runs: dict[Any, Callable[[], object]], device: str = "cpu", repeats: int = REPEATS
) -> dict[Any, list[float]]:
    """Seconds of each call, run in turn, after one warm-up each."""
    for run in runs.values():
        run()
    seconds: dict[Any, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            seconds[name].append(timed(run, device))
    return seconds


def peak_memory(run: Callable[[], object], device: str) -> float:
    """GB that one call adds at its peak: allocated on a GPU, resident in the process on a CPU (Linux)."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - before) / GB
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak counts from here
    run()
    return max(0.0, resident("VmHWM") - before) / GB


def resident(field: str) -> float:
    """Bytes of this process now (VmRSS) or at most (VmHWM)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in status if line.startswith(field))


class Traffic(TorchDispatchMode):
    """Adds up the bytes that operators read and write, each tensor once per operator; views are free."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        is_view = any(out.alias_info is not None and not out.alias_info.is_write for out in func._schema.returns)
        if not is_view:
            for x in tree_leaves((args, kwargs, result)):
                if isinstance(x, torch.Tensor):
                    self.bytes += min(x.numel() * x.element_size(), x.untyped_storage().nbytes())
        return result


def traffic(run: Callable[[], object]) -> float:
    """GB that the operators of one call read and write."""
    with Traffic() as counted:
        run()
    return counted.bytes / GB


@dataclass(frozen=True)
class Ceilings:
    """Measured FLOP/s of a large matrix product by precision, and bytes/s of a large copy (read and written)."""

    flops: dict[str, float]
    bytes: float

    @classmethod
    def measure(cls, device: str) -> "Ceilings":
        side = 8192 if device == "cuda" else 2048
        flops = {}
        for name, dtype in [("fp32", torch.float32), ("bf16", torch.bfloat16)]:
            a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
            flops[name] = 2 * side**3 / min(interleaved({0: lambda a=a, b=b: a @ b}, device)[0])
        x = torch.ones(2**28 if device == "cuda" else 2**26, device=device)
        y = torch.empty_like(x)
        return cls(flops, 2 * x.nbytes / min(interleaved({0: lambda: y.copy_(x)}, device)[0]))


def benchmark(candidates: list[Candidate], device: str, ceilings: Ceilings) -> list[dict[str, Any]]:
    """Times candidates in turn; returns one row each."""
    seconds = interleaved({i: candidate.run for i, candidate in enumerate(candidates)}, device)
    medians = {i: statistics.median(values) for i, values in seconds.items()}
    reference = next((medians[i] for i, candidate in enumerate(candidates) if candidate.is_reference), None)
    rows = []
    for i, candidate in enumerate(candidates):
        median = medians[i]
        moved = None if candidate.is_compiled else traffic(candidate.run)
        speed = candidate.flops / median
        row = {
            "what": candidate.what,
            "network": candidate.network,
            "code": candidate.code,
            "precision": candidate.precision,
            "seconds": f"{median:.4g}",
            "spread": f"{(max(seconds[i]) - min(seconds[i])) / median:.2f}",
            "ratio": "" if reference is None else f"{reference / median:.2f}",
            "per_second": f"{candidate.count / median:.4g}",
            "unit": candidate.unit,
            "gflop": f"{candidate.flops / 1e9:.4g}" if candidate.flops else "",
            "share_of_matmul": f"{speed / ceilings.flops[candidate.precision]:.2f}" if candidate.flops else "",
            "gb_moved": f"{moved:.4g}" if moved else "",
            "share_of_copy": f"{moved * GB / median / ceilings.bytes:.2f}" if moved else "",
            "peak_gb": f"{peak_memory(candidate.run, device):.3g}",
        }
        rows.append(row)
        print(
            f"{row['what']:22} {row['network']:12} {row['code']:26} {row['precision']:5} {row['seconds']:>9} s"
            f"  spread {row['spread']}  {row['ratio'] or '-':>5} times  {row['per_second']:>9} {row['unit']}/s",
            flush=True,
        )
    return rows


def machine(device: str) -> str:
    """Description of the device."""
    return torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, {os.cpu_count()} cores"


def save(file: Path, rows: Iterable[dict[str, Any]], device: str) -> None:
    """Writes rows as CSV atomically, each with machine, date and torch version."""
    stamp = {"machine": machine(device), "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__}
    rows = [{**row, **stamp} for row in rows]
    unfinished = file.with_suffix(".part")
    with open(unfinished, "w", encoding="utf-8", newline="") as lines:
        writer = csv.DictWriter(lines, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    unfinished.replace(file)
