"""Sequences in, one `Batch` out: append the end, pad, shift by one, ignore the padding.

Padding is masked by position and never by value: GPT-2 pads with its end-of-text, and masking by value would hide
the one token that teaches a model to stop (transformers issue 23530).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minigpt.data.encode import Example


class Batch(NamedTuple):
    """What one forward pass reads."""

    inputs: Tensor
    """(B,T) int64 token ids."""
    targets: Tensor
    """(B,T) int64: at each position the token that comes next; -100 where nothing is to be learnt."""


def collate(
    batch: Sequence,
    pad_token_id: int = 50256,
    ignore_index: int = -100,
    allowed_max_len: int | None = None,
) -> Batch:
    """Right-pads sequences to the longest one and shifts them against themselves.

    A plain sequence gets the end-of-text appended unless it already ends in it, and all of it is supervised. An
    `Example` is taken as it is: it carries its own end, or was cut before it.

    >>> collate([[1, 2, 3], [4, 5]])  # doctest: +NORMALIZE_WHITESPACE
    Batch(inputs=tensor([[    1,     2,     3], [    4,     5, 50256]]),
          targets=tensor([[    2,     3, 50256], [    5, 50256,  -100]]))

    Args:
        batch: Examples, or id sequences (lists, tuples, arrays, tensors); none of them is changed.
        pad_token_id: padding, and the end of a plain sequence.
        ignore_index: the target that the loss passes over.
        allowed_max_len: at most this many positions T; what is longer is cut on the right.

    Returns:
        `Batch(inputs, targets)`, both (B,T) int64 on the CPU.

    Raises:
        ValueError: an empty batch, a sequence with nothing left after the shift, or a cap below 1.
    """
    if len(batch) == 0:
        raise ValueError("the batch is empty: there is nothing to collate")
    if allowed_max_len is not None and allowed_max_len < 1:
        raise ValueError(f"allowed_max_len is {allowed_max_len}: at least one position is needed")
    rows = []
    for index, item in enumerate(batch):
        if isinstance(item, Example):
            ids = torch.from_numpy(np.asarray(item.ids).astype(np.int64))
            supervised = torch.from_numpy(np.asarray(item.supervised).astype(bool))
        else:
            ids = torch.from_numpy(np.asarray(item).astype(np.int64))
            if len(ids) == 0 or ids[-1] != pad_token_id:
                ids = torch.cat([ids, ids.new_tensor([pad_token_id])])
            supervised = torch.ones_like(ids, dtype=torch.bool)
        if len(ids) < 2:
            raise ValueError(f"sequence {index} of the batch has no token left to predict after the shift")
        if allowed_max_len is not None:  # the shift eats one
            ids, supervised = ids[: allowed_max_len + 1], supervised[: allowed_max_len + 1]
        rows.append((ids, supervised))
    longest = max(len(ids) for ids, _ in rows) - 1
    inputs = torch.full((len(rows), longest), pad_token_id)
    targets = torch.full((len(rows), longest), ignore_index)
    for row, (ids, supervised) in enumerate(rows):
        inputs[row, : len(ids) - 1] = ids[:-1]
        targets[row, : len(ids) - 1] = ids[1:].masked_fill(~supervised[1:], ignore_index)
    return Batch(inputs, targets)
