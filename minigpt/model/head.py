"""The output head and its cross-entropy in one step, without the full logits.

GPT-2's logits for one batch (8 x 1024 tokens x 50257 words, 1.6 GB in fp32) are larger than all other tensors of a
training step. They are computed in chunks: the loss of a chunk and its gradient together, in forward, after which the
chunk is freed. Backward only scales the gradients.

The idea is Liger Kernel's fused linear cross-entropy (Hsu et al. 2024, arXiv:2410.10989); the head is not
computed at all for ignored targets (the prompt, the padding), which in instruction tuning is most positions.
"""

from typing import Any

import torch
from torch import Tensor

IGNORE_INDEX = -100
CHUNK_ELEMENTS = 2**25  # logits of a chunk: 128 MB in fp32
CHUNK_ROWS = 1024  # and at most so many tokens: fp16, whose maximum is 65504, sums their gradients of a word


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Summed negative log-likelihood of `targets` under `softmax(hidden @ weight.T)`.

    Equal to `F.cross_entropy(hidden @ weight.T, targets, ignore_index=-100, reduction="sum")`.

    Args:
        hidden: (B,T,C), the last layer's output.
        weight: (V,C), the head; GPT-2 ties it to the token embedding.
        targets: (B,T), ids of int64; -100 is ignored.

    Returns:
        (nll_sum, n_tokens): the sum as an fp32 scalar, and the number of targets that are not ignored.
    """
    keep = targets != IGNORE_INDEX  # (B,T)
    hidden, targets = hidden[keep], targets[keep]  # (B,T,C) -> (N,C), (B,T) -> (N,)
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    with torch.autocast(device, enabled=False):
        if torch.is_grad_enabled():
            nll_sum = _LinearCrossEntropy.apply(hidden.to(dtype), weight.to(dtype), targets)
        else:
            nll_sum, _, _ = _loss_and_gradients(hidden.to(dtype), weight.to(dtype), targets, gradients=False)
    return nll_sum, keep.sum()


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        nll_sum, *gradients = _loss_and_gradients(hidden, weight, targets, gradients=True)
        ctx.save_for_backward(*gradients)
        return nll_sum

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        d_hidden, d_weight = ctx.saved_tensors
        # In fp32, because a loss scale of 65536 is infinite in fp16.
        return (d_hidden * scale[None]).to(d_hidden.dtype), (d_weight * scale[None]).to(d_hidden.dtype), None


def _loss_and_gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, gradients: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The sum over (N,C) hidden states and, if wanted, its gradients with respect to hidden (N,C) and weight (V,C)."""
    precise = torch.promote_types(hidden.dtype, torch.float32)
    nll_sum = torch.zeros((), dtype=precise, device=hidden.device)
    d_hidden = torch.empty_like(hidden) if gradients else None
    d_weight = torch.zeros_like(weight, dtype=precise) if gradients else None
    rows = max(1, min(CHUNK_ROWS, CHUNK_ELEMENTS // weight.shape[0]))
    for start in range(0, hidden.shape[0], rows):
        chunk, target = hidden[start : start + rows], targets[start : start + rows, None]  # (n,C), (n,1)
        logits = (chunk @ weight.t()).to(precise)  # (n,C) @ (C,V) -> (n,V)
        log_z = logits.logsumexp(-1, keepdim=True)  # (n,1)
        nll_sum += (log_z - logits.gather(1, target)).sum()
        if d_hidden is not None and d_weight is not None:
            # d nll / d logits = softmax(logits) - onehot(target)
            d_logits = logits.sub_(log_z).exp_()
            d_logits.scatter_add_(1, target, -torch.ones_like(target, dtype=precise))
            d_logits = d_logits.to(hidden.dtype)
            torch.mm(d_logits, weight, out=d_hidden[start : start + rows])
            if chunk.dtype == precise:
                d_weight.addmm_(d_logits.t(), chunk)  # (V,n) @ (n,C) -> (V,C)
            else:  # summed in fp32: in half precision the error would grow with every chunk
                d_weight += d_logits.t() @ chunk
            del d_logits
        del logits  # else they coexist with the next chunk's: 134 MB for GPT-2
    return nll_sum, d_hidden, d_weight
