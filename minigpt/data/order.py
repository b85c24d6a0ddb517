"""The order of the training data: which examples one optimizer step sees, and how they are split over ranks.

A global batch is what one optimizer step sees: micro-batch size x gradient accumulation x ranks. Global batches depend
only on the seed, the epoch and the global batch size; sharding over ranks and micro-batches happens within one. So the
same global batch gives the same step however it is split, and any epoch's order is computed without reading the epochs
before it.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

BATCHES_PER_POOL = 32  # global batches cut from one pool sorted by length: similar lengths, but still a random mix


def lengths_of(data: Sequence) -> np.ndarray:
    """The number of ids of each example; a token store knows them without reading the examples."""
    lengths = data.lengths if hasattr(data, "lengths") else [len(data[i]) for i in range(len(data))]
    return np.asarray(lengths, dtype=np.int64)


def epoch_global_batches(
    lengths: Sequence[int] | np.ndarray, global_batch_size: int, seed: int, epoch: int, group_by_length: bool = True
) -> list[np.ndarray]:
    """Indices of all examples, each once, in global batches of `global_batch_size`; the last one may be smaller.

    With `group_by_length` the shuffled examples are divided into pools of 32 global batches, each pool is sorted by
    length and cut into global batches, and these are shuffled: less padding, and the order stays random.
    """
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(lengths))
    if not group_by_length:
        return _chunks(order, global_batch_size)
    lengths = np.asarray(lengths)
    full, rest = np.split(order, [len(order) - len(order) % global_batch_size])
    global_batches: list[np.ndarray] = []
    for pool in _chunks(full, global_batch_size * BATCHES_PER_POOL):
        global_batches += _chunks(pool[np.argsort(lengths[pool], kind="stable")], global_batch_size)
    random.shuffle(global_batches)
    return [*global_batches, rest] if len(rest) else global_batches


def shard(
    lengths: Sequence[int] | np.ndarray, micro_batch_size: int, rank: int = 0, world_size: int = 1
) -> list[np.ndarray]:
    """This rank's micro-batches of a global batch, as indices into `lengths`; similar lengths share a micro-batch.

    Every rank gets the same number of micro-batches, so that no rank waits in a collective; the missing ones are empty.

    >>> [indices.tolist() for indices in shard([9, 2, 8, 3], 2)]
    [[1, 3], [2, 0]]
    >>> [[indices.tolist() for indices in shard([9, 2, 8], 1, rank, 2)] for rank in (0, 1)]
    [[[1], [0]], [[2], []]]
    """
    micro_batches = _chunks(np.argsort(lengths, kind="stable"), micro_batch_size)
    missing = -len(micro_batches) % world_size
    return [*micro_batches, *[np.empty(0, np.int64)] * missing][rank::world_size]


def replay_indices(size: int, count: int, seed: int, step: int) -> np.ndarray:
    """Indices of the `count` replayed examples, of `size`, in step `step`: all in turn, reshuffled after each round."""
    positions = np.arange(step * count, (step + 1) * count)
    return np.array([_replay_order(size, seed, i // size)[i % size] for i in positions.tolist()], np.int64)


@lru_cache(maxsize=1)  # consecutive steps are mostly in the same round
def _replay_order(size: int, seed: int, round: int) -> np.ndarray:
    return np.random.default_rng([seed, round, 1]).permutation(size)


def _chunks(order: np.ndarray, size: int) -> list[np.ndarray]:
    return [order[start : start + size] for start in range(0, len(order), size)]
