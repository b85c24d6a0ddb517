"""The order of data: which examples one optimizer step sees, and how they are dealt out.

A window is what one step sees. Windows depend on the seed, the epoch and the window's size alone, and dealing a
window to ranks and micro-batches happens inside it. So however the same window is cut, the step is the same, and any
epoch's order is there at once, without reading what came before.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

SORTED_WINDOWS = 32  # windows drawn from one sorted pool: similar lengths, still random company


def epoch_windows(
    lengths: Sequence[int] | np.ndarray, window_size: int, seed: int, epoch: int, group_by_length: bool = True
) -> list[np.ndarray]:
    """Indices of all examples, each once, in windows of `window_size`; the last window may be short.

    With `group_by_length` the shuffled examples are sorted by length in pools of 32 windows, cut into windows, and
    the windows shuffled: less padding, and the order stays random.
    """
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(lengths))
    if not group_by_length:
        return _cut(order, window_size)
    lengths = np.asarray(lengths)
    full, rest = np.split(order, [len(order) - len(order) % window_size])
    pools = _cut(full, window_size * SORTED_WINDOWS)
    windows = [w for pool in pools for w in _cut(pool[np.argsort(lengths[pool], kind="stable")], window_size)]
    random.shuffle(windows)
    return [*windows, rest] if len(rest) else windows


def shard(
    lengths: Sequence[int] | np.ndarray, micro_batch_size: int, rank: int = 0, world_size: int = 1
) -> list[np.ndarray]:
    """A rank's micro-batches of a window's places, neighbours in length together.

    All ranks get equally many, so that none waits for another; where nothing is left, one is empty.

    >>> [places.tolist() for places in deal([9, 2, 8, 3], 2)]
    [[1, 3], [2, 0]]
    >>> [[places.tolist() for places in deal([9, 2, 8], 1, rank, 2)] for rank in (0, 1)]
    [[[1], [0]], [[2], []]]
    """
    micro_batches = _cut(np.argsort(lengths, kind="stable"), micro_batch_size)
    missing = -len(micro_batches) % world_size
    return [*micro_batches, *[np.empty(0, np.int64)] * missing][rank::world_size]


def replay_rows(size: int, count: int, seed: int, step: int) -> np.ndarray:
    """Which `count` of `size` replayed rows step `step` sees: all of them in turn, in a new order each round."""
    places = np.arange(step * count, (step + 1) * count)
    return np.array([_replay_order(size, seed, place // size)[place % size] for place in places.tolist()], np.int64)


@lru_cache(maxsize=1)  # a step begins in the round where the one before ended
def _replay_order(size: int, seed: int, round: int) -> np.ndarray:
    return np.random.default_rng([seed, round, 1]).permutation(size)


def _cut(order: np.ndarray, size: int) -> list[np.ndarray]:
    return [order[start : start + size] for start in range(0, len(order), size)]
