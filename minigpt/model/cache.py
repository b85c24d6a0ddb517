"""The KV cache: keys and values of the previous tokens, so that generating a token computes one position only."""

import copy
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor


class KVCache:
    """Preallocated keys and values of every layer. A token is stored in the slot of its position.

    So a batch may have rows of different lengths: each row has its own positions, and attention reads the slots up to a
    query's position. Stale data in later slots (padding of a shorter prompt, tokens of an earlier row) is overwritten
    before it is read.

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
        self.buffer = _zeros(shape, device, dtype)  # zeros, because a NaN in a masked slot would spread
        self.max_length = max_length
        self.length = 0  # slots in use: the highest position of the last call + 1
        # Of the current call, set by `extend`:
        self.positions = torch.empty(0, dtype=torch.long)
        self._layers: tuple[Tensor, ...] = ()  # n_layer x (2,B,nh,length,hs)
        self._keys: tuple[Tensor, ...] = ()  # n_layer x (B,nh,length,hs)
        self._values: tuple[Tensor, ...] = ()
        self._new: tuple[Tensor, ...] = ()  # n_layer x (2,B,nh,T,hs): the last T slots of them

    @classmethod
    def for_model(cls, model: Any, batch_size: int, max_length: int) -> "KVCache":
        """A cache on the model's device. On a CPU it is fp32 for weights of any dtype: attention of one query over many
        keys is up to three times slower in bf16 there, although it reads half the bytes."""
        dtype = torch.float32 if model.device.type == "cpu" else model.dtype
        return cls(model.config, batch_size, max_length, device=model.device, dtype=dtype)

    def extend(self, positions: Tensor) -> None:
        """Prepares all layers for tokens at these consecutive positions: (B,T), or (T,) if the same in every row."""
        self.positions, self.length = positions, int(positions.max()) + 1
        if self.length > self.max_length:
            raise ValueError(f"position {self.length - 1} does not fit into a cache of {self.max_length}")
        used = self.buffer[:, :, :, :, : self.length]
        self._layers = used.unbind()
        self._keys, self._values = used[:, 0].unbind(), used[:, 1].unbind()
        self._new = used[:, :, :, :, self.length - positions.shape[-1] :].unbind()

    def update(self, layer: int, kv: Tensor) -> tuple[Tensor, Tensor]:
        """Stores (2,B,nh,T,hs) keys and values; returns all of the layer's, 2 x (B,nh,length,hs)."""
        kv = kv.detach() if kv.requires_grad else kv  # no gradient flows through the cache
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
        """A view of these rows, for a call on them alone."""
        part = copy.copy(self)
        part.buffer, part.length = self.buffer[:, :, start:stop], 0  # so that default positions count from 0
        return part

    def copy_rows(self, sources: list[int], targets: list[int], start: int, stop: int) -> None:
        """Copies slots start to stop from source rows to target rows; all are read before any is written."""
        self.buffer[:, :, targets, :, start:stop] = self.buffer[:, :, sources, :, start:stop]


def _zeros(shape: tuple[int, ...], device: torch.device | None, dtype: torch.dtype | None) -> Tensor:
    """Zeros. On a CPU by NumPy, whose zeros are mapped lazily: pages that are never written take no memory."""
    if torch.device(device or "cpu").type != "cpu":
        return torch.zeros(shape, device=device, dtype=dtype)
    dtype = dtype or torch.float32
    size = math.prod(shape) * dtype.itemsize
    raw = torch.from_numpy(np.zeros(size + 64, np.uint8))
    return raw[-raw.data_ptr() % 64 :][:size].view(dtype).view(shape)  # aligned to a cache line
