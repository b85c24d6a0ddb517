"""A model's weights laid out for generation on a CPU.

One token at a time, a model does little but read its weights, so what counts is how few bytes they are and how they
lie. oneDNN reads them in blocks of its own; given the plain layout it walks through memory in strides, or reorders
them at every call. `for_generation` reorders them once. With `quantize="int8"` they take a quarter of fp32's bytes:
one byte a weight and one scale a row, in products with bf16 (weight-only quantization, as in Dettmers et al. 2022,
arXiv:2208.07339, without its outliers).

GPUs keep the plain path, and training never sees any of this.
"""

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt.data.tokenizer import Tokenizer
from minigpt.model.cache import KVCache
from minigpt.model.gpt2 import GPT, Block, attend
from minigpt.model.hub import SkipInit

ENGLISH = Path(__file__).parents[1] / "assets" / "english.txt"
QUANTIZATIONS = ("int8",)
FEW_ROWS = 8  # up to that many, `_weight_int8pack_mm` is faster than to unpack and take a plain product
WHOLE_STEPS = 64  # `_weight_int8pack_mm` walks along a row in vectors, and beyond its end where they do not fit
PART = 3072  # rows of a weight that are unpacked at a time


def for_generation(model: GPT, quantize: str | None = None) -> GPT:
    """The same model with its matrices packed, to generate with alone; the one given stays as it is.

    What is not a matrix is shared with it, and so is the token embedding, whose rows are looked up: the head tied to
    it is a second, packed copy. Let go of the model given, and its other matrices are freed. In int8 the
    rows are looked up in the head itself.

    Args:
        model: fp32 or bf16.
        quantize: None packs the weights as they are, and returns the model itself where nothing can be packed (on a
            GPU, or without oneDNN); "int8" rounds the matrices to 8 bits and computes in bf16. `perplexity` says what
            that costs. Its sums are rounded otherwise for few rows than for many, so near a tie a row's token may
            hang on the size of its batch (as it may with weights that are not packed, and on a GPU).

    Raises:
        ValueError: no such quantization.
    """
    if quantize not in (None, *QUANTIZATIONS):
        raise ValueError(f"no quantization {quantize!r}; one of {', '.join(QUANTIZATIONS)}")
    weight = model.wte.weight
    if quantize is None and not _can_pack(weight):
        return model
    dtype = torch.bfloat16 if quantize else weight.dtype
    linear = Int8Linear if quantize else PackedLinear
    with torch.device("meta"), SkipInit():
        fast = GPT(model.config).eval()
    unpacked = ("wpe", "ln_f") if quantize else ("wte", "wpe", "ln_f")
    for name in unpacked:
        for key, parameter in model.get_submodule(name).named_parameters():
            own = nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
            setattr(fast.get_submodule(name), key, own)
    fast.h = nn.ModuleList(FastBlock(block, linear, dtype) for block in model.h)  # type: ignore[arg-type]
    fast.lm_head = linear(weight, None)
    if isinstance(fast.lm_head, Int8Linear):
        fast.wte = Int8Embedding(fast.lm_head)  # type: ignore[assignment]  # looks up as an Embedding does
    fast.register_state_dict_pre_hook(_refuse_state_dict)
    return fast


def with_loss(model: GPT, tokenizer: Tokenizer, quantize: str | None = None) -> tuple[GPT, str]:
    """An fp32 model in bf16, or quantized, packed for generation; and what that costs, measured, as a line.

    The cost is the change of the perplexity on the text that comes along with the package (`assets/english.txt`), in
    pieces of at most the model's context. It is little text: differences below a tenth of a percent say nothing. For
    bf16 the model given is itself converted.
    """
    ids = tokenizer.encode(ENGLISH.read_text(encoding="utf-8"))
    length = model.config.n_positions
    pieces = [ids[start : start + length] for start in range(0, len(ids) - 1, length)]
    before = perplexity(model, pieces)
    model = for_generation(model, quantize) if quantize else for_generation(model.bfloat16())
    after = perplexity(model, pieces)
    cost = f"perplexity {before:,.2f} in fp32, {after:,.2f} in {quantize or 'bf16'} ({after / before - 1:+.2%})"
    return model, f"{cost}, over {len(ids)} tokens of English"


def use_huge_pages() -> None:
    """Lets torch ask for huge pages where a tensor is large, on Linux; call it before the process makes its first one.

    Weights are then read 7% (bf16) to 13% (fp32) faster, for a few tenths of a second more of packing.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read once, by torch's allocator


def _can_pack(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return weight.dtype == torch.float32 or (
        weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def _refuse_state_dict(*_: Any) -> None:
    raise ValueError("these weights are packed for generation; save the model that they came from")


class FastBlock(nn.Module):
    """A `Block` in fewer calls: a product also takes the GELU, or adds the residual stream, before it writes.

    One token is so little work that calls count, those of Python too: so what it calls are no modules.
    """

    def __init__(self, block: Block, linear: type["PackedLinear | Int8Linear"], dtype: torch.dtype):
        super().__init__()
        self.attend = partial(attend, n_head=block.attn.n_head, layer=block.attn.layer)
        self.ln_1, self.ln_2 = _layer_norm(block.ln_1, dtype), _layer_norm(block.ln_2, dtype)
        self.c_attn, self.attn_c_proj, self.c_fc, self.mlp_c_proj = (
            linear(own.weight, own.bias.detach().to(dtype))
            for own in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj)
        )

    def forward(self, x: Tensor, cache: KVCache | None, mask: Tensor | None) -> Tensor:
        y = self.attend(self.c_attn(self.ln_1(x)), cache=cache, mask=mask)
        x = self.attn_c_proj(y, residual=x)
        y = self.c_fc(self.ln_2(x), gelu=True)
        return self.mlp_c_proj(y, residual=x)


def _layer_norm(module: nn.LayerNorm, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    weight, bias = module.weight.detach().to(dtype), module.bias.detach().to(dtype)
    return partial(F.layer_norm, normalized_shape=module.normalized_shape, weight=weight, bias=bias, eps=module.eps)


class PackedLinear:
    """`F.linear` with the weight in oneDNN's own layout; then the tanh GELU, or a sum with the residual."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
        self.bias = bias

    def __call__(self, x: Tensor, *, gelu: bool = False, residual: Tensor | None = None) -> Tensor:
        product = torch.ops.mkldnn._linear_pointwise
        if residual is not None:
            return product.binary(x, residual, self.weight, self.bias, "add")
        return product(x, self.weight, self.bias, *(("gelu", [], "tanh") if gelu else ("none", [], "")))


class Int8Linear:
    """`F.linear` with an 8-bit weight: row n of the (N,K) matrix is `scale[n] * weight[n]`, rounded to the nearest;
    then the tanh GELU, or a sum with the residual."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        weight = weight.detach()
        lowest, highest = weight.aminmax(dim=1)  # (N,)
        largest = torch.maximum(-lowest, highest).float().clamp(min=torch.finfo(torch.float32).tiny)
        self.scale = (largest / 127).bfloat16()
        scaled = weight.contiguous() / self.scale.float()[:, None]
        self.weight = scaled.round_().clamp_(-127, 127).to(torch.int8)  # (N,K)
        self.bias = bias

    def __call__(self, x: Tensor, *, gelu: bool = False, residual: Tensor | None = None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).contiguous()  # (B,T,K) -> (B*T,K)
        if x.device.type == "cpu" and len(rows) <= FEW_ROWS and rows.shape[1] % WHOLE_STEPS == 0:
            y = torch._weight_int8pack_mm(rows, self.weight, self.scale)
        else:
            parts = self.weight.split(PART)  # whole, the head unpacked would not stay in any processor's cache
            y = torch.cat([F.linear(rows, part.to(x.dtype)) for part in parts], dim=-1) * self.scale
        y = (y if self.bias is None else y + self.bias).view(*x.shape[:-1], -1)  # (B*T,N) -> (B,T,N)
        y = F.gelu(y, approximate="tanh") if gelu else y
        return y if residual is None else residual + y


class Int8Embedding(nn.Module):
    """Looks tokens up in the rows of the head tied to it."""

    def __init__(self, head: Int8Linear):
        super().__init__()
        self.head = head

    def forward(self, idx: Tensor) -> Tensor:
        return self.head.weight[idx].to(self.head.scale.dtype) * self.head.scale[idx, None]


@torch.inference_mode()
def perplexity(model: GPT, sequences: Sequence[Sequence[int]]) -> float:
    """exp of the mean negative log-likelihood of every token after each sequence's first.

    Sequences longer than the context are cut to it. `perplexity(fast, data) / perplexity(model, data)` is what
    quantization costs.

    Raises:
        ValueError: no sequence has two tokens.
    """
    total, count = 0.0, 0
    for ids in sequences:
        idx = torch.tensor([list(ids[: model.config.n_positions])], device=model.wpe.weight.device)  # (1,T)
        if idx.shape[1] < 2:
            continue
        logits = model(idx[:, :-1])[0].float()  # (T-1,V)
        total += F.cross_entropy(logits, idx[0, 1:], reduction="sum").item()
        count += idx.shape[1] - 1
    if count == 0:
        raise ValueError("perplexity needs a sequence of two tokens or more")
    return torch.tensor(total / count, dtype=torch.float64).exp().item()  # where math.exp would overflow: infinity
