"""Packed and quantized weights against the plain path."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import minigpt
from minigpt.data.tokenizer import Tokenizer
from minigpt.inference import packed
from minigpt.inference import packed as fast_module
from minigpt.inference.generate import generate
from minigpt.inference.kernels import DynamicInt8Linear, Int8Linear
from minigpt.inference.packed import for_generation, perplexity, with_loss
from minigpt.model.gpt2 import GPT, GPTConfig

PROMPTS = [[7], [1, 2, 3, 4, 5, 6, 7, 8, 9], [200, 17], [250] * 30]


@pytest.fixture
def model():
    """Weights of std 0.2 that lie as those of a checkpoint do: the matrices transposed."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=331, n_positions=64, n_embd=64, n_layer=3, n_head=4)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=float("ln_" in name and name.endswith("weight")), std=0.2)
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight = nn.Parameter(module.weight.t().contiguous().t())
    return model


def relative(a, b):
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (8, 1), (32, 1), (3, 20)], ids=str)
def test_packed_equals_plain(model, dtype, tolerance, shape):
    model = model.to(dtype)
    fast = for_generation(model)
    assert fast is not model
    assert not any(isinstance(module, nn.Linear) for module in fast.modules())
    idx = torch.randint(0, 331, shape)
    with torch.inference_mode():
        assert relative(fast(idx), model(idx)) < tolerance


@pytest.mark.parametrize("quantize", [None, "int8", "fp16"])
def test_a_family_without_a_fused_block_is_packed_matrix_by_matrix(model, quantize, monkeypatch):
    fused = for_generation(model, quantize)
    monkeypatch.setattr(GPT, "FUSED_BLOCK", None)
    fast = for_generation(model, quantize)
    assert not any(isinstance(module, nn.Linear) for module in fast.modules())
    assert not any(parameter.is_meta for parameter in fast.parameters())
    idx = torch.randint(0, 331, (3, 20))
    with torch.inference_mode():
        assert relative(fast(idx), fused(idx)) < 1e-5
    if quantize is None:
        assert generate(fast, PROMPTS, max_new_tokens=20) == generate(model, PROMPTS, max_new_tokens=20)


def test_int8_where_bf16_is_native_looks_embeddings_up_in_the_head(model, monkeypatch):
    """As on a GPU: the tied embedding is not kept a second time."""
    monkeypatch.setattr(packed, "int8_levels", lambda: None)
    fast = for_generation(model, "int8")
    assert isinstance(fast.wte, packed.Int8Embedding)
    assert not any(parameter.is_meta for parameter in fast.parameters())
    idx = torch.randint(0, 331, (3, 20))
    with torch.inference_mode():
        assert relative(fast(idx), model(idx)) < 0.05


@pytest.mark.parametrize("num_beams", [1, 3])
def test_packed_generates_what_plain_does(model, num_beams):
    settings = {"max_new_tokens": 20, "num_beams": num_beams}
    assert generate(for_generation(model), PROMPTS, **settings) == generate(model, PROMPTS, **settings)


@pytest.mark.parametrize("quantize", [None, "int8", "fp16"])
def test_the_model_given_stays_as_it_is(model, quantize):
    """It may be in training: its weights still learn, and the packed copy does not follow."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    idx = torch.randint(0, 331, (2, 9))
    with torch.no_grad():
        logits = model(idx)
    fast = for_generation(model.train(), quantize)
    assert not fast.training
    assert model.training
    assert model.lm_head is None
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(idx), logits)
    nll_sum, _ = model(idx, idx)
    nll_sum.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_what_is_not_packed_is_shared(model):
    fast = for_generation(model)
    assert fast.wte.weight.data_ptr() == model.wte.weight.data_ptr()
    assert fast.wpe.weight.data_ptr() == model.wpe.weight.data_ptr()
    assert fast.h[1].ln_1.keywords["weight"].data_ptr() == model.h[1].ln_1.weight.data_ptr()
    assert fast.h[1].c_attn.bias.data_ptr() == model.h[1].attn.c_attn.bias.data_ptr()


def test_packed_weights_are_not_saved(model, tmp_path):
    """A checkpoint would lack them all."""
    with pytest.raises(ValueError, match="packed for generation; save the model that they came from"):
        for_generation(model).save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_where_nothing_can_be_packed_the_model_itself_comes_back(model):
    assert for_generation(model.half()) is model
    with pytest.raises(ValueError, match="no quantization 'int3'; one of int8, fp16"):
        for_generation(model, "int3")


def test_huge_pages_are_asked_for_before_the_first_tensor():
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[never]" in setting.read_text():
        pytest.skip("this system gives no huge pages")
    script = """if True:
        import sys, torch
        from minigpt.inference.packed import use_huge_pages
        if sys.argv[1:]: use_huge_pages()
        block = torch.ones(2**25)
        print(next(line.split()[1] for line in open("/proc/self/smaps_rollup") if line.startswith("AnonHugePages")))
    """
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    plain, huge = (
        int(
            subprocess.run(
                [sys.executable, "-c", script, *more], env=environment, check=True, capture_output=True
            ).stdout
        )
        for more in ([], ["huge"])
    )
    assert huge > plain + 100 * 1024  # KiB


# ---- quantized


@pytest.mark.parametrize(("quantize", "tolerance"), [("fp16", 1e-3), ("int8", 0.1)])
def test_quantized_model_is_near_the_plain_one(model, quantize, tolerance):
    fast = for_generation(model, quantize)
    assert not any(isinstance(module, nn.Linear) for module in fast.modules())
    idx = torch.randint(0, 331, (4, 20))
    with torch.inference_mode():
        logits, expected = fast(idx), model(idx)
    assert relative(logits, expected) < tolerance
    assert torch.allclose(fast.wte(idx).float(), model.wte(idx), atol=0.01)
    assert len(generate(fast, PROMPTS, max_new_tokens=10)) == len(PROMPTS)


def test_in_int8_a_row_says_the_same_alone_and_in_a_batch(model):
    fast = for_generation(model, "int8")
    if fast.wpe.weight.dtype != torch.float32:
        pytest.skip("int8 is computed in bf16 on this machine")
    together = generate(fast, PROMPTS, max_new_tokens=20)
    assert together == [generate(fast, [prompt], max_new_tokens=20)[0] for prompt in PROMPTS]


@pytest.mark.parametrize("native", [False, True])
def test_int8_is_computed_in_bf16_only_where_that_is_native(model, native, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr(fast_module, "fastest_precision", lambda device: "bf16" if native else "fp32")
    fast = for_generation(model, "int8")
    assert fast.wpe.weight.dtype == (torch.bfloat16 if native else torch.float32)
    assert isinstance(fast.lm_head, Int8Linear if native else DynamicInt8Linear | Int8Linear)
    idx = torch.randint(0, 331, (4, 20))
    with torch.inference_mode():
        assert relative(fast(idx), model(idx)) < 0.1


@pytest.mark.parametrize(("quantize", "tolerance"), [("fp16", 5e-3), ("int8", 0.1)])
def test_without_fbgemm_the_products_are_plain(model, quantize, tolerance, monkeypatch):
    """torch for other processors than x86 is built without it."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    monkeypatch.setattr(fast_module, "has_fp16_product", lambda: False)
    monkeypatch.setattr(fast_module, "int8_levels", lambda: None)
    fast = for_generation(model, quantize)
    for shape in ((1, 1), (4, 20)):
        idx = torch.randint(0, 331, shape)
        with torch.inference_mode():
            assert relative(fast(idx), model(idx)) < tolerance


# ---- what it costs


def test_perplexity(model):
    """exp of the mean over all tokens, each sequence's first aside; and over-long sequences are cut."""
    sequences = [[5, 6, 7, 8], [9], [1, 2], [3] * 100]
    losses = []
    with torch.no_grad():
        for ids in ([5, 6, 7, 8], [1, 2], [3] * 64):
            chances = model(torch.tensor([ids])).log_softmax(-1)[0]
            losses += [-chances[place, token].item() for place, token in enumerate(ids[1:])]
    expected = torch.tensor(losses).double().mean().exp().item()
    assert perplexity(model, sequences) == pytest.approx(expected, rel=1e-4)
    assert perplexity(for_generation(model), sequences) == pytest.approx(expected, rel=1e-4)
    assert perplexity(for_generation(model, "int8"), sequences) == pytest.approx(expected, rel=0.2)
    with pytest.raises(ValueError, match="perplexity needs a sequence of two tokens or more"):
        perplexity(model, [[1]])


@pytest.mark.parametrize("quantize", ["bf16", "fp16", "int8"])
def test_the_cost_of_lighter_weights_is_measured_on_what_the_model_gives(quantize):
    """The line is of the very model that is returned, over every token of the text but each piece's first."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.tiny()
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, n_positions=100, n_embd=64, n_layer=1, n_head=2)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    text = (Path(minigpt.__file__).parent / "assets" / "english.txt").read_text(encoding="utf-8")
    ids = tokenizer.encode(text)
    pieces = torch.tensor(ids[: len(ids) // 100 * 100]).view(-1, 100)
    rest = torch.tensor([ids[len(ids) // 100 * 100 :]])

    def judged(network):
        with torch.no_grad():
            losses = [
                F.cross_entropy(network(idx[:, :-1]).float().transpose(1, 2), idx[:, 1:], reduction="none").flatten()
                for idx in (pieces, rest)
            ]
        return torch.cat(losses).double().mean().exp().item()

    before = judged(model)
    lighter, line = with_loss(model, tokenizer, quantize)
    assert lighter is not model or quantize == "bf16"
    numbers = re.match(r"perplexity ([\d,.]+) in fp32, ([\d,.]+) in (\w+) \(([-+][\d.]+)%\), over (\d+) tokens", line)
    fp32, after = (float(numbers[group].replace(",", "")) for group in (1, 2))
    assert fp32 == pytest.approx(before, rel=1e-5)
    assert after == pytest.approx(judged(lighter), rel=2e-3)  # bf16 sums depend on the shape
    assert float(numbers[4]) == pytest.approx((after / fp32 - 1) * 100, abs=0.01)
    assert (numbers[3], int(numbers[5])) == (quantize, len(ids))
