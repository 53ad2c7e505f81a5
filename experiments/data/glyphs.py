"""Letters and digits of thousands of freely licensed fonts as a data set of 32 pixel images: download (Debian), render,
leave out what is not text or repeats another face, split by family, pack.

    python experiments/data/glyphs.py [FOLDER]      (default data/glyphs32; ten minutes, 1.2 GB of downloads, 5 GB of disk)

Needs Debian or a system based on it (`apt-get download`, no root). The classes are A to Z, a to z and 0 to 9. Whole
families are held out for validation. Fonts and images are not part of this repository; FOLDER/LICENSES.txt names the
packages, each of which states the licenses of its fonts.
"""

import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from classifier import fit, predict
from debian import download
from PIL import Image, ImageDraw, ImageFont
from scipy.sparse.csgraph import connected_components
from tqdm.auto import tqdm

from varlab.data.dataset_card import write_card
from varlab.data.sources.items import Item, png, usable_cores
from varlab.data.write_shards import Source, pack

MAX_BYTES = 20_000_000  # of a package; larger ones hold Chinese characters
CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
SIDE, INNER, DRAWN = 32, 26, 96  # pixels of an image, of a character's longer side in it, of the font it is drawn from
UNEQUAL = ("abdeghqr", "ABDEGHQR")  # small and capital letters that differ, unless a face has capitals only
MISSING = "\uffff"  # no font has it: drawn as the mark of a missing character
SAME, SIMILAR = 0.05, 0.1  # largest distances of faces of which one is left out, and of faces of one family
READABLE, VAL_FACES = 0.6, 160


def look_alikes() -> np.ndarray:
    """The group of each class: a letter and its capital, which often differ only in size, and 0 O o, 1 I i l."""
    group = {"0": "o", "1": "l", "i": "l"}
    letters = [character.lower() for character in CHARACTERS]
    return np.array([CHARACTERS.index(group.get(letter, letter)) for letter in letters])


LOOK_ALIKES = look_alikes()


def packages() -> list[str]:
    """Debian's packages of fonts: texlive-fonts-extra, and all called fonts-... up to 20 MB."""
    listed = subprocess.run(
        ["apt-cache", "pkgnames", "fonts-"], check=True, capture_output=True, text=True
    ).stdout.split()
    shown = subprocess.run(["apt-cache", "show", "--no-all-versions", *listed], capture_output=True, text=True).stdout
    found = re.findall(r"^Package: (\S+)$.*?^Size: (\d+)$", shown, re.MULTILINE | re.DOTALL)
    return ["texlive-fonts-extra", *sorted(name for name, size in found if int(size) <= MAX_BYTES)]


def draw(font: ImageFont.FreeTypeFont, character: str) -> Image.Image | None:
    """The ink of a character, its longer side at INNER pixels, in the middle; None if the font draws nothing."""
    left, top, right, bottom = map(int, font.getbbox(character))
    if right - left < 2 or bottom - top < 2 or max(right - left, bottom - top) > 8 * DRAWN:
        return None
    mask = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(mask).text((-left, -top), character, font=font, fill=255)
    box = mask.getbbox()
    if box is None:
        return None
    mask = mask.crop(box)
    scale = INNER / max(mask.size)
    size = max(1, round(mask.width * scale)), max(1, round(mask.height * scale))
    image = Image.new("L", (SIDE, SIDE))
    image.paste(mask.resize(size, Image.Resampling.LANCZOS), ((SIDE - size[0]) // 2, (SIDE - size[1]) // 2))
    return image


def render(file: Path) -> tuple[str, np.ndarray] | None:
    """(family, characters as (62, SIDE, SIDE) uint8 with ink 255) of a face; None if it lacks a character or has no
    lowercase letters."""
    try:
        font = ImageFont.truetype(str(file), DRAWN)
        missing = draw(font, MISSING)
        images = [draw(font, character) for character in CHARACTERS]
    except (OSError, ValueError):
        return None
    if any(image is None or (missing is not None and image == missing) for image in images):
        return None
    face = np.stack([np.asarray(image) for image in images])
    lower, upper = (face[[CHARACTERS.index(letter) for letter in letters]].astype(int) for letters in UNEQUAL)
    different = np.abs(lower - upper).sum((1, 2)) / (lower + upper).sum((1, 2))
    if np.median(different) < 0.1:
        return None
    words = re.findall(r"[A-Za-z]*[a-z]|\S+", font.getname()[0] or file.stem)
    return words[0].lower() if words else file.stem.lower(), face


def distances(faces: np.ndarray) -> np.ndarray:
    """(N, N): the difference of two faces at a quarter of the resolution, relative to their ink; the same face: 0."""
    cell = 4
    blocks = faces.reshape(len(faces), len(CHARACTERS), SIDE // cell, cell, SIDE // cell, cell).mean((3, 5))
    flat = blocks.reshape(len(faces), -1).astype(np.float32)
    squares = (flat * flat).sum(1)
    return np.sqrt(np.maximum(squares[:, None] + squares - 2 * flat @ flat.T, 0) / (squares[:, None] + squares))


def new_faces(distance: np.ndarray) -> np.ndarray:
    """The faces that are not the same as one before them."""
    kept: list[int] = []
    for i, row in enumerate(distance):
        if not kept or row[kept].min() > SAME:
            kept.append(i)
    return np.array(kept)


def readable(faces: np.ndarray) -> np.ndarray:
    """The share of each face's characters that a classifier trained on the other half of the faces reads right, where
    look-alikes count as one."""
    images, labels = torch.from_numpy(255 - faces), torch.arange(len(CHARACTERS))
    order = np.random.default_rng(0).permutation(len(faces))
    same, share = torch.from_numpy(LOOK_ALIKES), np.zeros(len(faces))
    for half in range(2):
        train, test = order[half::2], order[1 - half :: 2]
        net = fit(images[train].flatten(0, 1)[:, None], labels.repeat(len(train)), len(CHARACTERS), steps=2000)
        read = predict(net, images[test].flatten(0, 1)[:, None]).view(len(test), -1)
        share[test] = (same[read] == same[labels]).float().mean(1).numpy()
    return share


def families(names: list[str], distance: np.ndarray) -> np.ndarray:
    """The number of each face's family: faces of one name, or so similar that one gives away the other."""
    number = np.unique(names, return_inverse=True)[1]
    return connected_components((distance < SIMILAR) | (number[:, None] == number))[1]


def held_out(family: np.ndarray) -> np.ndarray:
    """Whether a face is for validation: whole families, none of them large, about VAL_FACES faces."""
    sizes, chosen = np.bincount(family), []
    for number in np.random.default_rng(0).permutation(len(sizes)):
        if sizes[number] <= VAL_FACES // 10 and sizes[chosen].sum() < VAL_FACES:
            chosen.append(number)
    return np.isin(family, chosen)


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "data/glyphs32")
    fonts = download(packages(), folder / "fonts")
    files = [file for font in fonts for file in sorted(font.rglob("*")) if file.suffix in (".otf", ".ttf", ".pfb")]
    files = [file for file in files if not file.is_symlink()]
    with ProcessPoolExecutor(usable_cores(), mp_context=get_context("spawn")) as pool:
        rendered = list(tqdm(pool.map(render, files, chunksize=8), desc="render", unit="face", total=len(files)))
    complete = [(file, *face) for file, face in zip(files, rendered, strict=True) if face is not None]
    faces = np.stack([face for _, _, face in complete])
    print(f"{len(files):,} files, {len(faces):,} faces with all characters", flush=True)
    kept = new_faces(distances(faces))
    print(f"{len(kept):,} of them differ from those before; reading them takes two minutes", flush=True)
    kept = kept[readable(faces[kept]) >= READABLE]
    family = families([complete[i][1] for i in kept], distances(faces[kept]))
    splits: dict[str, list[Item]] = {"train": [], "val": []}
    for i, is_val in zip(kept, held_out(family), strict=True):
        file, _, face = complete[i]
        for label, image in enumerate(255 - face):
            name = f"{file.relative_to(folder / 'fonts')} {CHARACTERS[label]}"
            splits["val" if is_val else "train"].append(Item(label, "png", png(image), name=name))
    source = Source("glyphs", "glyphs32", list(CHARACTERS), splits)
    pack(source, folder / "shards", shard_images=10_000, seed=0, num_workers=usable_cores(), check=False)
    write_card(folder / "shards")
    licenses = sorted({complete[i][0].relative_to(folder / "fonts").parts[0] for i in kept})
    (folder / "LICENSES.txt").write_text(
        "Free licenses by font: see usr/share/doc/PACKAGE/copyright of each Debian package\n"
        + "\n".join(licenses)
        + "\n"
    )
    counts = {split: len(items) // len(CHARACTERS) for split, items in splits.items()}
    print(f"{folder / 'shards'}: {counts['train']:,} faces for training, {counts['val']} for validation")


if __name__ == "__main__":
    main()
