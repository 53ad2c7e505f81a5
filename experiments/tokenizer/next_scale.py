"""Does a tokenizer trained with scale dropout make tokens easier to predict? Trains the same small VAR on the tokens of
two tokenizers of run.py, samples as many images as the validation set has, with the same labels, and compares.

    python experiments/tokenizer/next_scale.py        (after run.py; ten minutes on two CPU cores)

Losses on different tokens are not comparable; distances of images are.
"""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import torch
from run import HERE, RUNS, SHARDS
from steps import finished, varlab

from varlab.checkpoints.load import load
from varlab.data.images import CenterCrops
from varlab.data.shards import ShardReader
from varlab.evaluation.frechet import features_of, frechet_distance, statistics
from varlab.models.feature_networks import EfficientNetLite0
from varlab.sampling.generate import generate

ARMS = ["plain", "scale_dropout"]
DEPTH, STEPS, BATCH, CFG_SCALE = 3, 800, 32, 1.5


def distance_of_samples(arm: str) -> dict[str, float]:
    """Trains if necessary, samples, scores."""
    tokenizer, tokens, run = RUNS / arm / "checkpoints/last.ckpt", RUNS / f"{arm}_tokens", RUNS / f"{arm}_var"
    if not (tokens / "manifest.json").is_file():
        varlab(
            "tokenize", f"tokenizer={tokenizer}", f"shards={SHARDS}", f"out={tokens}", "resize_ratio=1.0", "flips=true"
        )
    if not finished(run):
        sizes = [f"model.depth={DEPTH}", f"data.global_batch_size={BATCH}", f"steps={STEPS}", f"val_every={STEPS}"]
        given = [
            f"tokenizer={tokenizer}",
            f"data.path={tokens}",
            f"name=emoji64/{arm}_var",
            "logger=csv",
            "ckpt_path=last",
        ]
        varlab("train", "experiment=var_digits", *sizes, *given, "callbacks.pictures=null")
    network, reader, device = EfficientNetLite0(), ShardReader(SHARDS, "val"), torch.device("cpu")
    real = features_of(network, CenterCrops(reader, 64, 1.0, None, 32, device), "real")
    decoder, var, _ = load(run / "checkpoints/last.ckpt")
    labels = torch.from_numpy(reader.labels.astype(np.int64))

    def drawn():
        for first in range(0, len(labels), 64):
            chunk = labels[first : first + 64]
            seeds = list(range(first, first + len(chunk)))
            yield generate(var, decoder, chunk, cfg_scale=CFG_SCALE, seed=seeds) * 2 - 1

    made = features_of(network, drawn(), f"samples of {arm}")
    row = json.loads((run / "run.json").read_text())
    return {
        "frechet_distance/efficientnet_lite0": frechet_distance(statistics(made), statistics(real)),
        "val_loss": row["val_loss"],
        "val_loss_last": row["val_loss_last"],
    }


def main() -> None:
    found = {arm: distance_of_samples(arm) for arm in (sys.argv[1:] or ARMS)}
    with open(HERE / "next_scale.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["tokenizer", *next(iter(found.values()))])
        writer.writerows([arm, *(f"{value:.4g}" for value in scores.values())] for arm, scores in found.items())
    print(Path(HERE / "next_scale.csv").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
