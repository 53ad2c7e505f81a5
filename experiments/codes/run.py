"""Which code would you take? Members of the quantizer family with the same encoder, decoder, token maps and training on glyphs32, and
VARs of three sizes on the tokens of each, three seeds. Finished steps are skipped; an interrupted run continues. Codes whose rows
stand in the tables are not measured again.

    python experiments/data/glyphs.py && python experiments/codes/run.py     (two CPU cores: about two hours)
    python experiments/codes/run.py bsq fsq                                   (measures these only, beside another process)

Losses per token cannot be compared across codes: a code with more bits has more to predict, and holds more. Two numbers can:
the nats of a whole image at the PSNR that they buy, and the code length of the pixels in bits per dim: the tokens by the VAR, and
what they leave over by a Gaussian with the mean squared error of held-out reconstructions as its variance. Samples are judged by a
classifier of the same data.

Writes tokenizers.csv, var.csv and samples.csv beside this file and, for `varlab scaling compare`, runs/codes/<code>.csv; prints
means and 95 % intervals over seeds.
"""

import csv
import json
import math
import sys
from pathlib import Path
from typing import Any

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


def run_code(code: str, judge: Judge) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]:
    """(row of the tokenizer, rows of the VARs, rows of samples)."""
    study = study_of(code)
    tokens = study.tokens()
    tokenizer = study.runs / "tokens-tokenizer/checkpoints/last.ckpt"
    file = study.runs / "reconstructions.json"
    if not file.is_file():
        file.write_text(json.dumps(judge.of_reconstructions(tokenizer, study.runs / "reconstructions.png")))
    scores = json.loads(file.read_text())
    trained = json.loads((study.runs / "tokens-tokenizer/run.json").read_text())
    row = {"code": code, **scores, "seconds": trained["device_seconds"]}
    study.sweep("var", tokens, f"model.depth={study.depths}", f"seed={','.join(map(str, SEEDS))}")
    rows, samples = [], []
    for depth in DEPTHS:
        for seed in SEEDS:
            run = study.runs / "var" / f"d{depth}-seed{seed}-share1"
            facts = json.loads((run / "run.json").read_text())
            nats = facts["val_loss"] * LENGTH
            about = {key: facts[key] for key in ("params_main", "params_total", "flops_exact", "device_seconds")}
            found = {"nats_per_image": nats, "bits_per_dim": bits_per_dim(nats, scores["mean_squared_error"])}
            rows.append({"code": code, "depth": depth, "seed": seed, **about, **found})
        if depth == max(DEPTHS):
            for seed in SEEDS:
                run = study.runs / "var" / f"d{depth}-seed{seed}-share1"
                settings = {"cfg_scale": 0.5, "cfg_schedule": "constant", "top_p": 0.97, "seed": 10_000 * seed}
                found = judge.of_samples(run / "checkpoints/last.ckpt", run / "samples", PER_CLASS, **settings)
                found = {key.split("/")[0]: value for key, value in found.items() if "real_against_real" not in key}
                samples.append({"code": code, "training_seed": seed, **found})
                print(json.dumps(samples[-1]), flush=True)
    return row, rows, samples


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


def print_table() -> None:
    """Prints means and intervals of all codes measured, and writes a table of runs for each."""
    print(
        "| code | PSNR dB | read right % | nats, d1 | nats, d2 | nats, d3 | bits per dim, d3 | legible % | Frechet distance |"
    )
    print("|---" * 9 + "|")
    rows, samples = measured("var"), measured("samples")
    for tokenizer in measured("tokenizers"):
        runs, drawn = ([row for row in table if row["code"] == tokenizer["code"]] for table in (rows, samples))
        columns = {"N": "params_main", "C": "flops_exact", "seed": "seed", "loss": "bits_per_dim"}
        table = [{"name": f"d{run['depth']}"} | {key: run[column] for key, column in columns.items()} for run in runs]
        write_table(RUNS / f"{tokenizer['code']}.csv", table)
        nats = [interval([float(r["nats_per_image"]) for r in runs if r["depth"] == str(depth)]) for depth in DEPTHS]
        bits = interval([float(r["bits_per_dim"]) for r in runs if r["depth"] == str(max(DEPTHS))])
        scores = [interval([float(row[key]) for row in drawn]) for key in ("class_agreement", "frechet_distance")]
        about = [f"{float(tokenizer['psnr']):.2f}", f"{float(tokenizer['accuracy_reconstruction']):.1f}"]
        print("|", " | ".join([tokenizer["code"], *about, *nats, bits, *scores]), "|")


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
            tokenizer, rows, samples = run_code(code, judge)
            add_rows("var", rows)
            add_rows("samples", samples)
            add_rows("tokenizers", [tokenizer])
    print_table()


if __name__ == "__main__":
    main()
