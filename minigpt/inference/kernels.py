"""Matrix products with weights packed for generation: each class is `F.linear` with its own weight layout, optionally
followed by the tanh GELU or the residual sum.

Generating one token at a time is bound by memory bandwidth: the bytes of the weights and the order in which they are
read determine the speed. `minigpt.inference.packed` chooses the class for the processor.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from threading import get_ident
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

FEW_ROWS = 8  # up to so many, `_weight_int8pack_mm` is faster than unpacking and a plain product
FEW_NARROW_ROWS = 4  # the same limit for half-precision products on a CPU that emulates them
WHOLE_STEPS = 64  # `_weight_int8pack_mm` reads out of bounds unless K is a multiple of this
PART = 3072  # rows of a weight unpacked at a time: the whole head would not fit into the processor's cache
BLOCK = 96  # outputs of a block of `BlockTable`: few enough to be summed in registers
OUTLIERS = 8  # channels of each row of activations that are multiplied in fp32
TINY = torch.finfo(torch.float32).tiny


class Linear(Protocol):
    """`F.linear(x, weight, bias)` of (...,K) rows; then the GELU, or a sum with a (...,N) residual."""

    def __call__(self, x: Tensor, *, gelu: bool = False, residual: Tensor | None = None) -> Tensor: ...


Kernel = Callable[[Tensor, Tensor | None], Linear]  # from a weight (N,K) and a bias (N,)


class PlainLinear:
    """The weight in its plain layout."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        self.weight, self.bias = weight.detach(), bias

    def __call__(self, x: Tensor, *, gelu: bool = False, residual: Tensor | None = None) -> Tensor:
        return _finish(F.linear(x, self.weight, self.bias), gelu, residual)


class PackedLinear:
    """The weight in oneDNN's own layout; GELU and sum are part of the product."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
        self.bias = bias

    def __call__(self, x: Tensor, *, gelu: bool = False, residual: Tensor | None = None) -> Tensor:
        product = torch.ops.mkldnn._linear_pointwise
        if residual is not None:
            return product.binary(x, residual, self.weight, self.bias, "add")
        return product(x, self.weight, self.bias, *(("gelu", [], "tanh") if gelu else ("none", [], "")))


class WidenedLinear:
    """A bf16 or fp16 weight on a CPU that emulates products in it: more than a few rows are multiplied in fp32.

    One row is still fast, because the product is bound by memory; 32 rows take 20 times as long as in fp32.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None):
        self.weight, self.bias = weight.detach().contiguous(), bias

    def __call__(self, x: Tensor, *, gelu: bool = False, residual: Tensor | None = None) -> Tensor:
        if x.numel() <= FEW_NARROW_ROWS * x.shape[-1]:
            y = F.linear(x.to(self.weight.dtype), self.weight).to(x.dtype)
        else:
            wide = x.float()
            y = torch.cat([F.linear(wide, part.float()) for part in self.weight.split(PART)], dim=-1).to(x.dtype)
        return _finish(y if self.bias is None else y + self.bias, gelu, residual)


class Fp16Linear:
    """An fp16 weight in fbgemm's layout, converted to fp32 in registers; products and sums are fp32."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        with fbgemm():
            self.packed = torch.ops.quantized.linear_prepack_fp16(weight.detach().float().contiguous(), bias)

    def __call__(self, x: Tensor, *, gelu: bool = False, residual: Tensor | None = None) -> Tensor:
        return _finish(torch.ops.quantized.linear_dynamic_fp16(x, self.packed), gelu, residual)


class Int8Linear:
    """An 8-bit weight, dequantized on the fly for a product in x's precision: row n of the (N,K) matrix is
    `scale[n] * weight[n]`, rounded to the nearest."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        self.weight, self.scale = round_rows(weight, torch.bfloat16)  # (N,K), (N,)
        self.bias = bias

    def __call__(self, x: Tensor, *, gelu: bool = False, residual: Tensor | None = None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).contiguous()  # (B,T,K) -> (B*T,K)
        scale = self.scale.to(x.dtype)
        if x.device.type == "cpu" and len(rows) <= FEW_ROWS and rows.shape[1] % WHOLE_STEPS == 0:
            y = torch._weight_int8pack_mm(rows, self.weight, scale)
        else:
            y = torch.cat([F.linear(rows, part.to(x.dtype)) for part in self.weight.split(PART)], dim=-1) * scale
        y = (y if self.bias is None else y + self.bias).view(*x.shape[:-1], -1)  # (B*T,N) -> (B,T,N)
        return _finish(y, gelu, residual)


class DynamicInt8Linear:
    """An 8-bit weight on a CPU without bf16 instructions; fp32 in, fp32 out.

    Activations are rounded to 8 bits too and multiplied as integers by fbgemm. Each row has its own scale, so what it
    gets does not depend on its neighbours. The scale is that of the row's (OUTLIERS + 1)-th largest channel; what the
    larger ones have beyond it is multiplied in fp32, or one large channel would leave no steps to the others
    (LLM.int8, Dettmers et al. 2022, arXiv:2208.07339). With OUTLIERS 1 and the row [100, -2, 1]: the scale is 2, the
    integers stand for [1, -1, 0.5] * 2, and channel 0 has 98 more.

    Args:
        batched: False if rows are never compared with those of a batch: one row alone is then multiplied by the table,
            in fp32, which is three times as fast and more exact, but not the same to the last bit.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, batched: bool = True):
        levels = int8_levels()
        assert levels, "the caller asks for the kernel only where there is one"
        rounded, scale = round_rows(weight, torch.float32)
        self.packed = pack_int8(rounded, scale)
        self.quantized = 1 / levels, levels + 1  # scale and zero point of what lies between -1 and 1
        self.table = BlockTable(weight, bias)
        self.bias, self.batched = bias, batched
        self.outliers = min(OUTLIERS, weight.shape[1] - 1)

    def __call__(self, x: Tensor, *, gelu: bool = False, residual: Tensor | None = None) -> Tensor:
        if x.numel() == x.shape[-1] and not self.batched:
            y = self.table.linear(x)
        else:
            rows = x.reshape(-1, x.shape[-1])  # (B,T,K) -> (R,K)
            largest, channels = rows.abs().topk(self.outliers + 1)  # both (R,OUTLIERS+1), the largest first
            limit = largest[:, self.outliers :].clamp_(min=TINY)  # (R,1)
            scaled = rows / limit
            beyond = F.softshrink(scaled.gather(1, channels), 1.0)  # what lies above 1 or below -1; the last one is 0
            y = _int8_product(scaled.clamp_(-1, 1), *self.quantized, self.packed)
            y += self.table.weighted_sums(channels, beyond)
            y = y.mul_(limit) if self.bias is None else torch.addcmul(self.bias, y, limit)
            y = y.view(*x.shape[:-1], -1)  # (R,N) -> (B,T,N)
        return _finish(y, gelu, residual)


class BlockTable:
    """A weight (N,K) in 8 bits as a table of its channels, which fbgemm's embedding bag multiplies and sums in fp32:
    y = sum over k of x[k] * weight[:, k].

    The N outputs are cut into blocks, each of which is read from front to back; threads share the blocks. Each channel
    of a block has its own scale and offset. For N = 4, K = 2 and blocks of 2, the table's rows are weight[0:2, 0],
    weight[0:2, 1], weight[2:4, 0], weight[2:4, 1].

    The bias is two channels more in each block, for an x of 1: itself in 8 bits, and what that lost.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None):
        self.outputs, self.inputs = weight.shape
        table = _in_blocks(weight)  # (blocks,K,BLOCK)
        if bias is not None:
            fine = _in_blocks(bias[:, None])  # (blocks,1,BLOCK)
            coarse = torch.ops.quantized.embedding_bag_byte_unpack(_packed(fine)).view_as(fine)
            table = torch.cat([table, coarse, fine - coarse], dim=1)
        self.blocks, self.channels = table.shape[:2]
        self.table = _packed(table)
        self.first = torch.arange(0, self.blocks * self.channels, self.channels)[:, None]  # a block's first row

    def linear(self, x: Tensor) -> Tensor:
        """The product with one row, and the bias: (...,K) -> (...,N)."""
        indices, starts, weights, places = _whole_table(self.blocks, self.channels, self.inputs, get_ident())
        places.copy_(x.view(-1))
        sums = self._sums(indices, starts, weights)  # (blocks,BLOCK)
        if sums.numel() > self.outputs:
            sums = sums.view(-1)[: self.outputs]
        return sums.view(*x.shape[:-1], self.outputs)

    def weighted_sums(self, channels: Tensor, weights: Tensor) -> Tensor:
        """Sums over a few channels of each row: (R,k) channels and their weights -> (R,N)."""
        rows, size = channels.shape
        indices = self.first + channels[:, None]  # (blocks,1) + (R,1,k) -> (R,blocks,k)
        weights = weights[:, None].expand(-1, self.blocks, -1)
        sums = self._sums(indices.view(-1), _bag_starts(rows * self.blocks, size), weights.reshape(-1))
        return sums.view(rows, -1)[:, : self.outputs]  # (R*blocks,BLOCK) -> (R,N)

    def _sums(self, indices: Tensor, starts: Tensor, weights: Tensor) -> Tensor:
        """(n,) indices and weights, which are cut into bags that begin at these starts -> (bags,BLOCK)."""
        return torch.ops.quantized.embedding_bag_byte_rowwise_offsets(
            self.table, indices, starts, mode=0, per_sample_weights=weights
        )


def _in_blocks(weight: Tensor) -> Tensor:
    """(N,K) -> (blocks,K,BLOCK), the last block padded with zeros."""
    weight = weight.detach().float()
    return F.pad(weight, (0, 0, 0, -len(weight) % BLOCK)).view(-1, BLOCK, weight.shape[1]).transpose(1, 2)


def _packed(table: Tensor) -> Tensor:
    return torch.ops.quantized.embedding_bag_byte_prepack(table.reshape(-1, BLOCK))


@lru_cache(maxsize=64)
def _whole_table(blocks: int, channels: int, inputs: int, thread: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Indices of all rows, where each block begins, and the weights: ones, and the places in each block for an x.

    The thread's layers of one shape share them, so they stay in the processor's cache.
    """
    with torch.inference_mode(False):  # made in it, a tensor could not be written to outside
        indices = torch.arange(blocks * channels, dtype=torch.int32)
        weights = torch.ones(blocks, channels)
        return indices, indices[::channels].contiguous(), weights.view(-1), weights[:, :inputs]


@cache
def _bag_starts(bags: int, size: int) -> Tensor:
    return torch.arange(0, bags * size, size)


def _finish(y: Tensor, gelu: bool, residual: Tensor | None) -> Tensor:
    y = F.gelu(y, approximate="tanh") if gelu else y
    return y if residual is None else residual + y


# ---- 8 bits


def round_rows(weight: Tensor, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(N,K) weights -> (N,K) int8 and (N,) fp32 scales, of that dtype's precision: each row's largest is 127 steps.

    `[127, -63.4, 0.6]` -> `[127, -63, 1]` and 1.0.
    """
    weight = weight.detach()
    lowest, highest = weight.aminmax(dim=1)  # (N,)
    largest = torch.maximum(-lowest, highest).float().clamp(min=TINY)
    scale = (largest / 127).to(scale_dtype).float().clamp(min=TINY)
    return (weight.contiguous() / scale[:, None]).round_().clamp_(-127, 127).to(torch.int8), scale


@contextmanager
def fbgemm() -> Iterator[None]:
    """Packs weights for fbgemm; on some CPUs torch's default is oneDNN, which lacks these products."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = "fbgemm"
    try:
        yield
    finally:
        torch.backends.quantized.engine = before


def pack_int8(weight: Tensor, scale: Tensor) -> torch.ScriptObject:
    """(N,K) int8 and (N,) scales in fbgemm's layout."""
    with fbgemm(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*quantized tensor creation")  # there is no other way to this layout
        zero_points = torch.zeros(len(scale), dtype=torch.long)
        quantized = torch._make_per_channel_quantized_tensor(weight.cpu(), scale.double().cpu(), zero_points, 0)
        return torch.ops.quantized.linear_prepack(quantized, None)


def _int8_product(x: Tensor, scale: float, zero_point: int, packed: torch.ScriptObject) -> Tensor:
    return torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(x, scale, zero_point, packed)


@cache
def int8_levels() -> int | None:
    """The steps from zero to the largest activation, 127 or 63, of `DynamicInt8Linear`; None where it cannot run.

    On CPUs without VNNI fbgemm adds pairs of products in 16 bits, which saturate without an error unless activations
    are kept to 7 bits. So products of the largest numbers are taken, and compared with what they must be.
    """
    width = 64
    try:
        packed = pack_int8(torch.full((width, width), 127, dtype=torch.int8), torch.ones(width))
        for levels in (127, 63):
            products = [_int8_product(torch.ones(rows, width), 1 / levels, levels + 1, packed) for rows in (1, 64)]
            if all((product / (127 * width) - 1).abs().max() < 1e-3 for product in products):
                return levels
    except (RuntimeError, AttributeError):  # built without fbgemm, or a torch without quantized tensors
        pass
    return None


@cache
def has_fp16_product() -> bool:
    """Whether `Fp16Linear` can run."""
    try:
        Fp16Linear(torch.ones(8, 8), torch.ones(8))(torch.ones(1, 8))
    except (RuntimeError, AttributeError):
        return False
    return True
