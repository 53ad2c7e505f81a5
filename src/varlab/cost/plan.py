"""The cost of a run, before anything starts.

Weights, gradients and moments are counted, activations estimated (activation_memory.py); time is estimated from counted
FLOPs and bytes, and computed at an assumed MFU if one is given.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from varlab.cost.activation_memory import activation_bytes, block_bytes, linear_weights
from varlab.cost.flops import num_logits, parameter_counts, training_flops
from varlab.models import scales

GB = 1e9
RELEASED_PARAMS = 108_948_355  # of the released tokenizer
RESERVED = 3.0  # GB for the driver, kernel workspaces and allocator fragmentation


@dataclass(frozen=True)
class GPU:
    """Memory in GB; peak of dense bf16 matrix products in FLOP/s, from the vendor's data sheet; the share of it that large
    products reach (0.8 was measured on an H200, assumed elsewhere); bytes per second of large copies (4.3 TB/s was
    measured on an H200, 90 % of the data sheet; assumed elsewhere)."""

    memory: float
    peak: float
    bandwidth: float
    reached: float = 0.8


GPUS = {
    "a100": GPU(80.0, 312e12, 1.8e12),
    "h100": GPU(80.0, 989e12, 3.0e12),
    "h200": GPU(141.0, 989e12, 4.3e12),
}
# Bytes of a compiled block in bf16-mixed as Inductor counts them (experiments/performance/block_bytes.py): for each
# token and unit of width, forward and backward; for each weight, both together, and AdamW's.
TOKEN_BYTES, WEIGHT_BYTES, ADAMW_BYTES = (157, 256), 17, 28
LOGIT_BYTES = 16  # for each token and code: logits, their softmax and gradient


@dataclass(frozen=True)
class Layout:
    """How a run is distributed over devices."""

    num_devices: int = 1
    is_sharded: bool = False
    recompute: str = "none"
    accumulate: int = 1
    loss_chunks: int = 1

    @property
    def overrides(self) -> str:
        """The command-line settings of this layout."""
        trainer = "fsdp" if self.is_sharded else "ddp" if self.num_devices > 1 else "gpu"
        in_chunks = f" module.loss_chunks={self.loss_chunks}" if self.loss_chunks > 1 else ""
        return f"trainer={trainer} module.recompute={self.recompute} accumulate={self.accumulate}{in_chunks}"


@dataclass(frozen=True)
class PlannedRun:
    """What the cost of a VAR's training depends on. `sizes`: of the network, see `VAR.sizes`. `steps`: optimizer steps
    that this run takes itself. `assumed`: descriptions of assumptions about settings that were not given."""

    name: str
    sizes: dict[str, Any]
    num_images: int
    steps: int
    batch: int
    precision: str
    layout: Layout
    from_images: bool = False
    has_ema: bool = False
    tokens_on_device: bool = False
    tokenizer_params: int = RELEASED_PARAMS
    assumed: Sequence[str] = field(default_factory=list)

    @property
    def flops(self) -> float:
        """Training FLOPs of the network, tokenizer not included."""
        return float(training_flops(self.sizes) * self.steps * self.batch)


def estimated_mfu(run: PlannedRun, gpu: GPU) -> float:
    """Fraction of the peak that training reaches with compiled blocks, if matrix products run at the rate of large ones,
    all other bytes move at the rate of large copies, and nothing overlaps."""
    sizes, layout = run.sizes, run.layout
    params, tokens = parameter_counts(sizes)["params_total"], scales.num_tokens(sizes["patch_nums"])
    forward, backward = TOKEN_BYTES
    flops = training_flops(sizes)
    moved = forward + backward + (0 if layout.recompute == "none" else forward)
    bytes_moved = tokens * (sizes["depth"] * sizes["width"] * moved + num_logits(sizes) * LOGIT_BYTES)
    images = run.batch / layout.num_devices / layout.accumulate  # per forward pass of a device
    bytes_moved += params * (WEIGHT_BYTES / images + ADAMW_BYTES / (images * layout.accumulate))
    is_half = "bf16" in run.precision
    rate, width = (gpu.peak * gpu.reached, 1) if is_half else (gpu.peak * gpu.reached / 16, 2)
    seconds = flops * (4 / 3 if layout.recompute == "all" else 1) / rate + width * bytes_moved / gpu.bandwidth
    return flops / seconds / gpu.peak


def print_plan(
    run: PlannedRun, gpu_name: str, mfu: float | None, measured_flops: float | None = None
) -> dict[str, float]:
    """Prints cost and memory of a run; returns its `flops`, and for each kind of GPU the seconds on one. `mfu`: assumed
    fraction of the peak; None: estimated. `measured_flops`: FLOP/s of this machine.

    Raises ValueError if the run does not fit on the device with its layout.
    """
    if gpu_name not in GPUS:
        raise ValueError(f"planned_gpu={gpu_name!r}: choose one of {', '.join(GPUS)}")
    if mfu is not None and not 0 < mfu < 1:
        raise ValueError(f"planned_mfu={mfu}: give a fraction of the peak between 0 and 1")
    sizes, images = run.sizes, run.steps * run.batch
    params = parameter_counts(sizes)["params_total"]
    extra = " (tokenizing is not included)" if run.from_images else ""
    print(f"{run.name}: VAR of depth {sizes['depth']}, width {sizes['width']}, {params / 1e6:,.1f} M parameters")
    maps = ", ".join(str(pn) for pn in sizes["patch_nums"])
    print(f"  {scales.num_tokens(sizes['patch_nums'])} tokens per image on maps of {maps}")
    epochs = images / run.num_images
    print(f"  {run.steps:,} steps of {run.batch} images = {images / 1e6:,.1f} M images = {epochs:,.3g} epochs")
    print(f"  {training_flops(sizes) / 1e9:,.0f} GFLOP per image, {run.flops:.3g} FLOP in total{extra}")
    for line in run.assumed:
        print(f"  assumed: {line}")
    parts = memory(run)
    print_memory(parts, run.layout)
    if mfu is None:
        print(
            "time estimated with compiled blocks: matrix products at 80 % of the peak, other bytes at the rate of copies"
        )
    seconds = {name: run.flops / gpu.peak / (mfu or estimated_mfu(run, gpu)) for name, gpu in GPUS.items()}
    print_time(run.flops, run.layout.num_devices, seconds, measured_flops)
    check_fit(run, gpu_name, sum(parts.values()))
    return {"flops": run.flops, **seconds}


def memory(run: PlannedRun) -> dict[str, float]:
    """GB on each device, by component, at the peak of a step."""
    sizes, precision, layout = run.sizes, run.precision, run.layout
    params = parameter_counts(sizes)["params_total"]
    weight_bytes = 2 if precision == "bf16-true" else 4
    shards = layout.num_devices if layout.is_sharded else 1
    images = run.batch / layout.num_devices / layout.accumulate
    if images < 1:
        raise ValueError(
            f"data.global_batch_size={run.batch} is less than one image for each of {layout.num_devices} devices x"
            f" {layout.accumulate} accumulated batches"
        )
    logits = scales.num_tokens(sizes["patch_nums"]) * num_logits(sizes)
    gradients = params * weight_bytes / shards
    parts = {
        "weights": params * weight_bytes / shards,
        "Adam's moments": 2 * params * weight_bytes / shards,
        "averaged weights": params * weight_bytes / shards if run.has_ema else 0,
        "gathered blocks": 2 * 2 * params / sizes["depth"] if layout.is_sharded else 0,
        "frozen tokenizer": 4 * run.tokenizer_params,
    }
    copies = 2 * linear_weights(sizes) if precision == "bf16-mixed" and not layout.is_sharded else 0
    kept = images * activation_bytes(sizes, precision, layout.recompute, layout.loss_chunks)
    recomputed = images * (block_bytes(sizes, precision, "none") - block_bytes(sizes, precision, layout.recompute))
    earlier = (
        gradients if layout.num_devices > 1 or layout.accumulate > 1 else 0
    )  # otherwise they grow as activations are freed
    at_the_loss = {
        "gradients": earlier,
        "activations": kept,
        "logits and their gradient": images * logits * (8 if "bf16" in precision else 12) / layout.loss_chunks,
        "bf16 copies of weights": copies,
    }
    in_the_last_block = {
        "gradients": earlier,
        "activations": kept,
        "one block recomputed": recomputed,
        "bf16 copies of weights": copies / sizes["depth"],
    }
    in_the_first_block = {**in_the_last_block, "gradients": gradients, "activations": kept / sizes["depth"]}
    moments = (at_the_loss, in_the_last_block, in_the_first_block)
    parts.update(max(moments, key=lambda moment: sum(moment.values())))
    if run.tokens_on_device:
        codes = sizes["codebook_size"]
        size = next(
            size for size, bits in ((1, 8), (2, 15), (4, 31), (8, 63)) if codes <= 2**bits
        )  # of torch's integers
        parts["token cache"] = size * scales.num_tokens(sizes["patch_nums"]) * run.num_images
    return {name: size / GB for name, size in parts.items() if size}


def print_memory(parts: dict[str, float], layout: Layout) -> None:
    """Prints one line per component."""
    print(f"memory of each of {layout.num_devices} devices, GB ({layout.overrides}):")
    for name, size in parts.items():
        print(f"  {size:8.2f}  {name}")
    print(f"  {sum(parts.values()):8.2f}  in total, plus about {RESERVED:g} for driver and kernels")


def print_time(flops: float, num_devices: int, seconds: dict[str, float], measured_flops: float | None = None) -> None:
    """Prints days and GPU hours from the seconds on one GPU of each kind, and hours at the measured speed."""
    if measured_flops is not None:
        print(f"time at {measured_flops:.3g} FLOP/s, as measured: {flops / measured_flops / 3600:,.3g} hours")
    print(f"time on {num_devices} devices:")
    for name, alone in seconds.items():
        days, hours = alone / num_devices / 86400, alone / 3600
        mfu = flops / alone / GPUS[name].peak if alone else 0.0  # a branch that trains no step of its own
        print(f"  {name:5} {days:8.3g} days, {hours:10,.3g} GPU hours at {mfu:.0%} MFU")


def check_fit(run: PlannedRun, gpu_name: str, needed: float) -> None:
    """Prints the cheapest layout that fits. Raises ValueError if the planned one does not fit."""
    gpu = GPUS[gpu_name]
    room = gpu.memory - RESERVED
    best = cheapest(run, room)
    if best is None:
        raise ValueError(
            f"{run.name} does not fit {run.layout.num_devices} x {gpu_name} ({gpu.memory:g} GB) in any layout: use more devices"
        )
    if needed > room:
        raise ValueError(
            f"{run.name} needs {needed:.1f} GB of the {room:.1f} GB on each {gpu_name} with {run.layout.overrides}: the cheapest"
            f" layout that fits is {best.overrides}"
        )
    print(f"fits {gpu_name} ({needed:.1f} of {room:.1f} GB); the cheapest layout that fits: {best.overrides}")


def cheapest(run: PlannedRun, room: float) -> Layout | None:
    """The layout with the least overhead that fits: accumulation costs least, then selective recomputation, then the
    communication of sharding, then recomputing all activations (a third more FLOPs)."""
    by_cost = [
        (False, "none"),
        (False, "selective"),
        (True, "none"),
        (True, "selective"),
        (False, "all"),
        (True, "all"),
    ]
    per_device = run.batch // run.layout.num_devices
    for is_sharded, recompute in by_cost:
        for accumulate in (1, 2, 4, 8, 16):
            if (is_sharded and run.layout.num_devices == 1) or per_device % accumulate or per_device < accumulate:
                continue
            layout = replace(run.layout, is_sharded=is_sharded, recompute=recompute, accumulate=accumulate)
            if sum(memory(replace(run, layout=layout)).values()) <= room:
                return layout
    return None
