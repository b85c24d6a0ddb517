"""Generators: the local model, alone and on several ranks, and a server in every mood."""

import socket
import time

import pytest

from minigpt.data.tokenizer import Tokenizer
from minigpt.distributed import is_main
from minigpt.inference.api import ApiError
from minigpt.selfinstruct import endpoint as endpoint_module
from minigpt.selfinstruct.endpoint import KEY, ApiGenerator, EndpointArguments, read_choices
from minigpt.selfinstruct.generators import (
    Completion,
    GeneratorArguments,
    How,
    LocalGenerator,
    Ranks,
    cut,
    fit_shots,
)
from minigpt.selfinstruct.request import TaskFormat
from minigpt.selfinstruct.tasks import Task

from ..inference import served
from ..ranks import on_ranks
from .endpoint import MODEL, Reply, serving
from .writers import Scripted, babbler, plausible

PROMPTS = [f"{'###' * n}\n{n}. Instruction:" for n in range(1, 8)]
SEEDS = [10, 7, 99, 3, 2**63 - 1, 0, 5]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.tiny()


@pytest.fixture(scope="module")
def model(tokenizer):
    return babbler(tokenizer)


def local(model, tokenizer, stop=(), **settings):
    return LocalGenerator(model, tokenizer, How(GeneratorArguments(**{"max_length": 20, **settings}), stop))


# ---- the local model


def test_the_worked_example_of_cut():
    assert cut("4 apples\n###\n10. Instr", False, ["\n###\n10."]) == Completion(text="4 apples", finished=True)
    assert cut("a b c", False, ["c", "b"]) == ("a ", True)
    assert cut("a b c", False, ["d"]) == ("a b c", False)


def test_a_completion_depends_on_its_seed_alone(model, tokenizer):
    """So that a round cut to other batches, or dealt to ranks, comes to the same."""
    together = local(model, tokenizer, request_batch_size=3).complete(PROMPTS, SEEDS)
    alone = [local(model, tokenizer).complete([p], [s])[0] for p, s in zip(PROMPTS, SEEDS, strict=True)]
    assert together == alone
    assert len({completions[0].text for completions in together}) == len(PROMPTS)


def test_how_completions_end(model, tokenizer):
    """With end-of-text, which is no part of them; with a stop string, which is cut off; or for lack of room."""
    free = local(model, tokenizer, max_length=12).complete(PROMPTS, SEEDS)
    finished = [completion for (completion,) in free if completion.finished]
    unfinished = [completion for (completion,) in free if not completion.finished]
    assert finished and unfinished
    for completion in finished:
        assert len(tokenizer.encode(completion.text)) < 12
        assert "<|endoftext|>" not in completion.text
    stopped = local(model, tokenizer, ("\nOutput:",), max_length=60).complete(PROMPTS, SEEDS)
    whole = local(model, tokenizer, max_length=60).complete(PROMPTS, SEEDS)
    assert any("\nOutput:" in completion.text for (completion,) in whole)
    for (short,), (long,) in zip(stopped, whole, strict=True):
        assert short == (long.text.partition("\nOutput:")[0], True) if "\nOutput:" in long.text else long


def test_several_completions_of_a_prompt(model, tokenizer):
    several = local(model, tokenizer, num_return_sequences=3).complete(PROMPTS[:2], SEEDS[:2])
    assert [len(completions) for completions in several] == [3, 3]
    assert len({completion.text for completions in several for completion in completions}) == 6
    one = local(model, tokenizer).complete(PROMPTS[:2], SEEDS[:2])
    assert [completions[0] for completions in several] == [completions[0] for completions in one]


def test_beams_draw_nothing(model, tokenizer):
    generator = local(model, tokenizer, num_beams=3, num_return_sequences=2)
    assert generator.how.settings.temperature == 0
    assert generator.complete(PROMPTS[:2], [1, 2]) == generator.complete(PROMPTS[:2], [3, 4])


def test_another_way_to_complete(model, tokenizer):
    generator = local(model, tokenizer)
    greedy = How(GeneratorArguments(max_length=3, temperature=0.0))
    (first,), (second,) = generator.complete([PROMPTS[0]] * 2, [1, 2], how=greedy)
    assert first == second
    assert len(tokenizer.encode(first.text)) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 2, "temperature": 0.5}, "--num_beams 2 searches"),
        ({"num_beams": 2, "num_return_sequences": 3}, "--num_return_sequences 3 is more than"),
        ({"temperature": 0.0, "num_return_sequences": 2}, "would be alike"),
        ({"stop_words": ["a", ""]}, "--stop_words: an empty string"),
        ({"max_length": 0}, "--max_length must be at least 1"),
        ({"request_batch_size": 0}, "--request_batch_size must be at least 1"),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        GeneratorArguments(**settings)


def test_fewer_shots_where_the_context_is_short():
    """Words count as tokens here; every prompt is as long as its budget allows, and one more would not fit."""
    tasks = [Task(f"Say the number {n} in three languages.", "", "x " * n) for n in range(1, 9)]
    render = TaskFormat().render
    for context in range(60, 300, 7):
        found = fit_shots(Scripted(context=context), render, tasks, 20)
        lengths = [len(render(tasks[:count]).split()) for count in range(1, 9)]
        expected = max((count for count, length in enumerate(lengths, 1) if length + 20 <= context), default=0)
        assert found == ((tasks[:expected], render(tasks[:expected])) if expected else None)


# ---- several ranks


def test_two_ranks_complete_what_one_does(model, tokenizer):
    expected = local(model, tokenizer).complete(PROMPTS, SEEDS)
    short = How(GeneratorArguments(max_length=3))
    first, second = on_ranks(2, _on_a_rank, model, tokenizer, short)
    assert second is None
    assert first == [expected, local(model, tokenizer).complete(PROMPTS[:1], SEEDS[:1], how=short)]


def _on_a_rank(model, tokenizer, short):
    generator = Ranks(local(model, tokenizer))
    if not is_main():
        return generator.help()
    found = [
        generator.complete(PROMPTS, SEEDS),
        generator.complete(PROMPTS[:1], SEEDS[:1], how=short),  # nothing is left for rank 1
    ]
    generator.close()
    return found


def test_a_rank_that_fails_ends_all(model, tokenizer):
    assert on_ranks(2, _a_rank_fails, model, tokenizer) == ["ValueError", "OtherRankFailed"]


def _a_rank_fails(model, tokenizer):
    generator = Ranks(local(model, tokenizer))
    try:
        generator.complete(["", "a"], [1, 2]) if is_main() else generator.help()
    except (ValueError, RuntimeError) as error:
        return type(error).__name__


# ---- a server


def api(server, settings=None, stop=(), tokenizer=None, **endpoint):
    arguments = EndpointArguments(**{"api_base": server.base, "api_model": MODEL, "api_retries": 2, **endpoint})
    return ApiGenerator(arguments, How(settings or GeneratorArguments(), stop), tokenizer)


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv(KEY, raising=False)


@pytest.fixture
def quick(monkeypatch):
    """Pauses that a server does not ask for take a hundredth of their time."""
    real = endpoint_module.ApiGenerator._back_off
    monkeypatch.setattr(endpoint_module.ApiGenerator, "_back_off", lambda self, seconds: real(self, seconds / 100))


def expected_of(prompts, seeds, n=1):
    return [[plausible(p, s % 2**31 + place) for place in range(n)] for p, s in zip(prompts, seeds, strict=True)]


def test_what_a_server_is_asked(monkeypatch):
    monkeypatch.setenv(KEY, "sk-secret\n")
    settings = GeneratorArguments(temperature=0.7, top_p=0.9, max_length=99, num_return_sequences=2)
    with serving() as server:
        generator = api(server, settings, stop=("@1", "@2", "@3", "@4", "@5"))
        assert generator.complete(["7. Instruction:"], [2**40 + 5]) == expected_of(["7. Instruction:"], [5], 2)
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
        assert server.keys == ["Bearer sk-secret"] * 2
        chat = api(server, GeneratorArguments(repetition_penalty=1.2), api_chat=True)
        assert chat.complete(["7. Instruction:"], [5]) == expected_of(["7. Instruction:"], [5])
    assert server.paths[-1] == "/v1/chat/completions"
    assert server.bodies[-1]["messages"] == [{"role": "user", "content": "7. Instruction:"}]
    assert server.bodies[-1]["repetition_penalty"] == 1.2
    assert "prompt" not in server.bodies[-1]


def test_the_context_and_the_count(tokenizer):
    with serving() as server:
        assert api(server).context == 4096
        server.context = 777
        assert api(server).context == 777
        assert api(server, api_context=55).context == 55
        assert api(server).count("über") == 3  # five bytes
        assert api(server, tokenizer=tokenizer).count("über") == len(tokenizer.encode("über"))


def test_requests_run_side_by_side_as_many_as_are_wanted():
    prompts, seeds = PROMPTS * 3, list(range(21))
    with serving(lambda number, body: time.sleep(0.02)) as server:
        found = api(server, GeneratorArguments(request_batch_size=3)).complete(prompts, seeds)
    assert found == expected_of(prompts, seeds)
    assert server.most_at_once == 3


def test_a_moody_server_loses_nothing(quick):
    """Every second request meets a time-out, 429, 500, half an answer, nonsense, or a closed door."""
    moods = [
        lambda: Reply(429, {"error": {"message": "slow down"}}),
        lambda: Reply(500, b"oops"),
        lambda: Reply(503, b""),
        lambda: Reply(200, b"<html>gateway</html>"),
        lambda: Reply(200, b'{"choices": [{"text": "half'),
        lambda: Reply(200, {"choices": []}),
        lambda: Reply(200, {"choices": [{"text": 5}]}),
        lambda: Reply(200, ["no object"]),
        lambda: Reply(200, {"choices": [{}]}, after=0.6),
        lambda: (_ for _ in ()).throw(ConnectionError),
    ]

    def mood(number, body):
        return moods[number // 2 % len(moods)]() if number % 2 else None

    prompts, seeds = PROMPTS * 3, list(range(21))
    arrived = {}
    with serving(mood) as server:
        generator = api(server, api_timeout=0.3, api_retries=20)
        found = generator.complete(prompts, seeds, arrived.__setitem__)
    assert found == expected_of(prompts, seeds)
    assert arrived == dict(enumerate(found))
    assert sorted(server.answered) == seeds  # nothing was paid for twice
    assert len(server.bodies) > 30


def test_a_pause_that_is_asked_for_holds_for_all():
    with serving(lambda number, body: Reply(429, {}, Retry_After="1") if number == 2 else None) as server:
        found = api(server, GeneratorArguments(request_batch_size=2)).complete(PROMPTS, SEEDS)
    assert found == expected_of(PROMPTS, SEEDS)
    after = [at - server.at[2] for at in server.at[3:]]
    assert sum(pause < 0.99 for pause in after) <= 1  # the one that was under way may have been answered, no more


def test_what_is_under_way_is_kept_when_the_run_must_end(quick):
    """One request is refused for good while others are being answered: those were paid for."""

    def mood(number, body):
        if body["seed"] == 2:
            return Reply(500, {"error": {"message": "down"}})
        time.sleep(0.3 if body["seed"] < 5 else 0)

    arrived = {}
    with serving(mood) as server, pytest.raises(ApiError) as error:
        api(server, GeneratorArguments(request_batch_size=4)).complete(
            PROMPTS * 3, list(range(21)), arrived.__setitem__
        )
    assert str(error.value) == (
        f"{server.base}/completions: HTTP 500: down (3 attempts) (what has arrived is kept: the same command goes on)"
    )
    assert sorted(arrived) == sorted(server.answered)
    assert {0, 1, 3} <= arrived.keys()
    assert len(server.answered) < 21


@pytest.mark.parametrize(
    ("reply", "settings", "message"),
    [
        ((401, {"error": {"message": "bad key"}}), {}, "HTTP 401: bad key (the key is OPENAI_API_KEY of the environ"),
        ((404, b"nothing"), {}, "HTTP 404: nothing (no model 'scripted' there, or no such path: --api_model, --api_ba"),
        ((400, {"error": {"message": "context"}}), {}, "HTTP 400: context (where it is too long: --api_context, --tok"),
        ((308, b"", "http://other/v1"), {}, "(it sends elsewhere: give --api_base that address)"),
        ((200, {"choices": []}), {"api_retries": 1}, 'no completion in the answer {"choices": []} (2 attempts)'),
        ((429, {"error": {"code": "insufficient_quota"}}), {}, "HTTP 429: insufficient_quota (what has arrived is"),
    ],
)
def test_refusals_say_what_to_do(quick, reply, settings, message):
    status, body, *location = reply
    with (
        serving(lambda *_: Reply(status, body, **({"Location": location[0]} if location else {}))) as server,
        pytest.raises(ApiError) as error,
    ):
        api(server, **settings).complete(PROMPTS, SEEDS)
    assert str(error.value).startswith(f"{server.base}/completions: ")
    assert message in str(error.value)
    assert len(server.bodies) <= 10


def test_nobody_at_the_address():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        base = f"http://127.0.0.1:{probe.getsockname()[1]}/v1"
    arguments = EndpointArguments(api_base=base, api_model=MODEL)
    with pytest.raises(ApiError, match=f"{base}/models: no answer .*refused.*; is --api_base {base} right?"):
        ApiGenerator(arguments, How(GeneratorArguments()))


def test_one_request_that_is_refused_is_passed_over(capsys):
    """A prompt against the server's rules would be refused for ever, and the run with it."""
    with serving(lambda number, body: Reply(400, b"unsafe") if body["seed"] == 3 else None) as server:
        arrived = {}
        found = api(server, GeneratorArguments(request_batch_size=2)).complete(PROMPTS, SEEDS, arrived.__setitem__)
    assert found[3] == arrived[3] == []
    assert found[:3] + found[4:] == expected_of(PROMPTS[:3] + PROMPTS[4:], SEEDS[:3] + SEEDS[4:])
    assert (
        capsys.readouterr().out
        == f"a request is refused, and passed over: {server.base}/completions: HTTP 400: unsafe\n"
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
    with pytest.raises(ValueError, match="--num_beams needs a local model"):
        ApiGenerator(EndpointArguments("http://127.0.0.1:1/v1", "m"), How(GeneratorArguments(num_beams=2)))


def test_choices_that_are_none():
    good = {"text": "a\ud800b", "finish_reason": None}
    assert read_choices({"choices": [good]}, []) == [Completion("a?b", True)]  # no file can hold half a pair
    assert read_choices({"choices": [{"message": {"content": None}}]}, []) == [Completion("", True)]
    for bad in ({}, {"choices": None}, {"choices": [good, {"message": {}}]}, {"choices": ["text"]}, {"choices": 3}):
        assert read_choices(bad, []) == []


def test_our_own_server_gives_what_the_model_gives(tokenizer):
    """chat.py --serve, asked over HTTP, completes as the model in this process does."""
    model = served.make_model()
    settings = GeneratorArguments(max_length=15, top_p=0.9, repetition_penalty=1.1)
    with served.serving(model) as server:
        arguments = EndpointArguments(api_base=f"{server.url}/v1", api_model=served.NAME)
        generator = ApiGenerator(arguments, How(settings, ("the",)), tokenizer)
        assert generator.context == 256
        there = generator.complete(PROMPTS, list(range(7)))
    here = LocalGenerator(model, tokenizer, How(settings, ("the",))).complete(PROMPTS, list(range(7)))
    # the server leaves out bytes that are no characters
    assert there == [[one._replace(text=one.text.replace("\ufffd", ""))] for (one,) in here]
    assert {one.finished for (one,) in here} == {True, False}
