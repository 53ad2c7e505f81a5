"""`varlab train ... plan=true`: what a run will cost, before anything starts.

Weights, gradients and moments are counted, activations estimated (footprint.py); days follow from FLOPs at an assumed MFU.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from varlab.checkpoints.load import load_tokenizer
from varlab.cost.activation_memory import activation_bytes, block_bytes, linear_weights
from varlab.cost.flops import parameter_counts, training_flops
from varlab.data.shards import load_manifest
from varlab.files import load_json
from varlab.models import scales
from varlab.training.schedules import HOLD

GB = 1e9
IMAGENET = {"num_images": 1_281_167, "num_classes": 1000}
RELEASED = {"codebook_size": 4096, "codebook_dim": 32}
RELEASED_PARAMS = 108_948_355
RESERVED = 3.0  # GB that the driver, kernels' workspaces and gaps in the allocator take


@dataclass(frozen=True)
class GPU:
    """Memory in GB; peak of dense bf16 matrix products in FLOP/s, by the maker's data sheet."""

    memory: float
    peak: float


GPUS = {"a100": GPU(80.0, 312e12), "h100": GPU(80.0, 989e12), "h200": GPU(141.0, 989e12)}


@dataclass(frozen=True)
class Facts:
    """What is trained on what."""

    sizes: dict[str, Any]
    num_images: int
    tokenizer_params: int
    assumed: list[str]


@dataclass(frozen=True)
class Setup:
    """How a run is laid out over devices."""

    num_devices: int
    is_sharded: bool
    recompute: str
    accumulate: int
    loss_chunks: int = 1

    @property
    def overrides(self) -> str:
        """The settings that ask for it."""
        trainer = "fsdp" if self.is_sharded else "ddp" if self.num_devices > 1 else "gpu"
        in_chunks = f" module.loss_chunks={self.loss_chunks}" if self.loss_chunks > 1 else ""
        return f"trainer={trainer} module.recompute={self.recompute} accumulate={self.accumulate}{in_chunks}"


def affordable_steps(cfg: DictConfig) -> int:
    """Optimizer steps that `compute` FLOPs pay for, tokenizer not counted. Raises ValueError when it is not one."""
    if "VARModule" not in cfg.module._target_:
        raise ValueError("compute=... counts VARs only: give a tokenizer's length in steps or epochs")
    step = training_flops(facts(cfg).sizes) * cfg.data.global_batch_size
    if cfg.compute < step:
        raise ValueError(f"compute={cfg.compute:g} FLOP is less than one step of this network ({step:.3g} FLOP)")
    return round(cfg.compute / step)


def plan(cfg: DictConfig) -> float:
    """Prints cost and memory of the run that `cfg` describes; returns its FLOPs.

    Raises ValueError when it fits no device as it is laid out."""
    if cfg.planned_gpu not in GPUS:
        raise ValueError(f"planned_gpu={cfg.planned_gpu!r}: choose one of {', '.join(GPUS)}")
    if not 0 < cfg.planned_mfu < 1:
        raise ValueError(f"planned_mfu={cfg.planned_mfu}: give a share of the peak between 0 and 1")
    if "VARModule" not in cfg.module._target_:
        raise ValueError(
            "plan=true counts VARs only: a tokenizer's cost is that of its convolutions, see experiments/performance"
        )
    found, setup = facts(cfg), configured(cfg)
    sizes, num_images = found.sizes, found.num_images
    batch = cfg.data.global_batch_size
    steps_an_epoch = num_images // batch
    steps = round(cfg.steps * cfg.branch) if cfg.steps >= 0 else cfg.epochs * steps_an_epoch
    if cfg.branch < 1 and cfg.trunk is not None:
        shared = round(HOLD * steps)
        print(
            f"{cfg.name}, branch={cfg.branch:g}: the first {shared:,} of {steps:,} steps are those of {Path(cfg.trunk).name}"
        )
        steps -= shared
    flops, from_images = training_flops(sizes), "ImageNet" in cfg.data._target_
    counts, tokens = parameter_counts(sizes), scales.num_tokens(sizes["patch_nums"])
    total = float(flops * steps * batch)
    print(
        f"{cfg.name}: VAR of depth {sizes['depth']}, width {sizes['width']}, {counts['params_total'] / 1e6:,.1f} M parameters"
    )
    print(f"  {tokens} tokens an image on maps of {', '.join(str(pn) for pn in sizes['patch_nums'])}")
    print(
        f"  {steps:,} steps of {batch} images = {steps * batch / 1e6:,.1f} M images = {steps * batch / num_images:,.3g} epochs"
    )
    print(
        f"  {flops / 1e9:,.0f} GFLOP an image and step, {total:.3g} FLOP in all"
        + (" (tokenizing comes on top)" if from_images else "")
    )
    for line in found.assumed:
        print(f"  assumed: {line}")
    print_memory(memory(cfg, found, setup), setup)
    print_time(cfg, total, setup.num_devices)
    check_fit(cfg, found, setup)
    return total


def facts(cfg: DictConfig) -> Facts:
    """Read from tokenizer and data, or assumed for want of them."""
    given: dict[str, Any] = dict(RELEASED)
    assumed, tokenizer_params = [], RELEASED_PARAMS
    if cfg.tokenizer is None:
        is_large = cfg.model.get("shared_adaln", False)
        given["patch_nums"] = [1, 2, 3, 4, 6, 9, 13, 18, 24, 32] if is_large else [1, 2, 3, 4, 5, 6, 8, 10, 13, 16]
        assumed.append(
            f"the released tokenizer at {512 if is_large else 256} px (tokenizer=FILE to count with another)"
        )
    else:
        tokenizer = load_tokenizer(cfg.tokenizer)
        tokenizer_params = sum(parameter.numel() for parameter in tokenizer.parameters())
        given |= {key: tokenizer.sizes[key] for key in ("patch_nums", "codebook_size", "codebook_dim")}
    if OmegaConf.is_missing(cfg.data, "path"):
        num_images, given["num_classes"] = IMAGENET["num_images"], IMAGENET["num_classes"]
        assumed.append("ImageNet: 1,281,167 images of 1,000 classes (data.path=FOLDER to count with others)")
    else:
        is_tokens = "Token" in cfg.data._target_
        path = cfg.data.path
        manifest = load_json(Path(path) / "manifest.json", "varlab tokenize") if is_tokens else load_manifest(path)
        split = manifest["splits"]["train"]
        num_images = split["num_images"] if is_tokens else sum(shard["num_images"] for shard in split["shards"])
        given["num_classes"] = len(manifest["class_names"])
    settings: dict[str, Any] = OmegaConf.to_container(cfg.model, resolve=True)  # pyright: ignore[reportAssignmentType]
    with torch.device("meta"):
        var = get_object(settings["_target_"])(
            **{key: value for key, value in settings.items() if not key.startswith("_")}, **given
        )
    return Facts(var.sizes, num_images, tokenizer_params, assumed)


def configured(cfg: DictConfig) -> Setup:
    """The layout that the config asks for. `devices=auto` without a GPU in sight counts as eight a node."""
    devices = cfg.trainer.get("devices", 1)
    if devices in ("auto", -1):
        devices = torch.cuda.device_count() or 8
    is_sharded = "FSDP2" in str(OmegaConf.select(cfg, "trainer.strategy._target_"))
    return Setup(int(devices) * cfg.nodes, is_sharded, cfg.module.recompute, cfg.accumulate, cfg.module.loss_chunks)


def memory(cfg: DictConfig, found: Facts, setup: Setup) -> dict[str, float]:
    """GB on each device, by part, at the peak of a step."""
    sizes, precision = found.sizes, cfg.trainer.precision
    params = parameter_counts(sizes)["params_total"]
    weight_bytes = 2 if precision == "bf16-true" else 4
    shards = setup.num_devices if setup.is_sharded else 1
    images = cfg.data.global_batch_size / setup.num_devices / setup.accumulate
    if images < 1:
        raise ValueError(
            f"data.global_batch_size={cfg.data.global_batch_size} is less than one image for each of {setup.num_devices}"
            f" devices x {setup.accumulate} accumulated batches"
        )
    largest = scales.num_tokens(sizes["patch_nums"]) * sizes["codebook_size"]
    gradients = params * weight_bytes / shards
    parts = {
        "weights": params * weight_bytes / shards,
        "Adam's moments": 2 * params * weight_bytes / shards,
        "averaged weights": params * weight_bytes / shards if cfg.callbacks.get("ema") else 0,
        "gathered blocks": 2 * 2 * params / sizes["depth"] if setup.is_sharded else 0,
        "frozen tokenizer": 4 * found.tokenizer_params,
    }
    copies = 2 * linear_weights(sizes) if precision == "bf16-mixed" and not setup.is_sharded else 0
    kept = images * activation_bytes(sizes, precision, setup.recompute, setup.loss_chunks)
    again = images * (block_bytes(sizes, precision, "none") - block_bytes(sizes, precision, setup.recompute))
    earlier = gradients if setup.num_devices > 1 or setup.accumulate > 1 else 0  # else they come up as activations go
    at_the_loss = {
        "gradients": earlier,
        "activations": kept,
        "logits and their gradient": images * largest * (8 if "bf16" in precision else 12) / setup.loss_chunks,
        "bf16 copies of weights": copies,
    }
    in_the_last_block = {
        "gradients": earlier,
        "activations": kept,
        "one block computed again": again,
        "bf16 copies of weights": copies / sizes["depth"],
    }
    in_the_first_block = {**in_the_last_block, "gradients": gradients, "activations": kept / sizes["depth"]}
    moments = (at_the_loss, in_the_last_block, in_the_first_block)
    parts.update(max(moments, key=lambda moment: sum(moment.values())))
    if cfg.data.get("keep") == "device":
        parts["token cache"] = 2 * scales.num_tokens(sizes["patch_nums"]) * found.num_images
    return {name: size / GB for name, size in parts.items() if size}


def print_memory(parts: dict[str, float], setup: Setup) -> None:
    """One line a part."""
    print(f"memory of each of {setup.num_devices} devices, GB ({setup.overrides}):")
    for name, size in parts.items():
        print(f"  {size:8.2f}  {name}")
    print(f"  {sum(parts.values()):8.2f}  in all, and about {RESERVED:g} for driver and kernels")


def print_time(cfg: DictConfig, total: float, num_devices: int) -> None:
    """Days and GPU hours at the assumed MFU, hours at the speed that was measured."""
    if cfg.planned_flops is not None:
        print(f"time at {cfg.planned_flops:.3g} FLOP/s, as measured: {total / cfg.planned_flops / 3600:,.3g} hours")
    print(f"time at {cfg.planned_mfu:.0%} MFU on {num_devices} devices:")
    for name, gpu in GPUS.items():
        hours = total / (gpu.peak * cfg.planned_mfu) / 3600
        print(f"  {name:5} {hours / num_devices / 24:8.3g} days, {hours:10,.3g} GPU hours")


def check_fit(cfg: DictConfig, found: Facts, setup: Setup) -> None:
    """Prints the cheapest layout that fits. Raises ValueError when the one asked for does not."""
    gpu = GPUS[cfg.planned_gpu]
    room = gpu.memory - RESERVED
    needed = sum(memory(cfg, found, setup).values())
    best = cheapest(cfg, found, setup, room)
    if best is None:
        raise ValueError(
            f"{cfg.name} does not fit {setup.num_devices} x {cfg.planned_gpu} ({gpu.memory:g} GB) in any layout: take more devices"
        )
    if needed > room:
        raise ValueError(
            f"{cfg.name} needs {needed:.1f} GB of {room:.1f} on each {cfg.planned_gpu} with {setup.overrides}: the cheapest layout that"
            f" fits is {best.overrides}"
        )
    print(f"fits {cfg.planned_gpu} ({needed:.1f} of {room:.1f} GB); the cheapest layout that does: {best.overrides}")


def cheapest(cfg: DictConfig, found: Facts, given: Setup, room: float) -> Setup | None:
    """The layout with the least extra work that fits: accumulation costs least, then selective recomputation, then sharding's
    traffic, then recomputing all (a third more FLOPs)."""
    num_devices = given.num_devices
    shards = (False, True) if num_devices > 1 else (False,)
    recomputes = [
        (False, "none"),
        (False, "selective"),
        (True, "none"),
        (True, "selective"),
        (False, "all"),
        (True, "all"),
    ]
    per_device = cfg.data.global_batch_size // num_devices
    for is_sharded, recompute in recomputes:
        for accumulate in (1, 2, 4, 8, 16):
            if is_sharded not in shards or per_device % accumulate or per_device < accumulate:
                continue
            setup = Setup(num_devices, is_sharded, recompute, accumulate, given.loss_chunks)
            if sum(memory(cfg, found, setup).values()) <= room:
                return setup
    return None
