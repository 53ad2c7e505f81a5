"""Does condition contrastive alignment make guidance unnecessary? glyphs32 is tuned on its own training set with `varlab tune`,
against further training with the likelihood for as many steps; three seeds, judged by a classifier of the same data.
Finished steps are skipped; an interrupted run continues.

    python experiments/finetuning/tuning.py          (after experiments/pretrained/run.py glyphs32; 40 minutes)

Writes tuning.csv (one row per run and guidance) beside this file, and prints means and 95 % intervals over seeds.
"""

import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "data"), str(HERE.parent)]
from scores import Judge  # noqa: E402
from steps import finished, interval, varlab, write_table  # noqa: E402

SEEDS, STEPS, PER_CLASS = (0, 1, 2), 40, 10
TRAINED, TOKENS, RUNS = (
    Path("runs/glyphs32/var/checkpoints/last.ckpt"),
    Path("runs/glyphs32/tokens"),
    Path("runs/tuning"),
)
ARMS = {"not tuned": None, "likelihood": "likelihood", "contrastive alignment": "cca"}
GUIDANCE = (0.0, 1.0)
SCORES = ("class_agreement", "frechet_distance", "precision", "recall", "density", "coverage")
SETTINGS = [
    f"steps={STEPS}", "module.base_lr=4.0e-4", f"data.path={TOKENS}", "model.label_dropout=0", "model.drop_path=0", f"val_every={STEPS}",
    "logger=csv", "trainer=cpu", "trainer.precision=bf16-mixed", "callbacks.pictures=null", "callbacks.best=null", "ckpt_path=last",
]  # fmt: skip


def tuned(method: str | None, seed: int) -> Path:
    """The checkpoint of an arm, tuned here unless finished."""
    if method is None:
        return TRAINED
    run = RUNS / f"{method}-seed{seed}"
    if not finished(run):
        named = [f"checkpoint={TRAINED}", f"method={method}", f"name={run.relative_to('runs')}", f"seed={seed}"]
        varlab("tune", *named, *SETTINGS)
    return run / "checkpoints/last.ckpt"


def main() -> None:
    judge, rows = Judge(Path("data/glyphs32")), []
    for arm, method in ARMS.items():
        for seed in SEEDS:
            checkpoint = tuned(method, seed)
            for scale in GUIDANCE:
                settings = {"cfg_scale": scale, "cfg_schedule": "constant", "top_p": 0.97, "seed": 10_000 * seed}
                samples = RUNS / f"{method or 'before'}-seed{seed}-samples-{scale:g}"
                found = judge.of_samples(checkpoint, samples, PER_CLASS, **settings)
                named = {key.split("/")[0]: value for key, value in found.items() if "real_against_real" not in key}
                rows.append({"arm": arm, "training_seed": seed, **named})
                print(json.dumps(rows[-1]), flush=True)
    write_table(HERE / "tuning.csv", rows)
    lines = [f"| tuned with | cfg_scale | {' | '.join(SCORES).replace('_', ' ')} |", "|---" * (2 + len(SCORES)) + "|"]
    for scale in GUIDANCE:
        for arm in ARMS:
            chosen = [row for row in rows if row["arm"] == arm and row["cfg_scale"] == scale]
            lines.append(f"| {arm} | {scale:g} | {' | '.join(interval([row[k] for row in chosen]) for k in SCORES)} |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
