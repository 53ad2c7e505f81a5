"""What a GPU does with varlab, in half an hour: it trains, resumes, waits nowhere, and how fast.

    make gpu                                         # or python experiments/performance/gpu.py
    python experiments/performance/gpu.py --released FOLDER_OF_THE_RELEASED_CODE --minutes 28

Runs the parts below in order, each in a process of its own, and writes gpu/results.json, gpu/results.csv, gpu/kernels.csv
and the section of README.md. Parts that are done are not repeated (`--again` does); a part that cannot run says why.
Works without a network and without the packages that only tests need. `--rehearse` runs everything at tiny sizes on the
CPU, in a folder of its own, to see that the script works.
"""

import argparse
import csv
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from varlab.config import one_sentence
from varlab.cost.flops import training_flops
from varlab.cost.plan import Layout, PlannedRun, memory
from varlab.distributed import use_exact_fp32
from varlab.models import losses
from varlab.models.msvqvae import MSVQVAE
from varlab.models.quantizer import MultiScaleQuantizer
from varlab.models.transformer import AttentionKind
from varlab.models.var import VAR
from varlab.sampling.acceleration import use_bf16
from varlab.sampling.generate import generate
from varlab.training.gradients import clip_or_skip, gradient_norm
from varlab.training.optimizers import parameter_groups

HERE = Path(__file__).parent
FULL = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
MARKS = "<!-- gpu: written by gpu.py -->", "<!-- end of gpu -->"
Row = dict[str, Any]
PARTS: dict[str, Callable[["Sizes"], Iterator[Row]]] = {}


class Skipped(Exception):
    """A part that cannot run here; the message says why."""


class Sizes(NamedTuple):
    """What is measured, and where."""

    device: str
    depth: int
    deeper: tuple[int, ...]
    batch: int
    patch_nums: tuple[int, ...]
    channels: int
    repeats: int
    steps: int
    released: str | None

    @property
    def is_gpu(self) -> bool:
        return self.device == "cuda"

    def network(self, depth: int | None = None) -> VAR:
        """A transformer with open gates, so that every weight matters."""
        torch.manual_seed(0)
        sizes = {"drop_path": 0.0, "label_dropout": 0.0, "init_adaln_gamma": 0.5, "init_head": 1.0}
        return VAR(depth or self.depth, self.patch_nums, 4096, 32, 1000, **sizes).to(self.device)

    def tokenizer(self) -> MSVQVAE:
        """A tokenizer with random weights, whose codes are as far apart as features."""
        torch.manual_seed(0)
        tokenizer = MSVQVAE(MultiScaleQuantizer(self.patch_nums), channels=self.channels)
        torch.nn.init.normal_(tokenizer.quantizer.codebook.weight, std=0.5)
        return tokenizer.eval().requires_grad_(False).to(self.device)


def part(function: Callable[[Sizes], Iterator[Row]]) -> Callable[[Sizes], Iterator[Row]]:
    """Registers a part under the name of its function, in this order."""
    PARTS[function.__name__] = function
    return function


def need_gpu(sizes: Sizes) -> None:
    """Raises Skipped on a CPU."""
    if not sizes.is_gpu:
        raise Skipped("needs a GPU")


def seconds_of(run: Callable[[], object], sizes: Sizes) -> float:
    """Median seconds of a call after two warm-ups."""
    found = []
    for i in range(sizes.repeats + 2):
        start = time.perf_counter()
        run()
        if sizes.is_gpu:
            torch.cuda.synchronize()
        if i >= 2:
            found.append(time.perf_counter() - start)
    return sorted(found)[len(found) // 2]


def rates(sizes: Sizes) -> dict[str, float]:
    """FLOP/s of a large bf16 and fp32 matrix product, bytes per second of a large copy."""
    side = 8192 if sizes.is_gpu else 512
    found = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        a = torch.randn(side, side, device=sizes.device, dtype=dtype)
        found[name] = 2 * side**3 / seconds_of(lambda a=a: a @ a, sizes)
    source = torch.empty(2**30 if sizes.is_gpu else 2**24, dtype=torch.uint8, device=sizes.device)
    found["copy"] = 2 * source.numel() / seconds_of(source.clone, sizes)
    return found


@part
def machine(sizes: Sizes) -> Iterator[Row]:
    """Card, versions, and its measured limits."""
    name = torch.cuda.get_device_name() if sizes.is_gpu else platform.processor() or platform.machine()
    yield {"what": "device", "value": name}
    yield {"what": "date", "value": time.strftime("%Y-%m-%d")}
    for package in ("torch", "lightning", "varlab"):
        try:
            yield {"what": package, "value": version(package)}
        except PackageNotFoundError:
            yield {"what": package, "value": "not installed as a package"}
    if sizes.is_gpu:
        yield {"what": "CUDA", "value": str(torch.version.cuda)}
        yield {"what": "memory", "value": torch.cuda.get_device_properties(0).total_memory / 1e9, "unit": "GB"}
    measured = rates(sizes)
    for precision in ("bf16", "fp32"):
        yield {"what": f"matrix product, {precision}", "value": measured[precision] / 1e12, "unit": "TFLOP/s"}
    yield {"what": "copy", "value": measured["copy"] / 1e12, "unit": "TB/s"}


@part
def gpu_tests(sizes: Sizes) -> Iterator[Row]:
    """The tests that are marked gpu."""
    need_gpu(sizes)
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
    answer = subprocess.run(command, cwd=HERE.parents[1], capture_output=True, text=True, check=False, timeout=240)
    if "No module named" in answer.stderr:
        raise Skipped(answer.stderr.strip().splitlines()[-1])
    yield {"what": "pytest -m gpu", "value": answer.stdout.strip().splitlines()[-1], "passed": answer.returncode == 0}


def shapes(folder: Path, num: int) -> None:
    """Two classes of images: disks and squares of any color and place."""
    rng = np.random.default_rng(0)
    for i in range(num):
        name = ("disk", "square")[i % 2]
        image = Image.new("RGB", (40, 40), tuple(int(c) for c in rng.integers(0, 256, 3)))
        x, y, r = (int(v) for v in (*rng.integers(8, 32, 2), rng.integers(4, 8)))
        draw = ImageDraw.Draw(image)
        paint = draw.ellipse if name == "disk" else draw.rectangle
        paint((x - r, y - r, x + r, y + r), fill=tuple(int(c) for c in rng.integers(0, 256, 3)))
        for split in ("train", "val"):
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            if split == "train" or i < num // 8:
                image.save(folder / split / name / f"{i}.png")


def varlab(*arguments: str) -> str:
    """Runs a command of varlab; returns its output. Raises RuntimeError with the end of the output if it fails."""
    command = [sys.executable, "-m", "varlab", *arguments]
    answer = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "WANDB_MODE": "offline"}
    )
    if answer.returncode:
        raise RuntimeError(f"{' '.join(arguments[:3])}: {(answer.stdout + answer.stderr)[-1500:]}")
    return answer.stdout


def curve(run: Path) -> list[float]:
    """Training losses of a run."""
    with (run / "metrics.csv").open(encoding="utf-8") as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row.get("train/loss")]


@part
def training_works(sizes: Sizes) -> Iterator[Row]:
    """Tokenizer with discriminator, VAR from images and from tokens, in every precision: the loss falls, a stopped run
    continues with the same losses."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shapes(folder / "images", 256)
        varlab("pack", "source=folder", f"path={folder / 'images'}", f"out={folder / 'packed'}")
        trainer = "trainer=gpu" if sizes.is_gpu else "trainer=cpu"
        length = ["log_every=1", "val_every=1000", "save_every=5", "logger=csv", "data.num_workers=0", trainer]
        length += [] if sizes.is_gpu else ["module.is_compiled=false"]
        small = [
            "model.channels=32",
            "model.num_blocks=1",
            "data.global_batch_size=16",
            f"data.path={folder / 'packed'}",
        ]
        adversarial = ["adversarial=patch", "adversarial.discriminator_start=0.0", "adversarial.adversarial_start=0.2"]
        adversarial += ["adversarial.discriminator.num_layers=2", "adversarial.discriminator.channels=16"]
        cases = {}
        for precision in ("32-true", "bf16-mixed"):
            own = ["experiment=tokenizer_32px", "perceptual=none", *small, *adversarial]
            cases[f"tokenizer, {precision}"] = [*own, f"trainer.precision={precision}"]
        tokenizer = folder / "tokenizer-32-true/checkpoints/last.ckpt"
        own = ["experiment=var_digits", "model.depth=2", f"tokenizer={tokenizer}", "data.global_batch_size=16"]
        images = ["data=images", "resolution=32px", f"data.path={folder / 'packed'}"]
        for precision in ("32-true", "bf16-mixed", "bf16-true", "16-mixed"):
            source = images if precision == "bf16-mixed" else [f"data.path={folder / 'tokens'}"]
            word = "images" if precision == "bf16-mixed" else "tokens"
            cases[f"VAR from {word}, {precision}"] = [*own, *source, f"trainer.precision={precision}"]
        for case, overrides in cases.items():
            if case.startswith("VAR from tokens") and not (folder / "tokens").is_dir():
                source = [f"shards={folder / 'packed'}", f"out={folder / 'tokens'}"]
                varlab("tokenize", f"tokenizer={tokenizer}", *source)
            yield trained(folder, case, [*overrides, *length], sizes)


def trained(folder: Path, case: str, overrides: list[str], sizes: Sizes) -> Row:
    """One case: a whole run, and one that is stopped by SIGTERM and continues."""
    name = case.replace(",", "").replace(" ", "-")
    whole, moved = folder / name, folder / f"{name}-resumed"

    def settings(run: Path) -> list[str]:
        return ["train", f"run_dir={run}", f"hydra.run.dir={run}", f"name={name}", *overrides, f"steps={sizes.steps}"]

    try:
        varlab(*settings(whole))
        stopped_at = stop_early(settings(moved), moved)
        if stopped_at < sizes.steps:
            varlab(*settings(moved), "ckpt_path=last")
    except RuntimeError as error:
        return {"what": case, "value": str(error)[-800:], "passed": False}
    a, b = curve(whole), curve(moved)
    third = max(1, len(a) // 3)
    is_falling = sum(a[-third:]) < sum(a[:third])
    gap = max((abs(x - y) for x, y in zip(a, b, strict=False)), default=float("nan"))
    text = f"loss {a[0]:.3f} -> {a[-1]:.3f}; stopped at step {stopped_at}, continued within {gap:.2g}"
    return {"what": case, "value": text, "passed": bool(is_falling and len(a) == len(b) and gap < 0.05)}


def stop_early(arguments: list[str], run: Path) -> int:
    """Starts a training run, and sends SIGTERM once it has logged three steps; returns the steps it has done."""
    command = [sys.executable, "-m", "varlab", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not ((run / "metrics.csv").is_file() and len(curve(run)) >= 3):
        time.sleep(0.02)
    process.terminate()
    process.wait()
    return len(curve(run))


def step_of(sizes: Sizes, var: VAR, batch: int, attention: AttentionKind, is_compiled: bool) -> Callable[[], object]:
    """A training step from tokens in bf16, with clipping and fused AdamW."""
    var.train().attention = attention
    if is_compiled:
        for block in var.blocks:
            block.forward = torch.compile(block.forward)
    optimizer = torch.optim.AdamW(parameter_groups(var), lr=1e-4, betas=(0.9, 0.95), fused=True)
    length = var.step_bounds[-1][1]
    inputs = torch.randn(batch, length - var.step_bounds[0][1], 32, device=sizes.device)
    labels = torch.randint(1000, (batch,), device=sizes.device)
    sequence = torch.randint(4096, (batch, length), device=sizes.device)

    def step() -> Tensor:
        with torch.autocast(sizes.device, torch.bfloat16):
            loss = losses.cross_entropy(var(inputs, labels), sequence).mean()
        loss.backward()
        clip_or_skip(optimizer, gradient_norm(var.parameters()), 2.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


@part
def host_syncs(sizes: Sizes) -> Iterator[Row]:
    """Warnings of torch's sync debug mode in a training step and in a captured sampling call."""
    need_gpu(sizes)
    step, tokenizer, var = step_of(sizes, sizes.network(), 4, "split", False), sizes.tokenizer(), sizes.network()
    use_bf16(tokenizer, var)
    labels = torch.zeros(4, dtype=torch.long, device=sizes.device)
    works: dict[str, Callable[[], object]] = {"training step": step}
    works["sampling, with its check of the labels"] = lambda: generate(var, tokenizer, labels, compiled="graph")
    for name, work in works.items():
        for _ in range(3):
            work()
        torch.cuda.synchronize()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            work()
            torch.cuda.set_sync_debug_mode("default")
        syncs = [f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchronizing" in str(w.message)]
        yield {"what": name, "value": len(syncs), "unit": "host syncs", "note": " ".join(sorted(set(syncs)))}


@part
def training_speed(sizes: Sizes) -> Iterator[Row]:
    """A training step from tokens: milliseconds, images per second, share of the measured matmul rate, memory against
    the plan."""
    rate = rates(sizes)["bf16"]
    ways: dict[str, tuple[AttentionKind, bool]] = {
        "eager": ("split", False),
        "masked": ("masked", False),
        "compiled": ("split", True),
    }
    for name, (attention, is_compiled) in ways.items():
        yield speed_of(sizes, sizes.depth, name, attention, is_compiled, rate)
    if sizes.released:
        yield {"what": f"d{sizes.depth}, released", **released_step(sizes, rate)}


def speed_of(sizes: Sizes, depth: int, name: str, attention: AttentionKind, is_compiled: bool, rate: float) -> Row:
    """One way of training."""
    torch.compiler.reset()
    var = sizes.network(depth)
    flops = training_flops(var.sizes) * sizes.batch
    if sizes.is_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds = seconds_of(step_of(sizes, var, sizes.batch, attention, is_compiled), sizes)
    row = {
        "what": f"d{depth}, batch {sizes.batch}, {name}",
        "value": 1e3 * seconds,
        "unit": "ms",
        "images/s": sizes.batch / seconds,
        "of matmul rate": flops / seconds / rate,
    }
    if sizes.is_gpu:
        run = PlannedRun("run", var.sizes, 1, 1, sizes.batch, "bf16-mixed", Layout(), tokenizer_params=0)
        row |= {"peak GB": torch.cuda.max_memory_allocated() / 1e9, "planned GB": sum(memory(run).values())}
    return row


def released_step(sizes: Sizes, rate: float) -> Row:
    """The released network with our weights."""
    from released import released_tokenizer, released_var  # pyright: ignore[reportMissingImports]

    assert sizes.released is not None
    var = sizes.network().cpu()
    theirs = released_var(sizes.released, released_tokenizer(sizes.released, sizes.tokenizer().cpu()), var)
    theirs = theirs.to(sizes.device).train()
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
    inputs = torch.randn(sizes.batch, var.step_bounds[-1][1] - 1, 32, device=sizes.device)
    labels = torch.randint(1000, (sizes.batch,), device=sizes.device)
    sequence = torch.randint(4096, (sizes.batch, inputs.shape[1] + 1), device=sizes.device)

    def step() -> None:
        with torch.autocast(sizes.device, torch.bfloat16):
            loss = losses.cross_entropy(theirs(labels, inputs), sequence).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 2.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    seconds = seconds_of(step, sizes)
    flops = training_flops(var.sizes) * sizes.batch
    return {
        "value": 1e3 * seconds,
        "unit": "ms",
        "images/s": sizes.batch / seconds,
        "of matmul rate": flops / seconds / rate,
    }


@part
def kernels(sizes: Sizes) -> Iterator[Row]:
    """The kernels that take most of three compiled training steps -> kernels.csv."""
    from torch.profiler import ProfilerActivity, profile

    step = step_of(sizes, sizes.network(), sizes.batch, "split", True)
    for _ in range(3):
        step()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA][: 1 + sizes.is_gpu]) as profiled:
        for _ in range(3):
            step()
        if sizes.is_gpu:
            torch.cuda.synchronize()

    def time_of(event: Any) -> float:
        return event.self_device_time_total if sizes.is_gpu else event.self_cpu_time_total

    events = sorted(profiled.key_averages(), key=time_of, reverse=True)
    total = sum(time_of(event) for event in events) or 1.0
    for event in events[:25]:
        yield {
            "what": event.key[:90],
            "value": 100 * time_of(event) / total,
            "unit": "% of time",
            "calls": event.count // 3,
        }


@part
def attention(sizes: Sizes) -> Iterator[Row]:
    """Attention alone, forward and backward, of one block."""
    kinds: tuple[AttentionKind, ...] = ("split", "masked", "flex") if sizes.is_gpu else ("split", "masked")
    var = sizes.network()
    for kind in kinds:
        var.attention = kind
        block: Any = var.blocks[0].attention
        x = torch.randn(sizes.batch, var.step_bounds[-1][1], var.width, device=sizes.device, requires_grad=True)
        visible = var.visible(x.shape[1])

        def work(block: Any = block, x: Tensor = x, visible: Any = visible) -> None:
            with torch.autocast(sizes.device, torch.bfloat16):
                block(x, visible).float().sum().backward()

        yield {"what": f"{kind}, with projections", "value": 1e3 * seconds_of(work, sizes), "unit": "ms"}


@part
def sampling_speed(sizes: Sizes) -> Iterator[Row]:
    """Sampling with guidance, top-k and top-p, decoder included."""
    for batch in (1, sizes.batch):
        tokens = {}
        for compiled in ("none", "blocks", "graph"):
            tokenizer, var = sizes.tokenizer(), sizes.network()
            if sizes.is_gpu:
                use_bf16(tokenizer, var)
            labels = torch.arange(batch, device=sizes.device) % 1000

            def work(settings: dict[str, Any], n: Any = (tokenizer, var, labels, compiled)) -> Any:
                return generate(n[1], n[0], n[2], compiled=n[3], return_tokens=True, **settings)

            maps = work({"top_k": 1})[1]
            tokens[compiled] = torch.cat(list(maps), dim=1)
            chosen = {"cfg_scale": 1.5, "top_k": 900, "top_p": 0.96}
            seconds = seconds_of(lambda work=work, chosen=chosen: work(chosen), sizes)
            agreeing = float((tokens[compiled] == tokens["none"]).float().mean())
            row = {"what": f"d{sizes.depth}, batch {batch}, compiled={compiled}", "value": 1e3 * seconds, "unit": "ms"}
            yield {**row, "images/s": batch / seconds, "greedy tokens as eager": agreeing}


@part
def tokenizer_speed(sizes: Sizes) -> Iterator[Row]:
    """Encoder and decoder, in two memory formats, eager and compiled; tokens in TF32 and on the CPU against fp32."""
    side = sizes.tokenizer().image_size[0]
    images = torch.rand(min(sizes.batch, 16), 3, side, side, device=sizes.device) * 2 - 1
    expected = torch.cat(sizes.tokenizer().encode(images), dim=1)
    for layout in (torch.channels_last, torch.contiguous_format):
        for is_compiled in (False, True):
            torch.compiler.reset()
            tokenizer = sizes.tokenizer()
            tokenizer.to(memory_format=layout)  # pyright: ignore[reportCallIssue]
            if is_compiled:
                tokenizer.encoder.compile()
                tokenizer.decoder.compile()
            f_hat = torch.zeros(len(images), 32, *tokenizer.quantizer.sides[-1], device=sizes.device)
            name = f"{str(layout).removeprefix('torch.')}, {'compiled' if is_compiled else 'eager'}"
            works: dict[str, Callable[[], object]] = {"encode fp32": lambda t=tokenizer: t.encode(images)}

            def decode(tokenizer: MSVQVAE = tokenizer, f_hat: Tensor = f_hat) -> object:
                with torch.no_grad(), torch.autocast(sizes.device, torch.bfloat16):
                    return tokenizer.decode_features(f_hat)

            works["decode bf16"] = decode
            for what, work in works.items():
                yield {
                    "what": f"{what}, {name}",
                    "value": 1e3 * seconds_of(work, sizes) / len(images),
                    "unit": "ms/image",
                }
    if sizes.is_gpu:
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
        yield same_tokens("TF32", sizes.tokenizer().encode(images), expected)
        use_exact_fp32()
    yield same_tokens("CPU", sizes.tokenizer().cpu().encode(images.cpu()), expected)


def same_tokens(where: str, maps: list[Tensor], expected: Tensor) -> Row:
    """How many tokens are those of fp32 on the device."""
    share = float((torch.cat(maps, dim=1).cpu() == expected.cpu()).float().mean())
    return {"what": f"tokens in {where} as in fp32", "value": 100 * share, "unit": "%"}


@part
def full_memory(sizes: Sizes) -> Iterator[Row]:
    """What a run says when the memory is full."""
    need_gpu(sizes)
    try:
        kept = [torch.empty(2**33, dtype=torch.uint8, device=sizes.device) for _ in range(100)]
        yield {"what": "message", "value": f"{len(kept)} allocations of 8 GB fit", "passed": False}
    except torch.OutOfMemoryError as error:
        yield {"what": "message", "value": one_sentence(error), "passed": "accumulate=2" in one_sentence(error)}


@part
def deeper(sizes: Sizes) -> Iterator[Row]:
    """Compiled training steps of other depths, the batch halved until it fits."""
    rate = rates(sizes)["bf16"]
    for depth in sizes.deeper:
        batch = sizes.batch
        while True:
            try:
                yield speed_of(sizes._replace(batch=batch), depth, "compiled", "split", True, rate)
                break
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                batch //= 2
                if batch < 1:
                    yield {"what": f"d{depth}", "value": "does not fit at any batch size", "passed": False}
                    break


def run_part(name: str, sizes: Sizes, file: Path) -> None:
    """Runs one part in this process; writes its outcome."""
    rows: list[Row] = []
    try:
        for row in PARTS[name](sizes):
            rows.append(row)
            print("  ", *(f"{v:.4g}" if isinstance(v, float) else v for v in row.values()), flush=True)
        outcome: Row = {"state": "done"}
    except Skipped as reason:
        outcome = {"state": "skipped", "why": str(reason)}
    except Exception:
        outcome = {"state": "failed", "why": traceback.format_exc()[-2000:]}
    file.write_text(json.dumps({**outcome, "rows": rows}), encoding="utf-8")


def write(out: Path, results: dict[str, Row], is_rehearsal: bool) -> None:
    """results.json, results.csv, kernels.csv and, for a real run, the section of README.md."""
    (out / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    for file, chosen in (("results.csv", [n for n in results if n != "kernels"]), ("kernels.csv", ["kernels"])):
        rows = [{"part": name, **row} for name in chosen if name in results for row in results[name]["rows"]]
        columns = list(dict.fromkeys(key for row in rows for key in row))
        with (out / file).open("w", newline="", encoding="utf-8") as opened:
            writer = csv.DictWriter(opened, columns)
            writer.writeheader()
            writer.writerows(rows)
    text = section(results)
    (out / "section.md").write_text(text, encoding="utf-8")
    readme = HERE / "README.md"
    if not is_rehearsal:
        before, _, rest = readme.read_text(encoding="utf-8").partition(MARKS[0])
        after = rest.partition(MARKS[1])[2]
        readme.write_text(f"{before}{MARKS[0]}\n{text}{MARKS[1]}{after}", encoding="utf-8")


def section(results: dict[str, Row]) -> str:
    """The results as Markdown."""
    lines = []
    for name, result in results.items():
        lines += [f"### {name.replace('_', ' ').capitalize()}: {result['state']}", ""]
        if result.get("why"):
            lines += [result["why"].strip().splitlines()[-1], ""]
        rows = result["rows"][:12]
        if rows:
            columns = list(dict.fromkeys(key for row in rows for key in row))
            lines += [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
            for row in rows:
                cells = [row.get(column, "") for column in columns]
                shown = [f"{cell:.4g}" if isinstance(cell, float) else str(cell).replace("\n", " ") for cell in cells]
                lines.append(f"| {' | '.join(shown)} |")
            lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--released", help="folder of the released code (github.com/FoundationVision/VAR)")
    parser.add_argument("--minutes", type=float, default=28.0, help="no part is started after these")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="parts")
    parser.add_argument("--again", action="store_true", help="repeat what is done")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, on the CPU")
    parser.add_argument("--out", type=Path, help="folder of the results (default: gpu beside this file)")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # in a process of its own
    given = parser.parse_args()
    if not given.rehearse and not torch.cuda.is_available():
        sys.exit("this machine has no GPU that torch can use: --rehearse runs the script at tiny sizes on the CPU")
    if given.rehearse:
        sizes = Sizes("cpu", 2, (3,), 2, (1, 2, 3, 4), 32, 1, 12, given.released)
    else:
        sizes = Sizes("cuda", 16, (12, 20, 24, 30), 64, FULL, 160, 7, 60, given.released)
    out = given.out or (Path(tempfile.mkdtemp()) if given.rehearse else HERE / "gpu")
    out.mkdir(parents=True, exist_ok=True)
    if given.part:
        use_exact_fp32()
        run_part(given.part, sizes, out / f"{given.part}.part")
        return
    file = out / "results.json"
    results: dict[str, Row] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    start = time.monotonic()
    for name in given.only or PARTS:
        if results.get(name, {}).get("state") == "done" and not given.again:
            continue
        left = 60 * given.minutes - (time.monotonic() - start)
        print(f"{name}: {(PARTS[name].__doc__ or '').strip().splitlines()[0]}", flush=True)
        if left <= 0:
            results[name] = {"state": "skipped", "why": "no time was left; the same command continues", "rows": []}
        else:
            results[name] = in_its_own_process(name, out, left)
        print(f"   {results[name]['state']} {results[name].get('why', '')}", flush=True)
        write(out, {name: results[name] for name in PARTS if name in results}, given.rehearse)
    print(f"results: {out}")
    if any(result["state"] == "failed" for result in results.values()):
        sys.exit(1)


def in_its_own_process(name: str, out: Path, left: float) -> Row:
    """The outcome of a part; its process may crash or take too long."""
    file = out / f"{name}.part"
    file.unlink(missing_ok=True)
    try:
        command = [sys.executable, __file__, *sys.argv[1:], "--out", str(out), "--part", name]
        code = subprocess.run(command, check=False, timeout=left + 120).returncode
        why = f"its process ended with {code}"
    except subprocess.TimeoutExpired:
        why = "it took too long"
    if not file.is_file():
        return {"state": "failed", "why": why, "rows": []}
    outcome = json.loads(file.read_text(encoding="utf-8"))
    file.unlink()
    return outcome


if __name__ == "__main__":
    main()
