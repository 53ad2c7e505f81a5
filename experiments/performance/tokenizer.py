"""How fast the tokenizer codes and decodes, beside the released code with the same weights, in one run.

    python experiments/performance/tokenizer.py FOLDER_OF_THE_RELEASED_CODE [--device cuda] [--batch 1]

writes experiments/performance/tokenizer.csv. The released code is not part of this project.
"""

import argparse
import csv
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch

from varlab.models.msvqvae import MSVQVAE
from varlab.published import to_released

REPEATS = 7
RESULTS = Path(__file__).with_name("tokenizer.csv")
PATCH_NUMS = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)


def interleaved(contenders: dict[str, Callable[[], object]], device: str) -> dict[str, list[float]]:
    """Seconds of each contender, taking turns, after one warm-up each."""
    for run in contenders.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(REPEATS):
        for name, run in contenders.items():
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return seconds


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("released")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=1)
    given = parser.parse_args()
    sys.path.insert(0, given.released)
    sys.modules["models"] = ModuleType("models")  # without what its __init__ imports: only the tokenizer is needed
    sys.modules["models"].__path__ = [f"{given.released}/models"]
    from models.vqvae import VQVAE  # pyright: ignore[reportMissingImports]

    torch.manual_seed(0)
    ours = MSVQVAE(PATCH_NUMS)
    torch.nn.init.normal_(ours.quantizer.codebook.weight, std=0.5)
    theirs = VQVAE(vocab_size=4096, z_channels=32, ch=160, share_quant_resi=4, v_patch_nums=PATCH_NUMS, test_mode=True)
    theirs.load_state_dict(to_released(ours), strict=False)
    ours, theirs = ours.to(given.device).eval(), theirs.to(given.device).eval()
    images = torch.rand(given.batch, 3, 256, 256, device=given.device) * 2 - 1
    token_maps = ours.encode(images)
    agreement = [float((a == b).float().mean()) for a, b in zip(token_maps, theirs.img_to_idxBl(images), strict=True)]
    gap = float((ours.decode(token_maps) - theirs.idxBl_to_img(token_maps, same_shape=True, last_one=True)).abs().max())
    print(f"tokens that agree, by scale: {agreement}; decoded images differ by {gap:.2g} at most")

    def ours_bf16(run: Callable[[], object]) -> Callable[[], object]:
        def fast() -> object:
            with torch.autocast(given.device, dtype=torch.bfloat16):
                return run()

        return fast

    work = {
        "encode": (lambda: ours.encode(images), lambda: theirs.img_to_idxBl(images)),
        "decode": (
            lambda: ours.decode(token_maps),
            lambda: theirs.idxBl_to_img(token_maps, same_shape=True, last_one=True),
        ),
    }
    rows = []
    about = (
        f"{platform.machine()}, {torch.get_num_threads()} threads"
        if given.device == "cpu"
        else torch.cuda.get_device_name()
    )
    for what, (run, released) in work.items():
        contenders = {"varlab fp32": run, "released fp32": released, "varlab bf16": ours_bf16(run)}
        seconds = interleaved(contenders, given.device)
        reference = statistics.median(seconds["released fp32"])
        for name, values in seconds.items():
            median = statistics.median(values)
            spread = (max(values) - min(values)) / median
            rows.append([what, name, given.batch, f"{median:.4f}", f"{spread:.2f}", f"{reference / median:.2f}"])
            print(
                f"{what:8} {name:16} {median:8.4f} s  spread {spread:.0%}  {reference / median:.2f} times the released code"
            )
    with open(RESULTS, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["what", "code", "batch", "seconds", "spread", "ratio", "machine", "date", "torch"])
        writer.writerows([*row, about, time.strftime("%Y-%m-%d"), torch.__version__] for row in rows)


if __name__ == "__main__":
    main()
