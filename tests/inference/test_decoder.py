"""Continuous batching: every row gets the same tokens as in a batch of one."""

import random

import pytest
import torch

from minigpt.inference.decoder import Decoder, pad_right
from minigpt.inference.generate import Sampling, generate
from minigpt.model.gpt2 import GPT, GPTConfig

CONTEXT = 48


@pytest.fixture(scope="module")
def model():
    """Weights of std 0.2, so that answers do not loop and near-ties are rare."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=60, n_positions=CONTEXT, n_embd=32, n_layer=2, n_head=4)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


def requests(count, seed):
    """Random prompts with random settings, sampled and greedy ones mixed."""
    rng = random.Random(seed)
    for number in range(count):
        prompt = [rng.randrange(60) for _ in range(rng.randint(1, 30))]
        yield (
            prompt,
            Sampling(
                max_new_tokens=rng.randint(1, 25),
                temperature=rng.choice([0.0, 0.0, 0.8, 1.2]),
                top_k=rng.choice([0, 20]),
                top_p=rng.choice([1.0, 0.9]),
                repetition_penalty=rng.choice([1.0, 1.3]),
                min_new_tokens=rng.choice([0, 3]),
                eos_id=rng.choice([None, *range(40)]),
                seed=number,
            ),
        )


def alone(model, prompt, sampling):
    return generate(model, [prompt], **vars(sampling))[0]


def test_rows_do_not_depend_on_the_batch(model):
    rng = random.Random(3)
    pending = list(requests(60, seed=1))
    decoder = Decoder(model, max_rows=5)
    requests_by_key, tokens, reasons = {}, {}, {}
    running = set()
    while pending or len(decoder):
        for _ in range(min(len(pending), rng.choice([0, 0, 1, 4]))):
            prompt, sampling = pending.pop()
            key = decoder.add(prompt, sampling)
            requests_by_key[key], tokens[key] = (prompt, sampling), []
        events = decoder.step()
        assert len(events) == len({key for key, _, _ in events}) <= 5
        assert running <= {key for key, _, _ in events}  # every running row gets a token at every step
        running = {key for key, _, reason in events if reason is None}
        for key, token, reason in events:
            assert key not in reasons
            tokens[key].append(token)
            if reason:
                reasons[key] = reason
    assert tokens == {key: alone(model, *request) for key, request in requests_by_key.items()}
    for key, (prompt, sampling) in requests_by_key.items():
        at_limit = len(tokens[key]) == min(sampling.max_new_tokens, CONTEXT - len(prompt))
        assert reasons[key] == ("stop" if tokens[key][-1] == sampling.eos_id else "length")
        assert at_limit or reasons[key] == "stop"
    assert set(reasons.values()) == {"stop", "length"}
    assert decoder.step() == []


def test_the_batch_stays_full(model):
    """A freed cache row is used again at the next step."""
    decoder = Decoder(model, max_rows=3)
    lengths = [2, 9, 4, 5, 1, 6]
    keys = [decoder.add([number + 1], Sampling(max_new_tokens=length)) for number, length in enumerate(lengths)]
    assert keys == [0, 1, 2, 3, 4, 5]
    assert len(decoder) == 6
    steps = []
    while len(decoder):
        steps.append(sorted(key for key, _, _ in decoder.step()))
    assert steps == [[0, 1, 2]] * 2 + [[1, 2, 3]] * 2 + [[1, 3, 4]] + [[1, 3, 5]] * 2 + [[1, 5]] * 2 + [[5]] * 2


def test_removing_a_row_does_not_change_the_others(model):
    """Removes a running and a waiting row; the last row of the batch moves into the freed cache row."""
    requests_ = list(requests(8, seed=2))
    requests_ = [
        (prompt[:20], Sampling(max_new_tokens=20, temperature=1.0, seed=i)) for i, (prompt, _) in enumerate(requests_)
    ]
    decoder = Decoder(model, max_rows=4)
    tokens = {decoder.add(*request): [] for request in requests_}
    for step in range(60):
        for key, token, _ in decoder.step():
            tokens[key].append(token)
        if step == 3:
            decoder.remove(1)
            decoder.remove(6)  # still waiting
            decoder.remove(99)  # an unknown key
            assert len(decoder) == 6
    assert len(decoder) == 0
    decoder.remove(0)  # already ended
    for key, request in enumerate(requests_):
        expected = alone(model, *request)
        assert tokens[key] == (expected[:4] if key == 1 else [] if key == 6 else expected)


def test_an_empty_decoder_can_be_reused(model):
    """Stale keys and values of earlier rows are not read."""
    decoder = Decoder(model, max_rows=2)
    for request in requests(6, seed=4):
        key = decoder.add(*request)
        events = []
        while len(decoder):
            events += decoder.step()
        assert [(event[0], event[1]) for event in events] == [(key, token) for token in alone(model, *request)]


def test_prefill_batches_are_bounded(model, monkeypatch):
    from minigpt.inference import decoder as module

    sizes = []
    hook = model.register_forward_pre_hook(lambda _, args: sizes.append(tuple(args[0].shape)))
    monkeypatch.setattr(module, "PREFILL_TOKENS", 40)
    try:
        prompts = [[1] * 15, [2] * 3, [3] * 20, [4], [5] * 45]
        decoder = Decoder(model, max_rows=5)
        for prompt in prompts:
            decoder.add(prompt, Sampling(max_new_tokens=1))
        results = decoder.step()
    finally:
        hook.remove()
    assert sizes == [(2, 15), (2, 20), (1, 45)]
    assert results == [
        (key, generate(model, [prompt], max_new_tokens=1)[0][0], "length") for key, prompt in enumerate(prompts)
    ]


def test_prompts_are_padded_on_the_right():
    idx, last = pad_right([[5, 6, 7], [8]], torch.device("cpu"))
    assert idx.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert last.tolist() == [2, 0]


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        ([], {}, "the prompt has 0 tokens; between 1 and 9 fit"),
        ([1] * 10, {}, "the prompt has 10 tokens; between 1 and 9 fit"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ([1], {"stop": ["x"]}, "stop strings need a tokenizer, to decode the tokens"),
        ([1], {"eos_id": 60}, "eos_id 60 is not in the model's vocabulary of 60"),
    ],
)
def test_invalid_requests_are_refused_and_add_no_row(model, prompt, settings, message):
    decoder = Decoder(model, max_rows=2, max_length=10)
    with pytest.raises(ValueError) as caught:
        decoder.add(prompt, Sampling(**{"max_new_tokens": 3, **settings}))
    assert str(caught.value) == message
    assert len(decoder) == 0
    with pytest.raises(ValueError, match="max_rows must be at least 1, got 0"):
        Decoder(model, max_rows=0)
