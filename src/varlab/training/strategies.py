"""Ways of sharing a model out over devices that Lightning does not name itself."""

from lightning.pytorch.strategies import ModelParallelStrategy


class FSDP2(ModelParallelStrategy):
    """Every block of the transformer sharded over all devices of all nodes (`fully_shard`, see `VARModule`).

    Checkpoints are folders with one file a rank, or, without `save_distributed_checkpoint`, one ordinary file.
    """

    def __init__(self, save_distributed_checkpoint: bool = True, process_group_backend: str | None = None) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
        )

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes  # Lightning's "auto" counts nodes only
        super().setup_environment()
