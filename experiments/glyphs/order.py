"""Next-scale against next-token prediction on glyphs: the same blocks, tokens, images, steps and learning rate, three seeds.
Likelihood and samples; the judge is a classifier of the same data. Finished steps are skipped; an interrupted run continues.

    python experiments/glyphs/order.py    (after experiments/depth_scaling/run.py glyphs)

The runs of that study are the next-scale side.
Writes order.csv (one row per run and guidance) and order.png beside this file, and prints means and 95 % intervals over seeds.
"""

import json
import sys
from pathlib import Path

from PIL import Image, ImageDraw

from varlab import image_grid

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "data"), str(HERE.parent / "depth_scaling")]
from run import Study, glyphs  # noqa: E402
from scores import Judge  # noqa: E402
from steps import finished, interval, varlab, write_table  # noqa: E402

ORDERS = {"scales": "next scale", "raster": "next token"}
DEPTH, SEEDS, PER_CLASS, GUIDANCE, LENGTH = 3, (0, 1, 2), 10, (0.0, 1.5), 130
RUNS = Path("runs/glyphs")


def trained(order: str, seed: int, study: Study) -> Path:
    """The folder of one run. Those in raster order are trained here, unless finished."""
    run = RUNS / "var" / f"d{DEPTH}-seed{seed}-share1"
    if order == "scales":
        if not finished(run):
            sys.exit(f"{run} is not finished: run experiments/depth_scaling/run.py glyphs first")
        return run
    run = RUNS / "raster" / f"d{DEPTH}-seed{seed}"
    if not finished(run):
        own = [f"name={run.relative_to('runs')}", "model.order=raster", f"model.depth={DEPTH}", f"seed={seed}"]
        own += [
            f"steps={study.steps}",
            "ckpt_path=last",
            "logger=csv",
            "callbacks.pictures=null",
            "callbacks.best=null",
        ]
        varlab("train", "experiment=var_vs_raster", *own, *study.tokens(), *study.settings)
    return run


def main() -> None:
    judge, study = Judge(Path("data/glyphs32")), glyphs()
    rows, shown = [], []
    for order, name in ORDERS.items():
        for seed in SEEDS:
            run = trained(order, seed, study)
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
    write_table(HERE / "order.csv", rows)
    scores = ["nats_per_image", "class_agreement", *(key for key in rows[0] if "glyphs32" in key and "real" not in key)]
    lines = [f"| guidance | order | {' | '.join(key.split('/')[0].replace('_', ' ') for key in scores)} |"]
    lines.append("|---" * (2 + len(scores)) + "|")
    for scale in GUIDANCE:
        for name in ORDERS.values():
            chosen = [row for row in rows if row["order"] == name and row["cfg_scale"] == scale]
            found = " | ".join(interval([row[key] for row in chosen]) for key in scores)
            lines.append(f"| {scale:g} | {name} | {found} |")
    print("\n".join(lines))
    images = [Image.open(file) for _, file in shown]
    sheet = Image.new("RGB", (sum(image.width + 10 for image in images), images[0].height + 18), "white")
    for i, (image, (name, _)) in enumerate(zip(images, shown, strict=True)):
        sheet.paste(image, (i * (image.width + 10), 18))
        ImageDraw.Draw(sheet).text((i * (image.width + 10) + 2, 3), name, fill="black")
    image_grid.save(sheet, HERE / "order.png")


if __name__ == "__main__":
    main()
