"""Weights packed for fast generation.

`for_generation` packs each matrix once, for the kernel that suits the machine (`minigpt.inference.kernels`). oneDNN
uses a blocked layout; with the plain layout it reads memory in strides, or reorders the weights at every call. With
`quantize="fp16"` weights take half of fp32's bytes, with `"int8"` a quarter.

GPUs use the plain path unless weights are quantized. Training does not use this module.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt.data.tokenizer import Tokenizer
from minigpt.hardware import bf16_warning, fastest_precision
from minigpt.inference.kernels import (
    DynamicInt8Linear,
    Fp16Linear,
    Int8Linear,
    Kernel,
    PackedLinear,
    PlainLinear,
    WidenedLinear,
    has_fp16_product,
    int8_levels,
)
from minigpt.inference.model_folder import ModelFolder
from minigpt.model.base import CausalLM
from minigpt.model.families import load_model
from minigpt.model.weights import SkipInit

ENGLISH = Path(__file__).parents[1] / "assets" / "english.txt"
QUANTIZATIONS = ("int8", "fp16")


def for_generation(model: CausalLM, quantize: str | None = None, *, batched: bool = True) -> CausalLM:
    """A copy of the model with packed matrices, for generation only; the given model does not change.

    The copy shares all weights that are not matrices with the model, and the token embedding, which is only looked up;
    the tied head is a second, packed copy of it. Delete the given model to free its other matrices.

    Args:
        model: fp32 or bf16.
        quantize: None does not round, and returns the model itself if no packed layout is faster (on a GPU, or without
            oneDNN). "fp16" rounds the matrices to fp16; on a CPU products are computed in fp32. "int8" rounds them to 8
            bits and, on a CPU without bf16 instructions, the activations too, each row with its own scale: a row gets
            the same bits alone and in any batch. With native bf16, and on a GPU, int8 computes in bf16, which rounds
            sums differently for few rows than for many: near a tie, a row's token may depend on the batch size.
            `perplexity` measures the cost of rounding.
        batched: False if one sequence at a time is continued, as in a chat: some kernels are then faster, and their
            last bits differ from those in a batch.

    Raises:
        ValueError: no such quantization.
    """
    if quantize not in (None, *QUANTIZATIONS):
        raise ValueError(f"no quantization {quantize!r}; one of {', '.join(QUANTIZATIONS)}")
    chosen = _kernel(model.head_weight(), quantize, batched)
    if chosen is None:
        return model
    kernel, dtype, narrow = chosen

    def linear(weight: Tensor, bias: Tensor | None) -> Any:
        return kernel(weight.detach().to(narrow), None if bias is None else bias.detach().to(dtype))

    with torch.device("meta"), SkipInit():
        fast = type(model)(model.config).eval()
    fast.lm_head = head = linear(model.head_weight(), None)
    fused = _fused_block(model)

    def pack(source: nn.Module, target: nn.Module) -> None:
        """Fills `target`, the same module without weights: matrices packed, all other weights shared, in `dtype`."""
        for name, parameter in source.named_parameters(recurse=False):
            setattr(target, name, nn.Parameter(parameter.detach().to(dtype), requires_grad=False))
        for name, child in source.named_children():
            if isinstance(child, nn.Linear):
                setattr(target, name, LinearModule(linear(child.weight, child.bias)))
            elif isinstance(head, Int8Linear) and getattr(child, "weight", None) is model.head_weight():
                setattr(target, name, Int8Embedding(head, dtype))  # the tied embedding
            elif fused and isinstance(source, nn.ModuleList):
                setattr(target, name, fused(child, linear, dtype))
            else:
                pack(child, target.get_submodule(name))

    pack(model, fast)
    fast.register_state_dict_pre_hook(_refuse_state_dict)
    return fast


def _fused_block(model: CausalLM) -> Any:
    """The family's own layer for generation, or None."""
    if model.FUSED_BLOCK is None:
        return None
    module, _, name = model.FUSED_BLOCK.partition(":")
    return getattr(import_module(module), name)


def _kernel(weight: Tensor, quantize: str | None, batched: bool) -> tuple[Kernel, torch.dtype, torch.dtype] | None:
    """The kernel, the dtype of the activations and the dtype in which the kernel gets its weights; None if the plain
    path is the fastest."""
    fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
    if weight.device.type != "cpu":
        return {None: None, "int8": (Int8Linear, bf16, weight.dtype), "fp16": (PlainLinear, fp16, fp16)}[quantize]
    if quantize == "fp16":
        return (Fp16Linear, fp32, fp32) if has_fp16_product() else (WidenedLinear, fp32, fp16)
    packs = torch.backends.mkldnn.is_available()
    if quantize is None and weight.dtype == fp32:
        return (PackedLinear, fp32, fp32) if packs else None
    native_bf16 = packs and torch.ops.mkldnn._is_mkldnn_bf16_supported() and fastest_precision("cpu") == "bf16"
    if quantize == "int8" and not native_bf16:
        return (partial(DynamicInt8Linear, batched=batched) if int8_levels() else Int8Linear), fp32, fp32
    if quantize == "int8":
        return Int8Linear, bf16, fp32
    if weight.dtype == bf16:
        return (PackedLinear if native_bf16 else WidenedLinear), bf16, bf16
    return None


def load_for_generation(
    folder: ModelFolder,
    *,
    device: str | torch.device,
    quantize: str | None = None,
    batched: bool = True,
    on_note: Callable[[str], None] | None = None,
) -> tuple[CausalLM, Tokenizer]:
    """A model packed for generation, and its tokenizer.

    Args:
        quantize: as in `for_generation`; or "bf16".
        batched: as in `for_generation`.
        on_note: called with the measured cost of quantized weights in perplexity, see `with_loss`, and a warning if
            bf16 is emulated.

    Raises:
        FileNotFoundError, ValueError: those of `ModelFolder`; the tokenizer has ids that the model does not have.
    """
    model = load_model(folder.name, folder.revision, device=device)
    with ThreadPoolExecutor() as pool:  # the weights are packed while the vocabulary is read
        packed = None if quantize and on_note else pool.submit(lighten, model, quantize, batched)
        tokenizer = folder.tokenizer
    model.config.check_vocabulary(tokenizer.vocab_size)
    if packed:
        return packed.result(), tokenizer
    assert quantize and on_note
    if quantize == "bf16" and (warning := bf16_warning(str(device))):
        on_note(warning)
    model, cost = with_loss(model, tokenizer, quantize, batched)
    on_note(cost)
    return model, tokenizer


def lighten(model: CausalLM, quantize: str | None, batched: bool = True) -> CausalLM:
    """`for_generation`, and also "bf16", which converts the given model in place."""
    if quantize == "bf16":
        return for_generation(model.bfloat16(), batched=batched)
    return for_generation(model, quantize, batched=batched)


def with_loss(model: CausalLM, tokenizer: Tokenizer, quantize: str, batched: bool = True) -> tuple[CausalLM, str]:
    """An fp32 model in bf16 or quantized, packed for generation, and a line with the measured cost.

    The cost is the change of the perplexity on the bundled English text (`assets/english.txt`), in chunks of at most
    the model's context. The text is short: differences below 0.1% are noise.
    """
    ids = tokenizer.encode(ENGLISH.read_text(encoding="utf-8"))
    length = model.config.context
    pieces = [ids[start : start + length] for start in range(0, len(ids) - 1, length)]
    before = perplexity(model, pieces)
    model = lighten(model, quantize, batched)
    after = perplexity(model, pieces)
    cost = f"perplexity {before:,.2f} in fp32, {after:,.2f} in {quantize} ({after / before - 1:+.2%})"
    return model, f"{cost}, over {len(ids)} tokens of English"


def use_huge_pages() -> None:
    """Makes torch allocate large tensors in huge pages, on Linux. Call it before the first tensor is created.

    Weights are then read 7% (bf16) to 13% (fp32) faster; packing takes a few tenths of a second longer.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read once, by torch's allocator


def _refuse_state_dict(*_: Any) -> None:
    raise ValueError("these weights are packed for generation; save the model that they came from")


class LinearModule(nn.Module):
    """A packed product in place of an `nn.Linear`."""

    def __init__(self, product: Callable[[Tensor], Tensor]):
        super().__init__()
        self.product = product

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x)


class Int8Embedding(nn.Module):
    """Looks tokens up in the rows of the head tied to it."""

    def __init__(self, head: Int8Linear, dtype: torch.dtype):
        super().__init__()
        self.head, self.dtype = head, dtype

    def forward(self, idx: Tensor) -> Tensor:
        return self.head.weight[idx].to(self.dtype) * self.head.scale[idx, None].to(self.dtype)


@torch.inference_mode()
def perplexity(model: CausalLM, sequences: Sequence[Sequence[int]]) -> float:
    """exp of the mean negative log-likelihood of every token after each sequence's first.

    Sequences are truncated to the context. `perplexity(fast, data) / perplexity(model, data)` is the cost of
    quantization.

    Raises:
        ValueError: no sequence has two tokens.
    """
    total, count = 0.0, 0
    for ids in sequences:
        idx = torch.tensor([list(ids[: model.config.context])], device=model.device)  # (1,T)
        if idx.shape[1] < 2:
            continue
        logits = model(idx[:, :-1])[0].float()  # (T-1,V)
        total += F.cross_entropy(logits, idx[0, 1:], reduction="sum").item()
        count += idx.shape[1] - 1
    if count == 0:
        raise ValueError("perplexity needs a sequence of two tokens or more")
    return torch.tensor(total / count, dtype=torch.float64).exp().item()  # where math.exp would overflow: infinity
