"""The server over HTTP, with OpenAI's client and httpx: answers do not depend on other requests."""

# ruff: noqa: E402  # the extras may not be installed

from concurrent.futures import ThreadPoolExecutor

import pytest

for extra in ("fastapi", "uvicorn", "httpx"):
    pytest.importorskip(extra, reason="the extras serve and test are not installed")
import httpx

openai = pytest.importorskip("openai", reason="the extra test is not installed")

from minigpt.data.encode import encode_segments
from minigpt.data.prompts import get_template
from minigpt.data.tokenizer import Tokenizer
from minigpt.inference.generate import generate

from .running_server import CHAT, NAME, ask, events, post, serving

CONTEXT = 256


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        yield client


def alone(model, messages, max_tokens, stop=()):
    """The expected answer by `generate`: text, finish reason, prompt tokens and new tokens."""
    tokenizer, template = Tokenizer.tiny(), get_template("alpaca")
    prompt = list(encode_segments(template.render(messages, add_generation_prompt=True), tokenizer).ids)
    stops = [*template.stop_strings(), *stop]
    [ids] = generate(
        model, [prompt], max_new_tokens=max_tokens, eos_id=tokenizer.eot_id, stop=stops, tokenizer=tokenizer
    )
    text = tokenizer.decode([id for id in ids if id != tokenizer.eot_id])
    ends = [text.index(stop) for stop in stops if stop in text]
    stopped = bool(ends) or ids[-1] == tokenizer.eot_id
    text = text[: min(ends, default=len(text))].replace("\ufffd", "").strip()
    return text, "stop" if stopped else "length", len(prompt), len(ids)


# ---- OpenAI's client


def test_32_concurrent_clients_get_independent_answers(served_model, client):
    def request(number):
        messages = [{"role": "user", "content": f"Tell me of {number} " + "cats and dogs " * (number % 7)}]
        body = {"model": NAME, "messages": messages, "max_completion_tokens": 5 + number}
        if number % 2:
            whole = client.chat.completions.create(**body)
            text, reason, usage = whole.choices[0].message.content, whole.choices[0].finish_reason, whole.usage
        else:
            chunks = list(client.chat.completions.create(**body, stream=True, stream_options={"include_usage": True}))
            assert chunks[0].choices[0].delta.role == "assistant"
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
            reason, usage = chunks[-2].choices[0].finish_reason, chunks[-1].usage
            assert all(chunk.usage is None for chunk in chunks[:-1])
        expected = alone(served_model, messages, 5 + number)
        assert (text, reason, usage.prompt_tokens, usage.completion_tokens) == expected
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
        return reason

    with ThreadPoolExecutor(32) as pool:
        assert "length" in set(pool.map(request, range(32)))


def test_completions_of_texts_and_ids(served_model, client):
    tokenizer = Tokenizer.tiny()
    ids = tokenizer.encode("The capital of France")
    completion = client.completions.create(model=NAME, prompt=["The capital of France", ""], max_tokens=8)
    expected = generate(served_model, [ids, [tokenizer.eot_id]], max_new_tokens=8, eos_id=tokenizer.eot_id)
    assert [choice.text for choice in completion.choices] == [tokenizer.decode(row) for row in expected]
    assert [choice.index for choice in completion.choices] == [0, 1]
    assert completion.usage.prompt_tokens == len(ids) + 1
    for prompt in ("The capital of France", ids, [ids]):
        again = client.completions.create(model=NAME, prompt=prompt, max_tokens=8)
        assert again.choices[0].text == completion.choices[0].text
    pieces = client.completions.create(model=NAME, prompt=ids, max_tokens=8, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == completion.choices[0].text
    assert client.completions.create(model=NAME, prompt=ids).usage.completion_tokens == 16  # OpenAI's default


def test_choices_have_different_seeds(client):
    settings = {"model": NAME, "temperature": 1.0, "n": 3, "max_tokens": 12}
    first = client.chat.completions.create(**settings, seed=7, messages=ask()["messages"])
    texts = [choice.message.content for choice in first.choices]
    assert len(set(texts)) == 3
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(**settings, seed=7, messages=ask()["messages"], stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts
    other = client.chat.completions.create(**settings, seed=-7, messages=ask()["messages"])
    assert not {choice.message.content for choice in other.choices} & set(texts)


def test_an_answer_can_be_sent_back(client):
    messages = ask()["messages"]
    answer = client.chat.completions.create(model=NAME, messages=messages).choices[0].message
    again = [*messages, answer, {"role": "user", "content": [{"type": "text", "text": "And now?"}]}]
    assert client.chat.completions.create(model=NAME, messages=again).choices[0].message.role == "assistant"


def test_models_and_error_types_of_the_client(client):
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")
    with pytest.raises(openai.NotFoundError, match="unknown model 'gpt-4'; this server has 'tiny'"):
        client.chat.completions.create(model="gpt-4", messages=ask()["messages"])
    with pytest.raises(openai.BadRequestError, match="tools: not supported") as caught:
        client.chat.completions.create(model=NAME, messages=ask()["messages"], tools=[{"type": "function"}])
    assert (caught.value.param, caught.value.code) == ("tools", "unsupported_parameter")


# ---- settings of a request


def test_stop_strings_of_a_request(served_model, server):
    messages = ask("Tell me")["messages"]
    text = alone(served_model, messages, 20)[0]
    stop = text[8:11]
    choice = post(server, ask("Tell me", max_tokens=20, stop=stop)).json()["choices"][0]
    assert choice["message"]["content"] == text[: text.index(stop)].strip()
    assert choice["finish_reason"] == "stop"
    with httpx.stream("POST", server.url + CHAT, json=ask("Tell me", stop=[stop, "xyz"], stream=True)) as response:
        streamed = events(response.iter_lines())
    pieces = [event["choices"][0]["delta"].get("content", "") for event in streamed]
    assert "".join(pieces) == choice["message"]["content"]


def test_neutral_values_of_unsupported_features_are_accepted(server):
    neutral = {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "logprobs": False, "tools": []}
    neutral |= {"response_format": {"type": "text"}, "tool_choice": "none", "store": False, "user": "me", "stop": None}
    assert post(server, ask(**neutral)).status_code == 200
    assert post(server, {"prompt": "Hi", "echo": False, "best_of": 1}, "/v1/completions").status_code == 200


# ---- long conversations


def test_truncation(server):
    turns = [
        message
        for number in range(12)
        for message in (
            {"role": "user", "content": f"Question {number} about cats"},
            {"role": "assistant", "content": "An answer about cats. " * 3},
        )
    ]
    body = {"messages": [{"role": "system", "content": "Be kind."}, *turns, *ask("Last one")["messages"]]}
    refused = post(server, body)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")
    answered = post(server, {**body, "truncation": "auto"}).json()
    assert 0 < answered["truncated"]["turns_dropped"] < 12
    assert answered["truncated"]["tokens_cut"] == 0
    assert CONTEXT // 2 < answered["usage"]["prompt_tokens"] <= CONTEXT - 20
    cut = post(server, {**ask("word " * 500), "truncation": "auto", "max_tokens": 9}).json()
    assert cut["truncated"]["tokens_cut"] > 200
    assert cut["usage"] == {"prompt_tokens": CONTEXT - 9, "completion_tokens": 9, "total_tokens": CONTEXT}


def test_a_plain_text_model_continues_the_text(served_model):
    tokenizer = Tokenizer.tiny()
    with serving(served_model, template="none") as server:
        text = post(server, ask("The capital of", max_tokens=6)).json()["choices"][0]["message"]["content"]
    [ids] = generate(served_model, [tokenizer.encode("The capital of")], max_new_tokens=6, eos_id=tokenizer.eot_id)
    assert text == tokenizer.decode([id for id in ids if id != tokenizer.eot_id])
