"""Strategies and plugins: FSDP2 and HSDP, weights in bf16, atomic checkpoint files."""

import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh

from varlab.checkpoints.checkpoint_files import (
    CHECKSUMS,
    META_FILE,
    check_sharded,
    optimizer_state_by_name,
    optimizer_state_by_number,
    read_file,
    replace_folder,
    swap_paths,
)
from varlab.checkpoints.formats import CHECKPOINT_FORMAT
from varlab.checkpoints.load import read_checkpoint
from varlab.files import atomic_write, sha256


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoint files atomically. Also loads the folders of sharded runs."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        target = Path(path)
        with atomic_write(target) as partial:
            if target.is_dir():  # checkpoint of a sharded run that continues unsharded
                shutil.rmtree(target)
            torch.save(checkpoint, partial)

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read_checkpoint(path)


class BF16Weights(MixedPrecision):
    """bf16-true: the network's weights, gradients and Adam's moments in bf16 (`VARModule` converts them), at half the
    memory.

    Logits and loss are fp32, and the frozen tokenizer stays fp32, unlike with Lightning's plugin, which converts
    everything. An update below 1/512 of a bf16 weight is lost: use bf16-mixed for the full recipe.
    """

    def __init__(self, device_type: str) -> None:
        super().__init__("bf16-mixed", device_type)
        self.precision = "bf16-true"  # pyright: ignore[reportAttributeAccessIssue]

    def autocast_context_manager(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, cache_enabled=False)


def precision_plugin(precision: str, device_type: str) -> MixedPrecision | None:
    """The plugin for a precision that Lightning implements otherwise: bf16-true, and 16-mixed on a CPU, which Lightning
    replaces by bf16-mixed."""
    if precision == "bf16-true":
        return BF16Weights(device_type)
    if precision == "16-mixed" and device_type == "cpu":
        return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    return None


class FSDP2(ModelParallelStrategy):
    """Every block of the transformer sharded over devices (`fully_shard`, see `VARModule`).

    `num_replicas`: number of groups of devices that each hold all weights (HSDP): 1 shards over all devices of all
    nodes; the number of nodes shards within each node and averages gradients across nodes. Checkpoints are folders with
    one file per rank, or, without `save_distributed_checkpoint`, one regular file. Both can be resumed on any number of
    devices. `timeout`: how long a process waits for the others before the run fails.
    """

    def __init__(
        self,
        num_replicas: int = 1,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = None,
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout or timedelta(minutes=30),
        )
        self.num_replicas = num_replicas

    def setup_environment(self) -> None:
        world_size = self.num_nodes * self.num_processes
        if world_size % self.num_replicas:
            raise ValueError(f"num_replicas={self.num_replicas} does not divide the {world_size} devices")
        self._data_parallel_size = world_size  # Lightning's "auto" counts nodes only
        super().setup_environment()
        if self.num_replicas > 1:
            shape = (self.num_replicas, world_size // self.num_replicas)
            mesh = init_device_mesh(self.root_device.type, shape, mesh_dim_names=("replicate", "shard"))
            assert self.lightning_module is not None
            self._device_mesh = self.lightning_module._device_mesh = mesh

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        is_whole = not self._save_distributed_checkpoint
        assert self.model is not None
        options = StateDictOptions(full_state_dict=is_whole, cpu_offload=True)
        state = get_optimizer_state_dict(self.model, optimizer, options=options)
        return optimizer_state_by_number(state) if is_whole and state else state

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        path = Path(self.broadcast(str(filepath)))
        if not self._save_distributed_checkpoint:
            if "ema" in checkpoint:
                checkpoint["ema"] = {name: value.full_tensor().cpu() for name, value in checkpoint["ema"].items()}
            return super().save_checkpoint(checkpoint, path)
        sharded = {"state_dict": checkpoint.pop("state_dict"), "ema": checkpoint.pop("ema", {})}
        for i, state in enumerate(checkpoint.pop("optimizer_states", [])):
            sharded[f"optimizer_{i}"] = state
        partial, old = swap_paths(path)
        if self.is_global_zero:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        self.barrier()
        save(sharded, checkpoint_id=partial)
        own = {file.name: sha256(file) for file in partial.glob(f"__{self.global_rank}_*.distcp")}
        checksums: list[dict[str, str]] = [{}] * self.world_size
        torch.distributed.all_gather_object(checksums, own)
        if self.is_global_zero:
            checkpoint[CHECKSUMS] = {name: digest for part in checksums for name, digest in part.items()}
            checkpoint[CHECKSUMS][".metadata"] = sha256(partial / ".metadata")
            torch.save(checkpoint, partial / META_FILE)
            replace_folder(partial, path, old)
        self.barrier()

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        path = Path(self.broadcast(str(checkpoint_path)))
        assert self.model is not None and self.lightning_module is not None
        if not path.is_dir() or read_file(path / META_FILE)["varlab"]["format"] != CHECKPOINT_FORMAT:
            return self.load_unsharded(path)
        check_sharded(path)
        rest = super().load_checkpoint(path, weights_only=True)
        if "ema_updates" in rest:
            weights = self.lightning_module.named_parameters()
            rest["ema"] = {name: torch.empty_like(p.data) for name, p in weights if p.requires_grad}
            load({"ema": rest["ema"]}, checkpoint_id=path)
        return rest

    def load_unsharded(self, path: Path) -> dict[str, Any]:
        """Loads weights and optimizer of an unsharded run, or of a folder in an older format; each rank keeps its
        shard."""
        checkpoint, whole = read_checkpoint(path), StateDictOptions(full_state_dict=True)
        assert self.model is not None
        if self.optimizers:
            (optimizer,), (state,) = self.optimizers, checkpoint["optimizer_states"]
            names = {parameter: name for name, parameter in self.model.named_parameters()}
            groups = [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
            set_optimizer_state_dict(self.model, optimizer, optimizer_state_by_name(state, groups), options=whole)
        set_model_state_dict(self.model, checkpoint.pop("state_dict"), options=whole)
        return checkpoint
