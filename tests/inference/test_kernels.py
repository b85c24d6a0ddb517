"""Each kernel against `F.linear` in fp32."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

from minigpt.inference import kernels
from minigpt.inference.kernels import (
    BLOCK,
    BlockTable,
    DynamicInt8Linear,
    Fp16Linear,
    Int8Linear,
    PackedLinear,
    PlainLinear,
    WidenedLinear,
    has_fp16_product,
    int8_levels,
    round_rows,
)

needs_int8 = pytest.mark.skipif(int8_levels() is None, reason="this build of torch has no fbgemm")
needs_fp16 = pytest.mark.skipif(not has_fp16_product(), reason="this build of torch has no fbgemm")
needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this build has no oneDNN")
ROWS = [1, 4, 5, 8, 9, 64]


@pytest.fixture
def weight():
    """(N,K), as in a checkpoint: transposed."""
    return torch.randn(64, 4000, generator=torch.Generator().manual_seed(0)).t()


@pytest.fixture
def bias():
    return torch.randn(4000, generator=torch.Generator().manual_seed(1))


def rows_of(count, width=64):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(2))


def relative(a, b):
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


# ---- what all of them do


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(
    ("kernel", "dtype", "tolerance"),
    [
        pytest.param(PlainLinear, torch.float32, 1e-6, id="plain"),
        pytest.param(PackedLinear, torch.float32, 1e-6, id="packed", marks=needs_onednn),
        pytest.param(WidenedLinear, torch.bfloat16, 1e-2, id="bf16"),
        pytest.param(WidenedLinear, torch.float16, 2e-3, id="fp16"),
        pytest.param(Fp16Linear, torch.float32, 1e-3, id="fp16 of fbgemm", marks=needs_fp16),
        pytest.param(Int8Linear, torch.float32, 0.015, id="int8 weight"),
        pytest.param(DynamicInt8Linear, torch.float32, 0.02, id="int8", marks=needs_int8),
    ],
)
def test_product_gelu_and_residual(kernel, dtype, tolerance, rows, weight, bias):
    x, residual = rows_of(rows)[None], torch.ones(1, rows, 4000)
    linear = kernel(weight.to(dtype), bias)
    expected = F.linear(x, weight, bias)
    for y, wanted in (
        (linear(x), expected),
        (linear(x, gelu=True), F.gelu(expected, approximate="tanh")),
        (linear(x, residual=residual), expected + 1),
        (kernel(weight.to(dtype), None)(x), expected - bias),
    ):
        assert y.shape == (1, rows, 4000)
        assert y.dtype == torch.float32
        assert relative(y, wanted) < tolerance


def test_widened_bf16_stays_bf16(weight, bias):
    linear = WidenedLinear(weight.bfloat16(), bias.bfloat16())
    for rows in ROWS:
        x = rows_of(rows).bfloat16()
        assert linear(x).dtype == torch.bfloat16
        assert relative(linear(x), F.linear(x.float(), weight.bfloat16().float(), bias)) < 0.01


# ---- 8 bits


def test_each_row_is_rounded_to_the_nearest_of_its_own_steps():
    """A row whose largest weight is 127 steps: [127, -63.4, 0.6] steps -> [127, -63, 1]."""
    weight = torch.tensor([[127.0, -63.4, 0.6], [0.0, 0.0, 0.0], [-254.0, 2.0, 4.9]])
    rounded, scale = round_rows(weight, torch.bfloat16)
    assert scale.tolist()[::2] == [1.0, 2.0]
    assert rounded.tolist() == [[127, -63, 1], [0, 0, 0], [-127, 1, 2]]
    linear = Int8Linear(weight, torch.tensor([0.0, 5.0, 1.0]).bfloat16())
    x = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]).bfloat16()
    assert linear(x).tolist() == [[127.0, 5.0, -253.0], [-63.0, 5.0, 3.0]]
    assert linear(x.repeat(16, 1)).tolist() == [[127.0, 5.0, -253.0], [-63.0, 5.0, 3.0]] * 16


@pytest.mark.parametrize("rows", ROWS)
def test_int8_weights_in_bf16(rows, weight, bias):
    linear = Int8Linear(weight, bias.bfloat16())
    rounded = linear.weight.float() * linear.scale[:, None]
    assert (rounded - weight).abs().max() <= linear.scale.max() * 0.51
    x = rows_of(rows).bfloat16()
    assert relative(linear(x), F.linear(x.float(), rounded, bias)) < 0.01


@needs_int8
def test_one_channel_far_above_the_others(bias):
    """With one scale for it and the others, these would be left with no more than a step."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(256, 768, generator=generator)
    x = torch.randn(5, 768, generator=generator)
    x[:, 17] *= 100
    linear = DynamicInt8Linear(weight, None)
    assert relative(linear(x), F.linear(x, weight)) < 0.02
    weight[:, 17] = 0  # what the others are worth, alone
    assert relative(DynamicInt8Linear(weight, None)(x), F.linear(x, weight)) < 0.02


@needs_int8
def test_a_row_has_the_same_bits_alone_and_in_a_batch(weight, bias):
    """Rows from 1e-4 to 1e4: with one scale for all, a small one beside a large one would lose 95% of its value."""
    linear = DynamicInt8Linear(weight, bias)
    x = rows_of(40) * torch.logspace(-4, 4, 40)[:, None]
    together = linear(x)
    for start, stop in ((0, 1), (7, 8), (39, 40), (3, 11), (8, 40)):
        assert torch.equal(linear(x[start:stop]), together[start:stop])
    products = DynamicInt8Linear(weight, None)(x)
    assert max(relative(y, F.linear(row, weight)) for y, row in zip(products, x, strict=True)) < 0.03


@needs_int8
@pytest.mark.parametrize("outputs", [BLOCK, 2 * BLOCK, 331])
def test_a_table_of_channels_multiplies_a_row_and_parts_of_rows(outputs):
    """331 outputs are no whole number of blocks: what pads the last one is not returned."""
    generator = torch.Generator().manual_seed(4)
    weight, bias = torch.randn(outputs, 64, generator=generator), 100 * torch.randn(outputs, generator=generator)
    rows = rows_of(3)
    plain, table = BlockTable(weight, None), BlockTable(weight, bias)
    for x in (rows[1:2], rows[2:3, None]):
        y = plain.linear(x)
        assert y.shape == (*x.shape[:-1], outputs)
        assert relative(y, F.linear(x, weight)) < 0.01
        assert (table.linear(x) - y - bias).abs().max() < 2e-3 * bias.abs().max()  # the bias in 16 bits
    channels, weights = torch.tensor([[5, 0], [63, 7], [2, 2]]), rows[:, :2]
    expected = torch.stack([weight[:, own] @ w for own, w in zip(channels, weights, strict=True)])
    for each in (plain, table):
        assert relative(each.weighted_sums(channels, weights), expected) < 0.01


@needs_int8
def test_threads_do_not_share_the_buffer_of_a_table():
    weight, rows = torch.randn(BLOCK, 64, generator=torch.Generator().manual_seed(4)), rows_of(16)
    table = BlockTable(weight, None)
    expected = [table.linear(row) for row in rows]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(50):
            for y, wanted in zip(pool.map(table.linear, rows), expected, strict=True):
                assert torch.equal(y, wanted)


@needs_int8
def test_one_row_is_multiplied_by_the_table_unless_it_may_be_compared_with_a_batch(weight, bias):
    """A chat continues one row: faster, and nearer to fp32, because its activations are not rounded."""
    row = rows_of(1)
    row[0, 3] *= 100
    plain, single, batched = (
        F.linear(row, weight, bias),
        DynamicInt8Linear(weight, bias, batched=False)(row),
        DynamicInt8Linear(weight, bias)(row),
    )
    assert relative(single, plain) < 0.01
    assert not torch.equal(single, batched)
    many = rows_of(4)
    assert torch.equal(DynamicInt8Linear(weight, bias, batched=False)(many), DynamicInt8Linear(weight, bias)(many))


@needs_int8
def test_rows_of_zeros_and_of_what_is_no_number(weight, bias):
    linear = DynamicInt8Linear(weight, bias)
    assert torch.equal(linear(torch.zeros(2, 64)), bias.expand(2, -1))
    x = rows_of(3)
    x[1, 5] = float("nan")
    assert linear(x)[1].isnan().all()  # so broken weights are noticed
    assert linear(x)[::2].isfinite().all()


@needs_int8
def test_fewer_channels_than_outliers(bias):
    weight, x = torch.randn(16, 3, generator=torch.Generator().manual_seed(4)), rows_of(4, 3)
    assert relative(DynamicInt8Linear(weight, None)(x), F.linear(x, weight)) < 0.02


@needs_int8
@pytest.mark.parametrize("saturates", [True, False])
def test_activations_get_as_many_steps_as_the_kernel_adds_up_exactly(saturates, monkeypatch):
    """fbgemm without VNNI: 255 x 127 + 255 x 127 does not fit into 16 bits, and the sum is silently wrong."""

    def product(x, scale, zero_point, packed):
        exact = torch.full((len(x), 64), 127.0 * 64)
        return exact * 0.5 if saturates and zero_point > 64 else exact

    monkeypatch.setattr(kernels, "_int8_product", product)
    assert int8_levels.__wrapped__() == (63 if saturates else 127)


def test_without_fbgemm_there_is_no_int8_product(monkeypatch):
    def refuse(weight, scale):
        raise RuntimeError("Didn't find engine")

    monkeypatch.setattr(kernels, "pack_int8", refuse)
    assert int8_levels.__wrapped__() is None


@needs_int8
def test_packing_leaves_torch_as_it_was(weight, bias, recwarn):
    before = torch.backends.quantized.engine
    DynamicInt8Linear(weight, bias)
    assert torch.backends.quantized.engine == before
    assert not recwarn.list
