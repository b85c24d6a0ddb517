"""The server, asked over HTTP: by OpenAI's own client, by clients that leave, and by ones that mean no good."""

# ruff: noqa: E402  # the extras may be absent

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

for extra in ("fastapi", "uvicorn"):
    pytest.importorskip(extra, reason="the extra serve is not installed")
httpx = pytest.importorskip("httpx", reason="the extra test is not installed")
openai = pytest.importorskip("openai", reason="the extra test is not installed")

from minigpt.data.dataset import encode_segments
from minigpt.data.prompts import get_template
from minigpt.data.tokenizer import Tokenizer
from minigpt.inference.sampling import generate
from minigpt.inference.serve import run
from minigpt.inference.serve.answer import AnswerText
from minigpt.inference.serve.guard import MAX_BODY, Metrics

from .served import NAME, make_model, serving, wait_for

ROOT = Path(__file__).parents[2]
CHAT = "/v1/chat/completions"
CONTEXT = 256


@pytest.fixture(scope="module")
def model():
    return make_model(CONTEXT)


@pytest.fixture(scope="module")
def slow_model():
    """Twenty milliseconds a step: time enough to leave, to wait and to be turned away."""
    return make_model(CONTEXT, step_s=0.02)


@pytest.fixture(scope="module")
def server(model):
    with serving(model) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        yield client


def ask(content="Hi", **more):
    return {"messages": [{"role": "user", "content": content}], **more}


def post(server, body, path=CHAT, **more):
    return httpx.post(server.url + path, json=body, timeout=30, **more)


def events(lines):
    """The objects of server-sent events, up to [DONE]; a stream that was ended otherwise has an error as its last."""
    data = [line.removeprefix("data: ") for line in lines if line]
    assert all(one == "[DONE]" or one.startswith("{") for one in data)
    assert data[-1] == "[DONE]" or "error" in json.loads(data[-1])
    return [json.loads(one) for one in data if one != "[DONE]"]


def alone(model, messages, max_tokens, stop=()):
    """What the model answers when nobody else asks, by `generate`, and why it ended."""
    tokenizer, template = Tokenizer.tiny(), get_template("alpaca")
    prompt = list(encode_segments(template.render(messages, add_generation_prompt=True), tokenizer).ids)
    stops = [*template.stop_strings(), *stop]
    [ids] = generate(
        model, [prompt], max_new_tokens=max_tokens, eos_id=tokenizer.eot_id, stop=stops, tokenizer=tokenizer
    )
    text = tokenizer.decode([id for id in ids if id != tokenizer.eot_id])
    ends = [text.index(one) for one in stops if one in text]
    stopped = bool(ends) or ids[-1] == tokenizer.eot_id
    text = text[: min(ends, default=len(text))].replace("\ufffd", "").strip()
    return text, "stop" if stopped else "length", len(prompt), len(ids)


# ---- OpenAI's client


def test_32_clients_at_once_get_what_each_gets_alone(model, client):
    def one(number):
        messages = [{"role": "user", "content": f"Tell me of {number} " + "cats and dogs " * (number % 7)}]
        asked = {"model": NAME, "messages": messages, "max_completion_tokens": 5 + number}
        if number % 2:
            whole = client.chat.completions.create(**asked)
            text, reason, usage = whole.choices[0].message.content, whole.choices[0].finish_reason, whole.usage
        else:
            chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
            assert chunks[0].choices[0].delta.role == "assistant"
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
            reason, usage = chunks[-2].choices[0].finish_reason, chunks[-1].usage
            assert all(chunk.usage is None for chunk in chunks[:-1])
        expected = alone(model, messages, 5 + number)
        assert (text, reason, usage.prompt_tokens, usage.completion_tokens) == expected
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
        return reason

    with ThreadPoolExecutor(32) as pool:
        assert "length" in set(pool.map(one, range(32)))


def test_completions_of_texts_and_of_ids(model, client):
    tokenizer = Tokenizer.tiny()
    ids = tokenizer.encode("The capital of France")
    found = client.completions.create(model=NAME, prompt=["The capital of France", ""], max_tokens=8)
    expected = generate(model, [ids, [tokenizer.eot_id]], max_new_tokens=8, eos_id=tokenizer.eot_id)
    assert [choice.text for choice in found.choices] == [tokenizer.decode(row) for row in expected]
    assert [choice.index for choice in found.choices] == [0, 1]
    assert found.usage.prompt_tokens == len(ids) + 1
    for prompt in ("The capital of France", ids, [ids]):
        again = client.completions.create(model=NAME, prompt=prompt, max_tokens=8)
        assert again.choices[0].text == found.choices[0].text
    pieces = client.completions.create(model=NAME, prompt=ids, max_tokens=8, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == found.choices[0].text
    assert client.completions.create(model=NAME, prompt=ids).usage.completion_tokens == 16  # OpenAI's default


def test_several_choices_and_their_seeds(client):
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


def test_an_answer_sent_back_is_understood(client):
    messages = ask()["messages"]
    answer = client.chat.completions.create(model=NAME, messages=messages).choices[0].message
    again = [*messages, answer, {"role": "user", "content": [{"type": "text", "text": "And now?"}]}]
    assert client.chat.completions.create(model=NAME, messages=again).choices[0].message.role == "assistant"


def test_models_and_errors_as_the_client_knows_them(client):
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-4' here, but 'tiny'"):
        client.chat.completions.create(model="gpt-4", messages=ask()["messages"])
    with pytest.raises(openai.BadRequestError, match="tools: not supported here") as caught:
        client.chat.completions.create(model=NAME, messages=ask()["messages"], tools=[{"type": "function"}])
    assert (caught.value.param, caught.value.code) == ("tools", "unsupported_parameter")


# ---- text


def test_the_example_of_answer_text():
    tokenizer = Tokenizer.tiny()
    text = AnswerText(tokenizer, ["###"], trim=True)
    pieces = [text.feed(id, None) for id in tokenizer.encode(" Yes #")]
    assert [*pieces, text.feed(tokenizer.encode("!")[0], "length")] == ["Y", "es", "", "", " #!"]


def test_stop_strings_never_leak_whatever_the_borders_of_tokens():
    tokenizer, rng = Tokenizer.tiny(), random.Random(0)
    for _ in range(500):
        text = "".join(rng.choice(["a", "b", "ab", "# ", "##", "\n", " ", "日本", "🙂", "é"]) for _ in range(30))
        start = rng.randrange(len(text) - 6)
        stops = [text[start : start + rng.randint(1, 6)], "##\n#"]
        trim = rng.random() < 0.5
        ids = [*tokenizer.encode(text), tokenizer.eot_id]
        answer = AnswerText(tokenizer, stops, trim)
        pieces = []
        for place, id in enumerate(ids):
            decoded = tokenizer.decode(ids[: place + 1])
            over = any(stop in decoded for stop in stops)
            pieces.append(answer.feed(id, "stop" if over else None))
            if over:
                break
        expected = decoded[: min(decoded.index(stop) for stop in stops if stop in decoded)]
        assert "".join(pieces) == (expected.strip() if trim else expected)


def test_bytes_that_are_no_character_are_not_shown():
    tokenizer = Tokenizer.tiny()
    halves = [id for sign in "🙂日" for id in tokenizer.encode(sign)[:-1]]
    assert len(halves) > 2
    answer = AnswerText(tokenizer, [], trim=False)
    ids = [*tokenizer.encode("a"), *halves, *tokenizer.encode("b🙂")]
    assert "".join(answer.feed(id, None) for id in [*ids, halves[0]]) + answer.feed(halves[0], "length") == "ab🙂"


def test_a_request_s_stop_strings(model, server):
    messages = ask("Tell me")["messages"]
    text = alone(model, messages, 20)[0]
    stop = text[8:11]
    found = post(server, ask("Tell me", max_tokens=20, stop=stop)).json()["choices"][0]
    assert found["message"]["content"] == text[: text.index(stop)].strip()
    assert found["finish_reason"] == "stop"
    with httpx.stream("POST", server.url + CHAT, json=ask("Tell me", stop=[stop, "xyz"], stream=True)) as response:
        streamed = events(response.iter_lines())
    pieces = [event["choices"][0]["delta"].get("content", "") for event in streamed]
    assert "".join(pieces) == found["message"]["content"]


# ---- what is refused

BAD = [
    ({}, "messages: Field required"),
    (ask(temperature=-1), "temperature: Input should be greater than or equal to 0"),
    (ask(temperature="1"), "temperature: Input should be a valid number"),
    ({"messages": []}, "messages: List should have at least 1 item after validation, not 0"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role: Input should be 'system', 'developer', "),
    ({"messages": [{"role": "assistant", "content": "x"}]}, "turn 1 has the role 'assistant' where 'user' belongs"),
    ({"messages": [*ask()["messages"]] * 2}, "turn 2 has the role 'user' where 'assistant' belongs"),
    (ask(max_tokens=0), "max_tokens: Input should be greater than or equal to 1"),
    (ask(max_tokens=CONTEXT), "tokens of prompt and 256 of answer are more than the context of 256"),
    (ask("cat " * 500), "of answer are more than the context of 256"),
    (ask(logprobs=True), "logprobs: not supported here"),
    (ask(response_format={"type": "json_object"}), "response_format: not supported here"),
    (ask(frequency_penalty=0.5), "frequency_penalty: not supported here"),
    (ask(stop=["a", "b", "c", "d", "e"]), "stop: List should have at most 4 items"),
    (ask(stop=""), "stop: String should have at least 1 character"),
    (ask(n=17), "n: Input should be less than or equal to 16"),
    (ask(stream_options={"include_usage": True}), "stream_options goes with stream: true"),
    (ask(best=1), "unknown field best"),
]


@pytest.mark.parametrize(("body", "message"), BAD)
def test_what_is_refused_is_named(server, body, message):
    response = post(server, body)
    error = response.json()["error"]
    assert response.status_code == 400
    assert message in error["message"]
    assert "\n" not in error["message"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b'{"a": NaN}', b"\xff", b'{"messages": "\\ud800"}', b"[" * 100_000, b"9" * 9999]
)
def test_what_is_no_request_is_refused(server, body):
    response = httpx.post(server.url + CHAT, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["message"]


def test_neutral_values_of_what_is_not_here_pass(server):
    neutral = {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "logprobs": False, "tools": []}
    neutral |= {"response_format": {"type": "text"}, "tool_choice": "none", "store": False, "user": "me", "stop": None}
    assert post(server, ask(**neutral)).status_code == 200
    assert post(server, {"prompt": "Hi", "echo": False, "best_of": 1}, "/v1/completions").status_code == 200


def test_tokens_that_the_model_does_not_have(server):
    response = post(server, {"prompt": [[5, 10**9]]}, "/v1/completions")
    assert response.status_code == 400
    assert "token 1000000000 is not in the vocabulary" in response.json()["error"]["message"]


def test_a_body_too_large_is_refused_unread(server):
    assert post(server, ask("x" * MAX_BODY)).status_code == 413
    chunks = (b"x" * 65536 for _ in range(100))  # its length not said
    assert httpx.post(server.url + CHAT, content=chunks).status_code == 413
    assert httpx.get(server.url + "/health").json() == {"status": "ok"}


def test_an_unknown_path_and_method(server):
    assert httpx.get(server.url + "/v1/nothing").json()["error"]["type"] == "invalid_request_error"
    response = httpx.get(server.url + CHAT)
    assert (response.status_code, response.headers["allow"]) == (405, "POST")
    assert httpx.get(server.url + "/docs").status_code == 404  # it would load scripts from elsewhere


def test_pages_of_other_sites_are_refused(server):
    """By another name for this machine (DNS rebinding), or from another origin."""
    body = ask(max_tokens=1)
    assert post(server, body, headers={"Host": "evil.example"}).status_code == 403
    assert post(server, body, headers={"Origin": "http://evil.example"}).status_code == 403
    assert post(server, body, headers={"Origin": server.url}).status_code == 200
    response = httpx.post(server.url + CHAT, content=json.dumps(body), headers={"Content-Type": "text/plain"})
    assert response.status_code == 400  # what a form can send
    assert not [name for name in response.headers if name.startswith("access-control")]


def test_a_key_is_wanted(model):
    with serving(model, api_key="secret") as server:
        for path in ("/v1/models", "/metrics", "/v1/models/tiny"):
            assert httpx.get(server.url + path).status_code == 401
            assert httpx.get(server.url + path, headers={"Authorization": "Bearer wrong"}).status_code == 401
            assert httpx.get(server.url + path, headers={"Authorization": "Bearer secret"}).status_code == 200
        assert post(server, ask()).json()["error"]["code"] == "invalid_api_key"
        assert httpx.get(server.url + "/health").status_code == 200
        assert httpx.get(server.url + "/", headers={"Host": "chat.example"}).status_code == 200


# ---- a long conversation


def test_truncation_as_asked(server):
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


def test_a_model_of_plain_text_goes_on(model):
    tokenizer = Tokenizer.tiny()
    with serving(model, template="none") as server:
        found = post(server, ask("The capital of", max_tokens=6)).json()["choices"][0]["message"]["content"]
    [ids] = generate(model, [tokenizer.encode("The capital of")], max_new_tokens=6, eos_id=tokenizer.eot_id)
    assert found == tokenizer.decode([id for id in ids if id != tokenizer.eot_id])


# ---- load


def test_who_comes_too_late_is_sent_away(slow_model):
    with serving(slow_model, max_batch_size=1, max_queue=1) as server, ThreadPoolExecutor(2) as pool:
        under_way = [pool.submit(post, server, ask(max_tokens=20)) for _ in range(2)]
        wait_for(lambda: server.worker.rows == 2)
        response = post(server, ask())
        assert (response.status_code, response.headers["retry-after"]) == (429, "1")
        assert response.json()["error"]["type"] == "rate_limit_error"
        response = post(server, ask(n=3))
        assert (response.status_code, response.json()["error"]["param"]) == (400, "n")  # it never fits
        assert [one.result().status_code for one in under_way] == [200, 200]
        assert post(server, ask(max_tokens=1)).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_rows(slow_model, stream):
    with serving(slow_model, max_batch_size=2) as server:
        with pytest.raises(httpx.ReadTimeout), httpx.Client(timeout=httpx.Timeout(5, read=0.15)) as client:
            if stream:
                with client.stream("POST", server.url + CHAT, json=ask(max_tokens=200, n=3, stream=True)) as response:
                    for _ in response.iter_lines():
                        client.timeout = 5
                        raise httpx.ReadTimeout("enough")
            client.post(server.url + CHAT, json=ask(max_tokens=200, n=3))
        wait_for(lambda: server.worker.rows == 0, seconds=1.5)  # 200 steps take four seconds
        assert not server.worker._owners
        assert len(server.worker._decoder) == 0


def test_a_worker_that_breaks_is_said_to_everyone(model, capfd):
    """It hung them before: the thread was dead, and the requests waited for it."""
    broken = make_model(CONTEXT, step_s=0.01)
    with serving(broken, max_batch_size=2) as server, ThreadPoolExecutor(4) as pool:
        whole = [pool.submit(post, server, ask(max_tokens=150)) for _ in range(3)]
        with httpx.stream("POST", server.url + CHAT, json=ask(max_tokens=150, stream=True)) as response:
            lines = response.iter_lines()
            first = next(lines)  # the role; two of the four wait
            wait_for(lambda: server.worker.rows == 4)

            def fail(*_):
                raise RuntimeError("out of memory")

            broken.register_forward_pre_hook(fail)
            streamed = events([first, *lines])
        assert "the model failed" in streamed[-1]["error"]["message"]
        assert [one.result().status_code for one in whole] == [500] * 3
        health = httpx.get(server.url + "/health")
        assert (health.status_code, health.json()["error"]["type"]) == (503, "server_error")
        assert post(server, ask()).status_code == 503
        assert "minigpt_up 0\n" in httpx.get(server.url + "/metrics").text
    assert "error: the worker ended: RuntimeError: out of memory\n" in capfd.readouterr().err


def test_the_metrics_count(model):
    with serving(model) as server:
        usage = [post(server, ask(max_tokens=number)).json()["usage"] for number in (3, 4)]
        post(server, ask(temperature=-1))
        httpx.get(server.url + "/nowhere/" + "x" * 50)
        text = httpx.get(server.url + "/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert values['minigpt_requests_total{path="/v1/chat/completions",status="200"}'] == "2"
    assert values['minigpt_requests_total{path="/v1/chat/completions",status="400"}'] == "1"
    assert values['minigpt_requests_total{path="other",status="404"}'] == "1"
    assert values["minigpt_prompt_tokens_total"] == str(sum(one["prompt_tokens"] for one in usage))
    assert values["minigpt_completion_tokens_total"] == "7"
    assert values["minigpt_answer_seconds_count"] == values["minigpt_first_token_seconds_count"] == "2"
    assert (values["minigpt_rows_running"], values["minigpt_rows_waiting"], values["minigpt_up"]) == ("0", "0", "1")
    line = re.compile(r'minigpt_\w+(\{\w+="[^"]*"(,\w+="[^"]*")*\})? [-+.\de]+|# (HELP|TYPE) minigpt_\w+ .+')
    assert all(line.fullmatch(one) for one in text.splitlines())
    assert Metrics().text().count("# TYPE") == 8


# ---- the end


def test_answers_under_way_finish_when_the_server_is_asked_to_end(slow_model, capfd):
    with serving(slow_model) as server, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(post, server, ask(max_tokens=25))
        wait_for(lambda: server.worker.rows)
        server.should_exit = True
        assert answer.result().json()["usage"]["completion_tokens"] == 25
    assert "ending: 1 answer under way may take 15 seconds\nended\n" in capfd.readouterr().err


def test_answers_that_take_too_long_are_cut(slow_model, monkeypatch, capfd):
    monkeypatch.setattr(run, "GRACE_S", 0.3)
    with serving(slow_model) as server, ThreadPoolExecutor(1) as pool:
        whole = pool.submit(post, server, ask(max_tokens=200))
        with httpx.stream("POST", server.url + CHAT, json=ask(max_tokens=200, stream=True)) as response:
            wait_for(lambda: server.worker.rows == 2)
            server.should_exit = True
            assert "the server is ending" in events(response.iter_lines())[-1]["error"]["message"]
        assert whole.result().status_code == 500
    assert "2 answers are cut\nended\n" in capfd.readouterr().err


@contextmanager
def script(folder, *arguments, **environment):
    """chat.py --serve on a model of files: the process and its address."""
    model, tokenizer = make_model(CONTEXT), Tokenizer.tiny()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model", CONTEXT)
    get_template("hugchat").save_pretrained(folder / "model")
    command = [sys.executable, ROOT / "chat.py", "--model_name_or_path", "model", "--serve", "--port", "0", *arguments]
    env = {key: value for key, value in os.environ.items() if not key.startswith("MINIGPT_")}
    process = subprocess.Popen(command, cwd=folder, env=env | environment, stderr=subprocess.PIPE, text=True)
    try:
        said = process.stderr.readline() + process.stderr.readline()
        url = re.search(r"http://127\.0\.0\.1:\d+", said)
        assert url, said
        yield process, url[0]
    finally:
        process.kill()
        process.communicate()


def test_the_script_serves_and_ends_in_order(tmp_path):
    with script(tmp_path, "--max_new_tokens", "9", MINIGPT_API_KEY="of the environment") as (process, url):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="of the environment", max_retries=0)
        chunks = client.chat.completions.create(model="model", messages=ask()["messages"], stream=True)
        next(chunks)
        process.send_signal(signal.SIGTERM)
        assert list(chunks)[-1].choices[0].finish_reason == "length"
        assert process.wait(timeout=30) == -signal.SIGTERM
        assert process.stderr.read().endswith("ended\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0 lets other machines in: it needs --api_key or MINIGPT_API_KEY"),
        (["--port", "70000"], "--port must be between 0 and 65535, got 70000"),
        (["--prompt", "Hi"], "--serve and --prompt are two ways to ask: give one"),
        (["--api_key", "schlüssel"], "--api_key must be of printable ASCII characters, because it travels in a header"),
    ],
)
def test_what_the_script_refuses(arguments, message):
    command = [sys.executable, ROOT / "chat.py", "--serve", "--model_name_or_path", "nowhere", *arguments]
    env = {key: value for key, value in os.environ.items() if key != "MINIGPT_API_KEY"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=env)
    assert (done.returncode, done.stderr) == (2, f"error: {message}\n")


def test_the_script_names_the_extra_that_is_absent():
    code = (
        "import runpy, sys; sys.modules['uvicorn'] = None;"
        "sys.argv = ['chat.py', '--serve', '--model_name_or_path', 'x'];"
        "runpy.run_path('chat.py', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (
        1,
        "error: --serve needs uvicorn (pip install -c constraints.txt -e '.[serve]')\n",
    )


def test_a_port_in_use_is_named(model, server):
    port = int(server.url.rpartition(":")[2])
    with (
        pytest.raises(OSError, match=f"--host 127.0.0.1 --port {port}: Address already in use"),
        serving(model, port=port),
    ):
        pass


# ---- what nobody thought of


def fuzz(server, examples):
    """Requests made from the OpenAPI document, valid and not, each answered as the document says; their number."""
    schemathesis = pytest.importorskip("schemathesis", reason="the extra test is not installed")
    from hypothesis import HealthCheck, given, settings
    from hypothesis.errors import Unsatisfiable
    from schemathesis.specs.openapi.checks import positive_data_acceptance

    document = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    statuses = []
    for operation in document.get_all_operations():
        for mode in schemathesis.GenerationMode:

            @settings(
                max_examples=examples,
                deadline=None,
                derandomize=True,
                database=None,
                suppress_health_check=list(HealthCheck),
            )
            @given(case=operation.ok().as_strategy(generation_mode=mode))
            def ask(case):
                response = case.call(timeout=30)
                statuses.append(response.status_code)
                # no schema says that turns alternate, or how long a context is
                case.validate_response(response, excluded_checks=[positive_data_acceptance])

            with suppress(Unsatisfiable):  # without a body or parameters there is nothing to get wrong
                ask()
    return Counter(statuses)


def soak(server, requests, seed=0):
    """Clients that ask, stream, wait or leave, 16 at a time; what became of each."""
    rng = random.Random(seed)
    plans = [(rng.choice(["whole", "stream", "leave", "leave", "hurry"]), rng.randint(1, 60)) for _ in range(requests)]

    def one(plan):
        kind, tokens = plan
        body = ask("word " * (tokens % 9), max_tokens=tokens, temperature=1.0, n=1 + tokens % 2)
        try:
            if kind in ("whole", "hurry"):
                timeout = 30 if kind == "whole" else 0.02
                return httpx.post(server.url + CHAT, json=body, timeout=timeout).status_code
            with httpx.stream("POST", server.url + CHAT, json={**body, "stream": True}, timeout=30) as response:
                for number, _ in enumerate(response.iter_lines()):
                    if kind == "leave" and number > tokens // 2:
                        return "left"
                return response.status_code
        except httpx.TimeoutException:
            return "left"

    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(one, plans))
    wait_for(lambda: server.worker.rows == 0 and not server.worker._inbox)
    assert not server.worker._owners
    return Counter(found)


def test_no_request_breaks_the_server(server):
    statuses = fuzz(server, examples=8)
    assert statuses.keys() <= {200, 400, 404, 405}
    assert min(statuses[200], statuses[400]) > 5


@pytest.mark.slow
def test_clients_that_leave_at_random_leave_nothing_behind(model):
    with serving(model, max_batch_size=8) as server:
        found = soak(server, 100)
        assert found.keys() <= {200, "left"}
        assert found["left"] > 10
        threads = threading.active_count()
        soak(server, 50, seed=1)
        assert threading.active_count() <= threads + 2
