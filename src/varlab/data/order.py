"""The order of training samples: a pure function of (seed, epoch, position).

Shards are shuffled and concatenated; the sequence of samples is split into `lanes` equal lanes; each lane is shuffled
within windows; position p of the epoch is sample p // lanes of lane p % lanes. Rank r of W takes the positions p with
p % W == r, so a rank stays within its own lanes (and shards) if W divides `lanes`, and the global batches are the same
for any number of ranks and workers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from varlab.files import json_hash


class SampleRequest(NamedTuple):
    """A request to a worker: sample number, epoch (for augmentation), whether the sample counts."""

    sample: int
    epoch: int
    is_real: bool  # False for padding of the last validation batch


@dataclass(frozen=True)
class Order:
    """Settings of the order. `window`: samples of a lane that are shuffled together. A set of at most lanes * window
    samples, and any set with window None, is shuffled fully."""

    shard_counts: Sequence[int]
    seed: int = 0
    lanes: int = 64
    window: int | None = 4096

    def __post_init__(self) -> None:
        if self.lanes < 1 or (self.window is not None and self.window < 1):
            raise ValueError(f"lanes={self.lanes} and window={self.window} must be positive")

    @property
    def num_samples(self) -> int:
        """Samples of one epoch."""
        return sum(self.shard_counts)

    @property
    def fingerprint(self) -> str:
        """Identity of the order: runs with the same fingerprint get the same samples at the same positions."""
        return json_hash([list(self.shard_counts), self.seed, self.lanes, self.window])

    @property
    def is_full_shuffle(self) -> bool:
        """Whether any sample can follow any other."""
        return self.window is None or self.num_samples <= self.lanes * self.window

    def num_shards_at_once(self) -> int:
        """Upper bound on the shards that neighboring positions come from."""
        if self.is_full_shuffle:
            return len(self.shard_counts)
        assert self.window is not None
        return self.lanes * (self.window // min(self.shard_counts) + 2)

    def epoch(self, epoch: int) -> np.ndarray:
        """Sample numbers of an epoch by position, each exactly once."""
        rng = np.random.default_rng([self.seed, epoch])
        if self.is_full_shuffle:
            return rng.permutation(self.num_samples)
        assert self.window is not None
        shards = np.split(np.arange(self.num_samples), np.cumsum(self.shard_counts)[:-1])
        row = np.concatenate([shards[s] for s in rng.permutation(len(shards))])
        order = np.empty_like(row)
        parts = np.array_split(row, self.lanes)  # the first ones are longer by one if the row does not divide evenly
        for lane, part in enumerate(parts):
            for first in range(0, len(part), self.window):
                part[first : first + self.window] = rng.permutation(part[first : first + self.window])
            order[lane :: self.lanes] = part
        return order


class TrainBatches:
    """Batches of one rank, epoch after epoch; `start` sets the position to continue from.

    Every rank gets the same number of full batches, `accumulate` of them for each optimizer step; samples that do not
    fill a step are left out, different ones in each epoch.
    """

    def __init__(self, order: Order, batch_size: int, rank: int = 0, num_ranks: int = 1, accumulate: int = 1) -> None:
        self.order, self.batch_size, self.rank, self.num_ranks = order, batch_size, rank, num_ranks
        self.num_batches = order.num_samples // (batch_size * num_ranks * accumulate) * accumulate
        if self.num_batches == 0:
            raise ValueError(
                f"the training set has {order.num_samples} images, fewer than one step of {accumulate} x {batch_size} on each of"
                f" {num_ranks} ranks"
            )
        self.next_epoch, self.next_batch = 0, 0

    def start(self, consumed: int) -> None:
        """Continues after `consumed` batches, counted from the beginning of the run."""
        self.next_epoch, self.next_batch = divmod(consumed, self.num_batches)

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[SampleRequest]]:
        epoch, first = self.next_epoch, self.next_batch
        self.next_epoch, self.next_batch = epoch + 1, 0
        order = self.order.epoch(epoch)
        stride = self.batch_size * self.num_ranks
        for batch in range(first, self.num_batches):
            samples = order[batch * stride + self.rank : (batch + 1) * stride : self.num_ranks]
            yield [SampleRequest(int(sample), epoch, True) for sample in samples]


class ValidationBatches:
    """Every sample exactly once over all ranks, in order; the last batches are padded with samples that do not count."""

    def __init__(self, num_samples: int, batch_size: int, rank: int = 0, num_ranks: int = 1) -> None:
        if num_samples == 0:
            raise ValueError("the validation set is empty: pack one, or pack with val_share > 0")
        self.num_samples, self.batch_size, self.rank, self.num_ranks = num_samples, batch_size, rank, num_ranks
        self.num_batches = -(-num_samples // (batch_size * num_ranks))

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[SampleRequest]]:
        stride = self.batch_size * self.num_ranks
        for batch in range(self.num_batches):
            positions = range(batch * stride + self.rank, (batch + 1) * stride, self.num_ranks)
            yield [SampleRequest(p, 0, True) if p < self.num_samples else SampleRequest(0, 0, False) for p in positions]
