"""Requests that the server refuses: invalid fields, unreadable bodies, wrong hosts, origins and keys."""

# ruff: noqa: E402  # the extras may not be installed

import json
from collections import Counter
from contextlib import suppress

import pytest

for extra in ("fastapi", "uvicorn", "httpx"):
    pytest.importorskip(extra, reason="the extras serve and test are not installed")
import httpx

from minigpt.serving.guard import MAX_BODY

from .running_server import CHAT, ask, post, serving

CONTEXT = 256
INVALID = [
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
    (ask(logprobs=True), "logprobs: not supported"),
    (ask(response_format={"type": "json_object"}), "response_format: not supported"),
    (ask(frequency_penalty=0.5), "frequency_penalty: not supported"),
    (ask(stop=["a", "b", "c", "d", "e"]), "stop: List should have at most 4 items"),
    (ask(stop=""), "stop: String should have at least 1 character"),
    (ask(n=17), "n: Input should be less than or equal to 16"),
    (ask(stream_options={"include_usage": True}), "stream_options needs stream: true"),
    (ask(best=1), "unknown field best"),
]


@pytest.mark.parametrize(("body", "message"), INVALID)
def test_errors_name_the_field(server, body, message):
    response = post(server, body)
    error = response.json()["error"]
    assert response.status_code == 400
    assert message in error["message"]
    assert "\n" not in error["message"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"


UNREADABLE = {
    b"": "the body: Field required (expected a JSON object, sent as application/json)",
    b"{": "the body is not JSON: Expecting property name enclosed in double quotes at character 1",
    b"[]": "the body: Input should be a valid dictionary",
    b"null": "the body",
    b'{"a": NaN}': "messages: Field required",
    b'{"messages": "\\ud800"}': "messages: Input should be a valid list",
    b'{"a": "\xff"}': "the body is not UTF-8 text (byte 7), so not JSON",
    b"[" * 100_000: "the body is nested too deeply",
    b"9" * 9999: "the body contains a number with too many digits",
}


@pytest.mark.parametrize("body", UNREADABLE, ids=lambda body: str(body[:12]))
def test_unreadable_bodies_are_refused(server, body):
    """Regression: for invalid UTF-8 and deep nesting, the message was only "an error parsing the body"."""
    response = httpx.post(server.url + CHAT, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"].keys() == {"message", "type", "param", "code"}
    assert response.json()["error"]["message"].startswith(UNREADABLE[body])


@pytest.mark.parametrize("field", ["messages", "metadata", "stop", "logit_bias"])
def test_deep_nesting_that_json_can_read(server, field):
    deep = json.loads('{"a":' * 900 + "1" + "}" * 900)
    assert post(server, {**ask(max_tokens=1), field: deep}).status_code == (200 if field == "metadata" else 400)


def test_token_ids_outside_the_vocabulary(server):
    response = post(server, {"prompt": [[5, 10**9]]}, "/v1/completions")
    assert response.status_code == 400
    assert "token 1000000000 is not in the vocabulary" in response.json()["error"]["message"]


def test_a_body_that_is_too_large_is_refused(server):
    assert post(server, ask("x" * MAX_BODY)).status_code == 413
    chunks = (b"x" * 65536 for _ in range(100))  # chunked, without a Content-Length
    assert httpx.post(server.url + CHAT, content=chunks).status_code == 413
    assert httpx.get(server.url + "/health").json() == {"status": "ok"}


def test_an_unknown_path_and_method(server):
    assert httpx.get(server.url + "/v1/nothing").json()["error"]["type"] == "invalid_request_error"
    response = httpx.get(server.url + CHAT)
    assert (response.status_code, response.headers["allow"]) == (405, "POST")
    assert httpx.get(server.url + "/docs").status_code == 404  # it would load scripts from another site


def test_pages_of_other_sites_are_refused(server):
    """Another host name for this machine (DNS rebinding), or another origin."""
    body = ask(max_tokens=1)
    assert post(server, body, headers={"Host": "evil.example"}).status_code == 403
    assert post(server, body, headers={"Origin": "http://evil.example"}).status_code == 403
    assert post(server, body, headers={"Origin": server.url}).status_code == 200
    response = httpx.post(server.url + CHAT, content=json.dumps(body), headers={"Content-Type": "text/plain"})
    assert response.status_code == 400  # a content type that a form can send
    assert not [name for name in response.headers if name.startswith("access-control")]


def test_api_key(served_model):
    with serving(served_model, api_key="secret") as server:
        for path in ("/v1/models", "/metrics", "/v1/models/tiny"):
            assert httpx.get(server.url + path).status_code == 401
            assert httpx.get(server.url + path, headers={"Authorization": "Bearer wrong"}).status_code == 401
            assert httpx.get(server.url + path, headers={"Authorization": "Bearer secret"}).status_code == 200
        assert post(server, ask()).json()["error"]["code"] == "invalid_api_key"
        assert httpx.get(server.url + "/health").status_code == 200
        assert httpx.get(server.url + "/", headers={"Host": "chat.example"}).status_code == 200


# ---- fuzzing


def fuzz(server, examples):
    """Sends valid and invalid requests generated from the OpenAPI document, and checks the responses; counts the
    statuses."""
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
                # the schema cannot say that roles alternate, or how long the context is
                case.validate_response(response, excluded_checks=[positive_data_acceptance])

            with suppress(Unsatisfiable):  # an operation without body and parameters has no invalid requests
                ask()
    return Counter(statuses)


def test_fuzzed_requests_cause_no_server_error(server):
    statuses = fuzz(server, examples=8)
    assert statuses.keys() <= {200, 400, 404, 405}
    assert min(statuses[200], statuses[400]) > 5
