"""Super-resolution of held-out glyphs from 16 to 32 px: a VAR whose condition is the small image, against bicubic, against the
tokenizer alone, and against coarse maps kept by a VAR that was trained on classes. Finished steps are skipped; an interrupted run
continues.

    python experiments/data/glyphs.py && python experiments/upscaling/run.py      (one CPU core: about an hour and a half)

Writes results.csv (one row per method and training seed) and images.png beside this file, and prints means over images with 95 %
intervals over seeds.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "data"), str(HERE.parent)]
from classifier import Classifier, gray_images  # noqa: E402
from glyphs import LOOK_ALIKES  # noqa: E402
from steps import finished, interval, varlab, write_table  # noqa: E402

from varlab import image_grid  # noqa: E402
from varlab.checkpoints.load import load  # noqa: E402
from varlab.models.msvqvae import MSVQVAE  # noqa: E402
from varlab.models.var import VAR  # noqa: E402
from varlab.sampling.editing import edit  # noqa: E402
from varlab.sampling.upscaling import match_means, upscale  # noqa: E402

GLYPHS, RUNS = Path("data/glyphs32/shards"), Path("runs/upscaling")
SEEDS, STEPS, NUM_IMAGES, BATCH = (0, 1, 2), 1500, 1000, 100
SETTINGS = {
    "likeliest": {"cfg_scale": 0.0, "top_k": 1},
    "likeliest, guidance 1": {"cfg_scale": 1.0, "top_k": 1},
    "drawn": {"cfg_scale": 0.0, "top_p": 0.95},
}
STRENGTHS = (0.5, 0.17)  # of 6 maps, 3 and 5 are kept
MATCHED = ", means matched"
SHOWN = 16


def train(seed: int) -> Path:
    """Trains one network unless finished; returns its checkpoint."""
    cache, folder = RUNS / "tokens", RUNS / f"seed-{seed}"
    if not (cache / "manifest.json").is_file():
        varlab("tokenize", "tokenizer=glyphs32", f"shards={GLYPHS}", f"out={cache}", "resize_ratio=1.0", "low_res=2")
    if not finished(folder):
        network = ["experiment=var_glyphs32", "model.depth=3", "model.width=128", "model.num_heads=4"]
        data = ["tokenizer=glyphs32", f"data.path={cache}", "data.condition=image", "embedder@model.embedder=image"]
        length = [f"steps={STEPS}", f"val_every={STEPS // 3}", "save_every=100", "trainer=cpu", "ckpt_path=last"]
        name = [f"name=upscaling/{folder.name}", f"seed={seed}", "logger=csv", "callbacks.pictures=null"]
        varlab("train", *network, *data, *length, *name)
    return folder / "checkpoints/last.ckpt"


def enlarged(small: Tensor, resampling: Image.Resampling, size: tuple[int, int]) -> Tensor:
    """Images of `size` in [-1, 1], resized by Pillow."""
    images = [Image.fromarray(pixels).resize(size, resampling) for pixels in image_grid.to_uint8(small / 2 + 0.5)]
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).float() / 127.5 - 1


def scores(images: Tensor, originals: Tensor, labels: Tensor, judge: Classifier) -> dict[str, float]:
    """Of images in [-1, 1]: mean PSNR in dB, percent recognized, and the mean distance between the classifier's features of image
    and original, in percent of the mean norm of the originals'."""
    groups = torch.from_numpy(LOOK_ALIKES)
    errors = ((images - originals) / 2).square().mean(dim=(1, 2, 3))
    found, real = judge.pooled(images), judge.pooled(originals)
    right = groups[judge(images).argmax(1)] == groups[labels]
    return {
        "psnr": float(-10 * errors.clamp(min=1e-10).log10().mean()),
        "recognized": 100 * float(right.float().mean()),
        "features": 100 * float((found - real).norm(dim=1).mean() / real.norm(dim=1).mean()),
    }


def in_batches(draw: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """`draw` of a batch after the other; the number of its first image is the seed."""
    starts = range(0, len(inputs[0]), BATCH)
    return torch.cat([draw(*(x[first : first + BATCH] for x in inputs), seed=first) for first in starts])


@torch.no_grad()
def through(tokenizer: MSVQVAE, images: Tensor, seed: int) -> Tensor:
    """Encoded and decoded."""
    return tokenizer.decode(tokenizer.encode(images)).clamp(-1, 1)


def kept(tokenizer: MSVQVAE, var: VAR, strength: float, images: Tensor, labels: Tensor, seed: int) -> Tensor:
    """The finer maps drawn anew by a network of classes, without training."""
    nothing = torch.zeros(tokenizer.quantizer.sides[-1])
    given: dict[str, Any] = {**SETTINGS["likeliest"], "seed": seed, "strength": strength}
    return edit(var, tokenizer, images, nothing, labels, **given) * 2 - 1


def trained(tokenizer: MSVQVAE, var: VAR, settings: dict[str, Any], small: Tensor, seed: int) -> Tensor:
    """Drawn by a network of images."""
    return upscale(var, tokenizer, small, seed=seed, composite=False, **settings) * 2 - 1


def main() -> None:
    tokenizer, of_classes, _ = load("glyphs32")
    judge, size = Classifier("data/glyphs32/classifier.safetensors"), tokenizer.image_size
    gray, labels = gray_images(GLYPHS, "val")
    chosen = torch.linspace(0, len(gray) - 1, NUM_IMAGES).round().long()
    originals, labels = (gray[chosen].float() / 127.5 - 1).expand(-1, 3, -1, -1).contiguous(), labels[chosen]
    small = ((F.avg_pool2d(originals, 2) + 1) * 127.5).round() / 127.5 - 1
    rows: list[dict[str, Any]] = []
    shown: dict[str, Tensor] = {}

    def record(method: str, images: Tensor, seed: int | str = "") -> None:
        matched = match_means(images / 2 + 0.5, small / 2 + 0.5) * 2 - 1
        for name, found in ((method, images), (method + MATCHED, matched)):
            rows.append({"method": name, "seed": seed, **scores(found, originals, labels, judge)})
            shown.setdefault(name, found[:: NUM_IMAGES // SHOWN][:SHOWN])

    for resampling in (Image.Resampling.NEAREST, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS):
        record(resampling.name.lower(), enlarged(small, resampling, size))
    bicubic = enlarged(small, Image.Resampling.BICUBIC, size)
    record("bicubic, through the tokenizer", in_batches(partial(through, tokenizer), bicubic))
    for strength in STRENGTHS:
        num = round((1 - strength) * len(tokenizer.patch_nums))
        draw = partial(kept, tokenizer, of_classes, strength)
        record(f"{num} maps of bicubic, the others by a VAR of classes", in_batches(draw, bicubic, labels))
    for seed in SEEDS:
        _, var, _ = load(train(seed))
        for name, settings in SETTINGS.items():
            record(f"VAR of images, {name}", in_batches(partial(trained, tokenizer, var, settings), small), seed)
    record("the original, through the tokenizer", in_batches(partial(through, tokenizer), originals))
    write_table(HERE / "results.csv", rows)
    print("| method | PSNR, dB | recognized, % | distance of features, % |")
    print("|---" * 4 + "|")
    for method in shown:
        own = [row for row in rows if row["method"] == method]
        cells = [[row[name] for row in own] for name in ("psnr", "recognized", "features")]
        print(f"| {method} |", " | ".join(interval(x) if len(x) > 1 else f"{x[0]:.3g}" for x in cells), "|")
    columns = [
        "nearest",
        "bicubic",
        *(f"VAR of images, {name}{MATCHED}" for name in ("likeliest, guidance 1", "drawn")),
    ]
    sheet = torch.cat([*(shown[name] for name in columns), originals[:: NUM_IMAGES // SHOWN][:SHOWN]])
    image_grid.save(image_grid.grid(sheet / 2 + 0.5, columns=SHOWN), HERE / "images.png")


if __name__ == "__main__":
    main()
