"""The client of an OpenAI-compatible server: requests, retries, rejections and error messages."""

import socket
import time

import pytest

from minigpt.api_client import ApiError
from minigpt.data.tokenizer import Tokenizer
from minigpt.selfinstruct import endpoint as endpoint_module
from minigpt.selfinstruct.endpoint import API_KEY_VARIABLE, ApiGenerator, EndpointArguments, read_choices
from minigpt.selfinstruct.generators import Completion, GeneratorArguments, LocalGenerator, SamplingParams, SeededPrompt

from ..serving import running_server
from .endpoint import MODEL, serving
from .fake_generators import plausible

PROMPTS = [
    SeededPrompt(f"{'###' * n}\n{n}. Instruction:", seed) for n, seed in enumerate((10, 7, 99, 3, 2**63 - 1, 0, 5), 1)
]
MANY = [SeededPrompt(PROMPTS[seed % 7].text, seed) for seed in range(21)]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.tiny()


def api(server, tokenizer=None, **endpoint):
    arguments = {"api_base": server.url, "api_model": MODEL, "api_retries": 2, **endpoint}
    return ApiGenerator(EndpointArguments(**arguments), tokenizer)


def make_params(stop=(), **settings):
    return SamplingParams(GeneratorArguments(**settings), stop)


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv(API_KEY_VARIABLE, raising=False)


@pytest.fixture
def fast_backoff(monkeypatch):
    """Makes backoff 100 times shorter, except for waits requested by Retry-After."""
    real = endpoint_module.ApiGenerator._back_off
    monkeypatch.setattr(endpoint_module.ApiGenerator, "_back_off", lambda self, seconds: real(self, seconds / 100))


def expected_of(prompts, n=1):
    return [[plausible(text, seed % 2**31 + index) for index in range(n)] for text, seed in prompts]


def test_the_request_body_and_headers(monkeypatch):
    monkeypatch.setenv(API_KEY_VARIABLE, "sk-secret\n")
    settings = {"temperature": 0.7, "top_p": 0.9, "max_length": 99, "num_return_sequences": 2}
    prompts = [SeededPrompt("7. Instruction:", 2**40 + 5)]
    with serving() as server:
        results = api(server).complete(prompts, make_params(("@1", "@2", "@3", "@4", "@5"), **settings))
        assert results == expected_of(prompts, 2)
        assert server.bodies == [
            {
                "model": MODEL,
                "prompt": "7. Instruction:",
                "max_tokens": 99,
                "temperature": 0.7,
                "top_p": 0.9,
                "n": 2,
                "seed": 5,
                "stop": ["@1", "@2", "@3", "@4"],  # OpenAI's limit is four; the fifth is applied by the client
            }
        ]
        assert server.paths == ["/v1/models", "/v1/completions"]
        assert [headers["Authorization"] for headers in server.headers] == ["Bearer sk-secret"] * 2
        assert api(server, api_chat=True).complete(prompts, make_params(repetition_penalty=1.2)) == expected_of(prompts)
    assert server.paths[-1] == "/v1/chat/completions"
    assert server.bodies[-1]["messages"] == [{"role": "user", "content": "7. Instruction:"}]
    assert server.bodies[-1]["repetition_penalty"] == 1.2
    assert "prompt" not in server.bodies[-1]


def test_context_and_token_counts(tokenizer):
    with serving() as server:
        assert api(server).context == 4096
        assert api(server).count("über") == 3  # five bytes
        assert api(server, tokenizer).count("über") == len(tokenizer.encode("über"))
    with serving(context=777) as server:
        assert api(server).context == 777
        assert api(server, api_context=55).context == 55


def test_request_batch_size_requests_run_concurrently():
    with serving(lambda number, body: time.sleep(0.02)) as server:
        results = api(server).complete(MANY, make_params(request_batch_size=3))
    assert results == expected_of(MANY)
    assert server.most_at_once == 3


def test_failed_requests_are_retried_and_none_is_lost(fast_backoff):
    """Every second request gets a timeout, 429, 5xx, a truncated or malformed response, or a closed connection."""

    def late(handler):
        time.sleep(0.6)

    def closed(handler):
        handler.connection.shutdown(socket.SHUT_RDWR)

    faults = [
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

    def fault(number, body):
        return faults[number // 2 % len(faults)] if number % 2 else None

    reported = {}
    with serving(fault) as server:
        results = api(server, api_timeout=0.3, api_retries=20).complete(MANY, make_params(), reported.__setitem__)
    assert results == expected_of(MANY)
    assert reported == dict(enumerate(results))
    assert sorted(server.answered) == list(range(21))  # no completion was generated twice
    assert len(server.bodies) > 30


def test_retry_after_delays_all_threads():
    def fault(number, body):
        if number == 2:
            return 429, {"Retry-After": "1"}, b""
        time.sleep(0.05)  # longer than the 429 takes to arrive

    with serving(fault) as server:
        results = api(server).complete(PROMPTS, make_params(request_batch_size=2))
    assert results == expected_of(PROMPTS)
    after = [at - server.at[2] for at in server.at[3:]]
    assert sum(pause < 0.99 for pause in after) <= 1  # only the request in flight may finish sooner


def test_completions_of_requests_in_flight_are_reported_on_failure(fast_backoff):
    """One request fails for good while others are in flight: their completions are not lost."""

    def fault(number, body):
        if body["seed"] == 2:
            return 500, {}, {"error": {"message": "down"}}
        time.sleep(0.3 if body["seed"] < 5 else 0)

    reported = {}
    with serving(fault) as server, pytest.raises(ApiError) as error:
        api(server).complete(MANY, make_params(request_batch_size=4), reported.__setitem__)
    assert str(error.value) == (
        f"{server.url}/completions: HTTP 500: down (3 attempts) "
        "(completions received so far are saved: run the same command to resume)"
    )
    assert sorted(reported) == sorted(server.answered)
    assert {0, 1, 3} <= reported.keys()
    assert len(server.answered) < 21


@pytest.mark.parametrize(
    ("reply", "settings", "message"),
    [
        (
            (401, {}, {"error": {"message": "bad key"}}),
            {},
            "HTTP 401: bad key (the API key is read from OPENAI_API_KEY",
        ),
        ((404, {}, b"nothing"), {}, "HTTP 404: nothing (no model 'scripted' on the server, or a"),
        ((400, {}, {"error": {"message": "context"}}), {}, "HTTP 400: context (if it is too long: set --api_context, "),
        ((308, {"Location": "http://other/v1"}, b""), {}, "(the server redirects: set --api_base to the new URL)"),
        ({"choices": []}, {"api_retries": 1}, 'no completion in the response {"choices": []} (2 attempts)'),
        (
            (429, {}, {"error": {"code": "insufficient_quota"}}),
            {},
            "HTTP 429: insufficient_quota (completions received",
        ),
    ],
)
def test_errors_include_a_hint(fast_backoff, reply, settings, message):
    with serving(lambda *_: reply) as server, pytest.raises(ApiError) as error:
        api(server, **settings).complete(PROMPTS, make_params())
    assert str(error.value).startswith(f"{server.url}/completions: ")
    assert message in str(error.value)
    assert len(server.bodies) <= 10


@pytest.mark.parametrize("retries", [0, 2, 3])
def test_all_failures_count_towards_api_retries(fast_backoff, retries):
    """Failures and malformed responses were counted separately: 8 retries allowed up to 81 requests."""
    with serving(lambda number, body: {"choices": []} if number % 2 else 500) as server:
        with pytest.raises(ApiError):
            api(server, api_retries=retries).complete(PROMPTS[:1], make_params())
        assert len(server.bodies) == retries + 1


def test_connection_refused():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        base = f"http://127.0.0.1:{probe.getsockname()[1]}/v1"
    arguments = EndpointArguments(api_base=base, api_model=MODEL)
    with pytest.raises(ApiError, match=f"{base}/models: no response .*refused.*; is --api_base {base} right?"):
        ApiGenerator(arguments)


def test_a_single_rejected_request_is_skipped(capsys):
    """A prompt against the server's content rules is rejected every time, and must not block the run."""
    with serving(lambda number, body: (400, {}, b"unsafe") if body["seed"] == 3 else None) as server:
        reported = {}
        results = api(server).complete(PROMPTS, make_params(request_batch_size=2), reported.__setitem__)
    assert results[3] == reported[3] == []
    assert results[:3] + results[4:] == expected_of(PROMPTS[:3] + PROMPTS[4:])
    assert (
        capsys.readouterr().out
        == f"the server rejected a request, which is skipped: {server.url}/completions: HTTP 400: unsafe\n"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"api_base": "http://x/v1"}, "--api_base and --api_model go together"),
        ({"api_timeout": 0}, "--api_timeout must be above 0"),
        ({"api_retries": -1}, "--api_retries must be at least 0"),
    ],
)
def test_invalid_endpoint_settings_are_rejected(settings, message):
    with pytest.raises(ValueError, match=message):
        EndpointArguments(**settings)


def test_beam_search_is_rejected():
    with serving() as server, pytest.raises(ValueError, match="--num_beams needs a local model"):
        api(server).complete(PROMPTS, make_params(num_beams=2))


def test_malformed_choices():
    good = {"text": "a\ud800b", "finish_reason": None}
    assert read_choices({"choices": [good]}, []) == [Completion("a?b", True)]  # UTF-8 cannot encode a lone surrogate
    assert read_choices({"choices": [{"message": {"content": None}}]}, []) == [Completion("", True)]
    for bad in ({}, {"choices": None}, {"choices": [good, {"message": {}}]}, {"choices": ["text"]}, {"choices": 3}):
        assert read_choices(bad, []) == []


def test_chat_py_serve_equals_the_local_generator(tokenizer):
    """The same model gives the same completions over HTTP and in this process."""
    model = running_server.make_model()
    prompts = [SeededPrompt(text, seed) for seed, (text, _) in enumerate(PROMPTS)]
    params = make_params(("the",), max_length=15, top_p=0.9, repetition_penalty=1.1)
    with running_server.serving(model) as server:
        generator = ApiGenerator(EndpointArguments(f"{server.url}/v1", running_server.NAME), tokenizer)
        assert generator.context == 256
        remote = generator.complete(prompts, params)
    local = LocalGenerator(model, tokenizer).complete(prompts, params)
    # the server drops bytes that are not valid UTF-8
    assert remote == [[item._replace(text=item.text.replace("\ufffd", ""))] for (item,) in local]
    assert {item.finished for (item,) in local} == {True, False}
