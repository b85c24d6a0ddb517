"""A server in every mood: what is asked of it, what is kept, and what is said when it refuses."""

import socket
import time

import pytest

from minigpt.api_client import ApiError
from minigpt.data.tokenizer import Tokenizer
from minigpt.selfinstruct import endpoint as endpoint_module
from minigpt.selfinstruct.endpoint import KEY, ApiGenerator, EndpointArguments, read_choices
from minigpt.selfinstruct.generators import Completion, GeneratorArguments, How, LocalGenerator, Prompt

from ..serving import served
from .endpoint import MODEL, serving
from .writers import plausible

PROMPTS = [Prompt(f"{'###' * n}\n{n}. Instruction:", seed) for n, seed in enumerate((10, 7, 99, 3, 2**63 - 1, 0, 5), 1)]
MANY = [Prompt(PROMPTS[seed % 7].text, seed) for seed in range(21)]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.tiny()


def api(server, tokenizer=None, **endpoint):
    arguments = {"api_base": server.url, "api_model": MODEL, "api_retries": 2, **endpoint}
    return ApiGenerator(EndpointArguments(**arguments), tokenizer)


def how(stop=(), **settings):
    return How(GeneratorArguments(**settings), stop)


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv(KEY, raising=False)


@pytest.fixture
def quick(monkeypatch):
    """Pauses that a server does not ask for take a hundredth of their time."""
    real = endpoint_module.ApiGenerator._back_off
    monkeypatch.setattr(endpoint_module.ApiGenerator, "_back_off", lambda self, seconds: real(self, seconds / 100))


def expected_of(prompts, n=1):
    return [[plausible(text, seed % 2**31 + place) for place in range(n)] for text, seed in prompts]


def test_what_a_server_is_asked(monkeypatch):
    monkeypatch.setenv(KEY, "sk-secret\n")
    settings = {"temperature": 0.7, "top_p": 0.9, "max_length": 99, "num_return_sequences": 2}
    asked = [Prompt("7. Instruction:", 2**40 + 5)]
    with serving() as server:
        found = api(server).complete(asked, how(("@1", "@2", "@3", "@4", "@5"), **settings))
        assert found == expected_of(asked, 2)
        assert server.bodies == [
            {
                "model": MODEL,
                "prompt": "7. Instruction:",
                "max_tokens": 99,
                "temperature": 0.7,
                "top_p": 0.9,
                "n": 2,
                "seed": 5,
                "stop": ["@1", "@2", "@3", "@4"],  # OpenAI takes four; the fifth is looked for here
            }
        ]
        assert server.paths == ["/v1/models", "/v1/completions"]
        assert [headers["Authorization"] for headers in server.headers] == ["Bearer sk-secret"] * 2
        assert api(server, api_chat=True).complete(asked, how(repetition_penalty=1.2)) == expected_of(asked)
    assert server.paths[-1] == "/v1/chat/completions"
    assert server.bodies[-1]["messages"] == [{"role": "user", "content": "7. Instruction:"}]
    assert server.bodies[-1]["repetition_penalty"] == 1.2
    assert "prompt" not in server.bodies[-1]


def test_the_context_and_the_count(tokenizer):
    with serving() as server:
        assert api(server).context == 4096
        assert api(server).count("über") == 3  # five bytes
        assert api(server, tokenizer).count("über") == len(tokenizer.encode("über"))
    with serving(context=777) as server:
        assert api(server).context == 777
        assert api(server, api_context=55).context == 55


def test_requests_run_side_by_side_as_many_as_are_wanted():
    with serving(lambda number, body: time.sleep(0.02)) as server:
        found = api(server).complete(MANY, how(request_batch_size=3))
    assert found == expected_of(MANY)
    assert server.most_at_once == 3


def test_a_moody_server_loses_nothing(quick):
    """Every second request meets a time-out, 429, 500, half an answer, nonsense, or a closed door."""

    def late(handler):
        time.sleep(0.6)

    def closed(handler):
        handler.connection.shutdown(socket.SHUT_RDWR)

    moods = [
        (429, {}, {"error": {"message": "slow down"}}),
        (500, {}, b"oops"),
        503,
        b"<html>gateway</html>",
        b'{"choices": [{"text": "half',
        {"choices": []},
        {"choices": [{"text": 5}]},
        ["no object"],
        late,
        closed,
    ]

    def mood(number, body):
        return moods[number // 2 % len(moods)] if number % 2 else None

    arrived = {}
    with serving(mood) as server:
        found = api(server, api_timeout=0.3, api_retries=20).complete(MANY, how(), arrived.__setitem__)
    assert found == expected_of(MANY)
    assert arrived == dict(enumerate(found))
    assert sorted(server.answered) == list(range(21))  # nothing was paid for twice
    assert len(server.bodies) > 30


def test_a_pause_that_is_asked_for_holds_for_all():
    def mood(number, body):
        if number == 2:
            return 429, {"Retry-After": "1"}, b""
        time.sleep(0.05)  # for longer than the refusal is on its way

    with serving(mood) as server:
        found = api(server).complete(PROMPTS, how(request_batch_size=2))
    assert found == expected_of(PROMPTS)
    after = [at - server.at[2] for at in server.at[3:]]
    assert sum(pause < 0.99 for pause in after) <= 1  # the one that was under way may have been answered, no more


def test_what_is_under_way_is_kept_when_the_run_must_end(quick):
    """One request is refused for good while others are being answered: those were paid for."""

    def mood(number, body):
        if body["seed"] == 2:
            return 500, {}, {"error": {"message": "down"}}
        time.sleep(0.3 if body["seed"] < 5 else 0)

    arrived = {}
    with serving(mood) as server, pytest.raises(ApiError) as error:
        api(server).complete(MANY, how(request_batch_size=4), arrived.__setitem__)
    assert str(error.value) == (
        f"{server.url}/completions: HTTP 500: down (3 attempts) (what has arrived is kept: the same command goes on)"
    )
    assert sorted(arrived) == sorted(server.answered)
    assert {0, 1, 3} <= arrived.keys()
    assert len(server.answered) < 21


@pytest.mark.parametrize(
    ("reply", "settings", "message"),
    [
        ((401, {}, {"error": {"message": "bad key"}}), {}, "HTTP 401: bad key (the key is OPENAI_API_KEY of the env"),
        ((404, {}, b"nothing"), {}, "HTTP 404: nothing (no model 'scripted' there, or no such path: --api_model, --a"),
        ((400, {}, {"error": {"message": "context"}}), {}, "HTTP 400: context (where it is too long: --api_context, "),
        ((308, {"Location": "http://other/v1"}, b""), {}, "(it sends elsewhere: give --api_base that address)"),
        ({"choices": []}, {"api_retries": 1}, 'no completion in the answer {"choices": []} (2 attempts)'),
        ((429, {}, {"error": {"code": "insufficient_quota"}}), {}, "HTTP 429: insufficient_quota (what has arrived is"),
    ],
)
def test_refusals_say_what_to_do(quick, reply, settings, message):
    with serving(lambda *_: reply) as server, pytest.raises(ApiError) as error:
        api(server, **settings).complete(PROMPTS, how())
    assert str(error.value).startswith(f"{server.url}/completions: ")
    assert message in str(error.value)
    assert len(server.bodies) <= 10


@pytest.mark.parametrize("retries", [0, 2, 3])
def test_a_request_is_sent_no_more_often_than_it_may(quick, retries):
    """Failures and nonsense were counted apart: with eight retries a request was sent up to 81 times."""
    with serving(lambda number, body: {"choices": []} if number % 2 else 500) as server:
        with pytest.raises(ApiError):
            api(server, api_retries=retries).complete(PROMPTS[:1], how())
        assert len(server.bodies) == retries + 1


def test_nobody_at_the_address():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        base = f"http://127.0.0.1:{probe.getsockname()[1]}/v1"
    arguments = EndpointArguments(api_base=base, api_model=MODEL)
    with pytest.raises(ApiError, match=f"{base}/models: no answer .*refused.*; is --api_base {base} right?"):
        ApiGenerator(arguments)


def test_one_request_that_is_refused_is_passed_over(capsys):
    """A prompt against the server's rules would be refused for ever, and the run with it."""
    with serving(lambda number, body: (400, {}, b"unsafe") if body["seed"] == 3 else None) as server:
        arrived = {}
        found = api(server).complete(PROMPTS, how(request_batch_size=2), arrived.__setitem__)
    assert found[3] == arrived[3] == []
    assert found[:3] + found[4:] == expected_of(PROMPTS[:3] + PROMPTS[4:])
    assert (
        capsys.readouterr().out
        == f"a request is refused, and passed over: {server.url}/completions: HTTP 400: unsafe\n"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"api_base": "http://x/v1"}, "--api_base and --api_model go together"),
        ({"api_timeout": 0}, "--api_timeout must be above 0"),
        ({"api_retries": -1}, "--api_retries must be at least 0"),
    ],
)
def test_endpoint_settings_that_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        EndpointArguments(**settings)


def test_a_server_knows_no_beams():
    with serving() as server, pytest.raises(ValueError, match="--num_beams needs a local model"):
        api(server).complete(PROMPTS, how(num_beams=2))


def test_choices_that_are_none():
    good = {"text": "a\ud800b", "finish_reason": None}
    assert read_choices({"choices": [good]}, []) == [Completion("a?b", True)]  # no file can hold half a pair
    assert read_choices({"choices": [{"message": {"content": None}}]}, []) == [Completion("", True)]
    for bad in ({}, {"choices": None}, {"choices": [good, {"message": {}}]}, {"choices": ["text"]}, {"choices": 3}):
        assert read_choices(bad, []) == []


def test_our_own_server_gives_what_the_model_gives(tokenizer):
    """chat.py --serve, asked over HTTP, completes as the model in this process does."""
    model = served.make_model()
    asked = [Prompt(text, seed) for seed, (text, _) in enumerate(PROMPTS)]
    settings = how(("the",), max_length=15, top_p=0.9, repetition_penalty=1.1)
    with served.serving(model) as server:
        generator = ApiGenerator(EndpointArguments(f"{server.url}/v1", served.NAME), tokenizer)
        assert generator.context == 256
        there = generator.complete(asked, settings)
    here = LocalGenerator(model, tokenizer).complete(asked, settings)
    # the server leaves out bytes that are no characters
    assert there == [[one._replace(text=one.text.replace("\ufffd", ""))] for (one,) in here]
    assert {one.finished for (one,) in here} == {True, False}
