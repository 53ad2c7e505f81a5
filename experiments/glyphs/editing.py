"""Zero-shot editing of held-out faces: is the inserted letter the asked one, does it keep the style of its face, how wide is
the seam?

    python experiments/glyphs/editing.py          (needs data/glyphs32 and its classifier)

- Inpainting: the right half of a glyph is drawn anew, given its class or no class.
- Class editing: a glyph is redrawn as another character while its coarse scales are kept (`strength`).

Style: the edited image is compared, by blocks of 4 pixels, with the asked character of its own face and of all other held-out
faces; the score is the share of other faces that are farther away (50 % by chance, 100 %: the own face is the nearest).
Writes editing.csv (one row per edit, pair of characters and seed of sampling) and editing.png beside this file, and prints means
over pairs with 95 % intervals over seeds.
"""

import argparse
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from varlab import image_grid
from varlab.checkpoints.load import load
from varlab.sampling.editing import composite, edit, edit_errors
from varlab.sampling.generate import generate

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "data"), str(HERE.parent)]
from classifier import Classifier, gray_images  # noqa: E402
from glyphs import CHARACTERS, LOOK_ALIKES  # noqa: E402
from steps import interval, write_table  # noqa: E402

SETTINGS = {"cfg_scale": 1.5, "cfg_schedule": "constant", "top_p": 0.97}
SEEDS = (0, 1, 2)  # of sampling
SCORES = ("class_agreement", "style", "seam", "usual_step")
STRENGTHS = (1.0, 0.8, 0.65, 0.5)
PAIRS = ("nm", "bd", "EF", "hk", "38", "PR")  # from, to
SHOWN = 5


@dataclass(frozen=True)
class Faces:
    """Held-out faces: glyphs (N, 62, 3, H, W) in [-1, 1]."""

    glyphs: Tensor

    def of(self, character: str) -> Tensor:
        """One character of all faces (N, 3, H, W)."""
        return self.glyphs[:, CHARACTERS.index(character)]

    def style(self, images: Tensor, characters: str) -> float:
        """Percent of other faces farther away than the own one, mean over images; image i belongs to face i, and shows
        `characters`."""
        blocks = F.avg_pool2d(images.mean(1, keepdim=True), 4).flatten(1)
        real = F.avg_pool2d(self.of(characters).mean(1, keepdim=True), 4).flatten(1)
        distance = torch.cdist(blocks, real)
        own = distance.diagonal()[:, None]
        others = ~torch.eye(len(real), dtype=torch.bool)
        return 100 * ((distance > own) & others).sum().item() / others.sum().item()


def held_out(shards: Path) -> Faces:
    """All glyphs of the validation split, by face."""
    images, labels = gray_images(shards, "val")
    names = [line.rsplit(" ", 1)[0] for line in (shards / "val.sources.txt").read_text().splitlines()]
    order = np.lexsort((labels.numpy(), np.unique(names, return_inverse=True)[1]))
    faces = images[torch.from_numpy(order)].view(-1, len(CHARACTERS), 1, *images.shape[-2:])
    return Faces((faces.float() / 127.5 - 1).expand(-1, -1, 3, -1, -1))


def agreement(judge: Classifier, images: Tensor, character: str) -> float:
    """Percent of the images read as the character or one that looks like it."""
    groups = torch.from_numpy(LOOK_ALIKES)
    return 100 * (groups[judge(images).argmax(1)] == groups[CHARACTERS.index(character)]).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint", default="glyphs32")
    tokenizer, var, _ = load(parser.parse_args().checkpoint)
    faces, judge = held_out(Path("data/glyphs32/shards")), Classifier("data/glyphs32/classifier.safetensors")
    num, latent = len(faces.glyphs), tokenizer.quantizer.sides[-1]
    half, nothing = torch.ones(latent), torch.zeros(latent)
    half[:, latent[1] // 2 :] = 0
    pixels = F.interpolate(half[None, None], scale_factor=tokenizer.image_size[0] / latent[0])[0, 0]
    rows, shown = [], []

    for (source, target), seed in product(PAIRS, SEEDS):
        originals, given = faces.of(source), {**SETTINGS, "seed": 10_000 * seed}
        label, own = (torch.full((num,), CHARACTERS.index(character)) for character in (target, source))
        columns = [originals[:SHOWN], faces.of(target)[:SHOWN]]

        def record(what: str, images: Tensor, character: str, *more: float, seed: int = seed) -> None:
            found = (agreement(judge, images, character), faces.style(images, character), *more)
            rows.append({"edit": what, "to": character, "seed": seed, **dict(zip(SCORES, found, strict=False))})

        for name, condition in (
            ("right half, given the class", own),
            ("right half, no class", torch.full((num,), var.null_label)),
        ):
            made = edit(var, tokenizer, originals, half, condition, **given)
            whole = composite(made, originals / 2 + 0.5, pixels)
            errors = edit_errors(whole, originals / 2 + 0.5, pixels)
            record(name, whole * 2 - 1, source, errors.seam, errors.usual)
            columns.append(whole[:SHOWN] * 2 - 1)
        record("no image given", generate(var, tokenizer, label, **given) * 2 - 1, target)
        for strength in STRENGTHS:
            made = edit(var, tokenizer, originals, nothing, label, strength=strength, **given) * 2 - 1
            record(f"another character, strength {strength:g}", made, target)
            columns.append(made[:SHOWN])
        record("the original, not edited", originals, target)
        record("the face's own", faces.of(target), target)
        if seed == 0:
            shown.append(image_grid.columns_of(*columns))
        print(source, target, seed, flush=True)
    write_table(HERE / "editing.csv", rows)
    lines = [f"| edit | {' | '.join(SCORES).replace('_', ' ')} |", "|---" * (1 + len(SCORES)) + "|"]
    for what in dict.fromkeys(row["edit"] for row in rows):
        found = []
        for score in SCORES:
            seeds = [
                [row[score] for row in rows if row["edit"] == what and row["seed"] == n and score in row] for n in SEEDS
            ]
            found.append(interval([float(np.mean(values)) for values in seeds]) if seeds[0] else "")
        lines.append(f"| {what} | {' | '.join(found)} |")
    print("\n".join(lines))
    first = torch.cat(shown[:4])
    image_grid.save(image_grid.grid(first / 2 + 0.5, columns=4 + len(STRENGTHS)), HERE / "editing.png")


if __name__ == "__main__":
    main()
