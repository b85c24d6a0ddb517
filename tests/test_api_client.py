"""The API client against a scripted local server that is slow, busy, broken or refuses."""

import re
import signal
import socket
import subprocess
import sys
import threading
import time
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler

import pytest

from minigpt.api_client import ApiError, api_url, post_json, side_by_side
from minigpt.version import __version__

from .scripted_endpoint import Endpoint, Reply, in_turn, serve


def post(script, key: str | None = None, **settings) -> tuple[dict, list[float], Endpoint]:
    """The response, the pauses between attempts, and the server with the requests it received."""
    pauses: list[float] = []
    with serve(script) as server:
        answer = post_json(api_url(server.url, "x"), {"a": "é"}, key, sleep=pauses.append, **settings)
    return answer, pauses, server


def test_request_and_response():
    answer, pauses, server = post(in_turn({"b": "日"}), key=" sk-1\n")
    assert (answer, pauses) == ({"b": "日"}, [])
    assert (server.paths, server.bodies) == (["/v1/x"], [{"a": "é"}])
    assert server.headers[0]["Content-Type"] == "application/json"
    assert server.headers[0]["Authorization"] == "Bearer sk-1"
    assert server.headers[0]["User-Agent"] == f"minigpt/{__version__}"
    assert "Authorization" not in post(in_turn({}))[2].headers[0]


def test_urls():
    assert api_url("http://a:1/v1", "x/y") == api_url("http://a:1/v1/", "x/y") == "http://a:1/v1/x/y"
    for wrong in ("", "localhost:8000/v1", "file:///etc/passwd", "ftp://a/v1", "http://"):
        with pytest.raises(ValueError, match=re.escape(f"{wrong!r} is not a server URL")):
            api_url(wrong, "x")


def hang_up(handler: BaseHTTPRequestHandler) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)


def truncated_response(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "100")
    handler.end_headers()
    handler.wfile.write(b'{"a": ')


def no_response(handler: BaseHTTPRequestHandler) -> None:
    time.sleep(1)


TRANSIENT = {
    "busy": 429,
    "broken": 500,
    "overloaded": 529,
    "HTML error page of a gateway": (502, {"Content-Type": "text/html"}, b"<html>Bad Gateway</html>"),
    "request timeout": 408,
    "not JSON": b"<html>Welcome to the hotel's network</html>",
    "not UTF-8": b"\xff\xfe\x00",
    "not an object": b"[1, 2]",
    "empty": b"",
    "connection closed": hang_up,
    "truncated": truncated_response,
    "timeout": no_response,
}


@pytest.mark.parametrize("name", TRANSIENT)
def test_transient_errors_are_retried(name):
    answer, pauses, server = post(in_turn(TRANSIENT[name], TRANSIENT[name], {"b": 1}), timeout=0.1)
    assert answer == {"b": 1}
    assert len(server.bodies) == 3
    assert 0.5 <= pauses[0] <= 1 <= pauses[1] <= 2


LAST = {
    "busy": (429, r"HTTP 429: Too Many Requests \(3 attempts\)"),
    "HTML error page of a gateway": (502, r"HTTP 502: <html>Bad Gateway</html> \(3 attempts\)"),
    "not JSON": (None, r"the response is not JSON \(3 attempts\)"),
    "not an object": (None, r"the response is not a JSON object \(3 attempts\)"),
    "truncated": (None, r"no answer \(IncompleteRead.*\) \(3 attempts\)"),
    "timeout": (None, r"no answer within 0.1 s \(3 attempts\)"),
}


@pytest.mark.parametrize("name", LAST)
def test_the_error_is_that_of_the_last_attempt(name):
    status, message = LAST[name]
    with pytest.raises(ApiError, match=rf"^http://127.0.0.1:\d+/v1/x: {message}$") as caught:
        post(in_turn(TRANSIENT[name]), timeout=0.1, attempts=3)
    assert caught.value.status == status
    assert "\n" not in str(caught.value)


def test_connection_refused():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/x"
    with pytest.raises(ApiError, match=r"no answer \(.*[Cc]onnection refused\) \(2 attempts\)"):
        post_json(url, {}, attempts=2, sleep=lambda _: None)


def test_first_request_does_not_retry_a_refused_connection():
    """A server that is busy or closes the connection is retried all the same."""

    def no_pause(seconds: float) -> None:
        raise AssertionError(f"slept for {seconds} s")

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/x"
    with pytest.raises(ApiError, match=r"no answer \(.*[Cc]onnection refused\)$"):
        post_json(url, {}, first=True, sleep=no_pause)
    for transient in (503, hang_up):
        answer, pauses, _ = post(in_turn(transient, transient, {"b": 1}), first=True)
        assert (answer, len(pauses)) == ({"b": 1}, 2)


def test_backoff_doubles_up_to_a_maximum():
    pauses: list[float] = []
    with serve(in_turn(503)) as server, pytest.raises(ApiError, match="10 attempts"):
        post_json(server.url, {}, attempts=10, sleep=pauses.append)
    assert len(pauses) == 9  # none after the last
    for attempt, pause in enumerate(pauses):
        assert 0.5 * min(2**attempt, 120) <= pause <= min(2**attempt, 120)
    assert len(set(pauses)) == 9


def test_retry_after_replaces_the_backoff():
    def busy(after: str) -> Reply:
        return (429, {"Retry-After": after}, b"")

    soon = formatdate(time.time() + 60, usegmt=True)
    _, pauses, _ = post(in_turn(busy("7"), busy("0.5"), busy("-3"), busy(soon), busy("in a while"), {}))
    assert pauses[:3] == [7.0, 0.5, 0.0]
    assert 50 < pauses[3] <= 60
    assert 8 <= pauses[4] <= 16  # not parsed: the backoff of the fifth attempt
    with pytest.raises(ApiError, match=r"HTTP 429: Too Many Requests \(retry after 3,600 s\)"):
        post(in_turn(busy("3600")))


def refusal(status: int, content: str, **headers: str) -> Reply:
    return (status, headers, content.encode())


REFUSALS = {
    "wrong key": (
        refusal(401, '{"error": {"message": "Incorrect API key: sk-1\\n", "code": "invalid"}}'),
        "HTTP 401: Incorrect API key: *** invalid",
    ),
    "no such model": (refusal(404, '{"error": {"message": "no model x"}}'), "HTTP 404: no model x"),
    "ollama's format": (refusal(400, '{"error": "model is required"}'), 'HTTP 400: {"error": "model is required"}'),
    "empty body": (refusal(403, ""), "HTTP 403: Forbidden"),
    "quota exceeded": (
        refusal(429, '{"error": {"message": "You exceeded it.", "code": "insufficient_quota"}}'),
        "HTTP 429: You exceeded it. insufficient_quota",
    ),
    "redirect": (refusal(302, "", Location="http://127.0.0.1:9/"), "HTTP 302: Found"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_permanent_errors_are_not_retried(name):
    """Redirects are not followed: urllib would send the API key to another host."""
    reply, message = REFUSALS[name]
    with serve(in_turn(reply)) as server, pytest.raises(ApiError) as caught:
        post_json(server.url, {}, "sk-1", sleep=pytest.fail)
    assert str(caught.value) == f"{server.url}: {message}"
    assert caught.value.status == int(message.split()[1].rstrip(":"))
    assert len(server.bodies) == 1


def test_a_long_error_body_is_truncated():
    with pytest.raises(ApiError) as caught:
        post(in_turn((403, {}, b"<p>" * 10_000)))
    assert len(str(caught.value)) < 400


def test_an_invalid_key_is_refused_without_printing_it():
    """http.client's own error message contains the invalid header, and so the key."""
    for key in ("sk-1\nX: y", "schlüssel", "sk\x00"):
        with pytest.raises(ValueError, match="^the API key contains a non-ASCII or non-printable character$"):
            post_json("http://127.0.0.1:9/", {}, key)


# ---- parallel requests


def test_side_by_side_runs_in_parallel():
    barrier = threading.Barrier(4, timeout=5)  # passes only if four threads wait at once

    def work(item: int) -> int:
        barrier.wait()
        return item * item

    assert dict(side_by_side(work, range(8))) == {n: n * n for n in range(8)}
    assert list(side_by_side(work, [])) == []


def test_side_by_side_stops_at_the_first_error():
    started = []

    def work(item: int) -> int:
        started.append(item)
        if item == 3:
            raise ApiError("no")
        time.sleep(0.01)
        return item

    with pytest.raises(ApiError, match="no"):
        list(side_by_side(work, range(1000)))
    time.sleep(0.1)
    assert len(started) < 20  # pending items are cancelled


def test_ctrl_c_does_not_wait_for_pending_responses():
    """concurrent.futures joins its threads at exit, so a pending request would delay it for minutes."""
    code = (
        "from minigpt.api_client import post_json, side_by_side\n"
        "import sys\n"
        "for _ in side_by_side(lambda url: post_json(url, {}, timeout=60), [sys.argv[1]] * 2): pass\n"
    )
    received = threading.Event()

    def wait(handler: BaseHTTPRequestHandler) -> None:
        received.set()
        time.sleep(30)

    with serve(in_turn(wait)) as server:
        process = subprocess.Popen([sys.executable, "-c", code, server.url], stderr=subprocess.DEVNULL)
        assert received.wait(20)
        process.send_signal(signal.SIGINT)
        assert process.wait(10) != 0
