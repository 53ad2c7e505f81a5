"""A run's config and objects -> the `PlannedRun` that `cost.plan` takes."""

from collections.abc import Callable

import torch
from lightning.pytorch.strategies import Strategy
from omegaconf import DictConfig

from varlab.checkpoints.load import load_tokenizer
from varlab.cost.flops import training_flops
from varlab.cost.plan import RELEASED_PARAMS, Layout, PlannedRun
from varlab.data.datamodule import OrderedDataModule
from varlab.data.token_datamodule import TokenDataModule
from varlab.models import scales
from varlab.models.conditioning import embedder_arguments
from varlab.models.var import VAR
from varlab.training.schedules import Schedule
from varlab.training.strategies import FSDP2

IMAGENET = 1_281_167, 1000  # training images, classes


def planned_run(
    cfg: DictConfig,
    make_net: Callable[..., VAR],
    data: OrderedDataModule,
    has_data: bool,
    schedule: Schedule,
    strategy: Strategy | str,
) -> PlannedRun:
    """The run of a config. What depends on tokenizer and data is read from them; without cfg.tokenizer the released
    tokenizer is assumed, and without `has_data` (no data.path given) ImageNet."""
    assumed = []
    num_images, num_classes = data.declared_size() if has_data else IMAGENET
    if not has_data:
        assumed.append("ImageNet: 1,281,167 images of 1,000 classes (set data.path=FOLDER to use your data)")
    params = RELEASED_PARAMS
    given = {"patch_nums": scales.RELEASED_256, "codebook_size": 4096, "codebook_dim": 32, "num_classes": num_classes}
    if cfg.tokenizer is not None:
        tokenizer = load_tokenizer(cfg.tokenizer, trust_code=cfg.trust_code)
        params = sum(parameter.numel() for parameter in tokenizer.parameters())
        given |= {name: getattr(tokenizer.quantizer, name) for name in ("patch_nums", "codebook_size", "codebook_dim")}
        given |= tokenizer.quantizer.head_arguments()
    if not has_data and cfg.data.condition != "label":
        raise ValueError(
            f"data.condition={cfg.data.condition}: the size of such a network follows from the data: set data.path"
        )
    if has_data and cfg.data.condition != "label":
        data.setup("fit")
        given |= embedder_arguments(make_net, data.condition_shape, data.text)
    pyramids = data.pyramids if has_data and isinstance(data, TokenDataModule) else []
    if pyramids:
        given["patch_nums"] = max(pyramids, key=scales.num_tokens)
    with torch.device("meta"):
        net = make_net(**given)
        for pyramid in pyramids:
            net.at(pyramid)  # raises if it cannot
        if cfg.tokenizer is None and net.shared_adaln:  # the paper's d36, at 512 px
            given["patch_nums"] = scales.RELEASED_512
            net = make_net(**given)
    if cfg.tokenizer is None:
        side = 16 * given["patch_nums"][-1]
        assumed.append(f"the released tokenizer at {side} px (set tokenizer=FILE to use another)")
    batch = cfg.data.global_batch_size
    return PlannedRun(
        name=cfg.name,
        sizes=net.sizes,
        num_images=num_images,
        steps=planned_steps(cfg, schedule, num_images // batch),
        batch=batch,
        precision=cfg.trainer.precision,
        layout=layout_of(cfg, strategy),
        from_images=not isinstance(data, TokenDataModule),
        has_ema=bool(cfg.callbacks.get("ema")),
        tokens_on_device=isinstance(data, TokenDataModule) and data.keep == "device",
        tokenizer_params=params,
        assumed=assumed,
    )


def planned_steps(cfg: DictConfig, schedule: Schedule, steps_per_epoch: int) -> int:
    """Optimizer steps that this run takes itself, from `steps` or `epochs`, without those that a branch
    shares with its trunk."""
    steps = round(cfg.steps * cfg.branch) if cfg.steps >= 0 else cfg.epochs * steps_per_epoch
    shared = schedule.branch_step(steps) if cfg.branch < 1 and cfg.trunk is not None else None
    if shared is None:
        return steps
    print(f"{cfg.name}, branch={cfg.branch:g}: the first {shared:,} of {steps:,} steps are shared with {cfg.trunk}")
    return steps - shared


def affordable_steps(compute: float, run: PlannedRun) -> int:
    """Optimizer steps that `compute` FLOPs allow, not counting the tokenizer. Raises ValueError if that is less than
    one."""
    step = training_flops(run.sizes) * run.batch
    if compute < step:
        raise ValueError(f"compute={compute:g} FLOP is less than one step of this network ({step:.3g} FLOP)")
    return round(compute / step)


def layout_of(cfg: DictConfig, strategy: Strategy | str) -> Layout:
    """The layout that the config requests. `devices=auto` counts as eight per node if this machine has no GPU."""
    devices = cfg.trainer.get("devices", 1)
    if devices in ("auto", -1):
        devices = torch.cuda.device_count() or 8
    num_devices = int(devices) * cfg.nodes
    return Layout(
        num_devices, isinstance(strategy, FSDP2), cfg.module.recompute, cfg.accumulate, cfg.module.loss_chunks
    )
