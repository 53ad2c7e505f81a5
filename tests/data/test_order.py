"""The order of samples: once each, the same for any number of ranks and workers, resumable at any batch."""

import numpy as np
import pytest

from varlab.data import order as order_module
from varlab.data.order import Order, TrainBatches, ValidationBatches, scrambled

COUNTS = [[40, 40, 40, 17], [5, 3], [137], [1] * 30]


def samples(batches) -> list[list[int]]:
    return [[draw.sample for draw in batch] for batch in batches]


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize(("lanes", "window"), [(64, 4), (4, 7), (1, 3), (5, None)])
def test_an_epoch_holds_every_sample_once_in_another_order_each_time(counts, lanes, window):
    order = Order(counts, seed=3, lanes=lanes, window=window)
    first, second = order.epoch(0)[:], order.epoch(1)[:]
    assert sorted(first) == sorted(second) == list(range(sum(counts)))
    assert first.tolist() != second.tolist()
    assert first.tolist() == Order(counts, seed=3, lanes=lanes, window=window).epoch(0)[:].tolist()
    assert first.tolist() != Order(counts, seed=4, lanes=lanes, window=window).epoch(0)[:].tolist()


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 6])
def test_global_batches_do_not_depend_on_the_number_of_ranks(num_ranks):
    order = Order([40, 40, 40, 17], seed=1, lanes=12, window=5)
    whole = samples(TrainBatches(order, 12))
    ranks = [samples(TrainBatches(order, 12 // num_ranks, rank, num_ranks)) for rank in range(num_ranks)]
    assert len({len(batches) for batches in ranks}) == 1
    for k, batch in enumerate(whole):
        assert sorted(batch) == sorted(sample for batches in ranks for sample in batches[k])


def test_a_rank_reads_its_own_lanes_only():
    counts = [50] * 8
    order = Order(counts, seed=0, lanes=8, window=10)
    shards = np.repeat(np.arange(8), 50)
    seen = [{int(shards[i]) for batch in samples(TrainBatches(order, 5, rank, 4)) for i in batch} for rank in range(4)]
    assert all(len(own) == 2 for own in seen)
    assert len(set().union(*seen)) == 8


@pytest.mark.parametrize("consumed", [0, 1, 10, 11, 12, 29])
def test_starting_after_any_batch_continues_the_uninterrupted_run(consumed):
    order = Order([60, 37], seed=2, lanes=4, window=9)

    def run(batches: TrainBatches, epochs: int):
        return [draw for _ in range(epochs) for draw in batches]

    whole = run(TrainBatches(order, 8), 4)
    resumed = TrainBatches(order, 8)
    resumed.start(consumed)
    assert run(resumed, 3)[: 48 - consumed - 12] == whole[consumed:][: 48 - consumed - 12]


@pytest.mark.parametrize(
    ("num_samples", "batch_size", "num_ranks"), [(10, 4, 1), (10, 4, 2), (3, 4, 4), (1, 2, 3), (16, 4, 2)]
)
def test_validation_counts_every_sample_once(num_samples, batch_size, num_ranks):
    ranks = [list(ValidationBatches(num_samples, batch_size, rank, num_ranks)) for rank in range(num_ranks)]
    assert len({len(batches) for batches in ranks}) == 1
    counted = [draw.sample for batches in ranks for batch in batches for draw in batch if draw.is_real]
    assert sorted(counted) == list(range(num_samples))
    assert {len(batch) for batches in ranks for batch in batches} == {batch_size}


def test_neighbors_are_mixed_within_the_window():
    order = Order([100] * 20, seed=0, lanes=16, window=None).epoch(0)[:]
    shard = order // 100
    assert (shard[1:] == shard[:-1]).mean() < 0.09  # a full shuffle gives 0.05
    windowed = Order([100] * 20, seed=0, lanes=16, window=64).epoch(0)[:] // 100
    assert (windowed[1:] == windowed[:-1]).mean() < 0.09


def test_too_little_data_is_an_error_at_the_start():
    with pytest.raises(ValueError, match="10 images, fewer than one step of 1 x 8 on each of 2 ranks"):
        TrainBatches(Order([10]), 8, 0, 2)
    with pytest.raises(ValueError, match="validation set is empty"):
        ValidationBatches(0, 4)


def test_the_last_window_of_a_lane_is_shuffled_too():
    """One lane of 30 samples in windows of 20: the last ten are a window of their own."""
    order = Order([30], seed=0, lanes=1, window=20)
    epochs = np.array([order.epoch(epoch)[20:] for epoch in range(20)])
    assert (np.sort(epochs, axis=1) == np.arange(20, 30)).all()
    assert len({tuple(row) for row in epochs}) > 15


def test_shards_come_in_another_order_in_each_epoch():
    counts = [10] * 12
    order = Order(counts, seed=0, lanes=1, window=10)
    shards = [tuple(order.epoch(epoch)[::10] // 10) for epoch in range(10)]
    assert all(sorted(row) == list(range(12)) for row in shards)
    assert len(set(shards)) == 10


def test_validation_pads_the_last_batch_with_sample_0():
    requests = [request for batch in ValidationBatches(5, 2, rank=1, num_ranks=2) for request in batch]
    assert [tuple(request) for request in requests] == [(1, 0, True), (3, 0, True), (0, 0, False), (0, 0, False)]
    with pytest.raises(ValueError, match="the validation set is empty"):
        ValidationBatches(0, 2)


def test_positions_come_from_a_bounded_number_of_shards():
    """Shards of 10 samples, lanes of windows of 25: a window touches at most 25 // 10 + 2 shards."""
    order = Order([10] * 40, seed=0, lanes=2, window=25)
    assert order.num_shards_at_once() == 2 * (25 // 10 + 2)
    assert Order([10] * 4, window=None).num_shards_at_once() == 4
    epoch = order.epoch(0)[:]
    for first in range(0, 400, 50):  # one window of each lane
        assert len({sample // 10 for sample in epoch[first : first + 50]}) <= order.num_shards_at_once()


@pytest.mark.parametrize(("accumulate", "num_batches"), [(1, 11), (2, 10), (3, 9)])
def test_batches_follow_the_epoch_and_fill_whole_steps(accumulate, num_batches):
    order = Order([40, 40, 40, 17], seed=1, lanes=12, window=5)
    batches = TrainBatches(order, 12, accumulate=accumulate)
    for epoch in (0, 1):
        expected = order.epoch(epoch)[: 12 * num_batches].reshape(num_batches, 12)
        assert samples(batches) == expected.tolist()
    assert {(draw.epoch, draw.is_real) for batch in batches for draw in batch} == {(2, True)}


@pytest.mark.parametrize(("lanes", "window"), [(0, 5), (-1, None), (4, 0)])
def test_lanes_and_window_must_be_positive(lanes, window):
    with pytest.raises(ValueError, match=f"lanes={lanes} and window={window} must be positive"):
        Order([10], lanes=lanes, window=window)
    assert sorted(Order([10], lanes=1, window=1).epoch(0)[:]) == list(range(10))


def test_small_sets_have_the_order_of_version_0_1():
    expected = np.random.default_rng([3, 2]).permutation(97)
    order = Order([60, 37], seed=3)
    assert order.epoch(2)[:].tolist() == expected.tolist()
    assert order.fingerprint == "f238bebed876bb94"


@pytest.mark.parametrize("num", [1, 2, 3, 97, 1024, 1025])
def test_a_scrambled_range_holds_every_number_once(num):
    values = scrambled(np.arange(num), num, (0, 1))
    assert sorted(values) == list(range(num))
    assert num < 97 or values.tolist() != scrambled(np.arange(num), num, (0, 2)).tolist()


def test_a_scrambled_range_is_as_mixed_as_a_random_permutation():
    """Chi-squared statistics, over 32 x 32 cells, of where positions go and of what follows what, against their mean and
    standard deviation."""
    num, cells = 2**16 - 77, 32
    for epoch in range(5):
        values = scrambled(np.arange(num), num, (0, epoch)) * cells // num
        for before in (np.arange(num) * cells // num, np.roll(values, 1)):
            counts = np.bincount(before * cells + values, minlength=cells**2)
            expected = num / cells**2
            chi_squared = ((counts - expected) ** 2 / expected).sum()
            degrees = (cells - 1) ** 2
            assert abs(chi_squared - degrees) < 4 * np.sqrt(2 * degrees)


def test_large_sets_are_fully_shuffled_without_a_permutation_in_memory(monkeypatch):
    monkeypatch.setattr(order_module, "PERMUTED", 100)
    order = Order([50, 71], seed=1, window=None)
    assert not order.is_permuted and order.epoch(0).permutation is None
    assert sorted(order.epoch(0)[:]) == sorted(order.epoch(1)[:]) == list(range(121))
    batches = samples(TrainBatches(order, 8))
    assert np.concatenate(batches).tolist() == order.epoch(0)[:120].tolist()
    assert order.fingerprint != Order([51, 70], seed=1, window=None).fingerprint


def test_of_ten_to_the_nine_samples_only_a_window_per_lane_is_kept():
    order = Order([10_000] * 100_000, seed=0)
    epoch = order.epoch(7)
    middle = 600_000_123
    batch = epoch[middle : middle + 256]
    assert len(set(batch.tolist())) == 256 and batch.min() >= 0 and batch.max() < 10**9
    assert sum(window.nbytes for _, window in epoch.windows.values()) == 64 * 4096 * 8
    assert len({number for number, _ in epoch.windows.values()}) <= 2
    shards = {int(sample) // 10_000 for _, window in epoch.windows.values() for sample in window}
    assert len(shards) <= order.num_shards_at_once()
    assert order.epoch(7)[np.arange(middle, middle + 256)].tolist() == batch.tolist()


def test_each_window_of_each_lane_is_shuffled_in_its_own_way():
    epoch = Order([64], seed=0, lanes=2, window=8).epoch(0)
    windows = [epoch.window(lane, number) for lane in (0, 1) for number in range(4)]
    assert len({tuple(samples - samples.min()) for samples in windows}) == 8


def sets_of(batches, edges) -> list[int]:
    """The set that each batch belongs to; every batch belongs to one."""
    found = [{sum(int(request.sample >= edge) for edge in edges) for request in batch} for batch in batches]
    assert all(len(own) == 1 for own in found)
    return [own.pop() for own in found]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_batches_of_several_sets_hold_one_set_each_in_a_shuffled_order(accumulate):
    orders = [Order([100], seed=3), Order([41], seed=4), Order([3], seed=5)]
    batches = TrainBatches(orders, 4, accumulate=accumulate)
    drawn = list(batches)
    assert len(drawn) == len(batches) == (25 + 10 if accumulate == 1 else 24 + 10)
    sets = sets_of(drawn, [100, 141])
    assert sets.count(1) == 10 and sets.count(2) == 0  # three images fill no batch
    assert sets != sorted(sets) and sets != sets_of(batches, [100, 141])  # nor in the next epoch
    assert all(sets[i] == sets[i + 1] for i in range(0, len(sets), accumulate)[: None if accumulate == 2 else 0])
    samples = [request.sample for batch in drawn for request in batch]
    assert len(set(samples)) == len(samples)


def test_several_sets_continue_after_any_batch_and_are_the_same_on_any_number_of_ranks():
    orders = [Order([60, 37], seed=2), Order([50], seed=3)]
    first = TrainBatches(orders, 8)
    whole = [draw for _ in range(3) for draw in first]
    for consumed in (1, 17, 18, 40):
        resumed = TrainBatches(orders, 8)
        resumed.start(consumed)
        assert [draw for _ in range(2) for draw in resumed][:9] == whole[consumed : consumed + 9]
    ranks = [list(TrainBatches(orders, 4, rank, 2)) for rank in range(2)]
    for batch, *own in zip(whole, *ranks, strict=False):
        assert {request for part in own for request in part} == set(batch)


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_validation_of_several_sets_counts_every_sample_once(num_ranks):
    ranks = [list(ValidationBatches([10, 0, 7], 2, rank, num_ranks)) for rank in range(num_ranks)]
    assert {len(batches) for batches in ranks} == {len(ValidationBatches([10, 0, 7], 2, 0, num_ranks))}
    for batches in ranks:
        sets_of(batches, [10])
    together = [sets_of(batches, [10]) for batches in ranks]
    assert all(sets == together[0] for sets in together)
    counted = [request.sample for batches in ranks for batch in batches for request in batch if request.is_real]
    assert sorted(counted) == list(range(17))
