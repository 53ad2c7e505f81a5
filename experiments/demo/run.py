"""The whole workflow on 5,000 real digits, on a laptop: shards -> tokens -> transformer -> samples -> scores -> curves.

Each step is one `varlab` command, printed before it runs. Finished steps are skipped, so an interrupted demo continues
where it stopped.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from digits import agreement, train
from PIL import Image

OUT = Path("runs/demo")
SHARDS, TOKENS = OUT / "shards", OUT / "tokens"
TOKENIZER = OUT / "tokenizer/checkpoints/last.ckpt"
VAR = OUT / "var/checkpoints/last.ckpt"
DEPTHS = [1, 2, 3, 4]
NUM_SAMPLES = 500


def step(title: str, done: bool, *command: str) -> None:
    """Prints the title of a step, then runs its command unless its result exists."""
    print(f"\n== {title}", flush=True)
    if done:
        print("   already done", flush=True)
        return
    print(f"   varlab {' '.join(command)}", flush=True)
    start = time.perf_counter()
    answer = subprocess.run([sys.executable, "-m", "varlab", *command], check=False)
    if answer.returncode:
        sys.exit(
            f"the demo stopped at: varlab {' '.join(command)}\nFix the error above and run `make demo` again; finished steps are kept."
        )
    print(f"   {time.perf_counter() - start:.0f} s", flush=True)


def finished(folder: Path) -> bool:
    """Whether a training run reached its end."""
    file = folder / "run.json"
    return file.is_file() and json.loads(file.read_text())["state"] == "finished"


def newest(folder: Path, name: str) -> Path:
    return sorted(folder.glob(f"{name}-*.png"))[-1]


def main() -> None:
    start = time.perf_counter()
    step(
        "1/7 Pack 5,000 real MNIST digits into webdataset shards",
        (SHARDS / "manifest.json").is_file(),
        "pack", "source=mnist5k", f"out={SHARDS}",
    )  # fmt: skip
    step(
        "2/7 Train a tokenizer: a digit becomes 30 tokens on maps of 1x1, 2x2, 3x3, 4x4",
        finished(OUT / "tokenizer"),
        "train", "experiment=tokenizer_tiny", "name=demo/tokenizer", f"data.path={SHARDS}", "ckpt_path=last",
    )  # fmt: skip
    step(
        "3/7 Encode every digit once, so that all transformers train on the same tokens",
        (TOKENS / "manifest.json").is_file(),
        "tokenize", f"tokenizer={TOKENIZER}", f"shards={SHARDS}", f"out={TOKENS}", "resize_ratio=1.0",
    )  # fmt: skip
    step(
        f"4/7 Sweep the depth {DEPTHS}: the same data and steps, increasingly large transformers",
        all(finished(OUT / f"sweep/d{depth}-seed0") for depth in DEPTHS),
        "train", "--multirun", "experiment=depth_digits", "name=demo/sweep", f"tokenizer={TOKENIZER}", f"data.path={TOKENS}",
        f"model.depth={','.join(map(str, DEPTHS))}", "ckpt_path=last",
    )  # fmt: skip
    step(
        "5/7 Fit the scaling law: how loss falls with parameters and compute",
        (OUT / "scaling/fits.json").is_file(),
        "scaling", f"source={OUT / 'sweep'}", f"out={OUT / 'scaling'}", "floor=none",
    )  # fmt: skip
    step(
        "6/7 Train a VAR of depth 3 for longer, to sample digits from",
        finished(OUT / "var"),
        "train", "experiment=var_digits", "name=demo/var", f"tokenizer={TOKENIZER}", f"data.path={TOKENS}", "ckpt_path=last",
    )  # fmt: skip
    step(
        f"7/7 Sample {NUM_SAMPLES} digits, scale by scale, class by class",
        (OUT / "samples/samples.json").is_file(),
        "sample", f"checkpoint={VAR}", f"out={OUT / 'samples'}", f"num={NUM_SAMPLES}", "batch_size=100", "cfg_scale=1.5",
    )  # fmt: skip
    print("\n== Score: does a classifier trained on real digits recognize the requested digit?", flush=True)
    net, accuracy = train(str(SHARDS))
    labels = json.loads((OUT / "samples/samples.json").read_text())["labels"]
    files = sorted((OUT / "samples/images").glob("*.png"))
    pixels = (
        torch.from_numpy(np.stack([np.asarray(Image.open(file).convert("L")) for file in files]))[:, None].float() / 255
    )
    tokenizer_row = json.loads((OUT / "tokenizer/run.json").read_text())
    fits = {(law["y"], law["x"]): law for law in json.loads((OUT / "scaling/fits.json").read_text())["laws"]}
    law = fits["val_loss", "params_main"]
    summary = {
        "class_agreement_percent": agreement(net, pixels, labels),
        "num_samples": len(labels),
        "classifier_accuracy_on_real_digits_percent": accuracy,
        "reconstruction_psnr_db": tokenizer_row["val_psnr"],
        "depths": DEPTHS,
        "loss_exponent_against_parameters": law["alpha"],
        "loss_exponent_interval": law["alpha_interval"],
        "seconds_this_time": round(time.perf_counter() - start),
        "cpu_count": os.cpu_count(),
    }
    (OUT / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    interval = "" if law["alpha_interval"] is None else " (95 %: {:.3f} to {:.3f})".format(*law["alpha_interval"])
    print(f"""
   {summary["class_agreement_percent"]:.1f} % of {len(labels)} samples show the requested digit
        (the classifier gets {accuracy:.1f} % of real digits right)
   {summary["reconstruction_psnr_db"]:.1f} dB PSNR of reconstructed held-out digits (from 22 dB on, strokes keep their shape)
   loss falls as N^-{law["alpha"]:.3f}{interval} over depths {DEPTHS}; four sizes do not determine a floor, so none is fitted

   Files:
   {newest(OUT / "tokenizer/pictures", "reconstructions")}  original | what each scale adds
   {OUT / "samples/filmstrip.png"}   digits emerging scale by scale
   {OUT / "samples/grid.png"}        one column per class
   {OUT / "scaling/scaling.png"}     the scaling law
   {OUT / "summary.json"}

   total time: {time.perf_counter() - start:.0f} s""")


if __name__ == "__main__":
    main()
