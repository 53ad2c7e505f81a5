"""The effect of bf16: on the tokens of a trained tokenizer, and on the loss of a network over 500 steps compared with
the spread of seeds.

    python experiments/performance/agreement.py tokens TOKENIZER SHARDS [FILE.csv] [--resolution 64] [--device cuda]
    python experiments/performance/agreement.py loss TOKENIZER TOKEN_CACHE OUT [--depth 4] [--trainer gpu]

`tokens` encodes the validation images in fp32 and under autocast, and decodes both. `loss` trains each seed twice, with
the same weights and batches, in 32-true and bf16-mixed; finished runs are kept. Writes agreement_tokens.csv and
agreement_loss.csv next to this file.
"""

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from measure import save

from varlab.checkpoints.load import load_tokenizer
from varlab.data.images import ImageDataset
from varlab.data.order import SampleRequest
from varlab.data.shards import ShardReader
from varlab.files import read_curves
from varlab.models import losses

HERE = Path(__file__).parent


@torch.no_grad()
def tokens(given: argparse.Namespace) -> None:
    """Percentage of identical tokens per scale, and the resulting loss of reconstruction quality."""
    tokenizer = load_tokenizer(given.tokenizer).to(given.device).eval()
    reader = ShardReader(given.shards, "val")
    images = ImageDataset(reader, given.resolution, 1.0, random_crop=False, random_flip=False)
    same, quality = [], []
    for first in range(0, min(len(reader), given.images), 64):
        draws = [SampleRequest(i, 0, True) for i in range(first, min(first + 64, len(reader), given.images))]
        batch = images.__getitems__(draws).images.to(given.device)
        exact = tokenizer.encode(batch)
        with torch.autocast(given.device, torch.bfloat16):
            rounded = tokenizer.encode(batch)
        same.append(torch.stack([(a == b).float().mean(dim=1) for a, b in zip(exact, rounded, strict=True)], dim=1))
        quality.append(torch.stack([losses.psnr(tokenizer.decode(maps).float(), batch) for maps in (exact, rounded)]))
    by_scale, psnr = torch.cat(same).mean(dim=0), torch.cat(quality, dim=1).mean(dim=1)
    overall = float(losses.over_tokens(by_scale[None], tokenizer.patch_nums))
    rows = [
        {"tokenizer": given.tokenizer.parent.parent.name, "scale": f"{k:02d}", "same [%]": f"{100 * float(share):.2f}"}
        for k, share in enumerate(by_scale)
    ]
    rows.append({"tokenizer": given.tokenizer.parent.parent.name, "scale": "all", "same [%]": f"{100 * overall:.2f}"})
    print(f"{100 * overall:.2f} % of tokens are the same; by scale {[row['same [%]'] for row in rows[:-1]]}")
    print(f"PSNR of reconstructions: {psnr[0]:.3f} dB from fp32 tokens, {psnr[1]:.3f} from bf16 tokens")
    rows = [{**row, "psnr fp32 [dB]": f"{psnr[0]:.3f}", "psnr bf16 [dB]": f"{psnr[1]:.3f}"} for row in rows]
    save(given.out or HERE / "agreement_tokens.csv", rows, given.device)


def loss(given: argparse.Namespace) -> None:
    """Validation loss during training: the effect of bf16 at the same seed, and the spread of seeds."""
    curves: dict[tuple[int, str], dict[int, float]] = {}
    for seed in range(given.seeds):
        for precision in ("32-true", "bf16-mixed"):
            run = (given.out or Path("runs/agreement")) / f"{precision}-seed{seed}"
            if not (run / "run.json").is_file() or '"finished"' not in (run / "run.json").read_text():
                command = [
                    *(
                        sys.executable,
                        "-m",
                        "varlab.commands.train",
                        "experiment=var_digits",
                        f"trainer={given.trainer}",
                    ),
                    *(f"tokenizer={given.tokenizer}", f"data.path={given.shards}", f"model.depth={given.depth}"),
                    *(f"trainer.precision={precision}", f"seed={seed}", f"run_dir={run}", "steps=500", "val_every=50"),
                ]
                subprocess.run(command, check=True, capture_output=True)
            curves[seed, precision] = read_curves(run / "metrics.csv")["val/loss"]
            print(run.name, f"{list(curves[seed, precision].values())[-1]:.4f}", flush=True)
    rows = []
    for step in curves[0, "32-true"]:
        exact = [curves[seed, "32-true"][step] for seed in range(given.seeds)]
        change = [curves[seed, "bf16-mixed"][step] - value for seed, value in enumerate(exact)]
        rows.append(
            {
                "step": step,
                "val_loss fp32": f"{np.mean(exact):.5f}",
                "standard deviation of seeds": f"{statistics.stdev(exact):.5f}",
                "bf16 less fp32, mean": f"{np.mean(change):.5f}",
                "bf16 less fp32, largest": f"{max(change, key=abs):.5f}",
            }
        )
        print(rows[-1])
    save(HERE / "agreement_loss.csv", rows, "cuda" if given.trainer != "cpu" else "cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["tokens", "loss"])
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("shards", type=Path, help="shards, or a token cache for loss")
    parser.add_argument("out", type=Path, nargs="?", help="folder of runs, or CSV of tokens")
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--trainer", default="cpu")
    given = parser.parse_args()
    tokens(given) if given.what == "tokens" else loss(given)


if __name__ == "__main__":
    main()
