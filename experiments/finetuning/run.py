"""How many steps does fine-tuning save? A VAR of printed characters (glyphs32) learns 4,500 handwritten digits: from scratch,
from its weights, and from its weights with low-rank adapters; three seeds. Finished steps are skipped; an interrupted run continues.

    python experiments/finetuning/run.py          (needs nothing but varlab)

Writes finetuning.csv (one row per run and validation) and finetuning.png beside this file, and prints a table.
"""

import csv
import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from steps import finished, interval, varlab, write_table  # noqa: E402

SEEDS, STEPS, EVERY = (0, 1, 2), 160, 20
LORA = "{_target_: varlab.training.tuning.LoRA, rank: 4}"
ARMS = {
    "from scratch": ["module.base_lr=1.6e-2"],
    "from glyphs32": ["module.base_lr=4.0e-3", "module.init_from=glyphs32"],
    "from glyphs32, adapters": ["module.base_lr=1.6e-2", "module.init_from=glyphs32", f"module.adapter={LORA}"],
}
SHARDS, TOKENS, RUNS = Path("data/digits32"), Path("runs/finetuning/tokens"), Path("runs/finetuning")
SETTINGS = [
    "experiment=var_glyphs32", "tokenizer=glyphs32", f"data.path={TOKENS}", "data.global_batch_size=32", f"steps={STEPS}",
    "schedule@module.schedule=constant", f"val_every={EVERY}", "log_every=10", "save_every=80", "logger=csv", "trainer=cpu",
    "trainer.precision=bf16-mixed", "callbacks.pictures=null", "callbacks.best=null", "ckpt_path=last",
]  # fmt: skip


def curve(arm: str, seed: int) -> dict[int, float]:
    """Validation loss (nats per token) by step, of a run that is trained unless finished."""
    run = RUNS / f"{arm.replace(', ', '-').replace(' ', '-')}-seed{seed}"
    if not finished(run):
        varlab("train", f"name={run.relative_to('runs')}", f"seed={seed}", *SETTINGS, *ARMS[arm])
    with open(run / "metrics.csv", encoding="utf-8") as file:
        return {int(row["step"]) + 1: float(row["val/loss"]) for row in csv.DictReader(file) if row["val/loss"]}


def steps_to(loss: float, found: dict[int, float]) -> float:
    """Steps until the curve first reaches a loss, interpolated; infinite if it never does."""
    steps, losses = list(found), list(found.values())
    for i, value in enumerate(losses):
        if value <= loss:
            if i == 0:
                return float(steps[0])
            share = (losses[i - 1] - loss) / (losses[i - 1] - value)
            return steps[i - 1] + share * (steps[i] - steps[i - 1])
    return float("inf")


def main() -> None:
    if not (SHARDS / "manifest.json").is_file():
        varlab("pack", "source=mnist5k", f"out={SHARDS}")
    if not (TOKENS / "manifest.json").is_file():
        varlab("tokenize", "tokenizer=glyphs32", f"shards={SHARDS}", f"out={TOKENS}", "resize_ratio=1.0")
    curves = {arm: [curve(arm, seed) for seed in SEEDS] for arm in ARMS}
    rows: list[dict[str, Any]] = [
        {"start": arm, "seed": seed, "step": step, "val_loss": loss}
        for arm, found in curves.items()
        for seed, one in zip(SEEDS, found, strict=True)
        for step, loss in one.items()
    ]
    write_table(HERE / "finetuning.csv", rows)
    lines = [f"| after steps | {' | '.join(ARMS)} | steps from glyphs32 to the loss from scratch |", "|---" * 5 + "|"]
    for step in (20, 40, 80, 120, 160):
        losses = [[one[step] for one in found] for found in curves.values()]
        needed = [steps_to(loss, one) for loss, one in zip(losses[0], curves["from glyphs32"], strict=True)]
        saved = interval(needed) if min(needed) > EVERY else f"at most {EVERY}"
        lines.append(f"| {step} | {' | '.join(interval(values) for values in losses)} | {saved} |")
    print("\n".join(lines))
    figure = Figure(figsize=(5.5, 3.6), layout="constrained")
    axes = figure.subplots()
    for arm, found in curves.items():
        steps = list(found[0])
        values = np.array([[one[step] for step in steps] for one in found])
        (line,) = axes.plot(steps, values.mean(axis=0), marker="o", ms=3, label=arm)
        axes.fill_between(steps, values.min(axis=0), values.max(axis=0), color=line.get_color(), alpha=0.2)
    axes.set(xlabel="step", ylabel="validation loss (nats per token)", title="Handwritten digits, three seeds")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(HERE / "finetuning.png", dpi=130)


if __name__ == "__main__":
    main()
