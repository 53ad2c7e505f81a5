"""Data loading speed in one run on one core: decoding from shards against a plain folder and against the webdataset
library, token batches from memory, the first batch after a resume, and how well neighbors are shuffled.

`make bench-data` writes experiments/performance/data.csv. The JPEG files are crops of the two photographs in
scikit-learn (427 x 640), at ImageNet's typical size.
"""

import csv
import io
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import webdataset
from measure import interleaved
from PIL import Image
from sklearn.datasets import load_sample_images
from torch.utils.data import DataLoader, Dataset

from varlab.data.images import ImageDataset
from varlab.data.order import Order, SampleRequest, TrainBatches
from varlab.data.shards import ShardReader
from varlab.data.sources.folder import folder_source
from varlab.data.token_datamodule import TokenDataset
from varlab.data.write_shards import pack

NUM_IMAGES, RESOLUTION, REPEATS, BATCH = 256, 256, 5, 32
RESULTS = Path(__file__).with_name("data.csv")


def make_photos(folder: Path) -> None:
    """Writes JPEG files of 500 x 375 pixels into two class folders."""
    rng = np.random.default_rng(0)
    for label, photo in enumerate(load_sample_images().images):
        (folder / f"class{label}").mkdir(parents=True)
        for i in range(NUM_IMAGES // 2):
            top, left = rng.integers(0, 427 - 375), rng.integers(0, 640 - 500)
            image = Image.fromarray(photo[top : top + 375, left : left + 500])
            image.save(folder / f"class{label}" / f"{i:04d}.jpg", quality=95)


def recipe(image: Image.Image) -> torch.Tensor:
    """The recipe as in transform libraries: resize the whole image, crop, convert to a tensor, normalize."""
    scale = round(1.125 * RESOLUTION) / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    left, top = (image.width - RESOLUTION) // 2, (image.height - RESOLUTION) // 2
    image = image.crop((left, top, left + RESOLUTION, top + RESOLUTION))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255).mul(2).sub(1)


class PlainFolder(Dataset):
    """The data set of most training scripts: open the file, convert, resize, crop."""

    def __init__(self, folder: Path) -> None:
        self.files = sorted(folder.rglob("*.jpg"))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return recipe(Image.open(self.files[i]).convert("RGB")), int(self.files[i].parent.name[-1])


def decoding_contenders(folder: Path) -> tuple[dict[str, int], dict[str, Callable[[], object]]]:
    """(number of images, function that reads them) by code: decode and preprocess in one process."""
    make_photos(folder / "photos")
    pack(folder_source(folder / "photos", 0.05, 0), folder / "shards", shard_images=100, seed=0)
    reader = ShardReader(folder / "shards", "train")
    ours = ImageDataset(reader, RESOLUTION, 1.125, random_crop=False, random_flip=False)
    plain = DataLoader(PlainFolder(folder / "photos"), batch_size=BATCH)
    urls = [shard.url for shard in reader.shards]

    def from_shards() -> None:
        for batch in TrainBatches(Order(reader.shard_counts), BATCH):
            ours.__getitems__(batch)

    def from_webdataset() -> None:
        decoded = (
            webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).decode("pil").to_tuple("jpg", "cls")
        )
        cut = decoded.map(lambda pair: (recipe(pair[0]), pair[1]))
        for _ in DataLoader(cut, batch_size=BATCH):
            pass

    counts = {
        "varlab, shards by index": len(reader) // BATCH * BATCH,
        "plain folder and DataLoader": NUM_IMAGES,
        "webdataset as a stream": len(reader),
    }
    runs = [from_shards, lambda: [None for _ in plain], from_webdataset]
    return counts, dict(zip(counts, runs, strict=True))


def measure_decoding(folder: Path) -> list[tuple[str, float, str]]:
    """Images per second of decoding and preprocessing in one process."""
    counts, runs = decoding_contenders(folder)
    return [
        (f"decode 500x375 to 256: {name}", counts[name] / statistics.median(s), "images/s")
        for name, s in interleaved(runs, repeats=REPEATS).items()
    ]


def measure_agreement(folder: Path) -> list[tuple[str, float, str]]:
    """Difference of our pixels from resizing the whole image with Pillow and cropping it, in levels of 255."""
    reader = ShardReader(folder / "shards", "train")
    ours = ImageDataset(reader, RESOLUTION, 1.125, random_crop=False, random_flip=False)
    differences = []
    for i in range(32):
        exact = recipe(Image.open(io.BytesIO(reader.read(i))).convert("RGB"))
        differences.append((ours.__getitems__([SampleRequest(i, 0, True)]).images[0] - exact).abs() * 127.5)
    return [
        ("difference from the exact path, mean", float(torch.stack(differences).mean()), "levels of 255"),
        ("difference from the exact path, largest", float(torch.stack(differences).max()), "levels of 255"),
    ]


def token_contender() -> tuple[Callable[[], object], int]:
    """Reading sequences of 680 tokens in shuffled batches of 768 from memory, and how many it reads."""
    rows = 200_000
    tokens = np.random.default_rng(0).integers(0, 4096, (rows, 1, 680), dtype=np.uint16)
    cache = TokenDataset(tokens, np.zeros(rows, dtype=np.int64))
    batches = TrainBatches(Order([rows], window=None), 768)

    def read() -> None:
        for batch in batches:
            cache.__getitems__(batch)

    return read, len(batches) * 768


def measure_tokens() -> list[tuple[str, float, str]]:
    """Sequences of 680 tokens per second."""
    read, count = token_contender()
    seconds = interleaved({"tokens": read}, repeats=REPEATS)["tokens"]
    return [("token sequences from memory, 680 tokens", count / statistics.median(seconds), "sequences/s")]


def measure_resume(folder: Path) -> list[tuple[str, float, str]]:
    """Seconds from a fresh start to the first batch, one million images into an epoch of 1.28 million."""
    reader = ShardReader(folder / "shards", "train")
    repeats = 1_281_167 // len(reader) + 1
    reader.index = np.tile(np.asarray(reader.index), repeats)[:1_281_167]
    images = ImageDataset(reader, RESOLUTION, 1.125, random_crop=True, random_flip=True)
    counts = [1000] * 1281 + [167]

    def first_batch(consumed: int) -> float:
        start = time.perf_counter()
        batches = TrainBatches(Order(counts), BATCH)
        batches.start(consumed)
        images.__getitems__(next(iter(batches)))
        return time.perf_counter() - start

    return [
        ("first batch of 32 at the start of an epoch", statistics.median(first_batch(0) for _ in range(3)), "s"),
        (
            "first batch of 32 after 1,000,000 images",
            statistics.median(first_batch(1_000_000 // BATCH) for _ in range(3)),
            "s",
        ),
    ]


def measure_mixing() -> list[tuple[str, float, str]]:
    """Percentage of neighbors in the order from the same shard, at ImageNet's size (1,281 shards of 1,000)."""
    rows = []
    for lanes, window in [(64, 1024), (64, 4096), (64, 16384), (1, 4096), (64, None)]:
        order = Order([1000] * 1281, lanes=lanes, window=window).epoch(0)[:]
        shard = order // 1000
        batch = shard[: 1281000 // 768 * 768].reshape(-1, 768)
        name = f"lanes {lanes}, window {window or 'all'}"
        rows.append((f"same-shard neighbors: {name}", 100 * float((shard[1:] == shard[:-1]).mean()), "percent"))
        rows.append(
            (
                f"different shards in a batch of 768: {name}",
                float(np.mean([len(np.unique(b)) for b in batch[:200]])),
                "shards",
            )
        )
    return rows


def measure_classes() -> list[tuple[str, float, str]]:
    """Percentage of neighbors in the order of the same class, for shards sorted by class and for those of `varlab
    pack`."""
    label = np.repeat(np.arange(1000), 1281)
    mixed = np.random.default_rng(0).permutation(label)
    rows = []
    for name, labels in [("shards sorted by class", label), ("shards of varlab pack", mixed)]:
        for window in (4096, None):
            seen = labels[Order([1000] * 1281, window=window).epoch(0)[:]]
            per_batch = np.mean([len(np.unique(b)) for b in seen[: 200 * 768].reshape(-1, 768)])
            where = f"{name}, window {window or 'all'}"
            rows.append((f"same-class neighbors: {where}", 100 * float((seen[1:] == seen[:-1]).mean()), "percent"))
            rows.append((f"different classes in a batch of 768: {where}", float(per_batch), "classes"))
    return rows


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure_decoding(Path(folder)) + measure_agreement(Path(folder)) + measure_resume(Path(folder))
    rows += measure_tokens() + measure_mixing() + measure_classes()
    about = f"{platform.machine()}, {os.cpu_count()} cores, one used; {time.strftime('%Y-%m-%d')}; torch {torch.__version__}"
    with open(RESULTS, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["what", "value", "unit", "machine"])
        for what, value, unit in rows:
            print(f"{what:75} {value:12.4g} {unit}")
            writer.writerow([what, f"{value:.5g}", unit, about])


if __name__ == "__main__":
    main()
