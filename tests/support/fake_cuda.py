"""CUDA without a GPU: what varlab does on a GPU runs on fake tensors, which have a device, a shape and a dtype but no
values. Finds tensors on the wrong device and every place where the host waits for the device.

`python -m support.fake_cuda FILE` runs all cases with the settings in FILE (JSON) and writes FILE.out: for each case, the
host syncs and uploads by place, and what went wrong. A CPU build of torch needs the library of `build` in LD_PRELOAD.
"""

import json
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from hydra.utils import instantiate
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torchmetrics import Metric

import varlab
from support.networks import make_tokenizer, make_var
from support.runs import config
from varlab.checkpoints.load import load_tokenizer
from varlab.data.images import ImageBatch, ImageDataset
from varlab.evaluation.likelihood import likelihood_scores
from varlab.models.msvqvae import MSVQVAE
from varlab.models.var import VAR
from varlab.sampling.acceleration import use_bf16
from varlab.sampling.editing import edit
from varlab.sampling.generate import generate
from varlab.training.strategies import precision_plugin

CUDA = torch.device("cuda", 0)
STAND_IN = {torch.bool: True, torch.float32: 1.0, torch.float64: 1.0, torch.bfloat16: 1.0}  # otherwise 0
aten = torch.ops.aten
SOURCE = str(Path(varlab.__file__).parent)


def build(folder: Path) -> Path | None:
    """The library for LD_PRELOAD; None for a build of torch that has CUDA. Takes two seconds."""
    if torch.backends.cuda.is_built():
        return None
    root, library = Path(torch.__file__).parent, folder / "fake_cuda.so"
    source = Path(__file__).with_suffix(".cpp")
    paths = [f"-I{root}/include", f"-L{root}/lib", f"-Wl,-rpath,{root}/lib"]
    command = ["g++", "-std=c++20", "-O0", "-shared", "-fPIC", str(source), "-o", str(library), *paths]
    subprocess.run([*command, "-lc10", "-ltorch_cpu"], check=True)
    return library


class HostTraffic(TorchDispatchMode):
    """Counts where the host waits for the device (`syncs`) and where it sends something to it (`uploads`), by file and
    function of varlab, or of whoever else does it."""

    def __init__(self) -> None:
        super().__init__()
        self.syncs: Counter[str] = Counter()
        self.uploads: Counter[str] = Counter()
        self.launches = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default:
            if args[0].is_cuda:
                self.syncs[place()] += 1
            return STAND_IN.get(args[0].dtype, 0)
        out = func(*args, **kwargs)
        if func in (aten._to_copy.default, aten.copy_.default):
            source = args[1] if func is aten.copy_.default else args[0]
            if source.is_cuda and not out.is_cuda:
                self.syncs[place()] += 1
            if out.is_cuda and not source.is_cuda:
                self.uploads[place()] += 1
        if isinstance(out, Tensor) and out.is_cuda and not func.is_view:
            self.launches += 1
        return out


def place() -> str:
    """The innermost function of varlab that is running."""
    frames = [frame for frame in traceback.extract_stack() if SOURCE in frame.filename]
    if not frames:
        frames = [frame for frame in traceback.extract_stack() if "/lightning/" in frame.filename]
    return f"{Path(frames[-1].filename).name}:{frames[-1].name}" if frames else "elsewhere"


def fake(module: nn.Module) -> nn.Module:
    """The module with fake CUDA tensors in place of its own; call it in the mode."""
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, value in tensors.items():
                if value is not None:
                    made = torch.empty(value.shape, dtype=value.dtype, device=CUDA)
                    is_trained = isinstance(value, nn.Parameter)
                    tensors[name] = nn.Parameter(made, value.requires_grad) if is_trained else made
        for name in part._defaults if isinstance(part, Metric) else ():
            setattr(part, name, torch.zeros(getattr(part, name).shape, device=CUDA))
    return module


class FakeGPU(CPUAccelerator):
    """An accelerator that accepts the device."""

    def setup_device(self, device: torch.device) -> None:
        pass


class OneFakeGPU(SingleDeviceStrategy):
    """A strategy whose module stays on the device."""

    def __init__(self) -> None:
        super().__init__(CUDA, accelerator=FakeGPU())

    def teardown(self) -> None:
        pass


class FromTheFirstBatchOn(Callback):
    """Forgets what was counted while the run began."""

    def __init__(self, traffic: HostTraffic) -> None:
        self.traffic = traffic

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 0 and batch_idx == 0:
            self.traffic.syncs.clear()
            self.traffic.uploads.clear()


class FakeHostCopy:
    """In place of `HostCopy`: pinned memory and events need a GPU. The copy is not a sync."""

    def __init__(self, values: Tensor) -> None:
        assert values.is_cuda
        self.number = len(values)

    def read(self) -> list[float]:
        return [1.0] * self.number


def apply(self: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """In place of `Module._apply`, which exchanges the contents of tensors: moves and casts parameters and buffers."""
    for part in self.modules():
        for tensors in (part._parameters, part._buffers):
            for name, value in tensors.items():
                moved = None if value is None else fn(value)
                if value is not None and moved is not value:
                    is_trained = isinstance(value, nn.Parameter)
                    tensors[name] = nn.Parameter(moved, value.requires_grad) if is_trained else moved
    return self


def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """In place of `scaled_dot_product_attention`, which a CPU build decomposes: the kernels that a GPU would choose."""
    if torch.is_autocast_enabled("cuda"):
        q, k, v = (part.to(torch.bfloat16) for part in (q, k, v))
    if attn_mask is None and q.dtype == torch.bfloat16:
        return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, False, scale=scale)[0]
    bias = None
    if attn_mask is not None:
        bias = torch.zeros(attn_mask.shape, dtype=q.dtype, device=q.device).masked_fill(~attn_mask, -torch.inf)
        bias = bias.expand(q.shape[0], q.shape[1], -1, -1)
    return aten._scaled_dot_product_efficient_attention(q, k, v, bias, q.requires_grad, scale=scale)[0]


decode = ImageDataset.__getitems__


def fake_images(self: ImageDataset, requests: list) -> ImageBatch:
    """In place of `ImageDataset.__getitems__`: decodes outside of the mode."""
    with unset_fake_temporarily():
        batch = decode(self, requests)
    return ImageBatch(*(torch.empty(value.shape, dtype=value.dtype) for value in batch))


@contextmanager
def fake_cuda() -> Iterator[HostTraffic]:
    """The mode in which tensors are fake, with a count of host traffic."""
    with (
        mock.patch("varlab.training.callbacks.HostCopy", FakeHostCopy),
        mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
        mock.patch("torch.cuda.is_bf16_supported", lambda: True),
        mock.patch("torch.nn.functional.scaled_dot_product_attention", attention),
        mock.patch.object(nn.Module, "_apply", apply),
        mock.patch.object(ImageDataset, "__getitems__", fake_images),
        FakeTensorMode(),
        HostTraffic() as traffic,
    ):
        yield traffic


def train(folder: Path, *overrides: str, steps: int = 3) -> HostTraffic:
    """Host traffic of some training steps of a Trainer, without the logged ones."""
    cfg = config(folder, *overrides, f"steps={steps}", "module.is_compiled=false")  # Inductor needs a real GPU
    data, module = instantiate(cfg.data, _convert_="all"), instantiate(cfg.module, _convert_="all")
    callbacks = [instantiate(cfg.callbacks[name]) for name in ("reseed", "ema", "health") if cfg.callbacks[name]]
    with fake_cuda() as traffic:
        fake(module)
        if getattr(module, "adversarial", None) is not None:
            fake(module.adversarial.net)
            module.adversarial.logit_means = torch.zeros(2, device=CUDA)
        precision = precision_plugin(cfg.trainer.precision, "cuda") or MixedPrecision(cfg.trainer.precision, "cuda")
        trainer = Trainer(
            strategy=OneFakeGPU(),
            plugins=[precision],
            callbacks=[*callbacks, FromTheFirstBatchOn(traffic)],
            max_steps=steps,
            accumulate_grad_batches=cfg.accumulate,
            log_every_n_steps=1000,
            limit_val_batches=0,
            use_distributed_sampler=False,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, data)
        assert trainer.global_step == steps
    return traffic


CASES: dict[str, Callable[[dict[str, Any], Path], HostTraffic]] = {}


def case(function: Callable[[dict[str, Any], Path], HostTraffic]) -> Callable[[dict[str, Any], Path], HostTraffic]:
    """Registers a case by the name of its function."""
    CASES[function.__name__] = function
    return function


@case
def training_from_tokens(given: dict[str, Any], folder: Path) -> HostTraffic:
    return train(folder, *given["var"], "trainer.precision=bf16-mixed", "accumulate=2", given["ema"])


@case
def training_from_tokens_in_bf16(given: dict[str, Any], folder: Path) -> HostTraffic:
    return train(folder, *given["var"], "trainer.precision=bf16-true")


@case
def training_from_images(given: dict[str, Any], folder: Path) -> HostTraffic:
    return train(folder, *given["var_on_images"], "trainer.precision=bf16-mixed", given["ema"])


@case
def training_of_a_tokenizer(given: dict[str, Any], folder: Path) -> HostTraffic:
    return train(folder, *given["tokenizer"], "trainer.precision=bf16-mixed", given["ema"])


def networks(precision: str = "fp32", **sizes: Any) -> tuple[MSVQVAE, VAR]:
    """Tiny networks on the fake GPU; call it in the mode."""
    tokenizer, var = make_tokenizer(), make_var(**sizes)
    if precision == "bf16":
        use_bf16(tokenizer, var)
    fake(tokenizer)
    fake(var)
    return tokenizer.eval(), var.eval()


FILTERS = [
    {},
    {"top_k": 5, "top_p": 0.9, "min_p": 0.1},
    {"top_k": 1},
    {"top_p": 0.9, "temperature": 0.9, "cfg_scale": 0.0},
]


def sampling(precision: str, **sizes: Any) -> HostTraffic:
    """Host traffic of `generate` with several filters, for labels that are on the GPU."""
    with fake_cuda() as traffic:
        tokenizer, var = networks(precision, **sizes)
        for settings in FILTERS:
            images = generate(var, tokenizer, torch.zeros(3, dtype=torch.long, device=CUDA), seed=0, **settings)
            assert isinstance(images, Tensor) and images.is_cuda and images.dtype == torch.float32
    return traffic


@case
def sampling_in_fp32(given: dict[str, Any], folder: Path) -> HostTraffic:
    return sampling("fp32")


@case
def sampling_in_bf16(given: dict[str, Any], folder: Path) -> HostTraffic:
    return sampling("bf16", shared_adaln=True)


@case
def sampling_in_raster_order(given: dict[str, Any], folder: Path) -> HostTraffic:
    return sampling("bf16", order="raster")


@case
def what_a_cuda_graph_captures(given: dict[str, Any], folder: Path) -> HostTraffic:
    """The function that `CUDAGraph` calls, without the checks and the upload before it."""
    calls: list[Any] = []

    def accelerate(draw: Any, *rest: Any) -> Any:
        calls.append((draw, rest[3], rest[4]))
        return draw

    with fake_cuda(), mock.patch("varlab.sampling.generate.accelerate", accelerate):
        tokenizer, var = networks("bf16")
        for settings in FILTERS:
            generate(var, tokenizer, torch.zeros(3, dtype=torch.long, device=CUDA), seed=0, **settings)
        with HostTraffic() as traffic, torch.no_grad():
            for draw, condition, uniform in calls:
                draw(condition, uniform)
    return traffic


@case
def editing(given: dict[str, Any], folder: Path) -> HostTraffic:
    with fake_cuda() as traffic:
        tokenizer, var = networks("bf16")
        labels, keep = torch.zeros(2, dtype=torch.long, device=CUDA), torch.ones(4, 4, device=CUDA)
        for blend in ("tokens", "latents"):
            edit(var, tokenizer, torch.zeros(2, 3, 16, 16, device=CUDA), keep, labels, blend=blend)
    return traffic


@case
def likelihood(given: dict[str, Any], folder: Path) -> HostTraffic:
    with fake_cuda() as traffic:
        tokenizer, var = networks()
        batch = torch.zeros(2, 30, dtype=torch.long, device=CUDA), torch.zeros(2, dtype=torch.long, device=CUDA)
        likelihood_scores(var, tokenizer.quantizer, [batch])
    return traffic


@case
def validation(given: dict[str, Any], folder: Path) -> HostTraffic:
    """Scoring of one validation batch by both modules."""
    cfg = config(folder, *given["var_on_images"], "steps=1")
    tokenizer_cfg = config(folder, *given["tokenizer"], "steps=1")
    module, tokenizer_module = (instantiate(one.module, _convert_="all") for one in (cfg, tokenizer_cfg))
    with fake_cuda() as traffic, torch.no_grad():
        fake(module)
        fake(tokenizer_module)
        module.net = fake(make_var(patch_nums=module.tokenizer.patch_nums)).eval()
        size = module.tokenizer.image_size
        weight, condition = torch.ones(2, device=CUDA), torch.zeros(2, dtype=torch.long, device=CUDA)
        batch = ImageBatch(torch.zeros(2, 3, *size, device=CUDA), condition, weight, weight)
        module.score(batch, module.val_scores)
        tokenizer_module.score(batch, tokenizer_module.val_scores)
    return traffic


@case
def loading_a_checkpoint(given: dict[str, Any], folder: Path) -> HostTraffic:
    with fake_cuda() as traffic:
        tokenizer = load_tokenizer(given["checkpoint"]).to(CUDA)
        assert all(value.is_cuda for value in tokenizer.state_dict().values())
    return traffic


def main() -> None:
    """Runs all cases."""
    file = Path(sys.argv[1])
    given, found = json.loads(file.read_text(encoding="utf-8")), {}
    for name, run in CASES.items():
        try:
            traffic = run(given, file.parent / name)
            found[name] = {"syncs": traffic.syncs, "uploads": traffic.uploads, "launches": traffic.launches}
        except Exception:
            found[name] = {"error": traceback.format_exc()}
    Path(f"{file}.out").write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
