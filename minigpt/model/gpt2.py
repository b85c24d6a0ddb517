"""GPT-2, as a decoder that one can read top to bottom.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; the shapes, the initialisation and the
tanh GELU are those of the code released with it (openai/gpt-2, `src/model.py`). Names of the fields and of the
module tree are Hugging Face's, so that a checkpoint's tensors find their places by name.

Shapes: B rows, T positions, C = n_embd, nh heads of hs = C / nh, V = vocab_size.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch.nn.functional as F
from torch import Tensor, nn

from minigpt.model.base import CausalLM, ModelConfig
from minigpt.model.cache import KVCache
from minigpt.model.weights import WeightMap

PRESETS = {  # published shapes and parameter counts
    "gpt2": {"n_layer": 12, "n_embd": 768, "n_head": 12},  # 124,439,808
    "gpt2-medium": {"n_layer": 24, "n_embd": 1024, "n_head": 16},  # 354,823,168
    "gpt2-large": {"n_layer": 36, "n_embd": 1280, "n_head": 20},  # 774,030,080
    "gpt2-xl": {"n_layer": 48, "n_embd": 1600, "n_head": 25},  # 1,557,611,200
}
TANH_GELUS = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")  # three names of one function
WEIGHTS = WeightMap(
    prefix="transformer.",
    transposed=("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"),
    ignored=(".attn.bias", ".attn.masked_bias"),  # the causal mask, which old versions saved
    tied=("lm_head.weight",),  # the token embedding once more
)


@dataclass
class GPTConfig(ModelConfig):
    """The shape of a GPT-2. Field names are those of Hugging Face's `config.json`."""

    MODEL_TYPE = "gpt2"
    ARCHITECTURE = "GPT2LMHeadModel"
    NAME = "GPT-2"
    SHAPE = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")

    vocab_size: int = 50257
    n_positions: int = 1024
    """The context: how many tokens the model can look at."""
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    """Width of the MLP; None is 4 x n_embd."""
    activation_function: str = "gelu_new"
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    bos_token_id: int = 50256
    eos_token_id: int = 50256

    def __post_init__(self) -> None:
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        if self.activation_function not in TANH_GELUS:
            raise ValueError(
                f"activation_function {self.activation_function!r} is not GPT-2's; one of {', '.join(TANH_GELUS)}"
            )

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "GPTConfig":
        """One of the four published sizes: gpt2, gpt2-medium, gpt2-large, gpt2-xl."""
        if name not in PRESETS:
            raise ValueError(f"no preset {name!r}; one of {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **changes})

    @classmethod
    def from_dict(cls, values: dict) -> Self:
        config = super().from_dict(values)
        for key, plain in {
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
            "tie_word_embeddings": True,
        }.items():
            if values.get(key, plain) != plain:
                raise ValueError(f"{key} = {values[key]} is a variant of GPT-2 that is not supported")
        return config

    def to_dict(self) -> dict:
        return {
            "architectures": [self.ARCHITECTURE],
            "model_type": self.MODEL_TYPE,
            "n_ctx": self.n_positions,
            **asdict(self),
        }

    @property
    def context(self) -> int:
        return self.n_positions

    @property
    def width(self) -> int:
        return self.n_embd


def attend(
    qkv: Tensor, n_head: int, layer: int, cache: KVCache | None, mask: Tensor | None, dropout: float = 0.0
) -> Tensor:
    """Every head's causal attention: queries, keys and values (B,T,3*C) -> (B,T,C), the heads side by side.

    With a cache, the keys and values are those that it holds of the layer, these among them; `mask` is the cache's.
    """
    B, T, C = *qkv.shape[:2], qkv.shape[2] // 3
    heads = qkv if cache is None else qkv.to(cache.buffer.dtype)
    if B * T == 1:
        heads = heads.view(3, 1, n_head, 1, C // n_head)  # one token: the same, without a permutation
    else:
        heads = heads.view(B, T, 3, n_head, C // n_head).permute(2, 0, 3, 1, 4)  # (B,T,3*C) -> (3,B,nh,T,hs)
    if cache is None:
        q, k, v = heads
    else:
        q, (k, v) = heads[0], cache.update(layer, heads[1:])  # (B,nh,T,hs), 2 x (B,nh,S,hs)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None and T > 1)
    return y.transpose(1, 2).reshape(B, T, C).to(qkv.dtype)  # (B,nh,T,hs) -> (B,T,C)


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.n_head = config.n_head
        self.attn_pdrop = config.attn_pdrop
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x: Tensor, cache: KVCache | None, mask: Tensor | None) -> Tensor:
        dropout = self.attn_pdrop if self.training else 0.0
        y = attend(self.c_attn(x), self.n_head, self.layer, cache, mask, dropout)
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        inner = config.n_inner or 4 * config.n_embd
        self.c_fc = nn.Linear(config.n_embd, inner)
        self.c_proj = nn.Linear(inner, config.n_embd)
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.c_fc(x), approximate="tanh")  # (B,T,C) -> (B,T,4*C)
        return self.dropout(self.c_proj(x))  # (B,T,4*C) -> (B,T,C)


class Block(nn.Module):
    """Pre-norm: the residual stream itself is never normalised."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: KVCache | None, mask: Tensor | None) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache, mask)
        return x + self.mlp(self.ln_2(x))


class GPT(CausalLM):
    """GPT-2 with a language-modelling head tied to the token embedding."""

    CONFIG = GPTConfig
    WEIGHTS = WEIGHTS
    FUSED_BLOCK = "minigpt.model.gpt2_fused:FusedBlock"

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """GPT-2's initialisation: normal of std 0.02, the residual projections scaled by 1/sqrt(2 n_layer)."""
        std = self.config.initializer_range
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):  # two of them a layer write into the residual stream
                nn.init.normal_(parameter, std=std / math.sqrt(2 * self.config.n_layer))
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.ones_(parameter)  # a LayerNorm's gain

    def hidden_states(self, idx: Tensor, positions: Tensor, cache: KVCache | None) -> Tensor:
        mask = None if cache is None else cache.mask()
        x = self.drop(self.wte(idx) + self.wpe(positions))  # (B,T) -> (B,T,C)
        for block in self.h:
            x = self.run_block(block, x, cache, mask)
        return self.ln_f(x)

    def head_weight(self) -> Tensor:
        return self.wte.weight
