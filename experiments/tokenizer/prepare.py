"""Six freely licensed emoji sets as a data set of 64 pixel images: download (npm), render, composite on white, split,
pack.

    pip install resvg_py
    python experiments/tokenizer/prepare.py [FOLDER]      (default data/emoji64; about two minutes, 150 MB of downloads)

Labels are the nine Unicode categories. Captions are the name of an emoji, its keywords, and its short names. Train and
val are split by codepoint: all vendors and skin tones of an emoji are in the same split. Images are not part of this
repository; their licenses are in LICENCES below and in FOLDER/LICENCES.txt.
"""

import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from varlab.data.dataset_card import write_card
from varlab.data.sources.folder import folder_source
from varlab.data.sources.items import usable_cores
from varlab.data.write_shards import pack

SIDE = 64
BITMAPS = {"google": "emoji-datasource-google@16.0.0", "twitter": "emoji-datasource-twitter@16.0.0"}
VECTORS = {
    "fluent-flat": "@iconify-json/fluent-emoji-flat@1.2.6",
    "fluent": "@iconify-json/fluent-emoji@1.2.7",
    "emojione": "@iconify-json/emojione@1.2.3",
    "fxemoji": "@iconify-json/fxemoji@1.2.2",
}
WORDS = "emojibase-data@17.0.0"
LICENCES = {
    "google": "Noto Emoji, Google, Apache-2.0",
    "twitter": "Twemoji, Twitter, CC BY 4.0",
    "fluent-flat": "Fluent Emoji, Microsoft, MIT",
    "fluent": "Fluent Emoji, Microsoft, MIT",
    "emojione": "Emoji One 2, CC BY 4.0",
    "fxemoji": "Firefox OS Emoji, Mozilla, Apache-2.0",
    "words": "Emojibase, MIT; Unicode CLDR, Unicode License v3",
}
SKIN_TONES = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}


def fetch(package: str, folder: Path) -> Path:
    """The package's archive, downloaded once."""
    done = folder / f"{re.sub(r'[^a-z0-9.]+', '-', package).strip('-')}.tgz"
    if not done.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        answer = subprocess.run(
            ["npm", "pack", "--silent", package], cwd=folder, check=True, capture_output=True, text=True
        )
        (folder / answer.stdout.split()[-1]).rename(done)
    return done


def concept(codepoints: str) -> str:
    """A sequence of codepoints without skin tones and presentation selectors."""
    return "-".join(part for part in codepoints.lower().split("-") if part not in SKIN_TONES | {"fe0f"})


def on_white(image: Image.Image) -> Image.Image:
    """An image with alpha at 64 pixels on white."""
    image = image.convert("RGBA")
    if image.size != (SIDE, SIDE):
        image = image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def bitmaps(archive: Path) -> Iterator[tuple[str, Image.Image]]:
    """(codepoints, image) of a set distributed as PNG."""
    with tarfile.open(archive) as tar:
        for info in tar:
            if re.search(r"/img/\w+/64/[^/]+\.png$", info.name):
                content = tar.extractfile(info)
                assert content is not None
                yield Path(info.name).stem, on_white(Image.open(io.BytesIO(content.read())))


def in_package(archive: Path, name: str) -> Any:
    """A JSON file of a package."""
    with tarfile.open(archive) as tar:
        member = tar.extractfile(f"package/{name}.json")
        assert member is not None
        return json.load(member)


def vectors(archive: Path, by_name: dict[str, str]) -> Iterator[tuple[str, Image.Image]]:
    """(codepoints, image) of a set distributed as SVG; icons whose name is not that of an emoji are left out."""
    import resvg_py

    icons = in_package(archive, "icons")
    for name, icon in icons["icons"].items():
        codepoints = by_name.get(name)
        if codepoints is None or icon.get("hidden"):
            continue
        width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0 {width} {height}">'
        drawn = resvg_py.svg_to_bytes(svg_string=f"{svg}{icon['body']}</svg>", width=SIDE, height=SIDE)
        yield codepoints, on_white(Image.open(io.BytesIO(bytes(drawn))))


def categories(entries: list[dict[str, Any]]) -> dict[str, str]:
    """Category by concept, as a folder name."""
    found = {}
    for entry in entries:
        if entry["category"] != "Component":
            name = entry["category"].lower().replace(" & ", "_and_")
            found |= {concept(code): name for code in (entry["unified"], entry.get("non_qualified")) if code}
    return found


def names(entries: list[dict[str, Any]], chars: dict[str, str]) -> dict[str, str]:
    """Codepoints by every name of an emoji: Unicode's, the short names, and those of the Fluent set."""
    found = {}
    for entry in entries:
        for name in [entry["name"] or "", *entry["short_names"]]:
            found.setdefault(re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"), entry["unified"])
    return found | {name: codepoints for codepoints, name in chars.items()}


def captions(entries: list[dict[str, Any]], words: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Captions by concept: name, keywords, and short names where these say something else."""
    short = {concept(entry["unified"]): [name.replace("_", " ") for name in entry["short_names"]] for entry in entries}
    found = {}
    for entry in words:
        what, name = concept(entry["hexcode"]), entry["label"]
        keywords = ", ".join(tag for tag in entry.get("tags", []) if re.fullmatch(r"[\w '-]*[a-z][\w '-]*", tag))
        others = ", ".join(other for other in short.get(what, []) if re.search("[a-z]{3}", other) and other != name)
        found.setdefault(what, [line for line in (name, keywords, others) if line])
    return found


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "data/emoji64")
    archives = {name: fetch(package, folder / "downloads") for name, package in (BITMAPS | VECTORS).items()}
    entries = in_package(archives["google"], "emoji")
    described = captions(entries, in_package(fetch(WORDS, folder / "downloads"), "en/data"))
    by_name = names(entries, in_package(archives["fluent-flat"], "chars"))
    by_concept, seen, counts = categories(entries), set(), {"train": 0, "val": 0}
    shutil.rmtree(folder / "images", ignore_errors=True)
    for name, archive in archives.items():
        drawn = bitmaps(archive) if name in BITMAPS else vectors(archive, by_name)
        for codepoints, image in tqdm(drawn, desc=name, unit="image"):
            what = concept(codepoints)
            pixels = hashlib.sha256(np.asarray(image).tobytes()).hexdigest()
            if what not in by_concept or pixels in seen:
                continue
            seen.add(pixels)
            split = "val" if int(hashlib.sha256(what.encode()).hexdigest()[:8], 16) % 10 == 0 else "train"
            counts[split] += 1
            file = folder / "images" / split / by_concept[what] / f"{name}-{codepoints.lower()}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            image.save(file)
            if what in described:
                file.with_suffix(".txt").write_text("\n".join(described[what]) + "\n", encoding="utf-8")
    (folder / "LICENCES.txt").write_text("".join(f"{name}: {licence}\n" for name, licence in LICENCES.items()))
    source = folder_source(folder / "images", val_share=0.1, seed=0)
    pack(source, folder / "shards", shard_images=2000, seed=0, num_workers=usable_cores())
    write_card(folder / "shards")
    print(
        f"{folder / 'shards'}: {counts['train']} train, {counts['val']} val images, {len(set(by_concept.values()))} classes"
    )


if __name__ == "__main__":
    main()
