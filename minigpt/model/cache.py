"""Keys and values of the tokens that were read, so that each new token costs one position and not all of them."""

import torch
from torch import Tensor


class KVCache:
    """Preallocated keys and values of every layer. A token lies in the slot of its position.

    So rows of different lengths live side by side: each row has its own positions, and attention looks at the
    slots up to a query's position and no further. Left padding has the position -1, which is a spare slot at the
    end of the buffers that nobody reads.

    Args:
        config: the model's `GPTConfig`.
        batch_size: rows.
        max_length: slots a row; at most `config.n_positions`.
    """

    def __init__(self, config, batch_size: int, max_length: int, *, device=None, dtype=None):
        shape = (config.n_layer, 2, batch_size, config.n_head, max_length + 1, config.n_embd // config.n_head)
        self.buffer = torch.zeros(shape, device=device, dtype=dtype)  # zeros: a masked slot must not hold a NaN
        self.max_length = max_length
        self.length = 0  # slots in use: one more than the highest position seen in any row

    def extend(self, positions: Tensor) -> None:
        """Makes room for (B,T) or (T,) positions, once for all layers."""
        self.length = max(self.length, int(positions.max()) + 1)
        if self.length > self.max_length:
            raise ValueError(f"position {self.length - 1} does not fit into a cache of {self.max_length}")

    def update(self, layer: int, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Stores (B,nh,T,hs) keys and values; returns all of the layer's, (B,nh,length,hs)."""
        keys, values = self.buffer[layer, 0], self.buffer[layer, 1]  # (B,nh,slots,hs)
        k, v = k.detach(), v.detach()  # what was read is not learnt from
        if positions.dim() == 1:  # the same positions in every row
            keys[:, :, positions], values[:, :, positions] = k, v
        else:
            rows = torch.arange(k.shape[0], device=k.device)[:, None]  # (B,1), beside positions (B,T)
            keys[rows, :, positions] = k.transpose(1, 2)  # (B,nh,T,hs) -> (B,T,nh,hs)
            values[rows, :, positions] = v.transpose(1, 2)
        return keys[:, :, : self.length], values[:, :, : self.length]

    def mask(self, positions: Tensor) -> Tensor:
        """What each query may see, (B,1,T,length) or (1,1,T,length): the slots up to its own position.

        Padding sees slot 0, because a row of attention with nothing to see is not a number.
        """
        slots = torch.arange(self.length, device=positions.device)
        return slots <= positions.clamp(min=0).view(-1, 1, positions.shape[-1], 1)

    def select(self, rows: Tensor) -> None:
        """Keeps only these rows, in this order: finished ones leave the batch."""
        self.buffer = self.buffer[:, :, rows]
