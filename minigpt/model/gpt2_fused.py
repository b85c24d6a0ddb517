"""`gpt2.Block` in fewer calls, for generation: its products include the GELU and the residual sum.

Generating one token is so little work that the number of calls matters, calls of Python included: so the products and
the LayerNorms are functions, not modules.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from minigpt.model.cache import KVCache
from minigpt.model.gpt2 import Block, attend


class FusedBlock(nn.Module):
    """
    Args:
        block: the layer, which stays as it is.
        linear: makes a product of a weight (N,K) and a bias (N,): `y = product(x, gelu=False, residual=None)`.
        dtype: of the activations.
    """

    def __init__(self, block: Block, linear: Callable[[Tensor, Tensor | None], Any], dtype: torch.dtype):
        super().__init__()
        self.n_head, self.layer = block.attn.n_head, block.attn.layer
        self.ln_1, self.ln_2 = _layer_norm(block.ln_1, dtype), _layer_norm(block.ln_2, dtype)
        self.c_attn, self.attn_c_proj, self.c_fc, self.mlp_c_proj = (
            linear(module.weight, module.bias)
            for module in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj)
        )

    def forward(self, x: Tensor, cache: KVCache | None, mask: Tensor | None) -> Tensor:
        y = attend(self.c_attn(self.ln_1(x)), self.n_head, self.layer, cache, mask)
        x = self.attn_c_proj(y, residual=x)
        y = self.c_fc(self.ln_2(x), gelu=True)
        return self.mlp_c_proj(y, residual=x)


def _layer_norm(module: nn.LayerNorm, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    weight, bias = module.weight.detach().to(dtype), module.bias.detach().to(dtype)
    return partial(torch.layer_norm, normalized_shape=module.normalized_shape, weight=weight, bias=bias, eps=module.eps)
