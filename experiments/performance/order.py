"""The order of an epoch at 10^6 to 10^9 images: time to the first batch after a resume, and memory beyond the mapped files.

    python experiments/performance/order.py        -> order.csv, order.png; about a minute

Simulated counts: shards of 10,000 images, an index of zeros in a sparse file. Each size is a process of its own.
"""

import csv
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import matplotlib
import numpy as np

from varlab.data.manifests import open_array, spot_check
from varlab.data.order import Order, TrainBatches
from varlab.data.shard_files import INDEX_ROW

HERE = Path(__file__).parent
SIZES = [10**6, 10**7, 10**8, 10**9]
SHARD, BATCH, RANKS = 10_000, 768, 8


def sparse_index(file: Path, num: int) -> None:
    """An index of `num` rows that takes no disk space."""
    header = np.lib.format.header_data_from_array_1_0(np.empty(0, dtype=INDEX_ROW)) | {"shape": (num,)}
    with open(file, "wb") as stream:
        np.lib.format.write_array_header_1_0(stream, header)
        stream.truncate(stream.tell() + num * INDEX_ROW.itemsize)


def private_megabytes() -> float:
    """Memory of this process that is not a mapped file."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")) / 1000


def measure(num: int, window: int | None, index: Path) -> dict[str, float]:
    """One rank of eight resumes in the middle of the fourth epoch, and reads a hundred batches of labels."""
    before = private_megabytes()
    started = time.perf_counter()
    rows = open_array(index, (num,), INDEX_ROW)
    labels = rows["label"]
    checked = rows[spot_check(num)]["label"].max()
    order = Order([SHARD] * (num // SHARD), window=window)
    batches = TrainBatches(order, BATCH // RANKS, rank=3, num_ranks=RANKS)
    batches.start(3 * batches.num_batches + batches.num_batches // 2)
    reading = iter(batches)
    assert labels[[request.sample for request in next(reading)]].max() == checked
    first = time.perf_counter() - started
    started = time.perf_counter()
    for _ in range(100):
        labels[[request.sample for request in next(reading)]].max()
    seconds = (time.perf_counter() - started) / 100
    return {
        "images": num,
        "window": window or 0,
        "first_batch_s": first,
        "batch_ms": 1000 * seconds,
        "memory_mb": private_megabytes() - before,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000,
    }


def plot(rows: list[dict[str, float]]) -> None:
    """Both figures by number of images."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for window, name in ((4096, "64 lanes, window 4096"), (0, "full shuffle")):
        own = [row for row in rows if row["window"] == window]
        axes[0].loglog([row["images"] for row in own], [row["first_batch_s"] for row in own], "o-", label=name)
        axes[1].loglog([row["images"] for row in own], [row["memory_mb"] for row in own], "o-", label=name)
    for axis, limit, name in zip(axes, (0.2, 200), ("first batch after a resume [s]", "memory [MB]"), strict=True):
        axis.axhline(limit, color="gray", linestyle=":", label=f"limit {limit:g}")
        axis.set(xlabel="images", ylabel=name)
        axis.legend()
    figure.savefig(HERE / "order.png", dpi=120)


def main() -> None:
    """Measures every size in a process of its own."""
    if len(sys.argv) > 1:
        num, window, index = json.loads(sys.argv[1])
        print(json.dumps(measure(num, window, Path(index))))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for num in SIZES:
            index = Path(folder) / "train.index.npy"
            sparse_index(index, num)
            for window in (4096, None):
                command = [sys.executable, __file__, json.dumps([num, window, str(index)])]
                answer = subprocess.run(command, capture_output=True, text=True, check=True)
                rows.append(json.loads(answer.stdout))
                print(rows[-1], flush=True)
    with open(HERE / "order.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], "machine"])
        writer.writeheader()
        writer.writerows(
            {**{k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}, "machine": platform.machine()}
            for row in rows
        )
    plot(rows)


if __name__ == "__main__":
    main()
