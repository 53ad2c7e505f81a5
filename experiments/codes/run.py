"""Which code would you take? Members of the quantizer family with the same encoder, decoder, token maps and training on glyphs32, and
VARs of three sizes on the tokens of each, three seeds. Finished steps are skipped; an interrupted run continues. Codes whose rows
stand in the tables are not measured again.

    python experiments/data/glyphs.py && python experiments/codes/run.py     (two CPU cores: about two hours)
    python experiments/codes/run.py bsq fsq                                   (measures these only, beside another process)

Losses per token cannot be compared across codes: a code with more bits has more to predict, and holds more. Two numbers can:
the nats of a whole image at the PSNR that they buy, and the code length of the pixels in bits per dim: the tokens by the VAR, and
what they leave over by a Gaussian with the mean squared error of held-out reconstructions as its variance. Samples are judged by a
classifier of the same data.

Writes tokenizers.csv, var.csv, samples.csv and samples.png beside this file and, for `varlab scaling compare`,
runs/codes/<code>.csv; prints means and 95 % intervals over seeds.
"""

import csv
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import t

from varlab import image_grid

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "data"), str(HERE.parent / "depth_scaling")]
from run import Study, shared_settings  # noqa: E402
from scores import Judge  # noqa: E402
from steps import interval, varlab, write_table  # noqa: E402

CODES = {
    "residual": ["model.quantizer.codebook_size=1024"],
    "simvq": ["model.quantizer.codebook_size=1024"],
    "fsq": ["model.quantizer.levels=[4,4,4,4,4]"],
    "bsq": ["model.quantizer.bits=10"],
    "lfq": ["model.quantizer.bits=10"],
    "bsq-20": ["model.quantizer.bits=20"],
}
DEPTHS, SEEDS, PER_CLASS, LENGTH, DIMS = (1, 2, 3), (0, 1, 2), 10, 130, 3 * 32 * 32
TIMES = (2, 20, 200)  # the compute of the largest runs
SAMPLING = {
    "plain": {"cfg_scale": 0.0, "cfg_schedule": "constant", "top_p": 0.0},
    "guided": {"cfg_scale": 0.5, "cfg_schedule": "constant", "top_p": 0.97},
}
RUNS, DATA = Path("runs/codes"), Path("data/glyphs32")
FEW = DATA / "few"  # an eighth of the training images, of which each run of a VAR sees two thirds once


def study_of(code: str) -> Study:
    """Tokenizer and sweep of one code; only the quantizer differs."""
    tokenizer = ["experiment=tokenizer_glyphs32", f"quantizer@model.quantizer={code.split('-')[0]}", *CODES[code]]
    tokenizer += [f"data.path={DATA / 'shards'}", "steps=800", "val_every=400", "trainer=cpu"]
    if code != "residual":  # no table is learned
        tokenizer += ["callbacks.kmeans=null", "callbacks.reset_dead_codes=null"]
    steps = 300
    settings = [
        *shared_settings("cpu"),
        "data.global_batch_size=64",
        f"val_every={steps}",
        "log_every=25",
        "save_every=200",
    ]
    settings += [
        "module.base_lr=2.0e-2",
        "model.width=${mul:32,${model.depth}}",
        "callbacks.branches=null",
        "trunk=null",
    ]
    return Study(f"codes/{code}", FEW, tokenizer, ",".join(map(str, DEPTHS)), steps, settings)


def bits_per_dim(nats: float, mean_squared_error: float) -> float:
    """Code length of an image in two parts, tokens and a Gaussian residual, in bits per dim of 8-bit images."""
    residual = 0.5 * math.log2(2 * math.pi * math.e * mean_squared_error * 255**2)
    return nats / math.log(2) / DIMS + residual


def run_code(code: str, judge: Judge) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(row of the tokenizer, rows of the VARs)."""
    study = study_of(code)
    tokens = study.tokens()
    training = study.runs / "tokens-tokenizer"
    file = study.runs / "reconstructions.json"
    if not file.is_file():
        grid = study.runs / "reconstructions.png"
        file.write_text(json.dumps(judge.of_reconstructions(training / "checkpoints/last.ckpt", grid)))
    scores = json.loads(file.read_text())
    with open(training / "metrics.csv", encoding="utf-8") as opened:
        last = [row for row in csv.DictReader(opened) if row.get("train/perplexity")][-1]
    row = {"code": code, **scores, "seconds": json.loads((training / "run.json").read_text())["device_seconds"]}
    row |= {"usage": float(last["train/codebook_usage"]), "perplexity": float(last["train/perplexity"])}
    study.sweep("var", tokens, f"model.depth={study.depths}", f"seed={','.join(map(str, SEEDS))}")
    rows = []
    for depth in DEPTHS:
        for seed in SEEDS:
            facts = json.loads((study.runs / "var" / f"d{depth}-seed{seed}-share1" / "run.json").read_text())
            nats = facts["val_loss"] * LENGTH
            about = {key: facts[key] for key in ("params_main", "params_total", "flops_exact", "device_seconds")}
            found = {"nats_per_image": nats, "bits_per_dim": bits_per_dim(nats, scores["mean_squared_error"])}
            rows.append({"code": code, "depth": depth, "seed": seed, **about, **found})
    return row, rows


def sample_code(code: str, kind: str, judge: Judge) -> list[dict[str, Any]]:
    """Rows of samples of the largest VARs, drawn as SAMPLING says."""
    rows = []
    for seed in SEEDS:
        run = RUNS / code / "var" / f"d{max(DEPTHS)}-seed{seed}-share1"
        settings = {**SAMPLING[kind], "seed": 10_000 * seed}
        found = judge.of_samples(run / "checkpoints/last.ckpt", run / f"samples-{kind}", PER_CLASS, **settings)
        found = {key.split("/")[0]: value for key, value in found.items() if "real_against_real" not in key}
        rows.append({"code": code, "kind": kind, "training_seed": seed, **found})
    return rows


def measured(name: str) -> list[dict[str, str]]:
    """Rows of a table beside this file, none if there is no table yet."""
    file = HERE / f"{name}.csv"
    if not file.is_file():
        return []
    with open(file, encoding="utf-8", newline="") as opened:
        return list(csv.DictReader(opened))


def add_rows(name: str, rows: list[dict[str, Any]]) -> None:
    """Adds rows to a table beside this file, in the order of CODES."""
    write_table(HERE / f"{name}.csv", sorted([*measured(name), *rows], key=lambda row: list(CODES).index(row["code"])))


def print_tables() -> None:
    """Prints means and intervals of all codes measured, and writes a table of runs for each."""
    tokenizers, rows, samples = measured("tokenizers"), measured("var"), measured("samples")
    kinds = [f"{score}, {kind}" for kind in SAMPLING for score in ("legible %", "Frechet distance")]
    head = ["code", "PSNR dB", "read right %", "perplexity", *(f"nats, d{depth}" for depth in DEPTHS), *kinds]
    print(f"| {' | '.join(head)} |\n{'|---' * len(head)}|")
    for tokenizer in tokenizers:
        runs, drawn = ([row for row in table if row["code"] == tokenizer["code"]] for table in (rows, samples))
        nats = [interval([float(r["nats_per_image"]) for r in runs if r["depth"] == str(depth)]) for depth in DEPTHS]
        scores = [
            interval([float(row[key]) for row in drawn if row["kind"] == kind])
            for kind in SAMPLING
            for key in ("class_agreement", "frechet_distance")
        ]
        about = [f"{float(tokenizer[key]):.4g}" for key in ("psnr", "accuracy_reconstruction", "perplexity")]
        print("|", " | ".join([tokenizer["code"], *about, *nats, *scores]), "|")
    print(f"\n| bits per dim | {' | '.join(f'd{d}' for d in DEPTHS)} | {' | '.join(f'{t} times' for t in TIMES)} |")
    print("|---" * (1 + len(DEPTHS) + len(TIMES)) + "|")
    for tokenizer in tokenizers:
        runs = [row for row in rows if row["code"] == tokenizer["code"]]
        kept = ("params_main", "flops_exact", "seed")
        table = [
            {"name": f"d{run['depth']}", **{key: run[key] for key in kept}, "val_loss": run["bits_per_dim"]}
            for run in runs
        ]
        write_table(RUNS / f"{tokenizer['code']}.csv", table)
        bits = [[float(r["bits_per_dim"]) for r in runs if r["depth"] == str(depth)] for depth in DEPTHS]
        further = [extrapolated(runs, float(tokenizer["mean_squared_error"]), times) for times in TIMES]
        cells = [f"{np.mean(values):.3f} ± {half_width(values):.3f}" for values in [*bits, *further]]
        print("|", " | ".join([tokenizer["code"], *cells]), "|")


def half_width(values: list[float]) -> float:
    """Half the 95 % interval over seeds (Student's t)."""
    return float(t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values)))


def extrapolated(runs: list[dict[str, str]], error: float, times: int) -> list[float]:
    """Bits per dim at `times` the compute of the largest runs, for each seed, by a straight line of log nats against log compute."""
    found = []
    for seed in SEEDS:
        own = [row for row in runs if row["seed"] == str(seed)]
        compute, nats = (np.log([float(row[key]) for row in own]) for key in ("flops_exact", "nats_per_image"))
        slope, start = np.polyfit(compute, nats, 1)
        found.append(bits_per_dim(float(np.exp(start + slope * (compute.max() + np.log(times)))), error))
    return found


def draw_samples() -> None:
    """Writes samples.png: one row for each code, guided, every third class, the same seeds."""
    found = [
        RUNS / row["code"] / f"var/d{max(DEPTHS)}-seed0-share1/samples-guided/samples.npz"
        for row in measured("tokenizers")
    ]
    if all(file.is_file() for file in found):
        images = np.concatenate([np.load(file)["arr_0"][:62:3] for file in found])
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
        image_grid.save(image_grid.grid(pixels, columns=21, min_side=32), HERE / "samples.png")


def main() -> None:
    chosen = sys.argv[1:] or list(CODES)
    if unknown := [code for code in chosen if code not in CODES]:
        sys.exit(f"no such code: {', '.join(unknown)}; choose among {', '.join(CODES)}")
    judge = Judge(DATA)
    if not (FEW / "manifest.json").is_file():
        shards = DATA / "shards"
        varlab(
            "pack", "source=shards", f"train={shards}/train-00000{{0,1,2}}.tar", f"val={shards}/val-*.tar", f"out={FEW}"
        )
    for code in chosen:
        if code not in [row["code"] for row in measured("tokenizers")]:
            tokenizer, rows = run_code(code, judge)
            add_rows("var", rows)
            add_rows("tokenizers", [tokenizer])
        for kind in SAMPLING:
            if (code, kind) not in [(row["code"], row["kind"]) for row in measured("samples")]:
                add_rows("samples", sample_code(code, kind, judge))
    print_tables()
    draw_samples()


if __name__ == "__main__":
    main()
