"""Unlimited synthetic data: scenes of 32 pixels composed from emoji sprites, packed into shards.

    python experiments/depth_scaling/scenes.py FOLDER --train 24000 --val 4000

A scene is a pure function of (split, number): a two-color gradient, up to two small sprites, and one large sprite at a
random position, size, angle and tint, whose category is the label. Train and val share sprites, not scenes. The sprites
are downloaded from npm as in the tokenizer study (Noto Emoji, Apache-2.0; Twemoji, CC BY 4.0); no image is part of this
repository.
"""

import argparse
import io
import sys
import tarfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "tokenizer"))
from prepare import BITMAPS, SKIN_TONES, categories, concept, fetch, in_package

from varlab.data.dataset_card import write_card
from varlab.data.sources.items import Item, usable_cores
from varlab.data.write_shards import Source, pack
from varlab.files import atomic_write

SIDE = 32
SPLITS = {"train": 0, "val": 1}


@dataclass(frozen=True)
class Scene(Item):
    """An image that is composed when it is loaded."""

    sprites: Path = Path()
    seed: tuple[int, int] = (0, 0)

    def load(self) -> bytes:
        encoded = io.BytesIO()
        compose(sprites_of(self.sprites)[0], self.seed).save(encoded, "webp", lossless=True)
        return encoded.getvalue()


@cache
def sprites_of(file: Path) -> tuple[list[Image.Image], list[int], list[str]]:
    """(sprites with alpha, the category of each, names of the categories)."""
    held: Any = np.load(file)
    return [Image.fromarray(pixels) for pixels in held["pixels"]], held["labels"].tolist(), held["names"].tolist()


def collect(downloads: Path, file: Path) -> None:
    """Collects the bitmaps of both sets, without skin-tone variants, in one array."""
    archives = {name: fetch(package, downloads) for name, package in BITMAPS.items()}
    by_concept = categories(in_package(archives["google"], "emoji"))
    names = sorted(set(by_concept.values()))
    pixels, labels = [], []
    for archive in archives.values():
        with tarfile.open(archive) as tar:
            for member in tar:
                path = Path(member.name)
                if path.parts[-3:-1] not in (("google", "64"), ("twitter", "64")) or SKIN_TONES & set(
                    path.stem.split("-")
                ):
                    continue
                if (what := concept(path.stem)) in by_concept:
                    content = tar.extractfile(member)
                    assert content is not None
                    image = Image.open(io.BytesIO(content.read())).convert("RGBA")
                    pixels.append(np.asarray(image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)))
                    labels.append(names.index(by_concept[what]))
    with atomic_write(file) as partial, open(partial, "wb") as out:
        np.savez_compressed(out, pixels=np.stack(pixels), labels=labels, names=names)


def main_sprite(num_sprites: int, seed: tuple[int, int]) -> int:
    """The large sprite of a scene; it gives the label."""
    return int(np.random.default_rng(seed).integers(num_sprites))


def compose(sprites: list[Image.Image], seed: tuple[int, int]) -> Image.Image:
    """The scene of a seed."""
    rng = np.random.default_rng(seed)
    main = sprites[int(rng.integers(len(sprites)))]
    angle, colors = rng.uniform(0, 2 * np.pi), rng.uniform(0, 255, (2, 3))
    y, x = np.mgrid[-1 : 1 : SIDE * 1j, -1 : 1 : SIDE * 1j]
    share = ((np.cos(angle) * x + np.sin(angle) * y) / 2.83 + 0.5)[..., None]
    scene = Image.fromarray((colors[0] * share + colors[1] * (1 - share)).astype(np.uint8))
    small = [sprites[i] for i in rng.integers(len(sprites), size=rng.integers(3))]
    for sprite, smallest, largest in [*((sprite, 7, 12) for sprite in small), (main, 16, 28)]:
        side = int(rng.integers(smallest, largest + 1))
        turned = sprite.resize((side, side), Image.Resampling.BILINEAR)
        turned = turned.rotate(rng.uniform(-40, 40), Image.Resampling.BILINEAR, expand=True)
        tinted = np.asarray(turned).copy()
        tinted[..., :3] = np.clip(tinted[..., :3] * rng.uniform(0.7, 1.2, 3), 0, 255)
        place = tuple(int(rng.integers(-side // 5, SIDE - side + side // 5 + 1)) for _ in range(2))
        scene.paste(Image.fromarray(tinted[..., :3]), place, Image.fromarray(tinted[..., 3]))
    return scene


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--train", type=int, default=24_000)
    parser.add_argument("--val", type=int, default=4_000)
    given = parser.parse_args()
    file = given.out.parent / "sprites.npz"
    if not file.is_file():
        collect(given.out.parent / "downloads", file)
    sprites, labels, names = sprites_of(file)
    splits: dict[str, list[Item]] = {}
    for split, number in SPLITS.items():
        seeds = [(number, i) for i in range(getattr(given, split))]
        splits[split] = [
            Scene(labels[main_sprite(len(sprites), seed)], "webp", sprites=file, seed=seed) for seed in seeds
        ]
    source = Source("scenes", "emoji scenes, 32 px", names, splits)
    pack(source, given.out, shard_images=2000, seed=0, num_workers=usable_cores())
    write_card(given.out)
    print(f"{given.out}: {given.train} train, {given.val} val scenes, {len(names)} classes")


if __name__ == "__main__":
    main()
