"""Generation, judged by transformers and by the plain way: no cache, no batch, a full forward for every token."""

import pytest
import torch
import transformers
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from minigpt.inference.sampling import generate, next_token_probabilities, stream
from minigpt.model.gpt2 import GPT

VOCAB, CONTEXT = 500, 48
PROMPTS = [[7], [1, 2, 3, 4, 5, 6, 7, 8, 9], [400, 17], [250] * 30, [3, 1, 4, 1, 5]]


@pytest.fixture(scope="module")
def judge():
    """transformers' GPT-2 with every weight drawn at std 0.2: a wrong GELU or bias does not hide under a tolerance."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=VOCAB, n_positions=CONTEXT, n_embd=48, n_layer=3, n_head=4)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=float(".ln_" in name and name.endswith("weight")), std=0.2)
    return model


@pytest.fixture(scope="module")
def model(judge, tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge")
    judge.save_pretrained(folder)
    return GPT.from_pretrained(folder)


def plain_greedy(model, prompt, count):
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


# ---- greedy


@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
def test_greedy_ids_are_those_of_transformers(judge, model, prompt):
    expected = judge.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=15,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    assert generate(model, [prompt], max_new_tokens=15) == [expected[0, len(prompt) :].tolist()]


def test_prompts_of_mixed_lengths_answer_as_alone(judge, model):
    """Learned positions that count the left padding are transformers' issue 3021."""
    together = generate(model, PROMPTS, max_new_tokens=15)
    assert together == [generate(model, [prompt], max_new_tokens=15)[0] for prompt in PROMPTS]
    assert together == [plain_greedy(model, prompt, 15) for prompt in PROMPTS]

    longest = max(map(len, PROMPTS))
    padded = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in PROMPTS])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
    expected = judge.generate(
        padded, attention_mask=mask, max_new_tokens=15, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    assert together == expected[:, longest:].tolist()


def test_equal_lengths_take_the_way_without_padding(model):
    prompts = [[5, 6, 7], [300, 2, 1], [9, 9, 9]]
    assert generate(model, prompts, max_new_tokens=15) == [plain_greedy(model, prompt, 15) for prompt in prompts]


# ---- where a row ends


def test_eos_ends_a_row_and_is_included(model):
    """Each row stops at its own time, and the rows that stay go on as before."""
    free = generate(model, PROMPTS, max_new_tokens=15)
    eos_id = free[1][4]
    expected = [row[: row.index(eos_id) + 1] if eos_id in row else row for row in free]
    assert len({len(row) for row in expected}) > 1
    assert generate(model, PROMPTS, max_new_tokens=15, eos_id=eos_id) == expected


def test_the_context_ends_a_row(model):
    prompts = [[1] * (CONTEXT - 1), [2] * (CONTEXT - 3), [3] * 5]
    rows = generate(model, prompts, max_new_tokens=CONTEXT)
    assert list(map(len, rows)) == [1, 3, CONTEXT - 5]
    assert rows == [plain_greedy(model, prompt, len(row)) for prompt, row in zip(prompts, rows, strict=True)]


def test_a_stop_string_ends_a_row_wherever_tokens_end(speaker, tokenizer):
    def until(stop):
        return next(ids[:n] for n in range(len(ids) + 1) if stop in tokenizer.decode(ids[:n]))

    ids = tokenizer.encode("Paris.\n\n### Instruction:\nAnother 日本語")
    assert not any("### Instruction:" in tokenizer.decode([i]) for i in ids)  # it lies across several tokens
    assert len(until("日")) > len(until("Another ")) + 1  # and so does a character
    model = speaker(ids, prompt_length=1)
    settings = {"max_new_tokens": 40, "eos_id": tokenizer.eot_id, "tokenizer": tokenizer}
    for stop in (["### Instruction:"], ["never", "Paris"], ["日"], ["Another 日本"]):
        assert generate(model, [[1]], stop=stop, **settings) == [until(stop[-1])]
    assert generate(model, [[1]], stop=["never"], **settings) == [[*ids, tokenizer.eot_id]]


def test_nothing_to_do(model):
    assert generate(model, [], max_new_tokens=5) == []
    assert generate(model, [[1], [2, 3]], max_new_tokens=0) == [[], []]


# ---- drawing


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.0, 5, 1.0), (1.0, 0, 0.8), (1.3, 40, 0.9), (0.5, 1, 0.1), (1.0, 9999, 0.999)],
)
def test_probabilities_are_those_of_transformers(temperature, top_k, top_p):
    logits = 3 * torch.randn(16, VOCAB, generator=torch.Generator().manual_seed(1))
    expected = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    found = next_token_probabilities(logits, temperature, top_k, top_p)
    torch.testing.assert_close(found, expected.softmax(-1))
    assert torch.equal(found == 0, expected.isneginf())


def test_draws_follow_the_probabilities(model):
    """A thousand rows with a thousand seeds against the probabilities, by chi-squared."""
    rows, prompt = 1000, [1, 2, 3]
    drawn = generate(model, [prompt] * rows, max_new_tokens=1, temperature=1.0, top_k=10, seed=list(range(rows)))
    with torch.inference_mode():
        chances = next_token_probabilities(model(torch.tensor([prompt]))[:, -1], 1.0, top_k=10)[0]
    counts = torch.bincount(torch.tensor(drawn).flatten(), minlength=VOCAB)
    possible = chances > 0
    assert counts[~possible].sum() == 0
    expected = rows * chances[possible]
    assert ((counts[possible] - expected) ** 2 / expected).sum() < 27.9  # 9 degrees of freedom, p = 0.001


def test_draws_do_not_depend_on_neighbours(model):
    settings = {"max_new_tokens": 15, "temperature": 1.0, "top_k": 50, "top_p": 0.95}
    seeds = [11, 22, 33, 44, 55]
    alone = [generate(model, [p], seed=seed, **settings)[0] for p, seed in zip(PROMPTS, seeds, strict=True)]
    assert generate(model, PROMPTS, seed=seeds, **settings) == alone
    assert generate(model, PROMPTS[::-1], seed=seeds[::-1], **settings) == alone[::-1]
    eos_id = alone[2][3]  # rows that leave the batch take none of the others' draws with them
    ended = [row[: row.index(eos_id) + 1] if eos_id in row else row for row in alone]
    assert generate(model, PROMPTS, seed=seeds, eos_id=eos_id, **settings) == ended


def test_one_seed_fixes_all_rows_and_makes_none_alike(model):
    settings = {"max_new_tokens": 15, "temperature": 1.0}
    rows = generate(model, [[1, 2]] * 3, seed=5, **settings)
    assert rows == generate(model, [[1, 2]] * 3, seed=[5, 6, 7], **settings)
    assert len(set(map(tuple, rows))) == 3
    assert generate(model, [[1, 2]], **settings) != generate(model, [[1, 2]], **settings)  # no seed: fresh draws


# ---- streams


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_stream_is_what_generate_returns(model, temperature):
    settings = {"max_new_tokens": 15, "temperature": temperature, "seed": 3}
    [expected] = generate(model, [PROMPTS[1]], **settings)
    assert list(stream(model, PROMPTS[1], **settings)) == expected
    assert (
        list(stream(model, PROMPTS[1], eos_id=expected[4], **settings)) == expected[: expected.index(expected[4]) + 1]
    )


def test_a_stream_comes_token_by_token(model):
    ids = stream(model, [1, 2, 3], max_new_tokens=10)
    assert [next(ids), next(ids)] == plain_greedy(model, [1, 2, 3], 2)
    ids.close()


# ---- refusals


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([[1], []], {}, "prompt 1 has 0 tokens; between 1 and 47 fit"),
        ([[1] * CONTEXT], {}, "prompt 0 has 48 tokens; between 1 and 47 fit"),
        ([[1]], {"max_new_tokens": -1}, "max_new_tokens must be at least 0, got -1"),
        ([[1]], {"temperature": -0.1}, "temperature must be at least 0, got -0.1"),
        ([[1]], {"temperature": float("nan")}, "temperature must be at least 0, got nan"),
        ([[1]], {"top_k": -1}, "top_k must be at least 0, got -1"),
        ([[1]], {"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ([[1]], {"top_p": 1.1}, "top_p must be above 0 and at most 1, got 1.1"),
        ([[1]], {"stop": ["x"]}, "stop strings need a tokenizer, which knows where tokens end"),
        ([[1], [2]], {"seed": [1]}, "1 seeds for 2 prompts"),
    ],
)
def test_bad_arguments_are_refused(model, prompts, settings, message):
    with pytest.raises(ValueError) as caught:
        generate(model, prompts, **{"max_new_tokens": 5, **settings})
    assert str(caught.value) == message


def test_broken_weights_are_named(model):
    """Chat printed an empty answer, and --predict wrote 0%."""
    broken = GPT(model.config)
    with torch.no_grad():
        broken.h[0].mlp.c_fc.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="the model's logits are not numbers: its weights are broken"):
        generate(broken.eval(), [[1, 2]], max_new_tokens=3)
