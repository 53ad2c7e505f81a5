"""The order of training samples: a pure function of (seed, epoch, position).

Shards are shuffled and concatenated; the sequence of samples is split into `lanes` equal lanes; each lane is shuffled
within windows; position p of the epoch is sample p // lanes of lane p % lanes. Rank r of W takes the positions p with
p % W == r, so a rank stays within its own lanes (and shards) if W divides `lanes`, and the global batches are the same
for any number of ranks and workers.

Nothing is computed before it is needed, and nothing is kept but one window per lane and two numbers per shard: the
first batch of an epoch, or after a resume, takes as long at 10^9 samples as at 10^6.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from varlab.files import json_hash

PERMUTED = 2**22  # fully shuffled sets of up to this many samples are permuted in memory
ROUNDS = 8


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
        if self.is_permuted:
            return json_hash([list(self.shard_counts), self.seed, self.lanes, self.window])
        counts = hashlib.sha256(np.asarray(self.shard_counts, dtype=np.int64).tobytes()).hexdigest()
        return json_hash(["windows", counts, self.seed, self.lanes, self.window])

    @property
    def is_full_shuffle(self) -> bool:
        """Whether any sample can follow any other."""
        return self.window is None or self.num_samples <= self.lanes * self.window

    @property
    def is_permuted(self) -> bool:
        """Whether an epoch is one permutation in memory."""
        return self.is_full_shuffle and self.num_samples <= PERMUTED

    def num_shards_at_once(self) -> int:
        """Upper bound on the shards that neighboring positions come from."""
        if self.is_full_shuffle:
            return len(self.shard_counts)
        assert self.window is not None
        return self.lanes * (self.window // max(min(self.shard_counts), 1) + 2)

    def epoch(self, epoch: int) -> "EpochOrder":
        """The order of one epoch."""
        return EpochOrder(self, epoch)


class EpochOrder:
    """Sample numbers of one epoch by position, each exactly once. Index it with a slice or an array of positions."""

    def __init__(self, order: Order, epoch: int) -> None:
        self.order, self.key, self.num_samples = order, (order.seed, epoch), order.num_samples
        rng = np.random.default_rng(self.key)
        self.permutation = rng.permutation(self.num_samples) if order.is_permuted else None
        self.windows: dict[int, tuple[int, np.ndarray]] = {}  # by lane: the current window's number and samples
        if not order.is_full_shuffle:
            counts = np.asarray(order.shard_counts, dtype=np.int64)
            chosen = rng.permutation(len(counts))
            first = np.cumsum(counts) - counts
            self.ends = np.cumsum(counts[chosen])  # of the shuffled shards, in the sequence
            self.shifts = first[chosen] - (self.ends - counts[chosen])  # from place in the sequence to sample number

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, chosen: slice | np.ndarray) -> np.ndarray:
        positions = np.arange(*chosen.indices(len(self))) if isinstance(chosen, slice) else chosen
        if self.permutation is not None:
            return self.permutation[positions]
        if self.order.is_full_shuffle:
            return scrambled(positions, self.num_samples, self.key)
        lanes, window = self.order.lanes, self.order.window
        assert window is not None
        places = positions // lanes
        num_windows = self.num_samples // (lanes * window) + 1
        groups = positions % lanes * num_windows + places // window
        samples, by_group = np.empty_like(positions), np.argsort(groups, kind="stable")
        for part in np.split(by_group, np.flatnonzero(np.diff(groups[by_group])) + 1):
            if len(part):
                samples[part] = self.window(*divmod(int(groups[part[0]]), num_windows))[places[part] % window]
        return samples

    def window(self, lane: int, number: int) -> np.ndarray:
        """The shuffled samples of a window of a lane."""
        if self.windows.get(lane, (None,))[0] != number:
            short, longer = divmod(self.num_samples, self.order.lanes)  # the first lanes are longer by one
            start, length = lane * short + min(lane, longer), short + (lane < longer)
            assert self.order.window is not None
            first = number * self.order.window
            rng = np.random.default_rng([*self.key, lane, number])
            places = start + first + rng.permutation(min(self.order.window, length - first))
            self.windows[lane] = number, places + self.shifts[np.searchsorted(self.ends, places, side="right")]
        return self.windows[lane][1]


def scrambled(positions: np.ndarray, num: int, key: Sequence[int]) -> np.ndarray:
    """A pseudo-random permutation of range(num) at `positions`, in constant memory: a Feistel network on numbers of
    2 b bits, applied again to results that are not below `num` (cycle walking; Black and Rogaway 2002)."""
    half = np.uint64(max((num - 1).bit_length() + 1, 2) // 2)
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = np.random.default_rng(key).integers(0, 2**64, size=ROUNDS, dtype=np.uint64)
    values = np.asarray(positions, dtype=np.uint64)
    outside = np.ones(len(values), dtype=bool)
    while outside.any():
        left, right = values[outside] >> half, values[outside] & mask
        for round_key in keys:
            left, right = right, left ^ (mixed(right ^ round_key) & mask)
        values[outside] = left << half | right
        outside = values >= num
    return values.astype(np.int64)


def mixed(values: np.ndarray) -> np.ndarray:
    """A hash of 64-bit numbers: the finalizer of SplitMix64 (Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class TrainBatches:
    """Batches of one rank, epoch after epoch; `start` sets the position to continue from.

    Every rank gets the same number of full batches, `accumulate` of them for each optimizer step; samples that do not
    fill a step are left out, different ones in each epoch.

    `orders`: of several sets whose samples do not mix, numbered one set after the other: the samples of a step are of one set, and
    the steps of all sets are shuffled.
    """

    def __init__(
        self,
        orders: Order | Sequence[Order],
        batch_size: int,
        rank: int = 0,
        num_ranks: int = 1,
        accumulate: int = 1,
    ) -> None:
        self.orders = [orders] if isinstance(orders, Order) else list(orders)
        self.batch_size, self.rank, self.num_ranks, self.accumulate = batch_size, rank, num_ranks, accumulate
        self.steps = [order.num_samples // (batch_size * num_ranks * accumulate) for order in self.orders]
        self.num_batches = sum(self.steps) * accumulate
        if self.num_batches == 0:
            raise ValueError(
                f"the training set has {' + '.join(str(order.num_samples) for order in self.orders)} images, fewer than one step of"
                f" {accumulate} x {batch_size} on each of {num_ranks} ranks"
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
        orders = [order.epoch(epoch) for order in self.orders]
        starts = np.cumsum([0, *(order.num_samples for order in self.orders)])
        stride = self.batch_size * self.num_ranks
        for chosen, batch in self.turns(epoch, first):
            samples = orders[chosen][batch * stride + self.rank : (batch + 1) * stride : self.num_ranks]
            yield [SampleRequest(int(sample), epoch, True) for sample in samples + starts[chosen]]

    def turns(self, epoch: int, first: int) -> Iterator[tuple[int, int]]:
        """(number of a set, number of its batch) for the batches of an epoch from `first` on."""
        if len(self.orders) == 1:
            yield from ((0, batch) for batch in range(first, self.num_batches))
            return
        steps = np.repeat(np.arange(len(self.steps)), self.steps)
        batches = np.repeat(
            np.random.default_rng([self.orders[0].seed, epoch, 2**32 - 1]).permutation(steps), self.accumulate
        )
        used = np.bincount(batches[:first], minlength=len(self.steps))
        for chosen in batches[first:]:
            yield int(chosen), int(used[chosen])
            used[chosen] += 1


class ValidationBatches:
    """Every sample exactly once over all ranks, in order; the last batches are padded with samples that do not count. With several
    sets, numbered one after the other, each batch is of one set."""

    def __init__(self, num_samples: int | Sequence[int], batch_size: int, rank: int = 0, num_ranks: int = 1) -> None:
        self.num_samples = [num_samples] if isinstance(num_samples, int) else list(num_samples)
        if sum(self.num_samples) == 0:
            raise ValueError("the validation set is empty: pack one, or pack with val_share > 0")
        self.batch_size, self.rank, self.num_ranks = batch_size, rank, num_ranks
        self.num_batches = sum(-(-num // (batch_size * num_ranks)) for num in self.num_samples)

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[SampleRequest]]:
        stride, start = self.batch_size * self.num_ranks, 0
        for num in self.num_samples:
            for first in range(0, num, stride):
                positions = range(first + self.rank, first + stride, self.num_ranks)
                yield [SampleRequest(start + p if p < num else start, 0, p < num) for p in positions]
            start += num
