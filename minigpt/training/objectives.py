"""What a training step minimises: items in, a batch, its weight, and the sum of the loss.

The loop sums the loss and the weight over all micro-batches of a global batch and all ranks and divides one by the
other, so that a global batch gives the same gradient in however many parts it is computed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from minigpt.data.collate import Batch, collate

PAD_ID = 0  # any id of the vocabulary: padding is on the right, where causal attention does not look, and has no target


class Loss(NamedTuple):
    """What an objective computes on one micro-batch: sums, not means."""

    sum: Tensor
    """Scalar, with its graph."""
    extras: dict[str, Tensor]
    """More sums by name, for metrics.jsonl only; the same names in every call. Divided by the same weight."""


class Objective(Protocol):
    """The loop's whole knowledge of what is trained. A batch is any NamedTuple of tensors."""

    def collate(self, items: Sequence[Any]) -> Any:
        """A batch, on the CPU. Of no items, a filler: a batch of the same type and of weight zero.

        A rank that has run out of items computes a filler, because all ranks must run equally many forwards.
        """

    def weight(self, batch: Any) -> int:
        """The batch's share of the denominator: supervised tokens, or pairs, say."""
        ...

    def __call__(self, model: nn.Module, batch: Any) -> Loss:
        """The loss of a batch that is on the model's device.

        `model(...)` is the only way to compute with it: its methods and submodules would bypass ZeRO-3, which gathers
        the weights when the model itself is called.
        """
        ...


@dataclass(frozen=True)
class NextToken:
    """Language modelling: the negative log-likelihood of each supervised token, its weight the number of them.

    >>> batch = NextToken().collate([[5, 6, 7]])
    >>> NextToken().weight(batch), NextToken().weight(NextToken().collate([]))
    (3, 0)
    """

    def collate(self, items: Sequence[Any]) -> Batch:
        if not items:
            return Batch(torch.tensor([[PAD_ID]]), torch.tensor([[-100]]))  # (1,1) each
        return collate(items, PAD_ID)

    def weight(self, batch: Batch) -> int:
        return int((batch.targets != -100).sum())

    def __call__(self, model: nn.Module, batch: Batch) -> Loss:
        nll_sum, _ = model(batch.inputs, batch.targets)
        return Loss(nll_sum, {})
