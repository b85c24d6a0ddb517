"""The order of data: which examples one optimizer step sees, and how they are sharded over micro-batches and ranks.

A global batch is what one step sees. It depends only on the seed, the epoch and the global batch size; sharding it
happens inside it. So the step is the same however the global batch is cut, and any epoch's order can be computed
without reading the epochs before.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

POOL_BATCHES = 32  # global batches cut from one pool sorted by length: similar lengths, still random examples


def lengths_of(data: Sequence) -> np.ndarray:
    """The number of ids of each example; a token store knows them without reading the examples."""
    lengths = data.lengths if hasattr(data, "lengths") else [len(data[i]) for i in range(len(data))]
    return np.asarray(lengths, dtype=np.int64)


def epoch_global_batches(
    lengths: Sequence[int] | np.ndarray, global_batch_size: int, seed: int, epoch: int, group_by_length: bool = True
) -> list[np.ndarray]:
    """Indices of all examples, each once, in global batches of `global_batch_size`; the last one may be short.

    With `group_by_length` the shuffled examples are sorted by length in pools of 32 global batches, cut into global
    batches, and these are shuffled: less padding, and the order stays random.
    """
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(lengths))
    if not group_by_length:
        return _cut(order, global_batch_size)
    lengths = np.asarray(lengths)
    full, rest = np.split(order, [len(order) - len(order) % global_batch_size])
    global_batches = []
    for pool in _cut(full, global_batch_size * POOL_BATCHES):
        global_batches += _cut(pool[np.argsort(lengths[pool], kind="stable")], global_batch_size)
    random.shuffle(global_batches)
    return [*global_batches, rest] if len(rest) else global_batches


def shard(
    lengths: Sequence[int] | np.ndarray, micro_batch_size: int, rank: int = 0, world_size: int = 1
) -> list[np.ndarray]:
    """A rank's micro-batches: indices into a global batch, similar lengths together.

    All ranks get equally many, so that none waits for another; if the examples do not suffice, a rank's last
    micro-batch is empty.

    >>> [indices.tolist() for indices in shard([9, 2, 8, 3], 2)]
    [[1, 3], [2, 0]]
    >>> [[indices.tolist() for indices in shard([9, 2, 8], 1, rank, 2)] for rank in (0, 1)]
    [[[1], [0]], [[2], []]]
    """
    micro_batches = _cut(np.argsort(lengths, kind="stable"), micro_batch_size)
    missing = -len(micro_batches) % world_size
    return [*micro_batches, *[np.empty(0, np.int64)] * missing][rank::world_size]


def replay_indices(size: int, count: int, seed: int, step: int) -> np.ndarray:
    """The `count` of `size` replayed examples that step `step` sees: all in turn, in a new order each round."""
    positions = range(step * count, (step + 1) * count)  # in the endless sequence of rounds
    return np.array([_replay_order(size, seed, i // size)[i % size] for i in positions], np.int64)


@lru_cache(maxsize=1)  # a step starts in the round in which the previous one ended
def _replay_order(size: int, seed: int, round: int) -> np.ndarray:
    return np.random.default_rng([seed, round, 1]).permutation(size)


def _cut(order: np.ndarray, size: int) -> list[np.ndarray]:
    return [order[start : start + size] for start in range(0, len(order), size)]
