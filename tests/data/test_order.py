"""The order of the data: each example once per epoch; it depends only on seed, epoch and global batch size."""

import doctest

import numpy as np
import pytest

from minigpt.data import order as module
from minigpt.data.order import epoch_global_batches, replay_indices, shard


def lists(batches) -> list[list[int]]:
    return [batch.tolist() for batch in batches]


@pytest.mark.parametrize("group_by_length", [True, False])
@pytest.mark.parametrize("global_batch_size", [1, 2, 3, 8, 64])
def test_each_example_once_per_epoch_and_the_smaller_batch_last(global_batch_size, group_by_length):
    rng = np.random.default_rng(0)
    for size in [0, 1, 2, 3, 7, 8, 9, 63, 64, 65, 255, 256, 257, 64 * 32, 64 * 32 + 1, 5000]:
        lengths = rng.integers(1, 1000, size)
        for epoch in range(2):
            batches = epoch_global_batches(lengths, global_batch_size, 42, epoch, group_by_length)
            assert sorted(np.concatenate([np.empty(0, int), *batches])) == list(range(size))
            sizes = [len(batch) for batch in batches]
            full, rest = divmod(size, global_batch_size)
            assert sizes == [global_batch_size] * full + [rest] * (rest > 0)


@pytest.mark.parametrize("group_by_length", [True, False])
def test_the_order_depends_on_seed_epoch_and_global_batch_size_only(group_by_length):
    lengths = np.random.default_rng(0).integers(1, 1000, 500)

    def order(global_batch_size=8, seed=1, epoch=2):
        np.random.seed(order.calls)  # numpy's global random state must not matter
        order.calls += 1
        return lists(epoch_global_batches(lengths, global_batch_size, seed, epoch, group_by_length))

    order.calls = 0
    first = order()
    assert order() == first
    assert order(seed=2) != first
    assert order(epoch=3) != first
    assert order(epoch=1, seed=2) != first
    assert order(global_batch_size=16) != first
    assert lists(epoch_global_batches(lengths.tolist(), 8, 1, 2, group_by_length)) == first


def test_without_grouping_lengths_do_not_matter():
    lengths = np.arange(100)
    ascending, descending = (epoch_global_batches(order, 8, 0, 0, False) for order in (lengths, lengths[::-1]))
    assert lists(ascending) == lists(descending)


def padding(lengths: np.ndarray, batches: list[np.ndarray]) -> float:
    """Share of the positions that are padding."""
    padded = sum(len(batch) * lengths[batch].max() for batch in batches)
    return 1 - lengths.sum() / padded


def test_group_by_length_saves_padding_and_stays_random():
    lengths = np.random.default_rng(0).integers(10, 1000, 8 * 32 * 10 + 3)
    plain = epoch_global_batches(lengths, 8, 0, 0, group_by_length=False)
    grouped = [epoch_global_batches(lengths, 8, 0, epoch) for epoch in range(2)]
    assert padding(lengths, plain) > 0.35
    assert padding(lengths, grouped[0]) < 0.05
    # batches differ from epoch to epoch, and are not sorted by length
    contents = [{frozenset(batch.tolist()) for batch in batches} for batches in grouped]
    assert len(contents[0] & contents[1]) < 5
    means = [lengths[batch].mean() for batch in grouped[0]]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.2


def test_the_order_is_uniform_over_epochs():
    """Over 2000 epochs each of 5 examples comes first about 400 times."""
    first = [epoch_global_batches([3, 1, 4, 1, 5], 1, 0, epoch)[0][0] for epoch in range(2000)]
    assert all(330 < count < 470 for count in np.bincount(first, minlength=5))


def test_shard_covers_the_batch_in_order_of_length():
    rng = np.random.default_rng(0)
    for size, micro_batch_size in [(1, 1), (7, 2), (8, 2), (8, 3), (5, 8), (64, 16)]:
        lengths = rng.integers(1, 50, size)
        micro_batches = shard(lengths, micro_batch_size)
        indices = np.concatenate(micro_batches)
        assert sorted(indices) == list(range(size))
        assert (np.diff(lengths[indices]) >= 0).all()
        assert [len(batch) for batch in micro_batches[:-1]] == [micro_batch_size] * (len(micro_batches) - 1)
        assert 1 <= len(micro_batches[-1]) <= micro_batch_size
    assert lists(shard([5, 5, 1, 5], 2)) == [[2, 0], [1, 3]]  # stable: equal lengths keep their order


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 3])
def test_ranks_get_equally_many_micro_batches_and_all_of_the_batch(world_size, micro_batch_size):
    rng = np.random.default_rng(0)
    for size in range(1, 20):
        lengths = rng.integers(1, 50, size)
        ranks = [shard(lengths, micro_batch_size, rank, world_size) for rank in range(world_size)]
        turns = zip(*ranks, strict=True)  # strict: equally many
        interleaved = [batch.tolist() for turn in turns for batch in turn]
        full = [batch for batch in interleaved if batch]
        assert full == lists(shard(lengths, micro_batch_size))  # the micro-batches of one rank, round-robin
        assert all(batch == [] for batch in interleaved[len(full) :])  # empty ones only at the end
        assert len(interleaved) - len(full) < world_size


def test_shard_of_an_empty_batch():
    assert [shard([], 2, rank, 3) for rank in range(3)] == [[], [], []]


@pytest.mark.parametrize(("size", "count"), [(10, 3), (10, 10), (3, 10), (1, 4), (7, 1)])
def test_replay_sees_every_example_once_per_round(size, count):
    indices = np.concatenate([replay_indices(size, count, 5, step) for step in range(60)])
    assert indices.dtype == np.int64
    rounds = [indices[start : start + size] for start in range(0, len(indices) - size + 1, size)]
    assert all(sorted(round) == list(range(size)) for round in rounds)
    if size > 5:
        assert rounds[0].tolist() != rounds[1].tolist()


def test_replay_depends_on_seed_and_step_only():
    steps = [replay_indices(100, 7, 5, step).tolist() for step in range(40)]
    assert [replay_indices(100, 7, 5, step).tolist() for step in reversed(range(40))] == steps[::-1]
    assert replay_indices(100, 7, 6, 0).tolist() != steps[0]


def test_docstring_example():
    assert doctest.testmod(module) == doctest.TestResults(failed=0, attempted=2)
