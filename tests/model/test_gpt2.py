"""Parity with transformers, on random weights of std 0.2: under the usual 0.02 a wrong GELU hides."""

import json

import pytest
import torch
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from minigpt.model.cache import KVCache
from minigpt.model.gpt2 import GPT, GPTConfig

TINY = {"vocab_size": 331, "n_positions": 48, "n_embd": 64, "n_layer": 3, "n_head": 4}


def transformers_model(**shape) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(**{**TINY, **shape}, bos_token_id=0, eos_token_id=0, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    model = GPT2LMHeadModel(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)  # biases and gains too
    return model


@pytest.fixture(scope="module")
def judge() -> GPT2LMHeadModel:
    return transformers_model()


@pytest.fixture(scope="module")
def folder(judge, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2")
    judge.save_pretrained(folder)
    return folder


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def test_logits_equal_transformers(judge, folder):
    idx = torch.randint(0, TINY["vocab_size"], (4, 48))
    with torch.no_grad():
        ours, theirs = GPT.from_pretrained(folder)(idx), judge(idx).logits
    assert ours.shape == (4, 48, TINY["vocab_size"])
    assert relative(ours, theirs) < 1e-5


def test_loss_and_gradients_equal_transformers(judge, folder):
    model = GPT.from_pretrained(folder)
    idx = torch.randint(0, TINY["vocab_size"], (4, 40))
    labels = idx.clone()
    labels[:, :11] = -100
    targets = F.pad(labels[:, 1:], (0, 1), value=-100)
    nll_sum, n_tokens = model(idx, targets)
    judge.zero_grad()
    loss = judge(idx, labels=labels).loss
    assert n_tokens == 4 * 29
    assert nll_sum.dtype == torch.float32
    assert (nll_sum / n_tokens).item() == pytest.approx(loss.item(), rel=1e-6)
    (nll_sum / n_tokens).backward()
    loss.backward()
    theirs = dict(judge.transformer.named_parameters())
    for name, parameter in model.named_parameters():
        expected = theirs[name].grad
        if parameter.dim() == 2 and not name.startswith("w"):
            expected = expected.t()
        if name.endswith("c_attn.bias"):  # the key third is zero in exact arithmetic, rounding noise in floats
            keep = torch.ones_like(expected, dtype=torch.bool)
            keep[TINY["n_embd"] : 2 * TINY["n_embd"]] = False
            assert relative(parameter.grad[keep], expected[keep]) < 1e-4, name
        else:
            assert relative(parameter.grad, expected) < 1e-4, name


def test_twenty_training_steps_equal_a_plain_loop_over_transformers(folder):
    """One step may agree by luck; twenty only if loss, gradients, clipping and AdamW's groups all do."""
    from minigpt.data.collate import Batch
    from minigpt.settings.groups import TrainConfig
    from minigpt.training.engines.torch_engine import make_engine
    from minigpt.training.optim import learning_rate

    judge = GPT2LMHeadModel.from_pretrained(folder).train()
    config = TrainConfig(learning_rate=1e-3, warmup_steps=3, max_grad_norm=1.0)
    engine = make_engine(GPT.from_pretrained(folder), config)
    engine.module.train()
    matrices = [p for p in judge.parameters() if p.dim() == 2]
    vectors = [p for p in judge.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, foreach=False, fused=False)
    torch.manual_seed(1)
    for step in range(20):
        idx = torch.randint(0, TINY["vocab_size"], (4, 33))
        lr = learning_rate(step, 20, config)

        mean = engine(Batch(idx[:, :-1], idx[:, 1:])).sum / idx[:, 1:].numel()
        engine.backward(mean, last=True)
        info = engine.step(lr)

        loss = judge(idx, labels=idx).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(judge.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        assert mean.item() == pytest.approx(loss.item(), rel=1e-4), step
        assert info.grad_norm == pytest.approx(norm.item(), rel=1e-3), step


def test_every_tensor_is_byte_equal_after_load_and_save(folder, tmp_path):
    GPT.from_pretrained(folder).save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    theirs, ours = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path))
    for key, value in ours.items():
        assert theirs.get(key, value) == value, key


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
    ],
)
def test_presets_have_the_published_parameter_counts(name, parameters):
    with torch.device("meta"):
        assert GPT(GPTConfig.preset(name)).num_parameters() == parameters


def test_initialisation_is_gpt2s():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=500, n_positions=64, n_embd=256, n_layer=8, n_head=4))
    weights = dict(model.named_parameters())
    assert weights["wte.weight"].std().item() == pytest.approx(0.02, rel=0.02)
    assert weights["h.3.attn.c_attn.weight"].std().item() == pytest.approx(0.02, rel=0.02)
    for name in ("h.0.attn.c_proj.weight", "h.7.mlp.c_proj.weight"):  # 0.02 / sqrt(2 * 8)
        assert weights[name].std().item() == pytest.approx(0.005, rel=0.02)
    assert weights["h.0.ln_1.weight"].eq(1).all()
    assert weights["h.0.mlp.c_fc.bias"].eq(0).all()


def test_last_only_gives_the_last_position(folder):
    model, idx = GPT.from_pretrained(folder), torch.randint(0, 331, (2, 9))
    assert model(idx, last_only=True).shape == (2, 1, 331)
    assert relative(model(idx, last_only=True), model(idx)[:, -1:]) < 1e-6


def test_causality(folder):
    """What comes later changes nothing before it."""
    model, idx = GPT.from_pretrained(folder), torch.randint(0, 331, (1, 20))
    other = idx.clone()
    other[0, 12:] = torch.randint(0, 331, (8,))
    assert torch.equal(model(idx)[:, :12], model(other)[:, :12])
    assert not torch.equal(model(idx)[:, 12:], model(other)[:, 12:])


def test_dropout_acts_in_training_alone(folder):
    model = GPT.from_pretrained(folder, resid_pdrop=0.5)
    idx = torch.randint(0, 331, (1, 8))
    assert torch.equal(model(idx), model(idx))
    model.train()
    assert not torch.equal(model(idx), model(idx))


def test_cached_equals_uncached_piece_by_piece(folder):
    model, idx = GPT.from_pretrained(folder), torch.randint(0, 331, (3, 30))
    cache = KVCache(model.config, 3, 30)
    with torch.no_grad():
        whole = model(idx)
        pieces = [model(idx[:, a:b], cache=cache) for a, b in ((0, 11), (11, 12), (12, 13), (13, 30))]
    assert relative(torch.cat(pieces, dim=1), whole) < 1e-5


def test_rows_of_different_lengths_equal_the_rows_alone(folder):
    """Positions that count a left padding shift every row but the longest (transformers issue 3021)."""
    model = GPT.from_pretrained(folder)
    rows = [torch.randint(0, 331, (n,)) for n in (5, 17, 1)]
    idx = torch.stack([F.pad(row, (0, 17 - len(row)), value=7) for row in rows])
    cache = KVCache(model.config, 4, 24)
    with torch.no_grad():
        model(torch.randint(0, 331, (4, 20)), cache=cache)  # what lies in the cache from before
        last = torch.tensor([len(row) - 1 for row in rows])
        logits = model(idx, cache=cache.rows(1, 4), last_only=last)
        assert logits.shape == (3, 1, 331)
        for index, row in enumerate(rows):
            assert relative(logits[index, 0], model(row[None])[0, -1]) < 1e-5
        more = torch.randint(0, 331, (3, 1))
        cache.copy_rows([3], [1], 0, 1)  # the last row takes the first one's place
        positions = torch.tensor([[1], [17]])
        logits = model(more[[2, 1]], positions=positions, cache=cache.rows(1, 3), last_only=True)[:, 0]
        for place, index in enumerate((2, 1)):
            alone = model(torch.cat([rows[index], more[index]])[None])[0, -1]
            assert relative(logits[place], alone) < 1e-5


def test_positions_decide_what_is_seen_and_not_where_the_cache_began(folder):
    """Some rows' part of a cache begins at length 0; tokens at 11 to 16 of it were masked as if they were the first."""
    model, idx = GPT.from_pretrained(folder), torch.randint(0, 331, (3, 17))
    cache = KVCache(model.config, 3, 20)
    with torch.no_grad():
        model(idx[:, :11], cache=cache)
        logits = model(idx[1:, 11:], positions=torch.arange(11, 17), cache=cache.rows(1, 3))
        assert relative(logits, model(idx[1:])[:, 11:]) < 1e-5


def test_a_bf16_model_reads_its_cache_in_fp32_on_a_cpu(folder):
    model, idx = GPT.from_pretrained(folder, dtype=torch.bfloat16), torch.randint(0, 331, (3, 30))
    cache = KVCache.for_model(model, 3, 30)
    assert cache.buffer.dtype == torch.float32
    positions = torch.arange(12, 30).expand(3, -1)  # (B,T): the other way into the cache
    with torch.no_grad():
        whole = GPT.from_pretrained(folder)(idx)
        pieces = [model(idx[:, :11], cache=cache), model(idx[:, 11:12], cache=cache)]
        pieces.append(model(idx[:, 12:], positions=positions, cache=cache))
        cached = torch.cat(pieces, dim=1)
        assert cached.dtype == torch.bfloat16
        assert relative(cached.float(), whole) < 1.1 * relative(model(idx).float(), whole) < 0.05


def test_beyond_the_context_is_refused(folder):
    model = GPT.from_pretrained(folder)
    with pytest.raises(ValueError, match="49 tokens do not fit into a context of 48"):
        model(torch.zeros(1, 49, dtype=torch.long))
    cache = KVCache(model.config, 1, 48)
    model(torch.zeros(1, 48, dtype=torch.long), cache=cache)
    with pytest.raises(ValueError, match="49 tokens do not fit"):
        model(torch.zeros(1, 1, dtype=torch.long), cache=cache)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"activation_function": "relu"}, "activation_function 'relu' is not GPT-2's"),
        ({"n_embd": 65}, "n_embd 65 is not a multiple of n_head 4"),
        ({"model_type": "llama"}, "model_type 'llama' is not 'gpt2'"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True is a variant"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings = False is a variant"),
    ],
)
def test_what_is_not_gpt2_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig.from_dict({**TINY, **values})


@pytest.mark.slow
def test_logits_equal_transformers_at_355m(tmp_path):
    judge = transformers_model(vocab_size=50257, n_positions=1024, n_embd=1024, n_layer=24, n_head=16)
    judge.save_pretrained(tmp_path)
    idx = torch.randint(0, 50257, (1, 64))
    with torch.no_grad():
        assert relative(GPT.from_pretrained(tmp_path)(idx), judge(idx).logits) < 1e-4
