"""How fast a VAR trains from tokens, beside the released code with the same weights and batch, in one run.

    python experiments/performance/training.py FOLDER_OF_THE_RELEASED_CODE                          (CPU, about four minutes)
    python experiments/performance/training.py FOLDER --device cuda --depths 12 16 24 --batch 64 --bf16-only

A step is forward, loss, backward, clipping and AdamW on 680 tokens a image. Losses of both codes are compared first. Contenders take
turns; medians and spread over the repeats; FLOP/s beside those of a large matrix product in the same process.
Writes experiments/performance/training.csv. The released code is not part of this project.
"""

import argparse
import csv
import platform
import statistics
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from sampling import FULL, released_pair
from tokenizer import interleaved

from varlab import compute, losses
from varlab.models.msvqvae import MSVQVAE
from varlab.models.var import VAR
from varlab.training.optim import parameter_groups

RESULTS = Path(__file__).with_name("training.csv")
COLUMNS = [
    "depth", "code", "precision", "batch", "seconds", "spread", "ratio", "flops_per_second", "share_of_matmul_rate", "machine", "date",
    "torch",
]  # fmt: skip


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a product of two square matrices."""
    side = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / min(interleaved({"matmul": lambda: a @ b}, device)["matmul"])


def step(net: torch.nn.Module, optimizer: torch.optim.Optimizer, loss_of, cast) -> torch.Tensor:
    """One optimizer step."""
    with cast:
        loss = loss_of(net)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(net.parameters(), 2.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("released")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 6])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--bf16-only", action="store_true")
    given = parser.parse_args()
    device, batch = given.device, given.batch
    about = (
        f"{platform.machine()}, {torch.get_num_threads()} threads" if device == "cpu" else torch.cuda.get_device_name()
    )
    rates = {"fp32": matmul_rate(device, torch.float32), "bf16": matmul_rate(device, torch.bfloat16)}
    rows = []
    for depth in given.depths:
        torch.manual_seed(0)
        tokenizer = MSVQVAE(FULL, channels=32).to(device)
        first = VAR(depth, FULL, 4096, 32, 1000, drop_path=0.0, label_dropout=0.0, init_adaln_gamma=0.5, init_head=1.0)
        theirs = released_pair(given.released, tokenizer.cpu(), first, FULL, 32, device).train()
        theirs.cond_drop_rate = 0.0
        tokenizer.to(device)
        token_maps = [torch.randint(4096, (batch, pn * pn), device=device) for pn in FULL]
        sequence, labels = torch.cat(token_maps, dim=1), torch.arange(batch, device=device)
        inputs = tokenizer.quantizer.teacher_forcing_inputs(token_maps).detach()

        def our_loss(net, inputs=inputs, labels=labels, sequence=sequence) -> torch.Tensor:
            return losses.cross_entropy(net(inputs, labels), sequence).mean()

        def their_loss(net, inputs=inputs, labels=labels, sequence=sequence) -> torch.Tensor:
            return F.cross_entropy(net(labels, inputs).flatten(0, 1), sequence.flatten())

        contenders, compared = {}, {}
        for code, precision, attention in [
            ("released", "fp32", ""), ("varlab", "fp32", "masked"), ("varlab, split attention", "fp32", "split"),
            ("released", "bf16", ""), ("varlab", "bf16", "masked"), ("varlab, split attention", "bf16", "split"),
        ]:  # fmt: skip
            if given.bf16_only and precision == "fp32":
                continue
            if code == "released":
                net, loss_of, groups = theirs, their_loss, list(theirs.parameters())
            else:
                net = VAR(**first.sizes).to(device).train()
                net.load_state_dict(first.state_dict())
                net.attention, loss_of, groups = attention, our_loss, parameter_groups(net)
            is_bf16 = precision == "bf16"
            cast = torch.autocast(device, torch.bfloat16) if is_bf16 else nullcontext()
            optimizer = torch.optim.AdamW(
                groups, lr=0.0, betas=(0.9, 0.95), fused=True
            )  # weights stay: all do the same work
            with torch.no_grad(), cast:
                compared[code, precision] = float(loss_of(net))
            contenders[code, precision] = partial(step, net, optimizer, loss_of, cast)
        for key, loss in compared.items():
            print(f"d{depth} {key}: loss {loss:.5f}", flush=True)
        seconds = interleaved(contenders, device)
        flops = compute.training_flops(first.sizes) * batch
        for (code, precision), values in seconds.items():
            median = statistics.median(values)
            reference = statistics.median(seconds["released", "bf16" if given.bf16_only else "fp32"])
            speed = flops / median
            spread = (max(values) - min(values)) / median
            figures = [
                f"{median:.4f}",
                f"{spread:.2f}",
                f"{reference / median:.2f}",
                f"{speed:.4g}",
                f"{speed / rates[precision]:.2f}",
            ]
            rows.append([depth, code, precision, batch, *figures, about, time.strftime("%Y-%m-%d"), torch.__version__])
            print(
                f"d{depth} {code:24} {precision}: {median:.4f} s, spread {spread:.0%}, {reference / median:.2f} times",
                flush=True,
            )
    with open(RESULTS, "w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])


if __name__ == "__main__":
    main()
