"""The record of a run: its row in the table of runs (`run.json`), its progress bar, its summary."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch.callbacks import ProgressBar
from matplotlib.figure import Figure
from tqdm import tqdm

from varlab.cost.flops import parameter_counts, six_nd, tokenizer_flops, training_flops
from varlab.data.token_datamodule import TokenDataModule
from varlab.files import atomic_write, read_curves, save_json
from varlab.models import scales
from varlab.training.loggers import run_id
from varlab.training.msvqvae_module import MSVQVAEModule
from varlab.training.run_settings import changes, in_force
from varlab.training.signals import Stopped
from varlab.training.var_module import VARModule


def facts_of(module: VARModule | MSVQVAEModule) -> dict[str, Any]:
    """The fields of `run.json` about the network, the schedule and the cost per image."""
    schedule, batch = module.schedule, module.data.global_batch_size
    branch_step = schedule.branch_step(module.total_steps)
    shared = {
        "lr_peak": module.peak_lr,
        "schedule": schedule.name,
        "warmup": schedule.warmup_steps(module.total_steps) * batch,
        "cooldown": 0 if branch_step is None else (module.total_steps - branch_step) * batch,
        "weight_decay": module.weight_decay[0],
        "patch_nums": module.net.patch_nums,
        "init_from": module.init_from,
    }
    if isinstance(module, MSVQVAEModule):
        return {
            "kind": "tokenizer",
            "params_total": sum(parameter.numel() for parameter in module.net.parameters()),
            "tokens_per_image": scales.num_tokens(module.net.patch_nums),
            "flops_exact_per_image": 3 * sum(tokenizer_flops(module.net).values()),
            "codes": module.net.quantizer.codebook_size,
            **shared,
        }
    net, data = module.net, module.data
    is_tokens = isinstance(data, TokenDataModule)
    return {
        "kind": "var",
        "depth": net.depth,
        "width": net.width,
        "order": net.order,
        **parameter_counts(net.sizes),
        **facts_per_image(module, net.patch_nums),
        "pyramids": net.pyramids,
        "flops_tokenizer_per_image": 0 if is_tokens else tokenizer_flops(module.tokenizer)["encode"],
        "tokenizer_id": module.tokenizer_fingerprint,
        "codes": net.codebook_size,
        "label_smoothing": getattr(module.loss, "label_smoothing", None),
        "sizes": net.sizes,
        "params_trained": sum(parameter.numel() for parameter in net.parameters() if parameter.requires_grad),
        **shared,
        **(data.marginal_entropies() if is_tokens else {}),
    }


def facts_per_image(module: VARModule, patch_nums: scales.PatchNums) -> dict[str, int]:
    """Tokens and FLOPs per image if these scales are trained."""
    sizes = {**module.net.sizes, "patch_nums": patch_nums}
    cost = 1 if module.objective is None else module.objective.cost
    return {
        "tokens_per_image": scales.num_tokens(sizes["patch_nums"]),
        "flops_exact_per_image": round(cost * training_flops(sizes)),
        "flops_6nd_per_image": six_nd(sizes),
    }


class RunRecord(Callback):
    """Counts the cost of a run and writes `run.json` at each validation and at the end.

    Counters (images, tokens, FLOPs, device seconds) are part of the checkpoint, so they survive a restart. So are the
    settings of each stretch of steps (see `run_settings`): a run that continues with others says so before it starts.
    """

    COUNTERS = ("images_seen", "tokens_seen", "flops_exact", "flops_6nd", "flops_tokenizer", "device_seconds")

    def __init__(self, folder: str, seed: int, trunk: str | None = None) -> None:
        self.folder, self.seed, self.trunk = Path(folder), seed, trunk
        self.counters: dict[str, int | float] = dict.fromkeys(self.COUNTERS, 0)
        self.facts: dict[str, Any] = {}
        self.settings: dict[str, Any] = {}
        self.stretches: list[dict[str, Any]] = []
        self.resumed_step = 0
        self.validated_step = self.total_steps = -1
        self.has_ended, self.error = False, ""
        self.logged_time = self.batch_time = self.validation_start = 0.0
        self.logged_images = self.logged_flops = 0.0
        self.peak_flops: float | None = None
        self.scores: dict[str, float] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"counters": dict(self.counters), "total_steps": self.total_steps, "stretches": self.stretches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.counters, self.total_steps = dict(state_dict["counters"]), state_dict["total_steps"]
        self.stretches = list(state_dict.get("stretches", []))  # none in checkpoints of 0.1

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.resumed_step = checkpoint["global_step"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, VARModule | MSVQVAEModule)
        self.check_length(int(trainer.estimated_stepping_batches))
        self.facts = facts_of(pl_module)
        self.peak_flops = (
            get_available_flops(pl_module.device, torch.bfloat16) if pl_module.device.type == "cuda" else None
        )

    def check_length(self, total_steps: int) -> None:
        """Raises ValueError if the checkpoint is already at or beyond the run's last step, unless the run has finished, or is a
        branch that ends where it begins."""
        is_end = self.resumed_step == total_steps and (total_steps == self.total_steps or self.trunk is not None)
        if self.resumed_step and total_steps <= self.resumed_step and not is_end:
            raise ValueError(
                f"the run has {total_steps:,} steps, but its checkpoint is already at step {self.resumed_step:,}: give more steps,"
                " or start a new run from its weights with module.init_from=CHECKPOINT"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.total_steps = int(trainer.estimated_stepping_batches)
        assert isinstance(pl_module, VARModule | MSVQVAEModule)
        self.begin_stretch(trainer, pl_module)
        self.batch_time = self.logged_time = time.perf_counter()
        self.logged_images, self.logged_flops = self.counters["images_seen"], self.total_flops()
        if trainer.is_global_zero:
            print(self.describe_run(trainer), flush=True)

    def begin_stretch(self, trainer: Trainer, module: VARModule | MSVQVAEModule) -> None:
        """Notes the settings if they differ from those so far, and names the differences of a run that continues."""
        before = in_force(self.stretches)
        changed = changes(before, self.settings)
        if not changed:
            return
        self.stretches = [*self.stretches, {"first_step": trainer.global_step, "settings": changed}]
        if not before or not trainer.is_global_zero:
            return
        lines = [f"  {name}: {before.get(name)} before, now {value}" for name, value in changed.items()]
        used = max(group["lr"] / group.get("lr_multiplier", 1.0) for group in trainer.optimizers[0].param_groups)
        now = module.peak_lr * module.schedule(trainer.global_step, self.total_steps)
        lines.append(f"  the learning rate goes from {used:.3g} in the last step to {now:.3g} in the next one")
        print("\n".join([f"{self.folder.name} continues with other settings:", *lines]), flush=True)

    def describe_run(self, trainer: Trainer) -> str:
        """A one-line description of the run, to check before it takes days."""
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        images, tokens = self.total_steps * data.global_batch_size, self.facts["tokens_per_image"]
        unique, flops = sum(data.shard_counts), self.facts["flops_exact_per_image"]
        begun = f"continues at step {trainer.global_step:,}; " if trainer.global_step else ""
        return (
            f"{self.folder.name}: {begun}{self.facts['params_total'] / 1e6:,.1f} M parameters; {self.total_steps:,} steps of"
            f" {data.global_batch_size} images ({trainer.world_size} devices x {data.batch_size()}) = {images / unique:,.3g} epochs of"
            f" {unique:,} images; {tokens:,} tokens per image, {images * tokens:.3g} in total; {flops * images:.3g} FLOP"
        )

    def total_flops(self) -> int | float:
        """FLOPs so far, network and tokenizer."""
        return self.counters["flops_exact"] + self.counters["flops_tokenizer"]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        images, now = len(batch.condition) * trainer.world_size, time.perf_counter()
        facts = self.facts
        if isinstance(pl_module, VARModule) and pl_module.trained_patch_nums != pl_module.net.patch_nums:
            facts = {**facts, **facts_per_image(pl_module, pl_module.trained_patch_nums)}
        self.counters["images_seen"] += images
        self.counters["tokens_seen"] += images * facts["tokens_per_image"]
        for key in ("flops_exact", "flops_6nd", "flops_tokenizer"):
            self.counters[key] += images * facts.get(f"{key}_per_image", 0)
        self.counters["device_seconds"] += (now - self.batch_time) * trainer.world_size
        self.batch_time = now
        if trainer.global_step % trainer.log_every_n_steps or trainer.global_step == 0:  # pyright: ignore[reportAttributeAccessIssue]
            return
        seconds = max(now - self.logged_time, 1e-9)
        flops_per_second = (self.total_flops() - self.logged_flops) / seconds
        pl_module.log_dict({f"count/{key}": float(value) for key, value in self.counters.items()})
        pl_module.log(
            "speed/images_per_second", (self.counters["images_seen"] - self.logged_images) / seconds, prog_bar=True
        )
        pl_module.log("speed/flops_per_second", flops_per_second)
        if self.peak_flops:
            pl_module.log("speed/mfu", flops_per_second / trainer.world_size / self.peak_flops, prog_bar=True)
        skipped = float(trainer.datamodule.skipped)  # pyright: ignore[reportAttributeAccessIssue]
        pl_module.log("data/skipped", skipped, sync_dist=True, reduce_fx="sum")
        self.logged_time, self.logged_images, self.logged_flops = now, self.counters["images_seen"], self.total_flops()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.validation_start = time.perf_counter()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:  # so that curves against images or compute are exact
            pl_module.log_dict({f"count/{key}": float(self.counters[key]) for key in ("images_seen", "flops_exact")})

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.batch_time = time.perf_counter()  # validation is not training time
        self.logged_time += self.batch_time - self.validation_start
        if trainer.sanity_checking:
            return
        self.validated_step = trainer.global_step
        self.scores = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("val")}
        self.write(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.has_ended = True
        self.write(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.error = "stopped" if isinstance(exception, Stopped) else "failed"
        self.write(trainer, pl_module)

    def write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes `run.json`; the README of `experiments/` lists the units."""
        if not trainer.is_global_zero or not self.facts:
            return
        data = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        unique = sum(data.shard_counts)
        unfinished = "stopped" if self.has_ended else "running"
        state = "finished" if trainer.global_step == self.total_steps else unfinished
        row = {
            "run_id": run_id(self.folder),
            "name": self.folder.name,
            "state": self.error or state,
            **{key: value for key, value in self.facts.items() if not key.endswith("_per_image")},
            **self.counters,
            "step": trainer.global_step,
            "unique_images": unique,
            "views": getattr(data, "views", None),
            "epochs": self.counters["images_seen"] / unique,
            "batch": data.global_batch_size,
            "dataset_id": data.data_fingerprint,
            "class_names": len(data.class_names),
            "seed": self.seed,
            "parent_run": self.folder.name if self.trunk is None else Path(self.trunk).name,
            "device": torch.cuda.get_device_name(pl_module.device)
            if pl_module.device.type == "cuda"
            else pl_module.device.type,
            "num_devices": trainer.world_size,
            "precision": str(trainer.precision),
            "is_compiled": pl_module.compiles,
            "torch": torch.__version__,
            "val_images": data.num_val,
            **{key.replace("/", "_"): value for key, value in self.scores.items()},
            "train_loss_unique": self.unique_loss(unique),
            "stretches": self.stretches,
            "git_commit": git_commit(),
            "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        save_json(self.folder / "run.json", row)

    def unique_loss(self, unique: int) -> float | None:
        """Mean of the training loss logged in the last tenth of a run in which no image was seen twice; else None. The
        loss includes label dropout."""
        if self.counters["images_seen"] > unique:
            return None
        curve = read_curves(self.folder / "metrics.csv").get("train/loss", {})
        late = [loss for step, loss in curve.items() if step >= 0.9 * self.total_steps]
        return sum(late) / len(late) if late else None


def git_commit() -> str | None:
    """Commit of the code that runs, None outside a checkout."""
    answer = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return answer.stdout.strip() or None


class Progress(ProgressBar):
    """One bar for the whole run: loss, error, images per second, MFU if the device's peak is known; the remaining time
    is that of the run, not of the epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.bar: tqdm | None = None

    def disable(self) -> None:
        self.close()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            total = int(trainer.estimated_stepping_batches)
            pause = 0.5 if sys.stderr.isatty() else 10.0  # fewer lines in a log file
            self.bar = tqdm(total=total, initial=trainer.global_step, unit="step", smoothing=0.05, mininterval=pause)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.bar is None:
            return
        if trainer.global_step % trainer.log_every_n_steps == 0:  # pyright: ignore[reportAttributeAccessIssue]
            shown = {name.split("/")[-1]: value for name, value in trainer.progress_bar_metrics.items()}
            self.bar.set_postfix(shown, refresh=False)
        self.bar.update(trainer.global_step - self.bar.n)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.close()

    def close(self) -> None:
        """Leaves the bar on the screen."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def summary(folder: Path) -> str:
    """The results of a run and its files, as text; also writes `curves.png`."""
    row = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    scores = [f"{key} {row[key]:.4g}" for key in ("val_loss", "val_loss_last", "val_err", "val_psnr") if key in row]
    seconds, devices = row["device_seconds"], row["num_devices"]
    saved = sorted((folder / "checkpoints").glob("[!.]*"))
    lines = [
        f"{folder}: {row['state']} at step {row['step']:,}, {row['images_seen']:,} images ({row['epochs']:.3g} epochs),"
        f" {seconds / devices / 60:.1f} minutes of training on {devices} x {row['device']}",
        f"  {', '.join(scores) or 'not validated'}",
        f"  checkpoints: {', '.join(str(path) for path in saved)}",
    ]
    if plot_curves(folder):
        lines.append(f"  curves: {folder / 'curves.png'} (data: {folder / 'metrics.csv'})")
    return "\n".join(lines)


def plot_curves(folder: Path) -> bool:
    """Plots loss, error or PSNR, gradient norm and speed against the step; returns False if nothing was logged."""
    curves = read_curves(folder / "metrics.csv")
    panels = [
        {name: curves[name] for name in names if name in curves}
        for names in (
            ("train/loss", "val/loss", "val_raw/loss"),
            ("train/err", "val/err", "val/psnr"),
            ("train/grad_norm",),
            ("speed/images_per_second",),
        )
    ]
    panels = [panel for panel in panels if panel]
    if not panels:
        return False
    figure = Figure(figsize=(4 * len(panels), 3), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name, curve in panel.items():
            axes.plot(list(curve), list(curve.values()), label=name, marker="o" if len(curve) < 20 else None, ms=3)
        axes.set(xlabel="step")
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    with atomic_write(folder / "curves.png") as partial:
        figure.savefig(partial, dpi=120, format="png")
    return True
