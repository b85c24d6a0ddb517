"""GPT-2, as a decoder that one can read top to bottom.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; the shapes, the initialisation and the
tanh GELU are those of the code released with it (openai/gpt-2, `src/model.py`). Names of the fields and of the
module tree are Hugging Face's, so that a checkpoint's tensors find their places by name.

Shapes: B rows, T positions, C = n_embd, nh heads of hs = C / nh, V = vocab_size.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minigpt.model.cache import KVCache
from minigpt.model.head import linear_cross_entropy
from minigpt.model.weights import SkipInit, check_tensors, read_config, read_weights, write_model

PRESETS = {  # published shapes and parameter counts
    "gpt2": {"n_layer": 12, "n_embd": 768, "n_head": 12},  # 124,439,808
    "gpt2-medium": {"n_layer": 24, "n_embd": 1024, "n_head": 16},  # 354,823,168
    "gpt2-large": {"n_layer": 36, "n_embd": 1280, "n_head": 20},  # 774,030,080
    "gpt2-xl": {"n_layer": 48, "n_embd": 1600, "n_head": 25},  # 1,557,611,200
}
TANH_GELUS = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")  # three names of one function
CONV1D = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")  # stored (in,out) in a checkpoint, not (out,in)


@dataclass
class GPTConfig:
    """The shape of a GPT-2. Field names are those of Hugging Face's `config.json`."""

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
    def from_pretrained(cls, name_or_folder: str | Path, revision: str | None = None, **changes: Any) -> "GPTConfig":
        """The shape of a checkpoint, with some fields changed. Errors: those of `GPT.from_pretrained`."""
        values = read_config(name_or_folder, revision)
        try:
            config = cls.from_dict(values)
        except ValueError as error:
            raise ValueError(f"{name_or_folder}: config.json: {error}") from error
        return replace(config, **changes)

    @classmethod
    def from_dict(cls, values: dict) -> "GPTConfig":
        """From the contents of a `config.json`; keys that do not change the computation are passed over.

        Raises `ValueError` where it describes another model than GPT-2, or a variant of it.
        """
        if values.get("model_type", "gpt2") != "gpt2":
            raise ValueError(f"model_type {values['model_type']!r} is not 'gpt2'")
        for key, plain in {
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
            "tie_word_embeddings": True,
        }.items():
            if values.get(key, plain) != plain:
                raise ValueError(f"{key} = {values[key]} is a variant of GPT-2 that is not supported")
        names = {field.name for field in fields(cls)}
        return cls(**{key: value for key, value in values.items() if key in names})

    def check_vocabulary(self, size: int) -> None:
        """Refuses a tokenizer whose ids reach beyond the embedding."""
        if size > self.vocab_size:
            raise ValueError(
                f"the tokenizer has {size:,} ids, the model's embedding {self.vocab_size:,}: they do not belong "
                "together (--tokenizer_name names another tokenizer)"
            )

    def check_length(self, flag: str, length: int) -> None:
        """Refuses sequences that reach beyond the context."""
        if length > self.n_positions:
            raise ValueError(f"{flag} {length} is more than the model's context of {self.n_positions}")

    def to_dict(self) -> dict:
        """The contents of a `config.json` that transformers opens."""
        return {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_ctx": self.n_positions, **asdict(self)}


def attend(
    qkv: Tensor, n_head: int, layer: int, cache: KVCache | None, mask: Tensor | None, dropout: float = 0.0
) -> Tensor:
    """Every head's causal attention: queries, keys and values (B,T,3*C) -> (B,T,C), the heads side by side.

    With a cache, the keys and values are those that it holds of the layer, these among them; `mask` is the cache's.
    """
    B, T, C = *qkv.shape[:2], qkv.shape[2] // 3
    heads = qkv if cache is None else qkv.to(cache.buffer.dtype)
    if B * T == 1:
        heads = heads.view(3, 1, n_head, 1, C // n_head)  # the same, in one call
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


class GPT(nn.Module):
    """GPT-2 with a language-modelling head tied to the token embedding."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False  # keep only each block's input: compute the rest again (arXiv:1604.06174)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.lm_head: Callable[[Tensor], Tensor] | None = None  # tied to wte, unless `inference.fast` packed it
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

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
        last_only: bool | Tensor = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits, or the loss.

        Args:
            idx: (B,T) token ids.
            targets: (B,T) ids to predict; -100 is ignored, and the head is not computed there.
            positions: (T,) or (B,T); None counts from 0, or from where the cache ends.
            cache: filled with this call's keys and values, and read.
            last_only: logits of the last position only; or a (B,) tensor that says which one of each row, where rows
                of different lengths are padded on the right.

        Returns:
            Without targets logits (B,T,V), with `last_only` (B,1,V). With targets `(nll_sum, n_tokens)`: the summed
            negative log-likelihood in fp32 and the number of targets that counted.

        Raises:
            ValueError: the tokens reach beyond the context; of positions that are given, beyond the cache.
        """
        T = idx.shape[1]
        if positions is None:
            start = cache.length if cache is not None else 0
            if start + T > self.config.n_positions:
                raise ValueError(f"{start + T} tokens do not fit into a context of {self.config.n_positions}")
            positions = torch.arange(start, start + T, device=idx.device)
        mask = None
        if cache is not None:
            cache.extend(positions)
            alike = positions.dim() == 1  # one token sees all, and tokens from the first on are plainly causal
            mask = None if alike and T in (1, cache.length) else cache.mask()
        x = self.drop(self.wte(idx) + self.wpe(positions))  # (B,T) -> (B,T,C)
        recompute = self.gradient_checkpointing and self.training and cache is None
        for block in self.h:
            # Early stop is the default, and needed: without it ZeRO-3 releases weights that backward is reading.
            x = checkpoint(block, x, cache, mask, use_reentrant=False) if recompute else block(x, cache, mask)
        x = self.ln_f(x)
        if targets is not None:
            return linear_cross_entropy(x, self.wte.weight, targets)
        if isinstance(last_only, Tensor):
            x = x[torch.arange(len(x), device=x.device), last_only][:, None]  # (B,T,C) -> (B,1,C)
        elif last_only:
            x = x[:, -1:]  # (B,T,C) -> (B,1,C)
        return F.linear(x, self.wte.weight) if self.lm_head is None else self.lm_head(x)  # (B,T,C) -> (B,T,V)

    def num_parameters(self) -> int:
        """The tied head counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path,
        revision: str | None = None,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        **changes: Any,
    ) -> "GPT":
        """A checkpoint in Hugging Face's layout, from a folder or from the hub, in eval mode.

        An fp32 file is memory-mapped: its pages are the model's weights, and there is no second copy in RAM.

        Args:
            name_or_folder: a folder, or a hub id such as "openai-community/gpt2".
            revision: branch, tag or commit of a hub id.
            device: where the weights go; None is the CPU.
            dtype: of the weights; None is fp32, whatever the file holds.
            changes: fields of the config to change, such as `resid_pdrop=0.0`.

        Raises:
            FileNotFoundError: no such folder or repository, or no safetensors weights in it.
            ValueError: it is not a GPT-2, or tensors are missing, unexpected or of another shape.
        """
        config = GPTConfig.from_pretrained(name_or_folder, revision, **changes)
        with torch.device("meta"), SkipInit():  # no memory, no initialisation
            model = cls(config)
        weights = {
            name: tensor.to(device=device, dtype=dtype or torch.float32)
            for name, tensor in read_state_dict(name_or_folder, revision).items()
        }
        check_tensors(model.state_dict(), weights, name_or_folder)
        model.load_state_dict(weights, assign=True)
        return model.eval()

    def save_pretrained(self, folder: str | Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """Writes config.json, generation_config.json and model.safetensors as transformers would.

        Args:
            folder: made if it does not exist.
            state_dict: weights to write instead of the module's own, such as those an engine gathered.
        """
        weights = {}
        for name, tensor in (state_dict if state_dict is not None else self.state_dict()).items():
            if name.endswith(tuple(f"{layer}.weight" for layer in CONV1D)):
                tensor = tensor.t()
            weights[f"transformer.{name}"] = tensor
        write_model(folder, self.config.to_dict(), weights)


def read_state_dict(name_or_folder: str | Path, revision: str | None = None) -> dict[str, Tensor]:
    """A checkpoint's weights by the module's own names and in its layout, memory-mapped."""
    weights = {}
    for name, tensor in read_weights(name_or_folder, revision).items():
        name = name.removeprefix("transformer.")
        if name == "lm_head.weight" or name.endswith((".attn.bias", ".attn.masked_bias")):
            continue  # the tied head once more; the causal mask, which old versions saved
        weights[name] = tensor.t() if name.endswith(tuple(f"{layer}.weight" for layer in CONV1D)) else tensor
    return weights
