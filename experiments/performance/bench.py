"""How fast varlab trains, encodes, samples and reads, compared with the released code if available, and with the limits
of this device.

    make bench                                                                   (2 CPU cores, about ten minutes)
    make bench ARGS="--released FOLDER_OF_THE_RELEASED_CODE"                     compared with the released code
    make bench ARGS="--released FOLDER --device cuda"                            on a GPU: d12, d16, d24, bf16, larger batches
    make bench ARGS="--only sampling --sampled d16 --released FOLDER --device cuda"

Each part runs in its own process: memory cached by an earlier part would favor the slower code. In each comparison both
codes have the same weights and the same batch and run in turn; outputs are compared first. Every row: the median of 7
repeats, their spread, the ratio to the released code in fp32 (on a GPU: as it runs by default, under autocast), the
fraction of the rate of a large matrix product and of a large copy measured in the same process, the peak memory that
one call adds. Writes results.csv (results_cuda.csv), a figure of the ratios, and the table in README.md. The released
code is not part of this project.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from data import decoding_contenders, make_photos, token_contender
from measure import Candidate, Ceilings, benchmark, machine, save, timed
from released import released_tokenizer, released_var
from show import show

from varlab.cost.flops import tokenizer_flops, training_flops
from varlab.data.sources.folder import folder_source
from varlab.data.write_shards import pack
from varlab.models import losses, scales
from varlab.models.msvqvae import MSVQVAE
from varlab.models.quantizer import MultiScaleQuantizer
from varlab.models.var import VAR
from varlab.sampling.acceleration import use_bf16
from varlab.sampling.generate import generate, generate_tokens
from varlab.sampling.token_sampling import SamplingSettings
from varlab.training.optimizers import parameter_groups

HERE = Path(__file__).parent
FULL = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
PARTS = ("training", "memory", "tokenizer", "sampling", "data", "start")
SETTINGS: dict[str, Any] = {"cfg_scale": 1.5, "top_k": 900, "top_p": 0.96}


class Bench:
    """The comparisons on one device."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given, self.device, self.released = given, given.device, given.released
        self.is_gpu = given.device == "cuda"
        self.precisions = ("bf16",) if self.is_gpu else ("fp32", "bf16")
        self.base = self.precisions[0]  # precision of the reference

    def cast(self, precision: str) -> AbstractContextManager:
        """Autocast for bf16."""
        return torch.autocast(self.device, torch.bfloat16) if precision == "bf16" else nullcontext()

    def under_cast(self, run: Callable[[], object], precision: str) -> Callable[[], object]:
        """The same work under autocast."""

        def cast_run() -> object:
            with self.cast(precision):
                return run()

        return cast_run

    def tokenizer(self, patch_nums: tuple[int, ...], channels: int) -> MSVQVAE:
        """A tokenizer with random weights, whose codes are as far apart as features."""
        torch.manual_seed(0)
        tokenizer = MSVQVAE(MultiScaleQuantizer(patch_nums), channels=channels)
        torch.nn.init.normal_(tokenizer.quantizer.codebook.weight, std=0.5)
        return tokenizer.eval().requires_grad_(False)

    def training(self) -> Iterator[list[Candidate]]:
        """A training step from cached tokens (forward, loss, backward, clip, AdamW), and one from images."""
        for name in self.given.trained:
            yield self.training_of(int(name[1:]), self.given.batch, from_images=False)
        name = self.given.trained[0]
        yield self.training_of(int(name[1:]), self.given.batch, from_images=True)

    def training_of(self, depth: int, batch: int, from_images: bool) -> list[Candidate]:
        """Contenders for one network; the learning rate is 0, so that all do the same work in every step."""
        tokenizer = self.tokenizer(FULL, 160)
        first = VAR(depth, FULL, 4096, 32, 1000, drop_path=0.0, label_dropout=0.0, init_adaln_gamma=0.5, init_head=1.0)
        their_vae, theirs = None, None
        if self.released:
            their_vae = released_tokenizer(self.released, tokenizer)
            theirs = released_var(self.released, their_vae, first).to(self.device).train()
        tokenizer.to(self.device)
        labels = torch.arange(batch, device=self.device)
        images = torch.rand(batch, 3, 256, 256, device=self.device) * 2 - 1
        cached = [torch.randint(4096, (batch, pn * pn), device=self.device) for pn in FULL]

        def our_loss(net: VAR, precision: str) -> torch.Tensor:
            with torch.no_grad():
                token_maps = tokenizer.encode(images) if from_images else cached
                inputs = tokenizer.quantizer.teacher_forcing_inputs(token_maps)
            sequence = torch.cat(token_maps, dim=1)
            with self.cast(precision):
                return losses.cross_entropy(net(inputs, labels), sequence).mean()

        def their_loss(net: torch.nn.Module, precision: str) -> torch.Tensor:
            assert their_vae is not None
            with torch.no_grad():
                token_maps = their_vae.img_to_idxBl(images) if from_images else cached
                inputs = their_vae.quantize.idxBl_to_var_input(token_maps)
            with self.cast(precision):
                logits = net(labels, inputs)
                return F.cross_entropy(logits.flatten(0, 1), torch.cat(token_maps, dim=1).flatten())

        def step(net: torch.nn.Module, optimizer: torch.optim.Optimizer, loss_of: Callable, precision: str) -> None:
            loss_of(net, precision).backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 2.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        flops = training_flops(first.sizes)
        if from_images:
            flops += tokenizer_flops(tokenizer)["encode"]
        found = []
        for precision in self.precisions:
            for code in ("released", "varlab, masked", "varlab", "varlab, compiled"):
                if code == "released":
                    if theirs is None:
                        continue
                    net, loss_of, groups = theirs, their_loss, list(theirs.parameters())
                else:
                    if from_images and code != "varlab":
                        continue
                    net = VAR(**first.sizes).to(self.device).train()
                    net.load_state_dict(first.state_dict())
                    net.attention = "masked" if "masked" in code else "split"
                    loss_of, groups = our_loss, parameter_groups(net)
                    if "compiled" in code:
                        for block in net.blocks:
                            block.forward = torch.compile(block.forward)
                optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)
                with torch.no_grad():
                    print(f"d{depth} {code} {precision}: loss {float(loss_of(net, precision)):.5f}", flush=True)
                found.append(
                    Candidate(
                        what="step from images" if from_images else "step from tokens",
                        network=f"d{depth}, batch {batch}",
                        code=code,
                        precision=precision,
                        run=partial(step, net, optimizer, loss_of, precision),
                        count=batch,
                        flops=flops * batch,
                        is_reference=code == "released" and precision == self.base,
                        is_compiled="compiled" in code,
                    )
                )
        return found

    def memory(self) -> Iterator[list[Candidate]]:
        """The same step with fewer activations kept for the backward pass."""
        name, batch, precision = self.given.trained[-1], self.given.batch, self.base
        labels = torch.arange(batch, device=self.device)
        length = scales.num_tokens(FULL)
        inputs = torch.randn(batch, length - 1, 32, device=self.device)
        sequence = torch.randint(4096, (batch, length), device=self.device)

        def loss_of(logits: torch.Tensor, place: slice) -> torch.Tensor:
            return losses.cross_entropy(logits, sequence[:, place])

        def step(net: VAR, optimizer: torch.optim.Optimizer, chunks: int) -> None:
            with self.cast(precision):
                hidden = net(inputs, labels, returns_hidden=True)
                head = partial(net.predict, vector=hidden.vector)
                loss = losses.in_chunks(head, hidden.x, loss_of, chunks).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        found = []
        for code, recompute, chunks in [
            ("all kept", "none", 1),
            ("logits in 8 chunks", "none", 8),
            ("recompute=selective", "selective", 1),
            ("recompute=all", "all", 1),
        ]:
            net = VAR(int(name[1:]), FULL, 4096, 32, 1000).to(self.device).train()
            for block in net.blocks:
                block.recompute = recompute
            optimizer = torch.optim.AdamW(parameter_groups(net), lr=0.0, fused=True)
            run, flops = partial(step, net, optimizer, chunks), training_flops(net.sizes)
            candidate = Candidate("memory for time", f"{name}, batch {batch}", code, precision, run, batch)
            found.append(replace(candidate, flops=flops * batch, is_reference=code == "all kept"))
        yield found

    @torch.no_grad()
    def tokenizing(self) -> Iterator[list[Candidate]]:
        """Encoding and decoding 256 px images, 109M parameters."""
        batch = self.given.coded
        ours = self.tokenizer(FULL, 160)
        theirs = released_tokenizer(self.released, ours).to(self.device) if self.released else None
        ours.to(self.device)
        images = torch.rand(batch, 3, 256, 256, device=self.device) * 2 - 1
        token_maps = ours.encode(images)
        runs: dict[str, dict[str, Callable[[], object]]] = {
            "encode": {"varlab": lambda: ours.encode(images)},
            "decode": {"varlab": lambda: ours.decode(token_maps)},
        }
        if theirs is not None:
            pairs = zip(token_maps, theirs.img_to_idxBl(images), strict=True)
            agreeing = torch.cat([(a == b).float() for a, b in pairs], dim=1).mean()
            decoded = theirs.idxBl_to_img(token_maps, same_shape=True, last_one=True)
            gap = (ours.decode(token_maps) - decoded).abs().max()
            print(f"tokenizer: {agreeing:.2%} of tokens agree; decoded images differ by {gap:.2g} at most")
            runs["encode"]["released"] = lambda: theirs.img_to_idxBl(images)
            runs["decode"]["released"] = lambda: theirs.idxBl_to_img(token_maps, same_shape=True, last_one=True)
        with torch.autocast(self.device, torch.bfloat16):
            rounded = ours.encode(images)
        agreeing = torch.cat([(a == b).float() for a, b in zip(token_maps, rounded, strict=True)], dim=1).mean()
        print(
            f"tokenizer: {agreeing:.2%} of tokens of random weights are the same in bf16 (trained weights: agreement.py)"
        )
        flops = tokenizer_flops(ours)
        for what, by_code in runs.items():
            yield [
                Candidate(
                    what=what,
                    network=f"256 px, batch {batch}",
                    code=code,
                    precision=precision,
                    run=torch.no_grad()(self.under_cast(run, precision)),
                    count=batch,
                    flops=flops[what] * batch,
                    is_reference=code == "released" and precision == ("fp32" if self.is_gpu else self.base),
                )
                for precision in ("fp32", "bf16")
                for code, run in by_code.items()
                if (what, code, precision) != ("encode", "released", "bf16")  # it fails when it adds bf16 to fp32
            ]

    def sampling(self) -> Iterator[list[Candidate]]:
        """Sampling images of classes with guidance, including the decoder."""
        for name in self.given.sampled:
            depth, patch_nums, channels = (2, (1, 2, 3, 4), 32) if name == "tiny" else (int(name[1:]), FULL, 160)
            tokenizer = self.tokenizer(patch_nums, channels)
            var = VAR(depth, patch_nums, 4096, 32, 1000, init_adaln_gamma=0.5, init_head=1.0).eval()
            theirs = None
            if self.released:
                theirs = released_var(self.released, released_tokenizer(self.released, tokenizer), var).to(self.device)
                theirs.vae_proxy[0].to(self.device)  # pyright: ignore
            tokenizer, var = tokenizer.to(self.device), var.to(self.device)
            if self.is_gpu:
                use_bf16(tokenizer, var)
            for batch in self.given.batches:
                yield self.sampling_of(name, tokenizer, var, theirs, batch)

    @torch.no_grad()
    def sampling_of(self, name: str, tokenizer: MSVQVAE, var: VAR, theirs: Any, batch: int):
        """Contenders for one network and batch size; greedy tokens are compared first."""
        labels = torch.arange(batch, device=self.device)
        fast = deepcopy(tokenizer), deepcopy(var)  # compiled in the first call
        ways = {"varlab": (tokenizer, var, "none"), "varlab, compiled": (*fast, "blocks")}
        ways |= {"varlab, graph": (*fast, "graph")} if self.is_gpu else {}

        def run(tokenizer: MSVQVAE, var: VAR, compiled: str, **settings: Any) -> Any:
            return generate(var, tokenizer, labels, compiled=compiled, return_tokens=True, **settings)

        tokens = {code: torch.cat(run(*way, cfg_scale=1.5, top_k=1)[1], dim=1) for code, way in ways.items()}
        for code, found in tokens.items():
            agreeing = (found == tokens["varlab"]).float().mean()
            print(f"{name}, {code}: {agreeing:.2%} of greedy tokens are the same", flush=True)
        runs: dict[str, Callable[[], object]] = {code: partial(run, *way, **SETTINGS) for code, way in ways.items()}
        if theirs is not None:
            ours = tokenizer.decode_features(generate_tokens(var, tokenizer, labels, SamplingSettings(1.5, top_k=1))[0])
            gap = (ours / 2 + 0.5 - theirs.autoregressive_infer_cfg(batch, labels, cfg=1.5, top_k=1)).abs().max()
            print(f"{name}: greedy images differ from the released code's by {gap:.2g} at most", flush=True)
            runs["released"] = lambda: theirs.autoregressive_infer_cfg(
                batch, labels, g_seed=0, cfg=1.5, top_k=900, top_p=0.96
            )
        # guidance takes two forward passes, each a third of a training step; with a cache, each token is computed once
        network_flops = 2 * training_flops(var.sizes) / 3
        flops = network_flops + tokenizer_flops(tokenizer)["decode"]
        return [
            Candidate(
                what="sampling",
                network=f"{name}, batch {batch}",
                code=code,
                precision=self.base,
                run=self.under_cast(run, self.base),
                count=batch,
                flops=flops * batch,
                is_reference=code == "released",
                is_compiled="compiled" in code,
            )
            for code, run in runs.items()
        ]

    def data(self) -> Iterator[list[Candidate]]:
        """Reading images from shards and token batches, in one process."""
        with tempfile.TemporaryDirectory() as folder:
            counts, runs = decoding_contenders(Path(folder))
            yield [
                Candidate(
                    "read images", "500x375 to 256", code, "fp32", run, counts[code], is_reference="plain" in code
                )
                for code, run in runs.items()
            ]
        run, count = token_contender()
        yield [Candidate("read tokens", "680 tokens", "varlab, from memory", "fp32", run, count, "sequences")]

    def start(self) -> list[dict[str, Any]]:
        """Seconds of the help commands and of a run of one training step, each in its own process."""
        rows = []
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            make_photos(folder / "photos")
            pack(folder_source(folder / "photos", 0.05, 0), folder / "shards", shard_images=100, seed=0)
            one_step = ["experiment=tokenizer_tiny", f"data.path={folder / 'shards'}", "steps=1"]
            for what, module, arguments in [
                ("varlab --help", "varlab.cli", ["--help"]),
                ("varlab train --help", "varlab.commands.train", ["--help"]),
                ("varlab train experiment=tokenizer_tiny steps=1", "varlab.commands.train", one_step),
            ]:
                seconds = []
                for repeat in range(3):
                    own = [f"run_dir={folder / 'run'}{repeat}"] if "experiment" in what else []
                    command = [sys.executable, "-m", module, *arguments, *own]
                    seconds.append(timed(partial(subprocess.run, command, check=True, capture_output=True), "cpu"))
                row = {"what": "start", "network": what, "code": "varlab", "seconds": f"{sorted(seconds)[1]:.3g}"}
                rows.append(row)
                print(f"{what:50} {row['seconds']} s", flush=True)
        return rows


def measure_part(given: argparse.Namespace, part: str) -> list[dict[str, Any]]:
    """The rows of the ceilings, then those of one part."""
    bench = Bench(given)
    if bench.is_gpu:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    ceilings = Ceilings.measure(given.device)
    print(
        f"{machine(given.device)}: matrix product {ceilings.flops['fp32'] / 1e9:,.0f} GFLOP/s in fp32,"
        f" {ceilings.flops['bf16'] / 1e9:,.0f} in bf16; copy {ceilings.bytes / 1e9:,.1f} GB/s",
        flush=True,
    )
    rows: list[dict[str, Any]] = [
        {"what": "ceiling", "network": f"matrix product, {precision}", "per_second": f"{rate:.4g}", "unit": "FLOP"}
        for precision, rate in ceilings.flops.items()
    ]
    rows.append({"what": "ceiling", "network": "copy", "per_second": f"{ceilings.bytes:.4g}", "unit": "B"})
    if part == "start":
        return rows + bench.start()
    comparisons = {
        "training": bench.training, "memory": bench.memory, "tokenizer": bench.tokenizing, "sampling": bench.sampling, "data": bench.data,
    }[part]  # fmt: skip
    return rows + [row for candidates in comparisons() for row in benchmark(candidates, given.device, ceilings)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--released", help="folder of the released code (github.com/FoundationVision/VAR)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--trained", nargs="+", help="networks trained, as d16")
    parser.add_argument("--batch", type=int, help="images of a training step")
    parser.add_argument("--coded", type=int, help="images per batch of the tokenizer")
    parser.add_argument("--sampled", nargs="+", help="networks sampled: tiny or as d16")
    parser.add_argument("--batches", type=int, nargs="+", help="images sampled per batch")
    parser.add_argument(
        "--out", type=Path, help="CSV; default for all parts: results.csv or results_cuda.csv next to this file"
    )
    given = parser.parse_args()
    is_gpu = given.device == "cuda"
    given.trained = given.trained or (["d12", "d16", "d24"] if is_gpu else ["d2", "d6"])
    given.batch = given.batch or (64 if is_gpu else 4)
    given.coded = given.coded or (64 if is_gpu else 1)
    given.sampled = given.sampled or (["d16"] if is_gpu else ["tiny", "d2"])
    given.batches = given.batches or ([1, 64] if is_gpu else [4])
    start, rows = time.perf_counter(), []
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as fresh:
        for found in fresh.map(measure_part, [given] * len(given.only), given.only):
            rows += [row for row in found if not rows or row["what"] != "ceiling"]
    columns = max((list(row) for row in rows), key=len)
    rows = [{column: row.get(column, "") for column in columns} for row in rows]
    print(f"{len(rows)} rows in {time.perf_counter() - start:.0f} s")
    if given.out or len(given.only) == len(PARTS):
        file = given.out or HERE / ("results_cuda.csv" if is_gpu else "results.csv")
        save(file, rows, given.device)
        show(file)
    else:
        print("not saved, since only some parts were measured: give --out FILE to save the results")


if __name__ == "__main__":
    main()
