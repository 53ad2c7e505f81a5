"""Next-scale against next-token prediction, with the same blocks on scenes: VAR, the same tokens one by one, and the
classical raster scan of a tokenizer with one scale. Loss, samples, Frechet distance, sampling speed. Finished steps are
skipped.

    python experiments/depth_scaling/run.py scenes && python experiments/depth_scaling/var_vs_raster.py     (about half an hour)
"""

import csv
import json
import platform
import statistics
import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from run import HERE, Study
from steps import finished, varlab

from varlab import image_grid
from varlab.checkpoints.load import load
from varlab.sampling.generate import generate

DEPTHS, NUM_SAMPLES, STEPS, REPEATS = (2, 3, 4), 1000, 936, 5
SETTINGS = [
    "trainer.precision=bf16-mixed", "module.lr_reference_depth=3", "module.base_lr=8.0e-3", "data.global_batch_size=64", "val_every=468",
    "log_every=36", "save_every=234", "logger=csv", "callbacks.pictures=null", "callbacks.best=null", f"steps={STEPS}",
]  # fmt: skip
DRAWING = ["cfg_scale=1.0", "cfg_schedule=constant", "top_k=100"]
COLUMNS = [
    "arm", "depth", "tokens", "params_main", "flops_exact", "val_loss", "nats_per_image", "frechet_distance/efficientnet_lite0",
    "milliseconds_per_image_batch_1", "milliseconds_per_image_batch_50", "machine", "date",
]  # fmt: skip


def seconds(networks: dict[str, tuple], batch: int) -> dict[str, float]:
    """Median seconds per image; the networks are timed in turn."""
    found: dict[str, list[float]] = {name: [] for name in networks}
    for repeat in range(REPEATS + 1):
        for name, (tokenizer, var) in networks.items():
            start = time.perf_counter()
            generate(var, tokenizer, torch.arange(batch) % 9, cfg_scale=1.0, cfg_schedule="constant", top_k=100)
            if repeat:
                found[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) / batch for name, values in found.items()}


def main() -> None:
    study = Study("scenes", Path("data/scenes/shards"), ["experiment=tokenizer_scenes"], "", STEPS, [])
    pyramid, flat = study.tokens(), study.tokens("flat", "patch_nums=[4]")
    arms = {
        "next scale": (pyramid, "scales", "pyramid"),
        "next token, same tokens": (pyramid, "raster", "pyramid"),
        "next token, one scale": (flat, "raster", "flat"),
    }
    networks, rows, grids = {}, [], []
    for arm, (tokens, order, name) in arms.items():
        for depth in DEPTHS:
            run = study.runs / f"raster/{name}-{order}-d{depth}"
            if not finished(run):
                own = [
                    f"name=scenes/raster/{run.name}",
                    f"model.order={order}",
                    f"model.depth={depth}",
                    "ckpt_path=last",
                ]
                varlab("train", "experiment=var_vs_raster", *own, *tokens, *SETTINGS)
            row, checkpoint = json.loads((run / "run.json").read_text()), run / "checkpoints/last.ckpt"
            samples = run / "samples"
            if not (samples / "samples.json").is_file():
                varlab("sample", f"checkpoint={checkpoint}", f"out={samples}", f"num={NUM_SAMPLES}", *DRAWING)
            scores = run / "scores"
            if depth == DEPTHS[-1] and not (scores / "generation.json").is_file():
                given = [
                    f"samples={samples}",
                    "reference=data/scenes/shards",
                    "split=val",
                    "features=efficientnet_lite0",
                ]
                varlab("evaluate", *given, f"out={scores}")
            tokenizer, var, _ = load(checkpoint)
            networks[f"{arm}, depth {depth}"] = (tokenizer, var)
            found = (
                json.loads((scores / "generation.json").read_text()) if (scores / "generation.json").is_file() else {}
            )
            length = sum(pn * pn for pn in var.patch_nums)
            distance = found.get("frechet_distance/efficientnet_lite0", "")
            counts = [
                length,
                row["params_main"],
                row["flops_exact"],
                row["val_loss"],
                row["val_loss"] * length,
                distance,
            ]
            rows.append([arm, depth, *counts])
            if depth == DEPTHS[-1]:
                grids.append((arm, samples / "grid.png"))
    alone, together = seconds(networks, 1), seconds(networks, 50)
    about = [f"{platform.machine()}, {torch.get_num_threads()} threads", time.strftime("%Y-%m-%d")]
    target = HERE / "scenes-var_vs_raster"
    target.mkdir(exist_ok=True)
    with open(target / "results.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for row, name in zip(rows, networks, strict=True):
            writer.writerow([*row, f"{1e3 * alone[name]:.2f}", f"{1e3 * together[name]:.2f}", *about])
            print(*row, f"{1e3 * alone[name]:.1f} ms alone, {1e3 * together[name]:.2f} ms in batches of 50")
    shown = [Image.open(file).crop((0, 0, 330, 264)) for _, file in grids]
    sheet = Image.new("RGB", (sum(image.width + 10 for image in shown), shown[0].height + 18), "white")
    for i, (image, (arm, _)) in enumerate(zip(shown, grids, strict=True)):
        sheet.paste(image, (i * (image.width + 10), 18))
        ImageDraw.Draw(sheet).text((i * (image.width + 10) + 2, 3), f"{arm}, depth {DEPTHS[-1]}", fill="black")
    image_grid.save(sheet, target / "samples.png")


if __name__ == "__main__":
    main()
