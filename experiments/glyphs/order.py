"""Next-scale against next-token prediction on glyphs: the same blocks, tokens, images, steps and learning rate, three seeds.
Likelihood and samples; the judge is a classifier of the same data. Finished steps are skipped; an interrupted run continues.

    python experiments/glyphs/order.py          (after experiments/data/glyphs.py; not run yet)

Writes order.csv (one row per run and guidance), order.md (means and 95 % intervals over seeds) and order.png beside this file.
"""

import csv
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from scipy.stats import t

from varlab import image_grid

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "data"))
from scores import Judge  # noqa: E402
from steps import finished, varlab  # noqa: E402

ORDERS = {"scales": "next scale", "raster": "next token"}
DEPTH, SEEDS, STEPS, PER_CLASS, GUIDANCE, LENGTH = 3, (0, 1, 2), 1000, 16, (0.0, 1.5), 130
RUNS, TOKENS = Path("runs/glyphs-order"), Path("runs/glyphs/tokens")
SETTINGS = [
    "experiment=var_vs_raster", "tokenizer=glyphs32", f"data.path={TOKENS}", f"model.depth={DEPTH}", f"steps={STEPS}",
    "trainer.precision=bf16-mixed", "module.lr_reference_depth=3", "module.base_lr=8.0e-3", "data.global_batch_size=64",
    "val_every=500", "log_every=25", "save_every=250", "logger=csv", "callbacks.pictures=null", "callbacks.best=null",
]  # fmt: skip


def train(order: str, seed: int) -> Path:
    """One run, unless finished; returns its folder."""
    run = RUNS / f"{order}-seed{seed}"
    if not finished(run):
        varlab(
            "train",
            f"name={run.relative_to('runs')}",
            f"model.order={order}",
            f"seed={seed}",
            "ckpt_path=last",
            *SETTINGS,
        )
    return run


def interval(values: list[float]) -> str:
    """Mean and half the 95 % interval over seeds."""
    half = t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return f"{np.mean(values):.4g} ± {half:.2g}"


def main() -> None:
    judge = Judge(Path("data/glyphs32"))
    if not (TOKENS / "manifest.json").is_file():
        varlab("tokenize", "tokenizer=glyphs32", f"shards={judge.shards}", f"out={TOKENS}", "resize_ratio=1.0")
    rows, shown = [], []
    for order, name in ORDERS.items():
        for seed in SEEDS:
            run = train(order, seed)
            facts = json.loads((run / "run.json").read_text())
            for scale in GUIDANCE:
                settings = {"cfg_scale": scale, "cfg_schedule": "constant", "top_p": 0.97, "seed": 10_000 * seed}
                samples = run / f"samples-{scale:g}"
                scores = judge.of_samples(run / "checkpoints/last.ckpt", samples, PER_CLASS, **settings)
                about = {"order": name, "training_seed": seed, "flops_exact": facts["flops_exact"]}
                rows.append({**about, "nats_per_image": facts["val_loss"] * LENGTH, **scores})
                print(json.dumps(rows[-1]), flush=True)
            if seed == 0:
                shown.append((name, run / f"samples-{GUIDANCE[-1]:g}/grid.png"))
    with open(HERE / "order.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    scores = ["nats_per_image", "class_agreement", *(key for key in rows[0] if "glyphs32" in key and "real" not in key)]
    lines = [f"| guidance | order | {' | '.join(key.split('/')[0].replace('_', ' ') for key in scores)} |"]
    lines.append("|---" * (2 + len(scores)) + "|")
    for scale in GUIDANCE:
        for name in ORDERS.values():
            chosen = [row for row in rows if row["order"] == name and row["cfg_scale"] == scale]
            found = " | ".join(interval([row[key] for row in chosen]) for key in scores)
            lines.append(f"| {scale:g} | {name} | {found} |")
    (HERE / "order.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print((HERE / "order.md").read_text())
    images = [Image.open(file) for _, file in shown]
    sheet = Image.new("RGB", (sum(image.width + 10 for image in images), images[0].height + 18), "white")
    for i, (image, (name, _)) in enumerate(zip(images, shown, strict=True)):
        sheet.paste(image, (i * (image.width + 10), 18))
        ImageDraw.Draw(sheet).text((i * (image.width + 10) + 2, 3), name, fill="black")
    image_grid.save(sheet, HERE / "order.png")


if __name__ == "__main__":
    main()
