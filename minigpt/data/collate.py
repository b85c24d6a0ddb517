"""Collates sequences into a `Batch`: append end-of-text, pad, shift by one, mask the padding.

Padding is masked by position, never by value: GPT-2's pad token is its end-of-text token, and masking by value would
hide the only token that teaches a model to stop (transformers issue 23530).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minigpt.data.encode import Example


class Batch(NamedTuple):
    """The input of one forward pass."""

    inputs: Tensor
    """(B,T) int64 token ids."""
    targets: Tensor
    """(B,T) int64: the next token at each position, or -100 at positions without a loss."""


def collate(
    batch: Sequence,
    pad_token_id: int = 50256,
    ignore_index: int = -100,
    allowed_max_len: int | None = None,
) -> Batch:
    """Right-pads sequences to the longest one; targets are the inputs shifted left by one.

    A plain sequence gets end-of-text appended unless it already ends with it, and is supervised throughout. An
    `Example` gets nothing appended: it already ends with its end-of-text, or was truncated before it.

    >>> collate([[1, 2, 3], [4, 5]])  # doctest: +NORMALIZE_WHITESPACE
    Batch(inputs=tensor([[    1,     2,     3], [    4,     5, 50256]]),
          targets=tensor([[    2,     3, 50256], [    5, 50256,  -100]]))

    Args:
        batch: Examples, or id sequences (lists, tuples, arrays, tensors); they are not modified.
        pad_token_id: the padding, and the end-of-text appended to a plain sequence.
        ignore_index: the target value that the loss ignores.
        allowed_max_len: maximum number of positions T; longer sequences are truncated on the right.

    Returns:
        `Batch(inputs, targets)`, both (B,T) int64 on the CPU.

    Raises:
        ValueError: an empty batch, a sequence with no token left after the shift, or `allowed_max_len` below 1.
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
        if allowed_max_len is not None:  # + 1: the shift consumes one
            ids, supervised = ids[: allowed_max_len + 1], supervised[: allowed_max_len + 1]
        rows.append((ids, supervised))
    longest = max(len(ids) for ids, _ in rows) - 1
    inputs = torch.full((len(rows), longest), pad_token_id)
    targets = torch.full((len(rows), longest), ignore_index)
    for row, (ids, supervised) in enumerate(rows):
        inputs[row, : len(ids) - 1] = ids[:-1]
        targets[row, : len(ids) - 1] = ids[1:].masked_fill(~supervised[1:], ignore_index)
    return Batch(inputs, targets)
