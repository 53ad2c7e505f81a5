"""Does one VAR of two shapes predict each as well as a VAR of that shape alone? Glyphs in tall and in wide boxes, three seeds. Finished
steps are skipped; an interrupted run continues.

    python experiments/data/glyphs.py && python experiments/shapes/run.py      (one CPU core: about an hour and a half)

Writes results.csv, longer.csv and samples.png beside this file and prints means and 95 % intervals over seeds.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from steps import finished, interval, varlab, write_table  # noqa: E402

from varlab import VARPipeline, image_grid  # noqa: E402
from varlab.data.decoding import open_image  # noqa: E402
from varlab.data.shards import ShardReader  # noqa: E402
from varlab.data.sources.items import Item, png  # noqa: E402
from varlab.data.write_shards import Source, pack  # noqa: E402

GLYPHS, DATA, RUNS = Path("data/glyphs32/shards"), Path("data/glyphs_boxes"), Path("runs/shapes")
SHAPES = {"tall": (40, 24), "wide": (24, 40)}
MARGIN, NUM = 3, {"train": 40_000, "val": 4_000}
STEPS, SEEDS, MORE_STEPS = 300, (0, 1, 2), 1200
ALONE = {  # position and steps of a network of one shape
    "learned": ("learned", STEPS),  # as many images of the shape as the network of both
    "coordinates": ("coordinates", STEPS),
    "long": ("learned", 2 * STEPS),  # as many steps
}
LETTERS, SEEN, UNSEEN = "ABRagk58", [(40, 24), (24, 40)], [(32, 32), (48, 32), (24, 56)]


def boxed(image: Image.Image, shape: tuple[int, int]) -> np.ndarray:
    """The ink of a glyph, as large as fits, in the middle of a box."""
    ink = Image.eval(image.convert("L"), lambda level: 255 - level)
    ink = ink.crop(ink.getbbox())
    inner = shape[1] - 2 * MARGIN, shape[0] - 2 * MARGIN
    scale = min(inner[0] / ink.width, inner[1] / ink.height)
    ink = ink.resize((max(1, round(ink.width * scale)), max(1, round(ink.height * scale))), Image.Resampling.LANCZOS)
    box = Image.new("L", (shape[1], shape[0]))
    box.paste(ink, ((shape[1] - ink.width) // 2, (shape[0] - ink.height) // 2))
    return 255 - np.asarray(box)


def prepare() -> None:
    """Packs evenly spaced glyphs, every other one in a tall box."""
    if (DATA / "manifest.json").is_file():
        return
    splits, reader = {}, ShardReader(GLYPHS, "train")
    for split, num in NUM.items():
        reader, items = ShardReader(GLYPHS, split), []
        for turn, i in enumerate(tqdm(np.linspace(0, len(reader) - 1, num).astype(int), desc=f"box {split}")):
            image = open_image(reader.read(int(i)), lambda: "a glyph")
            drawn = boxed(image, list(SHAPES.values())[turn % 2])
            items.append(Item(int(reader.labels[i]), "png", png(drawn)))
        splits[split] = items
    pack(Source("glyphs", "glyphs in boxes", reader.manifest["class_names"], splits), DATA, shard_images=10_000, seed=0)


def tokens() -> Path:
    """A token cache for each shape."""
    out = RUNS / "tokens"
    if not (out / "manifest.json").is_file():
        shapes = str([list(shape) for shape in SHAPES.values()]).replace(" ", "")
        varlab("tokenize", "tokenizer=glyphs32", f"shards={DATA}", f"out={out}", f"shapes={shapes}", "resize_ratio=1.0")
    return out


def train(arm: str, seed: int, cache: Path, position: str, steps: int) -> Path:
    """Trains one run unless finished; returns its folder."""
    folder = RUNS / f"{arm}-{seed}"
    if not finished(folder):
        network = ["experiment=var_glyphs32", "model.depth=2", "model.width=96", "model.num_heads=3"]
        data = ["tokenizer=glyphs32", f"data.path={cache}", "data.global_batch_size=64", f"model.position={position}"]
        length = [f"steps={steps}", f"val_every={steps}", "save_every=100", "trainer=cpu", "ckpt_path=last"]
        name = [f"name=shapes/{folder.name}", f"seed={seed}", "logger=csv", "callbacks.pictures=null"]
        varlab("train", *network, *data, *length, *name)
    return folder


def loss_of(folder: Path, cache: Path) -> float:
    """Nats per token on one shape."""
    out = folder / cache.name
    if not (out / "likelihood.json").is_file():
        varlab("evaluate", f"checkpoint={folder / 'checkpoints/last.ckpt'}", f"shards={cache}", f"out={out}")
    return json.loads((out / "likelihood.json").read_text())["loss"]


def draw(folder: Path) -> None:
    """The same letters at trained and other shapes, one row each, padded to one size."""
    pipeline, rows = VARPipeline.from_pretrained(folder / "checkpoints/last.ckpt"), []
    height, width = (max(shape[side] for shape in SEEN + UNSEEN) for side in (0, 1))
    for shape in SEEN + UNSEEN:
        for image in pipeline(list(LETTERS), image_size=shape, seed=0, cfg_scale=1.5, top_p=0.9):
            page = Image.new("RGB", (width, height), (200, 200, 200))
            page.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
            rows.append(np.asarray(page) / 255)
    pixels = torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2)
    image_grid.save(image_grid.grid(pixels, columns=len(LETTERS)), HERE / "samples.png")


def main() -> None:
    prepare()
    cache = tokens()
    caches = {name: cache / f"{height}x{width}" for name, (height, width) in SHAPES.items()}
    rows = []
    for seed in SEEDS:
        both = train("both", seed, cache, "coordinates", 2 * STEPS)
        for name, own in caches.items():
            alone = {arm: loss_of(train(f"{name}-{arm}", seed, own, *given), own) for arm, given in ALONE.items()}
            rows.append({"shape": name, "seed": seed, "both": loss_of(both, own), **alone})
    both, longer = train("both-longer", 0, cache, "coordinates", MORE_STEPS), []
    for name, own in caches.items():
        alone = train(f"{name}-longer", 0, own, "learned", MORE_STEPS)
        longer.append({"shape": name, "seed": 0, "both": loss_of(both, own), "long": loss_of(alone, own)})
    write_table(HERE / "results.csv", rows)
    write_table(HERE / "longer.csv", longer)
    columns = ("shape", "both shapes", "alone, as many images", "the same, coordinates", "alone, as many steps")
    print("|", " | ".join(columns), "| both against as many images, % | both against as many steps, % |")
    print("|---" * 7 + "|")
    for name in SHAPES:
        own = [row for row in rows if row["shape"] == name]
        means = [interval([row[arm] for row in own]) for arm in ("both", *ALONE)]
        means += [interval([100 * (row["both"] / row[arm] - 1) for row in own]) for arm in ("learned", "long")]
        print(f"| {name} |", " | ".join(means), "|")
    for row in longer:
        print(
            f"{MORE_STEPS} steps each, {row['shape']}: {row['both']:.3f} and {row['long']:.3f}, {row['both'] / row['long'] - 1:+.1%}"
        )
    draw(RUNS / "both-longer-0")


if __name__ == "__main__":
    main()
