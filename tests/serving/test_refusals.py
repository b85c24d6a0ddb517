"""What the server refuses: requests that make no sense, bodies that are none, and who may not ask."""

# ruff: noqa: E402  # the extras may be absent

import json
from collections import Counter
from contextlib import suppress

import pytest

for extra in ("fastapi", "uvicorn", "httpx"):
    pytest.importorskip(extra, reason="the extras serve and test are not installed")
import httpx

from minigpt.serving.guard import MAX_BODY

from .served import CHAT, ask, post, serving

CONTEXT = 256
BAD = [
    ({}, "messages: Field required"),
    (ask(temperature=-1), "temperature: Input should be greater than or equal to 0"),
    (ask(temperature="1"), "temperature: Input should be a valid number"),
    ({"messages": []}, "messages: List should have at least 1 item after validation, not 0"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role: Input should be 'system', 'developer', "),
    ({"messages": [{"role": "assistant", "content": "x"}]}, "turn 1 has the role 'assistant', expected 'user'"),
    ({"messages": [*ask()["messages"]] * 2}, "turn 2 has the role 'user', expected 'assistant'"),
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


NO_REQUESTS = {
    b"": "the body: Field required (a JSON object is wanted, as application/json)",
    b"{": "the body is not JSON: Expecting property name enclosed in double quotes at character 1",
    b"[]": "the body: Input should be a valid dictionary",
    b"null": "the body",
    b'{"a": NaN}': "messages: Field required",
    b'{"messages": "\\ud800"}': "messages: Input should be a valid list",
    b'{"a": "\xff"}': "the body is not UTF-8 text (byte 7), so not JSON",
    b"[" * 100_000: "the body is nested too deeply",
    b"9" * 9999: "the body holds a number of too many digits",
}


@pytest.mark.parametrize("body", NO_REQUESTS, ids=lambda body: str(body[:12]))
def test_what_is_no_request_is_refused(server, body):
    """What was no text, or nested too deeply, was told to be "an error parsing the body"."""
    response = httpx.post(server.url + CHAT, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"].keys() == {"message", "type", "param", "code"}
    assert response.json()["error"]["message"].startswith(NO_REQUESTS[body])


@pytest.mark.parametrize("field", ["messages", "metadata", "stop", "logit_bias"])
def test_what_is_nested_as_deeply_as_json_reads_it_breaks_nothing(server, field):
    deep = json.loads('{"a":' * 900 + "1" + "}" * 900)
    assert post(server, {**ask(max_tokens=1), field: deep}).status_code == (200 if field == "metadata" else 400)


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


def test_a_key_is_wanted(served_model):
    with serving(served_model, api_key="secret") as server:
        for path in ("/v1/models", "/metrics", "/v1/models/tiny"):
            assert httpx.get(server.url + path).status_code == 401
            assert httpx.get(server.url + path, headers={"Authorization": "Bearer wrong"}).status_code == 401
            assert httpx.get(server.url + path, headers={"Authorization": "Bearer secret"}).status_code == 200
        assert post(server, ask()).json()["error"]["code"] == "invalid_api_key"
        assert httpx.get(server.url + "/health").status_code == 200
        assert httpx.get(server.url + "/", headers={"Host": "chat.example"}).status_code == 200


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


def test_no_request_breaks_the_server(server):
    statuses = fuzz(server, examples=8)
    assert statuses.keys() <= {200, 400, 404, 405}
    assert min(statuses[200], statuses[400]) > 5
