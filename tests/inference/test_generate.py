"""Generation, compared with transformers and with a plain loop: no cache, no batch, a full forward for every token."""

import pytest
import torch
import transformers
from transformers.generation.logits_process import (
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from minigpt.inference.generate import generate, stream
from minigpt.inference.sampling import Row, Sampling, candidates, draw, next_tokens
from minigpt.model.gpt2 import GPT

VOCAB, CONTEXT = 500, 48
PROMPTS = [[7], [1, 2, 3, 4, 5, 6, 7, 8, 9], [400, 17], [250] * 30, [3, 1, 4, 1, 5]]


@pytest.fixture(scope="module")
def hf_model():
    """transformers' GPT-2 with every weight drawn at std 0.2, so that a wrong GELU or bias exceeds the tolerances."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=VOCAB, n_positions=CONTEXT, n_embd=48, n_layer=3, n_head=4)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=float(".ln_" in name and name.endswith("weight")), std=0.2)
    return model


@pytest.fixture(scope="module")
def model(hf_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf_model")
    hf_model.save_pretrained(folder)
    return GPT.from_pretrained(folder)


def probabilities(logits, temperature, top_k=0, top_p=1.0):
    """The (B,V) distribution that is sampled from."""
    weights, ids = candidates(logits, temperature, top_k, top_p)
    weights = weights if ids is None else torch.zeros(logits.shape, dtype=weights.dtype).scatter(-1, ids, weights)
    return weights / weights.sum(-1, keepdim=True)


def hf_generate(hf_model, prompt, *, eos_id=None, **settings):
    """The new tokens of transformers' generate: a list per sequence, without the padding after an early end."""
    sequences = hf_model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        pad_token_id=VOCAB - 1,
        eos_token_id=eos_id,
        **settings,
    )
    rows = [row[len(prompt) :].tolist() for row in sequences]
    return [row[: row.index(eos_id) + 1] if eos_id in row else row for row in rows]


def plain_greedy(model, prompt, count):
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


# ---- greedy


@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
def test_greedy_equals_transformers(hf_model, model, prompt):
    assert generate(model, [prompt], max_new_tokens=15) == hf_generate(hf_model, prompt, max_new_tokens=15)


def test_a_batch_of_mixed_lengths_equals_one_prompt_at_a_time(hf_model, model):
    """With left padding, learned positions would count the padding (transformers issue 3021)."""
    batched = generate(model, PROMPTS, max_new_tokens=15)
    assert batched == [generate(model, [prompt], max_new_tokens=15)[0] for prompt in PROMPTS]
    assert batched == [plain_greedy(model, prompt, 15) for prompt in PROMPTS]

    longest = max(map(len, PROMPTS))
    padded = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in PROMPTS])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
    expected = hf_model.generate(
        padded, attention_mask=mask, max_new_tokens=15, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    assert batched == expected[:, longest:].tolist()


def test_prompts_of_equal_length_need_no_mask(model):
    prompts = [[5, 6, 7], [300, 2, 1], [9, 9, 9]]
    assert generate(model, prompts, max_new_tokens=15) == [plain_greedy(model, prompt, 15) for prompt in prompts]


@pytest.mark.parametrize("settings", [{"repetition_penalty": 1.3}, {"repetition_penalty": 0.8}], ids=str)
def test_repetition_penalty_equals_transformers(hf_model, model, settings):
    expected = [hf_generate(hf_model, prompt, max_new_tokens=15, **settings)[0] for prompt in PROMPTS]
    assert generate(model, PROMPTS, max_new_tokens=15, **settings) == expected
    assert expected != generate(model, PROMPTS, max_new_tokens=15)


def test_min_new_tokens_equals_transformers(hf_model, model):
    free = generate(model, PROMPTS, max_new_tokens=15)
    for prompt, row in zip(PROMPTS, free, strict=True):
        settings = {"max_new_tokens": 15, "eos_id": row[2], "min_new_tokens": 6}
        [ids] = generate(model, [prompt], **settings)
        assert [ids] == hf_generate(hf_model, prompt, **settings)
        assert len(ids) > 6
        assert row[2] not in ids[:6]


# ---- beams


@pytest.mark.parametrize("num_beams", [2, 3, 5])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"length_penalty": 2.0},
        {"length_penalty": -1.0},
        {"length_penalty": 0.0, "min_new_tokens": 4},
        {"repetition_penalty": 1.5},
        {"repetition_penalty": 1.2, "length_penalty": 0.5, "min_new_tokens": 2},
    ],
    ids=str,
)
def test_beam_search_equals_transformers(hf_model, model, num_beams, settings):
    """eos_id ends beams at different steps; all beams are returned, so the order of their scores is compared too."""
    settings = {"max_new_tokens": 12, "num_beams": num_beams, "num_return_sequences": num_beams, **settings}
    lengths = set()
    for prompt in PROMPTS[1:4]:
        likely = plain_greedy(model, prompt, 8)
        for eos_id in (likely[1], likely[7]):
            beams = generate(model, [prompt], eos_id=eos_id, **settings)
            assert beams == hf_generate(hf_model, prompt, eos_id=eos_id, **settings)
            lengths |= set(map(len, beams))
    assert len(lengths) > 1
    assert generate(model, [PROMPTS[1]], **settings) == hf_generate(hf_model, PROMPTS[1], **settings)


def test_beams_do_not_depend_on_the_batch(model):
    settings = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 12, "length_penalty": -1.0}
    lengths = set()
    for eos_id in plain_greedy(model, PROMPTS[0], 6)[::2]:
        settings["eos_id"] = eos_id
        alone = [ids for prompt in PROMPTS for ids in generate(model, [prompt], **settings)]
        assert generate(model, PROMPTS, **settings) == alone
        assert generate(model, PROMPTS, batch_size=7, **settings) == alone  # two prompts at a time
        lengths |= set(map(len, alone))
    assert len(lengths) > 1


def test_the_context_ends_beams(hf_model, model):
    prompt = [1] * (CONTEXT - 3)
    beams = generate(model, [prompt, [2]], max_new_tokens=10, num_beams=3)
    assert beams == hf_generate(hf_model, prompt, max_new_tokens=3, num_beams=3) + hf_generate(
        hf_model, [2], max_new_tokens=10, num_beams=3
    )


class OneCharacterTokens:
    """A tokenizer in which every token is one character."""

    vocab_size = VOCAB

    def decode(self, ids):
        return "".join(chr(0x4E00 + i) for i in ids)


@pytest.mark.parametrize("num_beams", [2, 3])
def test_beam_search_with_many_stop_strings_equals_transformers(hf_model, model, num_beams):
    """If stop strings end most candidates, fewer than num_beams are left to continue."""
    ending, lengths = set(range(VOCAB)) - set(range(0, VOCAB, 3)), set()
    settings = {"max_new_tokens": 8, "num_beams": num_beams, "num_return_sequences": num_beams, "length_penalty": 2.0}
    for prompt in PROMPTS:
        rows = hf_model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
            stopping_criteria=[lambda ids, _: torch.tensor([row[-1].item() in ending for row in ids])],
            **settings,
        )
        expected = []
        for row in (row[len(prompt) :].tolist() for row in rows):
            end = next((index for index, token in enumerate(row) if token in ending), len(row))
            expected.append(row[: end + 1])
        assert (
            generate(
                model,
                [prompt],
                stop=list(OneCharacterTokens().decode(ending)),
                tokenizer=OneCharacterTokens(),
                **settings,
            )
            == expected
        )
        lengths |= set(map(len, expected))
    assert len(lengths) > 1


# ---- the end of a row


def test_eos_ends_a_row_and_is_included(model):
    """Each row stops independently, and the remaining rows are unaffected."""
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


def test_nothing_to_do(model):
    assert generate(model, [], max_new_tokens=5) == []
    assert generate(model, [[1], [2, 3]], max_new_tokens=0) == [[], []]


# ---- sampling


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.0, 5, 1.0), (1.0, 0, 0.8), (1.3, 40, 0.9), (0.5, 1, 0.1), (1.0, 9999, 0.999)],
)
def test_probabilities_equal_transformers(temperature, top_k, top_p):
    logits = 3 * torch.randn(16, VOCAB, generator=torch.Generator().manual_seed(1))
    expected = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    probs = probabilities(logits, temperature, top_k, top_p)
    torch.testing.assert_close(probs, expected.softmax(-1).double(), atol=1e-6, rtol=1e-5)
    assert torch.equal(probs == 0, expected.isneginf())


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7},
        {"temperature": 1.0, "top_k": 20},
        {"temperature": 1.0, "top_p": 0.7},
        {"temperature": 1.3, "top_k": 50, "top_p": 0.8, "repetition_penalty": 1.4, "min_new_tokens": 1, "eos_id": 3},
    ],
    ids=str,
)
def test_samples_follow_the_distribution_of_transformers(hf_model, settings):
    """Chi-squared test of 10,000 seeds against transformers' processors on its own logits."""
    rows, prompt = 10_000, torch.tensor([[1, 2, 3, 400, 2]])
    with torch.inference_mode():
        logits = hf_model(prompt).logits[:, -1] / 4  # flatter, so that many tokens have a chance
    processors = {
        "repetition_penalty": RepetitionPenaltyLogitsProcessor,
        "min_new_tokens": lambda n: MinNewTokensLengthLogitsProcessor(prompt.shape[1], n, settings["eos_id"]),
        "temperature": TemperatureLogitsWarper,
        "top_k": TopKLogitsWarper,
        "top_p": TopPLogitsWarper,
    }
    scores = logits
    for name, processor in processors.items():  # in transformers' order
        if name in settings:
            scores = processor(settings[name])(prompt, scores)
    probs = scores.softmax(-1)[0]
    samples = []
    for start in range(0, rows, 500):
        batch = [
            Row(prompt[0].tolist(), Sampling(max_new_tokens=1, seed=seed, **settings), 1, None)
            for seed in range(start, start + 500)
        ]
        samples += next_tokens(logits.repeat(500, 1), batch)
    counts = torch.bincount(torch.tensor(samples), minlength=VOCAB)
    assert counts[probs == 0].sum() == 0
    expected = rows * probs
    likely = expected >= 5  # the unlikely ones are merged: the test needs an expected count of 5
    observed = torch.cat([counts[likely], counts[~likely].sum()[None]])
    expected = torch.cat([expected[likely], expected[~likely].sum()[None].clamp(min=1e-9)])
    statistic = ((observed - expected) ** 2 / expected).sum().item()
    freedom = int(likely.sum())
    assert freedom > 8
    # Wilson and Hilferty's normal approximation; p = 0.001 is 3.09 standard deviations
    assert freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3 > statistic


def test_docstring_example_of_draw():
    uniforms = torch.tensor([0.0, 0.2499, 0.25, 0.5, 1 - 2**-53], dtype=torch.float64)
    weights = torch.tensor([[0.0, 1.0, 0.0, 3.0, 0.0]], dtype=torch.float64).expand(5, 5)
    assert draw(weights, None, uniforms).tolist() == [1, 1, 3, 3, 3]
    assert draw(weights, torch.tensor([[9, 8, 7, 6, 5]]).expand(5, 5), uniforms).tolist() == [8, 8, 6, 6, 6]


@pytest.mark.parametrize("temperature", [1e-3, 1e-9, 1e-38, 1e-300])
def test_a_very_small_temperature_is_greedy(model, temperature):
    """Regression: dividing by the temperature overflowed, and sampling failed."""
    settings = {"max_new_tokens": 10, "seed": 1}
    expected = generate(model, PROMPTS, max_new_tokens=10)
    for cut in ({}, {"top_k": 5}, {"top_p": 0.9}):
        assert generate(model, PROMPTS, temperature=temperature, **cut, **settings) == expected


def test_top_p_sorts_the_whole_vocabulary_if_the_first_sizes_do_not_reach_p():
    logits = 0.1 * torch.randn(2, 3000, generator=torch.Generator().manual_seed(1))
    logits[0, 7] = 20.0  # one row needs a single token, the other more than 2,048
    expected = TopPLogitsWarper(0.9)(None, logits)
    probs = probabilities(logits, 1.0, top_p=0.9)
    torch.testing.assert_close(probs, expected.softmax(-1).double(), atol=1e-6, rtol=1e-4)
    assert (probs > 0).sum(-1).tolist() == (~expected.isneginf()).sum(-1).tolist()
    assert (probs[1] > 0).sum() > 2048


def test_samples_do_not_depend_on_the_batch(model):
    settings = {"max_new_tokens": 15, "temperature": 1.0, "top_k": 50, "top_p": 0.95}
    seeds = [11, 22, 33, 44, 55]
    alone = [generate(model, [p], seed=seed, **settings)[0] for p, seed in zip(PROMPTS, seeds, strict=True)]
    assert generate(model, PROMPTS, seed=seeds, **settings) == alone
    assert generate(model, PROMPTS[::-1], seed=seeds[::-1], **settings) == alone[::-1]
    eos_id = alone[2][3]  # rows that end early do not change the draws of the others
    ended = [row[: row.index(eos_id) + 1] if eos_id in row else row for row in alone]
    assert generate(model, PROMPTS, seed=seeds, eos_id=eos_id, **settings) == ended


def test_num_return_sequences_returns_a_flat_list(model):
    settings = {"max_new_tokens": 8, "temperature": 1.0}
    rows = generate(model, [[1, 2], [1, 2], [5]], seed=9, num_return_sequences=3, **settings)
    assert len(rows) == 9
    assert len(set(map(tuple, rows))) == 9
    assert rows[::3] == generate(model, [[1, 2], [1, 2], [5]], seed=9, **settings)
    assert rows[3:6] == generate(model, [[1, 2]], seed=[10], num_return_sequences=3, **settings)


def test_one_seed_gives_each_row_its_own_seed(model):
    settings = {"max_new_tokens": 15, "temperature": 1.0}
    rows = generate(model, [[1, 2]] * 3, seed=5, **settings)
    assert rows == generate(model, [[1, 2]] * 3, seed=[5, 6, 7], **settings)
    assert len(set(map(tuple, rows))) == 3
    assert generate(model, [[1, 2]], **settings) != generate(model, [[1, 2]], **settings)  # no seed: random


# ---- streaming


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_stream_equals_generate(model, temperature):
    settings = {"max_new_tokens": 15, "temperature": temperature, "seed": 3}
    [expected] = generate(model, [PROMPTS[1]], **settings)
    assert list(stream(model, PROMPTS[1], **settings)) == expected
    assert (
        list(stream(model, PROMPTS[1], eos_id=expected[4], **settings)) == expected[: expected.index(expected[4]) + 1]
    )


def test_stream_yields_token_by_token(model):
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
        ([[1]], {"stop": ["x"]}, "stop strings need a tokenizer, to decode the tokens"),
        ([[1], [2]], {"seed": [1]}, "1 seeds for 2 prompts"),
        ([[1]], {"seed": -1}, "seed must be at least 0 and below 2^63, got -1"),
        ([[1]], {"stop": "x"}, "stop must be a list of strings, got the string 'x'"),
        ([[1]], {"stop": ["x", ""]}, "stop must be non-empty strings, got ('x', '')"),
        ([[1]], {"repetition_penalty": 0.0}, "repetition_penalty must be above 0, got 0.0"),
        ([[1]], {"min_new_tokens": -2}, "min_new_tokens must be at least 0, got -2"),
        ([[1]], {"num_beams": 0}, "num_beams must be at least 1, got 0"),
        ([[1]], {"num_beams": 2, "temperature": 1.0}, "num_beams 2 is a search, which needs temperature 0, got 1.0"),
        ([[1]], {"num_beams": 2, "num_return_sequences": 3}, "num_return_sequences 3 is more than num_beams 2"),
        (
            [[1]],
            {"num_return_sequences": 2},
            "num_return_sequences 2 would be equal: set temperature above 0, or num_beams",
        ),
        ([[1]], {"eos_id": VOCAB}, "eos_id 500 is not in the model's vocabulary of 500"),
    ],
)
def test_invalid_arguments_are_refused(model, prompts, settings, message):
    with pytest.raises(ValueError) as caught:
        generate(model, prompts, **{"max_new_tokens": 5, **settings})
    assert str(caught.value) == message


def test_nan_weights_are_an_error(model):
    """Regression: chat printed an empty answer, and --predict wrote scores of 0%."""
    broken = GPT(model.config)
    with torch.no_grad():
        broken.h[0].mlp.c_fc.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="the model's logits contain NaN: its weights are broken"):
        generate(broken.eval(), [[1, 2]], max_new_tokens=3)
