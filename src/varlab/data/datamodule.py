"""Base class of both data modules: batch sizes, order, resuming, validation, the count of replaced samples."""

import signal
from typing import Any

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from varlab.data.order import Order, TrainBatches, ValidationBatches

WORKER_GRACE = 30  # seconds that a data worker lives on after SIGTERM
BATCH_TIMEOUT = 1800  # timeout for one batch in seconds; a worker that hangs longer ends the run


class OrderedDataModule(LightningDataModule):
    """Training and validation batches of two map-style data sets, in an order that does not change if a run is killed
    and resumed.

    `global_batch_size`: images per optimizer step over all devices and accumulated batches. Subclasses set `train_set`,
    `val_set`, `shard_counts`, `class_names` and `data_fingerprint` in `setup`.
    """

    train_set: Dataset
    val_set: Dataset
    shard_counts: list[int]
    num_val: int
    class_names: list[str]
    data_fingerprint: str
    condition_shape: tuple[int, ...]  # of one image: () for class labels
    text: dict[str, Any] | None = None  # the text encoder, where conditions are vectors of captions
    pins = True  # whether batches are in host memory

    def __init__(
        self,
        global_batch_size: int,
        num_workers: int,
        seed: int,
        lanes: int,
        window: int | None,
        max_skipped_share: float = 0.0,
    ) -> None:
        super().__init__()
        self.global_batch_size = global_batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.lanes = lanes
        self.window = window
        self.max_skipped_share = max_skipped_share
        self.consumed = 0
        self.skipped = self.seen = 0  # images of this rank
        self.resumed_fingerprint: str | None = None

    def declared_size(self) -> tuple[int, int]:
        """(training images, classes) according to the manifest, for `plan=true`; nothing else is read."""
        raise NotImplementedError

    @property
    def num_classes(self) -> int:
        """Classes named in the manifest."""
        return len(self.class_names)

    def ranks(self) -> tuple[int, int]:
        """(rank, number of ranks) of the running trainer."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    @property
    def accumulate(self) -> int:
        """Batches per optimizer step."""
        return self.trainer.accumulate_grad_batches if self.trainer else 1

    def batch_size(self) -> int:
        """Images per batch and device. Raises ValueError if the global batch size does not divide evenly."""
        _, num_ranks = self.ranks()
        per_device, rest = divmod(self.global_batch_size, num_ranks * self.accumulate)
        if rest or not per_device:
            raise ValueError(
                f"global_batch_size={self.global_batch_size} is not divisible by {num_ranks} devices x {self.accumulate} accumulated"
                " batches"
            )
        return per_device

    def orders(self) -> list[Order]:
        """The order of the training samples, one for each set whose samples share no batch."""
        return [Order(self.shard_counts, self.seed, self.lanes, self.window)]

    def val_counts(self) -> list[int]:
        """Validation samples of each of these sets."""
        return [self.num_val]

    def loader(self, dataset: Dataset, batches: TrainBatches | ValidationBatches) -> DataLoader:
        """A data loader whose workers hold no state of the order: they only load what the batch sampler requests."""
        return DataLoader(
            dataset,
            batch_sampler=batches,  # pyright: ignore[reportArgumentType]
            collate_fn=unchanged,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=self.pins and torch.cuda.is_available(),
            timeout=BATCH_TIMEOUT if self.num_workers else 0,
            worker_init_fn=ignore_signals,
        )

    def train_dataloader(self) -> DataLoader:
        batches = TrainBatches(self.orders(), self.batch_size(), *self.ranks(), self.accumulate)
        if self.resumed_fingerprint not in (None, self.run_fingerprint()):
            raise ValueError(
                "the checkpoint was made with other data, seed, lanes, window or global batch size, or by version 0.1 on a set so"
                " large that its order differs; so its position in the epoch is not valid here: use the same settings, or start a"
                " new run from its weights"
            )
        batches.start(self.consumed)
        return self.loader(self.train_set, batches)

    def val_dataloader(self) -> DataLoader:
        return self.loader(self.val_set, ValidationBatches(self.val_counts(), self.batch_size(), *self.ranks()))

    def run_fingerprint(self) -> str:
        """Identity of order, batch size and data: positions in runs with the same value refer to the same samples."""
        orders = "-".join(order.fingerprint for order in self.orders())
        return f"{orders}-{self.global_batch_size}-{self.data_fingerprint}"

    def state_dict(self) -> dict[str, Any]:
        assert self.trainer is not None
        consumed = self.trainer.fit_loop.epoch_loop.total_batch_idx + 1
        counts = {"consumed": consumed, "accumulate": self.accumulate, "skipped": self.skipped, "seen": self.seen}
        return {"fingerprint": self.run_fingerprint(), **counts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        before = state_dict.get("accumulate", self.accumulate)
        self.consumed = state_dict["consumed"] // before * self.accumulate
        self.resumed_fingerprint = state_dict["fingerprint"]
        self.skipped, self.seen = state_dict["skipped"], state_dict["seen"]

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Counts samples that were replaced.

        Raises ValueError if they exceed `max_skipped_share` of the images seen (of one epoch, at least).
        """
        if hasattr(batch, "skipped") and self.trainer and self.trainer.training:
            self.skipped += int(batch.skipped.sum())
            self.seen += len(batch.condition)
            reference = max(sum(self.shard_counts), self.seen)
            allowed = int(self.max_skipped_share * reference)
            if self.skipped > allowed:
                raise ValueError(
                    f"{self.skipped} images could not be read, but max_skipped_share={self.max_skipped_share} allows {allowed} of"
                    f" {reference}: the log names them; repair or repack the data"
                )
        return batch


def ignore_signals(worker: int) -> None:
    """Lets a data worker outlive the signals that a cluster sends to all processes of a job, until its run has saved."""
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(WORKER_GRACE))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)


def unchanged(batch: Any) -> Any:
    """Returns the batch unchanged: the data sets collate in `__getitems__`."""
    return batch
