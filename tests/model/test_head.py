"""The fused head and loss equal the naive computation, whole tensors."""

import pytest
import torch
from torch.nn import functional as F

from minigpt.model import head
from minigpt.model.head import linear_cross_entropy


def case(dtype=torch.float32, rows=3, length=50, width=24, vocabulary=97):
    torch.manual_seed(0)
    hidden = torch.randn(rows, length, width, dtype=dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, dtype=dtype).requires_grad_()
    targets = torch.randint(0, vocabulary, (rows, length))
    targets[torch.rand(rows, length) < 0.4] = -100
    return hidden, weight, targets


def naive(hidden, weight, targets):
    return F.cross_entropy((hidden @ weight.t()).flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")


@pytest.mark.parametrize("rows_at_once", [1, 7, 10_000])
def test_loss_and_gradients_equal_the_naive_ones_in_chunks_of_any_size(monkeypatch, rows_at_once):
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", rows_at_once * 97)
    hidden, weight, targets = case(torch.float64)
    nll_sum, n_tokens = linear_cross_entropy(hidden, weight, targets)
    assert n_tokens == (targets != -100).sum()
    got = torch.autograd.grad(nll_sum * 0.37, [hidden, weight])
    expected_loss = naive(hidden, weight, targets)
    expected = torch.autograd.grad(expected_loss * 0.37, [hidden, weight])
    torch.testing.assert_close(nll_sum, expected_loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_without_gradients_the_loss_is_the_same():
    hidden, weight, targets = case()
    with torch.no_grad():
        alone, _ = linear_cross_entropy(hidden, weight, targets)
    assert torch.equal(alone, linear_cross_entropy(hidden, weight, targets)[0].detach())


def test_nothing_supervised_gives_zero_and_zero_gradients():
    """A rank with nothing left runs a filler through the head: it must stay in the graph and weigh nothing."""
    hidden, weight, targets = case()
    nll_sum, n_tokens = linear_cross_entropy(hidden, weight, torch.full_like(targets, -100))
    gradients = torch.autograd.grad(nll_sum / max(1, int(n_tokens)), [hidden, weight])
    assert nll_sum == 0
    assert n_tokens == 0
    assert all(gradient.eq(0).all() for gradient in gradients)


def test_bf16_autocast_stays_close_and_sums_in_fp32():
    hidden, weight, targets = case()
    with torch.autocast("cpu", torch.bfloat16):
        nll_sum, _ = linear_cross_entropy(hidden, weight, targets)
    d_hidden, d_weight = torch.autograd.grad(nll_sum, [hidden, weight])
    assert nll_sum.dtype == torch.float32
    assert d_hidden.dtype == d_weight.dtype == torch.float32
    expected = torch.autograd.grad(naive(hidden, weight, targets), [hidden, weight])
    assert nll_sum.item() == pytest.approx(naive(hidden, weight, targets).item(), rel=5e-3)
    for got, wanted in zip((d_hidden, d_weight), expected, strict=True):
        assert ((got - wanted).norm() / wanted.norm()).item() < 2e-2


def test_bf16_gradients_do_not_lose_precision_with_every_chunk(monkeypatch):
    hidden, weight, targets = case(torch.bfloat16, rows=8, length=200)
    expected = torch.autograd.grad(naive(hidden.float(), weight.float(), targets), weight)[0].float()
    errors = []
    for rows in (2000, 8):  # one chunk, and over a hundred
        monkeypatch.setattr(head, "CHUNK_ELEMENTS", rows * 97)
        got = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets)[0], weight)[0].float()
        errors.append(((got - expected).norm() / expected.norm()).item())
    assert errors[1] < 1.5 * errors[0] < 0.01


def test_a_loss_scale_beyond_fp16_is_applied_in_fp32():
    """fp16 ends at 65504, where loss scales begin: the gradient of the loss was infinite before it met the others."""
    hidden, weight, targets = (tensor.detach() for tensor in case())
    half = [(tensor * 0.02).half().requires_grad_() for tensor in (hidden, weight)]  # small: what comes out fits
    exact = [tensor.detach().double().requires_grad_() for tensor in half]
    scale = 2.0**17
    nll_sum, _ = linear_cross_entropy(*half, targets)
    found = torch.autograd.grad(nll_sum * scale, half)
    expected = torch.autograd.grad(naive(*exact, targets) * scale, exact)
    for got, wanted in zip(found, expected):
        assert got.dtype == torch.float16
        assert ((got - wanted).norm() / wanted.norm()).item() < 2e-3


def test_a_frequent_word_does_not_overflow_before_it_is_averaged():
    """Summed over 70,000 tokens, the gradient of one word is more than fp16 holds; their mean is 1."""
    count, width, vocabulary = 70_000, 4, 97
    hidden = torch.ones(1, count, width, dtype=torch.float16, requires_grad=True)
    weight = torch.zeros(vocabulary, width, dtype=torch.float16, requires_grad=True)
    nll_sum, _ = linear_cross_entropy(hidden, weight, torch.zeros(1, count, dtype=torch.int64))
    gradient = torch.autograd.grad(nll_sum / count, weight)[0]
    p = 1 / vocabulary
    torch.testing.assert_close(gradient[0], torch.full((width,), p - 1).half(), rtol=2e-3, atol=0)
    torch.testing.assert_close(gradient[1], torch.full((width,), p).half(), rtol=1e-2, atol=0)


def test_the_full_logits_never_exist(monkeypatch):
    """The point of it all: no tensor of (supervised tokens, vocabulary) is ever made."""
    hidden, weight, targets = case(length=400, vocabulary=1000)
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", 16 * 1000)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return out

    with Watch():
        linear_cross_entropy(hidden, weight, targets)[0].backward()
    assert largest == max(hidden.numel(), weight.numel())
