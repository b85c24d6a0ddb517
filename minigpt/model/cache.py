"""Keys and values of the tokens that were read, so that each new token costs one position and not all of them."""

import copy
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor


class KVCache:
    """Preallocated keys and values of every layer. A token lies in the slot of its position.

    So rows of different lengths live side by side: each row has its own positions, and attention looks at the
    slots up to a query's position and no further. What a slot beyond it holds (the padding of a shorter prompt, an
    earlier row's tokens) is overwritten before anybody reads it.

    Args:
        config: the model's; the cache depends on `n_layer` and `kv_shape`.
        batch_size: rows.
        max_length: slots a row; at most `config.context`.
        dtype: of keys and values; attention over the cache computes in it.
    """

    def __init__(
        self,
        config: Any,
        batch_size: int,
        max_length: int,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        n_kv_head, head_size = config.kv_shape
        shape = (config.n_layer, 2, batch_size, n_kv_head, max_length, head_size)
        self.buffer = _zeros(shape, device, dtype)  # zeros: a masked slot must not hold a NaN
        self.max_length = max_length
        self.length = 0  # slots in use: one more than the highest position of the last call
        # Of the call under way, set by `extend`:
        self.positions = torch.empty(0, dtype=torch.long)
        self._layers: tuple[Tensor, ...] = ()  # n_layer x (2,B,nh,length,hs)
        self._keys: tuple[Tensor, ...] = ()  # n_layer x (B,nh,length,hs)
        self._values: tuple[Tensor, ...] = ()
        self._new: tuple[Tensor, ...] = ()  # n_layer x (2,B,nh,T,hs): the last T slots of them

    @classmethod
    def for_model(cls, model: Any, batch_size: int, max_length: int) -> "KVCache":
        """A cache where the model's weights are. On a CPU it is fp32, whatever they are: one query against many keys
        is slower there in bf16, by up to three times, though it reads half the bytes."""
        dtype = torch.float32 if model.device.type == "cpu" else model.dtype
        return cls(model.config, batch_size, max_length, device=model.device, dtype=dtype)

    def extend(self, positions: Tensor) -> None:
        """Makes room for (B,T) or (T,) positions, in each row one after the other, once for all layers."""
        self.positions, self.length = positions, int(positions.max()) + 1
        if self.length > self.max_length:
            raise ValueError(f"position {self.length - 1} does not fit into a cache of {self.max_length}")
        used = self.buffer[:, :, :, :, : self.length]
        self._layers = used.unbind()
        self._keys, self._values = used[:, 0].unbind(), used[:, 1].unbind()
        self._new = used[:, :, :, :, self.length - positions.shape[-1] :].unbind()

    def update(self, layer: int, kv: Tensor) -> tuple[Tensor, Tensor]:
        """Stores (2,B,nh,T,hs) keys and values; returns all of the layer's, 2 x (B,nh,length,hs)."""
        kv = kv.detach() if kv.requires_grad else kv  # what was read is not learnt from
        if self.positions.dim() == 1:  # the same positions in every row
            self._new[layer].copy_(kv)
        else:
            rows = torch.arange(kv.shape[1], device=kv.device)[:, None]  # (B,1), beside positions (B,T)
            self._layers[layer].transpose(2, 3)[:, rows, self.positions] = kv.transpose(2, 3)  # both (2,B,T,nh,hs)
        return self._keys[layer], self._values[layer]

    def mask(self) -> Tensor | None:
        """Which slots each query may attend to, (B,1,T,length): those up to its own position. None if all rows have the
        same positions and no mask is needed: a single token attends to all slots, and a prompt is plainly causal."""
        if self.positions.dim() == 1 and len(self.positions) in (1, self.length):
            return None
        slots = torch.arange(self.length, device=self.positions.device)
        return slots <= self.positions.view(-1, 1, self.positions.shape[-1], 1)

    def rows(self, start: int, stop: int) -> "KVCache":
        """A cache of these rows alone, in the same memory, for a call on them."""
        part = copy.copy(self)
        part.buffer, part.length = self.buffer[:, :, start:stop], 0  # so, by default, positions count from 0
        return part

    def copy_rows(self, sources: list[int], targets: list[int], start: int, stop: int) -> None:
        """Copies the slots start to stop of some rows over those of others. All are read before any is written."""
        self.buffer[:, :, targets, :, start:stop] = self.buffer[:, :, sources, :, start:stop]


def _zeros(shape: tuple[int, ...], device: torch.device | None, dtype: torch.dtype | None) -> Tensor:
    """Zeros, of which a CPU holds only the pages that are written: numpy asks for clear pages, torch clears them."""
    if torch.device(device or "cpu").type != "cpu":
        return torch.zeros(shape, device=device, dtype=dtype)
    dtype = dtype or torch.float32
    size = math.prod(shape) * dtype.itemsize
    raw = torch.from_numpy(np.zeros(size + 64, np.uint8))
    return raw[-raw.data_ptr() % 64 :][:size].view(dtype).view(shape)  # from a cache line's beginning
