"""How fast images are sampled, beside the released code with the same weights, in one run.

    python experiments/performance/sampling.py FOLDER_OF_THE_RELEASED_CODE                                  (CPU, about four minutes)
    python experiments/performance/sampling.py FOLDER --device cuda --names d16 --batches 1 64 --bf16 --compile

writes experiments/performance/sampling.csv. The released code is not part of this project. Guidance 1.5, top_k 900, top_p 0.96,
decoder included; greedy tokens of both are compared first.
"""

import argparse
import csv
import platform
import statistics
import sys
import time
from contextlib import nullcontext
from copy import deepcopy
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from tokenizer import interleaved

from varlab.drawing import Settings
from varlab.models.msvqvae import MSVQVAE
from varlab.models.var import VAR
from varlab.published import to_released
from varlab.sampling import compile_scales, generate, generate_tokens

RESULTS = Path(__file__).with_name("sampling.csv")
FULL = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
SIZES = {  # depth, pyramid, channels of the tokenizer
    "tiny": (2, (1, 2, 3, 4), 32),
    "d2": (2, FULL, 160),
    **{f"d{depth}": (depth, FULL, 160) for depth in (12, 16, 20, 24, 30)},
}


def released_pair(folder: str, ours: MSVQVAE, var: VAR, patch_nums: tuple[int, ...], channels: int, device: str):
    """The released networks with our weights."""
    sys.path.insert(0, folder)
    sys.modules.setdefault("models", ModuleType("models")).__path__ = [f"{folder}/models"]
    hub = sys.modules.setdefault("huggingface_hub", ModuleType("huggingface_hub"))  # only named there
    hub.PyTorchModelHubMixin = object
    from models.var import VAR as TheirVAR  # pyright: ignore[reportMissingImports]
    from models.vqvae import VQVAE  # pyright: ignore[reportMissingImports]

    vae = VQVAE(
        vocab_size=4096, z_channels=32, ch=channels, share_quant_resi=4, v_patch_nums=patch_nums, test_mode=True
    )
    vae.load_state_dict(to_released(ours), strict=False)
    theirs = TheirVAR(
        vae.to(device),
        depth=var.depth,
        embed_dim=var.width,
        num_heads=var.num_heads,
        patch_nums=patch_nums,
        attn_l2_norm=True,
    )
    theirs.load_state_dict(to_released(var), strict=True)
    return theirs.to(device).eval()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("released")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--names", nargs="+", default=["tiny", "d2"], choices=list(SIZES))
    parser.add_argument("--batches", type=int, nargs="+", default=[4])
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--compile", action="store_true", help="our network compiled for each scale besides")
    given = parser.parse_args()
    about = (
        f"{platform.machine()}, {torch.get_num_threads()} threads"
        if given.device == "cpu"
        else torch.cuda.get_device_name()
    )
    rows = []
    for name in given.names:
        depth, patch_nums, channels = SIZES[name]
        torch.manual_seed(0)
        tokenizer = MSVQVAE(patch_nums, channels=channels)
        torch.nn.init.normal_(tokenizer.quantizer.codebook.weight, std=0.5)
        var = VAR(depth, patch_nums, 4096, 32, 1000, init_adaln_gamma=0.5, init_head=1.0)
        theirs = released_pair(given.released, tokenizer, var, patch_nums, channels, given.device)
        tokenizer, var = tokenizer.to(given.device).eval(), var.to(given.device).eval()
        for batch in given.batches:
            labels = torch.arange(batch, device=given.device)
            greedy = generate_tokens(var, tokenizer, labels, Settings(1.5, top_k=1))[0]
            images = theirs.autoregressive_infer_cfg(batch, labels, cfg=1.5, top_k=1)
            with torch.no_grad():
                gap = float((tokenizer.decode_features(greedy) / 2 + 0.5 - images).abs().max())
            cast = torch.autocast(given.device, torch.bfloat16) if given.bf16 else nullcontext()

            def ours_once(var=var, tokenizer=tokenizer, labels=labels, cast=cast) -> object:
                with cast:
                    return generate(var, tokenizer, labels, cfg_scale=1.5, top_k=900, top_p=0.96)

            def theirs_once(theirs=theirs, batch=batch, labels=labels, cast=cast) -> object:
                with cast:
                    return theirs.autoregressive_infer_cfg(batch, labels, g_seed=0, cfg=1.5, top_k=900, top_p=0.96)

            contenders = {"varlab": ours_once, "released": theirs_once}
            if given.compile:
                compiled = deepcopy(var)
                compile_scales(compiled)
                contenders["varlab compiled"] = partial(ours_once, var=compiled)
                same = generate_tokens(compiled, tokenizer, labels, Settings(1.5, top_k=1))[1]
                eager = generate_tokens(var, tokenizer, labels, Settings(1.5, top_k=1))[1]
                agreeing = float((torch.cat(same, dim=1) == torch.cat(eager, dim=1)).float().mean())
                print(f"{name:5} compiled: {agreeing:.2%} of greedy tokens the same")
            seconds = interleaved(contenders, given.device)
            reference = statistics.median(seconds["released"])
            for code, values in seconds.items():
                median = statistics.median(values)
                spread = (max(values) - min(values)) / median
                rows.append(
                    [
                        name,
                        code,
                        batch,
                        "bf16" if given.bf16 else "fp32",
                        f"{median:.4f}",
                        f"{spread:.2f}",
                        f"{reference / median:.2f}",
                    ]
                )
                print(
                    f"{name:5} {code:15} batch {batch}: {median:8.4f} s  spread {spread:.0%}  {reference / median:.2f} times"
                )
            print(f"{name:5} greedy images differ by {gap:.2g} at most", flush=True)
    with open(RESULTS, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["network", "code", "batch", "precision", "seconds", "spread", "ratio", "machine", "date", "torch"]
        )
        writer.writerows([*row, about, time.strftime("%Y-%m-%d"), torch.__version__] for row in rows)


if __name__ == "__main__":
    main()
