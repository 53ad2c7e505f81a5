"""Does a VAR use the words it is given? Emoji with their names and keywords against the same images with captions of others, three
seeds; validation holds concepts that training does not, and in a further run the drawings of another vendor. Finished
steps are skipped; an interrupted run continues.

    python experiments/tokenizer/prepare.py && python experiments/tokenizer/late.py    (data and tokenizer)
    python experiments/text/run.py    (one CPU core: an hour and a half)

Writes results.csv and words.png beside this file and prints means and 95 % intervals over seeds.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from steps import finished, interval, varlab, write_table  # noqa: E402

from varlab import VARPipeline, image_grid  # noqa: E402
from varlab.files import sha256  # noqa: E402

SHARDS, RUNS = Path("data/emoji64/shards"), Path("runs/text")
TOKENIZER = Path("runs/emoji64/long_continued/checkpoints/last.ckpt")
SEEDS, STEPS, CANDIDATES = (0, 1, 2), 1000, 16
VENDOR = "twitter"  # whose drawings a further run holds out
SEEN = ("octopus", "red heart", "smiling face", "house", "snowman", "taxi")
UNSEEN = ("a blue heart", "a green car", "a sad cat", "an orange flower", "two stars", "a purple hat")


def tokens() -> Path:
    """The token cache, with vectors of captions."""
    out = RUNS / "tokens"
    if not (out / "manifest.json").is_file():
        settings = [f"tokenizer={TOKENIZER}", f"shards={SHARDS}", f"out={out}", "resize_ratio=1.0", "flips=true"]
        varlab("tokenize", *settings, "text=minilm")
    return out


def shuffled(cache: Path) -> Path:
    """The same cache with the captions of other images."""
    out = cache.with_name("shuffled")
    if not (out / "manifest.json").is_file():
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(cache, out, ignore=shutil.ignore_patterns("manifest.json"))
        for split in ("train", "val"):
            vectors = np.load(cache / f"{split}.text.npy")
            np.save(out / f"{split}.text.npy", vectors[np.random.default_rng(0).permutation(len(vectors))])
        shutil.copy(cache / "manifest.json", out)
    return out


def by_vendor(cache: Path) -> Path:
    """The same rows split anew: validation holds those of one vendor, training all others."""
    out, splits = cache.with_name("by_vendor"), ("train", "val")
    if not (out / "manifest.json").is_file():
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        sources = [line for split in splits for line in (SHARDS / f"{split}.sources.txt").read_text().splitlines()]
        held = np.array([Path(line).name.startswith(f"{VENDOR}-") for line in sources])
        manifest = json.loads((cache / "manifest.json").read_text())
        for name in ("tokens", "labels", "text"):
            rows = np.concatenate([np.load(cache / f"{split}.{name}.npy") for split in splits])
            for split, chosen in zip(splits, (~held, held), strict=True):
                np.save(out / f"{split}.{name}.npy", rows[chosen])
                manifest["splits"][split] |= {"num_images": int(chosen.sum()), "skipped": 0}
        for split in splits:
            manifest["splits"][split]["sha256"] = sha256(out / f"{split}.tokens.npy")
        (out / "manifest.json").write_text(json.dumps(manifest))
    return out


def score(arm: str, cache: Path, seed: int) -> dict[str, float | int | str]:
    """Trains and evaluates one run unless finished."""
    folder = RUNS / f"{arm}-{seed}"
    if not finished(folder):
        network = [
            "experiment=var_glyphs32",
            "model.depth=3",
            "model.width=128",
            "model.num_heads=4",
            "embedder@model.embedder=text",
        ]
        data = [f"tokenizer={TOKENIZER}", f"data.path={cache}", "data.condition=text", "data.global_batch_size=64"]
        length = [f"steps={STEPS}", f"val_every={STEPS // 3}", "save_every=100", "trainer=cpu", "ckpt_path=last"]
        name = [f"name=text/{folder.name}", f"seed={seed}", "logger=csv", "callbacks.pictures=null"]
        varlab("train", *network, *data, *length, *name)
    found = folder / "likelihood/likelihood.json"
    if not found.is_file():
        checkpoint = f"checkpoint={folder / 'checkpoints/last.ckpt'}"
        varlab("evaluate", checkpoint, f"shards={cache}", f"out={found.parent}", f"retrieval={CANDIDATES}")
    scores = json.loads(found.read_text())
    names = ("loss", "class_gap", "retrieval", "retrieval_images")
    return {"arm": arm, "seed": seed, **{name: scores[name] for name in names}}


def main() -> None:
    cache = tokens()
    caches = {"captions": cache, "shuffled": shuffled(cache)}
    rows = [score(arm, folder, seed) for seed in SEEDS for arm, folder in caches.items()]
    vendor = score("vendor", by_vendor(cache), 0)
    write_table(HERE / "results.csv", [*rows, vendor])
    print(f"| captions | loss, nats per token | gain from the caption | retrieval among {CANDIDATES}, % |")
    print("|---" * 4 + "|")
    for arm in caches:
        means = [
            interval([float(row[name]) for row in rows if row["arm"] == arm])
            for name in ("loss", "class_gap", "retrieval")
        ]
        print(f"| {arm} |", " | ".join(means), "|")
    losses = {arm: [float(row["loss"]) for row in rows if row["arm"] == arm] for arm in caches}
    print("shuffled - captions:", interval([b - a for a, b in zip(*losses.values(), strict=True)]), "nats per token")
    print(f"drawings of {VENDOR}, seed 0: {vendor}")
    pipeline = VARPipeline.from_pretrained(RUNS / "captions-0/checkpoints/last.ckpt")
    drawn = [pipeline(text=[word] * 6, seed=0, cfg_scale=3.0, top_p=0.95) for word in SEEN + UNSEEN]
    pixels = np.stack([np.asarray(image) for images in drawn for image in images]) / 255
    sheet = image_grid.grid(torch.from_numpy(pixels).permute(0, 3, 1, 2), columns=12)
    image_grid.save(sheet, HERE / "words.png")


if __name__ == "__main__":
    main()
