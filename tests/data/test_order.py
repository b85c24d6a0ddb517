"""The order of data: every example once, and nothing but seed, epoch and global batch size decides it."""

import doctest

import numpy as np
import pytest

from minigpt.data import order as module
from minigpt.data.order import epoch_global_batches, replay_indices, shard


def lists(global_batches) -> list[list[int]]:
    return [global_batch.tolist() for global_batch in global_batches]


@pytest.mark.parametrize("group_by_length", [True, False])
@pytest.mark.parametrize("global_batch_size", [1, 2, 3, 8, 64])
def test_each_example_once_per_epoch_and_the_short_one_last(global_batch_size, group_by_length):
    draw = np.random.default_rng(0)
    for size in [0, 1, 2, 3, 7, 8, 9, 63, 64, 65, 255, 256, 257, 64 * 32, 64 * 32 + 1, 5000]:
        lengths = draw.integers(1, 1000, size)
        for epoch in range(2):
            global_batches = epoch_global_batches(lengths, global_batch_size, 42, epoch, group_by_length)
            assert sorted(np.concatenate([np.empty(0, int), *global_batches])) == list(range(size))
            sizes = [len(global_batch) for global_batch in global_batches]
            full, rest = divmod(size, global_batch_size)
            assert sizes == [global_batch_size] * full + [rest] * (rest > 0)


@pytest.mark.parametrize("group_by_length", [True, False])
def test_seed_epoch_and_global_batch_size_decide(group_by_length):
    lengths = np.random.default_rng(0).integers(1, 1000, 500)

    def order(global_batch_size=8, seed=1, epoch=2):
        np.random.seed(order.calls)  # what else draws, or drew, does not matter
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
    assert lists(epoch_global_batches(lengths, 8, 0, 0, False)) == lists(
        epoch_global_batches(lengths[::-1], 8, 0, 0, False)
    )


def padding(lengths: np.ndarray, global_batches: list[np.ndarray]) -> float:
    """The share of a padded batch that is padding."""
    padded = sum(len(global_batch) * lengths[global_batch].max() for global_batch in global_batches)
    return 1 - lengths.sum() / padded


def test_grouping_saves_padding_and_keeps_chance():
    lengths = np.random.default_rng(0).integers(10, 1000, 8 * 32 * 10 + 3)
    plain = epoch_global_batches(lengths, 8, 0, 0, group_by_length=False)
    grouped = [epoch_global_batches(lengths, 8, 0, epoch) for epoch in range(2)]
    assert padding(lengths, plain) > 0.35
    assert padding(lengths, grouped[0]) < 0.05
    # the company of an example changes from epoch to epoch, and global batches come in no order of length
    company = [{frozenset(global_batch.tolist()) for global_batch in global_batches} for global_batches in grouped]
    assert len(company[0] & company[1]) < 5
    means = [lengths[global_batch].mean() for global_batch in grouped[0]]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.2


def test_many_seeds_give_every_example_every_place():
    """No example is always early: over 2000 epochs each of 5 is first about 400 times."""
    first = [epoch_global_batches([3, 1, 4, 1, 5], 1, 0, epoch)[0][0] for epoch in range(2000)]
    assert all(330 < count < 470 for count in np.bincount(first, minlength=5))


def test_a_dealt_global_batch_is_whole_and_sorted():
    draw = np.random.default_rng(0)
    for size, micro_batch_size in [(1, 1), (7, 2), (8, 2), (8, 3), (5, 8), (64, 16)]:
        lengths = draw.integers(1, 50, size)
        dealt = shard(lengths, micro_batch_size)
        indices = np.concatenate(dealt)
        assert sorted(indices) == list(range(size))
        assert (np.diff(lengths[indices]) >= 0).all()
        assert [len(batch) for batch in dealt[:-1]] == [micro_batch_size] * (len(dealt) - 1)
        assert 1 <= len(dealt[-1]) <= micro_batch_size
    assert lists(shard([5, 5, 1, 5], 2)) == [[2, 0], [1, 3]]  # equal lengths stay in order


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 3])
def test_ranks_get_equally_many_micro_batches_and_together_the_global_batch(world_size, micro_batch_size):
    draw = np.random.default_rng(0)
    for size in range(1, 20):
        lengths = draw.integers(1, 50, size)
        ranks = [shard(lengths, micro_batch_size, rank, world_size) for rank in range(world_size)]
        turns = [lists(turn) for turn in zip(*ranks, strict=True)]  # strict: every rank makes the same number of turns
        dealt = [indices for turn in turns for indices in turn]
        full = [indices for indices in dealt if indices]
        assert full == lists(shard(lengths, micro_batch_size))  # the same micro-batches as one rank's, in turns
        assert all(indices == [] for indices in dealt[len(full) :])  # only the last turn falls short
        assert len(dealt) - len(full) < world_size


def test_an_empty_global_batch_is_nothing_for_anybody():
    assert [shard([], 2, rank, 3) for rank in range(3)] == [[], [], []]


@pytest.mark.parametrize(("size", "count"), [(10, 3), (10, 10), (3, 10), (1, 4), (7, 1)])
def test_replayed_rows_go_round_evenly(size, count):
    rows = np.concatenate([replay_indices(size, count, 5, step) for step in range(60)])
    assert rows.dtype == np.int64
    rounds = [rows[start : start + size] for start in range(0, len(rows) - size + 1, size)]
    assert all(sorted(round) == list(range(size)) for round in rounds)  # all rows, then all rows again
    if size > 5:
        assert rounds[0].tolist() != rounds[1].tolist()


def test_replayed_rows_depend_on_seed_and_step_alone():
    steps = [replay_indices(100, 7, 5, step).tolist() for step in range(40)]
    assert [replay_indices(100, 7, 5, step).tolist() for step in reversed(range(40))] == steps[::-1]
    assert replay_indices(100, 7, 6, 0).tolist() != steps[0]


def test_docstring_example():
    assert doctest.testmod(module) == doctest.TestResults(failed=0, attempted=2)
