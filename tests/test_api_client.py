"""A server elsewhere that is slow, busy, broken or wrong: a scripted one on the loopback interface."""

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


def ask(script, key: str | None = None, **settings) -> tuple[dict, list[float], Endpoint]:
    """The answer, the pauses, and what the server saw."""
    pauses: list[float] = []
    with serve(script) as server:
        answer = post_json(api_url(server.url, "x"), {"a": "é"}, key, sleep=pauses.append, **settings)
    return answer, pauses, server


def test_an_object_for_an_object():
    answer, pauses, server = ask(in_turn({"b": "日"}), key=" sk-1\n")
    assert (answer, pauses) == ({"b": "日"}, [])
    assert (server.paths, server.bodies) == (["/v1/x"], [{"a": "é"}])
    assert server.headers[0]["Content-Type"] == "application/json"
    assert server.headers[0]["Authorization"] == "Bearer sk-1"
    assert server.headers[0]["User-Agent"] == f"minigpt/{__version__}"
    assert "Authorization" not in ask(in_turn({}))[2].headers[0]


def test_urls():
    assert api_url("http://a:1/v1", "x/y") == api_url("http://a:1/v1/", "x/y") == "http://a:1/v1/x/y"
    for wrong in ("", "localhost:8000/v1", "file:///etc/passwd", "ftp://a/v1", "http://"):
        with pytest.raises(ValueError, match=re.escape(f"{wrong!r} is no address of a server")):
            api_url(wrong, "x")


def hang_up(handler: BaseHTTPRequestHandler) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)


def half_an_answer(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "100")
    handler.end_headers()
    handler.wfile.write(b'{"a": ')


def silence(handler: BaseHTTPRequestHandler) -> None:
    time.sleep(1)


PASSING = {
    "busy": 429,
    "broken": 500,
    "overloaded": 529,
    "a gateway's page": (502, {"Content-Type": "text/html"}, b"<html>Bad Gateway</html>"),
    "timed out there": 408,
    "no JSON": b"<html>Welcome to the hotel's network</html>",
    "not text": b"\xff\xfe\x00",
    "no object": b"[1, 2]",
    "nothing": b"",
    "hung up": hang_up,
    "half an answer": half_an_answer,
    "silence": silence,
}


@pytest.mark.parametrize("what", PASSING)
def test_what_may_pass_is_tried_again(what):
    answer, pauses, server = ask(in_turn(PASSING[what], PASSING[what], {"b": 1}), timeout=0.1)
    assert answer == {"b": 1}
    assert len(server.bodies) == 3
    assert 0.5 <= pauses[0] <= 1 <= pauses[1] <= 2


LAST = {
    "busy": (429, r"HTTP 429: Too Many Requests \(3 attempts\)"),
    "a gateway's page": (502, r"HTTP 502: <html>Bad Gateway</html> \(3 attempts\)"),
    "no JSON": (None, r"the answer is not JSON \(3 attempts\)"),
    "no object": (None, r"the answer is no JSON object \(3 attempts\)"),
    "half an answer": (None, r"no answer \(IncompleteRead.*\) \(3 attempts\)"),
    "silence": (None, r"no answer within 0.1 s \(3 attempts\)"),
}


@pytest.mark.parametrize("what", LAST)
def test_the_last_attempt_says_what_it_was(what):
    status, message = LAST[what]
    with pytest.raises(ApiError, match=rf"^http://127.0.0.1:\d+/v1/x: {message}$") as caught:
        ask(in_turn(PASSING[what]), timeout=0.1, attempts=3)
    assert caught.value.status == status
    assert "\n" not in str(caught.value)


def test_nobody_there():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/x"
    with pytest.raises(ApiError, match=r"no answer \(.*[Cc]onnection refused\) \(2 attempts\)"):
        post_json(url, {}, attempts=2, sleep=lambda _: None)


def test_at_a_new_address_nobody_is_waited_for():
    """But who is there, and busy, or hangs up, is asked again."""

    def no_pause(seconds: float) -> None:
        raise AssertionError(f"it waits for {seconds} s")

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/x"
    with pytest.raises(ApiError, match=r"no answer \(.*[Cc]onnection refused\)$"):
        post_json(url, {}, first=True, sleep=no_pause)
    for passing in (503, hang_up):
        answer, pauses, _ = ask(in_turn(passing, passing, {"b": 1}), first=True)
        assert (answer, len(pauses)) == ({"b": 1}, 2)


def test_pauses_double_and_have_an_end():
    pauses: list[float] = []
    with serve(in_turn(503)) as server, pytest.raises(ApiError, match="10 attempts"):
        post_json(server.url, {}, attempts=10, sleep=pauses.append)
    assert len(pauses) == 9  # none after the last
    for attempt, pause in enumerate(pauses):
        assert 0.5 * min(2**attempt, 120) <= pause <= min(2**attempt, 120)
    assert len(set(pauses)) == 9


def test_the_server_says_how_long(monkeypatch):
    def busy(after: str) -> Reply:
        return (429, {"Retry-After": after}, b"")

    soon = formatdate(time.time() + 60, usegmt=True)
    _, pauses, _ = ask(in_turn(busy("7"), busy("0.5"), busy("-3"), busy(soon), busy("in a while"), {}))
    assert pauses[:3] == [7.0, 0.5, 0.0]
    assert 50 < pauses[3] <= 60
    assert 8 <= pauses[4] <= 16  # not understood: the pause of a fifth attempt
    with pytest.raises(ApiError, match=r"HTTP 429: Too Many Requests \(it asks to wait for 3,600 s\)"):
        ask(in_turn(busy("3600")))


def refusal(status: int, content: str, **headers: str) -> Reply:
    return (status, headers, content.encode())


REFUSALS = {
    "a wrong key": (
        refusal(401, '{"error": {"message": "Incorrect API key: sk-1\\n", "code": "invalid"}}'),
        "HTTP 401: Incorrect API key: *** invalid",
    ),
    "no such model": (refusal(404, '{"error": {"message": "no model x"}}'), "HTTP 404: no model x"),
    "ollama's words": (refusal(400, '{"error": "model is required"}'), 'HTTP 400: {"error": "model is required"}'),
    "nothing said": (refusal(403, ""), "HTTP 403: Forbidden"),
    "no money": (
        refusal(429, '{"error": {"message": "You exceeded it.", "code": "insufficient_quota"}}'),
        "HTTP 429: You exceeded it. insufficient_quota",
    ),
    "elsewhere": (refusal(302, "", Location="http://127.0.0.1:9/"), "HTTP 302: Found"),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_a_refusal_is_not_asked_again(what):
    """Nor is a redirection followed: urllib would hand the key to wherever it leads."""
    reply, message = REFUSALS[what]
    with serve(in_turn(reply)) as server, pytest.raises(ApiError) as caught:
        post_json(server.url, {}, "sk-1", sleep=pytest.fail)
    assert str(caught.value) == f"{server.url}: {message}"
    assert caught.value.status == int(message.split()[1].rstrip(":"))
    assert len(server.bodies) == 1


def test_a_long_page_is_cut():
    with pytest.raises(ApiError) as caught:
        ask(in_turn((403, {}, b"<p>" * 10_000)))
    assert len(str(caught.value)) < 400


def test_a_key_that_is_none_is_refused_and_not_shown():
    """http.client's own error shows the header that it refuses."""
    for key in ("sk-1\nX: y", "schlüssel", "sk\x00"):
        with pytest.raises(ValueError, match="^the API key holds characters that no key has$"):
            post_json("http://127.0.0.1:9/", {}, key)


# ---- side by side


def test_side_by_side():
    gate = threading.Barrier(4, timeout=5)  # passes only if four are under way at once

    def work(item: int) -> int:
        gate.wait()
        return item * item

    assert dict(side_by_side(work, range(8))) == {n: n * n for n in range(8)}
    assert list(side_by_side(work, [])) == []


def test_side_by_side_ends_with_the_first_error():
    begun = []

    def work(item: int) -> int:
        begun.append(item)
        if item == 3:
            raise ApiError("no")
        time.sleep(0.01)
        return item

    with pytest.raises(ApiError, match="no"):
        list(side_by_side(work, range(1000)))
    time.sleep(0.1)
    assert len(begun) < 20  # what was waiting is asked no more


def test_an_interrupted_program_does_not_wait_for_an_answer():
    """Threads of concurrent.futures are waited for at exit, and one that waits for a server does so for minutes."""
    code = (
        "from minigpt.api_client import post_json, side_by_side\n"
        "import sys\n"
        "for _ in side_by_side(lambda url: post_json(url, {}, timeout=60), [sys.argv[1]] * 2): pass\n"
    )
    asked = threading.Event()

    def wait(handler: BaseHTTPRequestHandler) -> None:
        asked.set()
        time.sleep(30)

    with serve(in_turn(wait)) as server:
        process = subprocess.Popen([sys.executable, "-c", code, server.url], stderr=subprocess.DEVNULL)
        assert asked.wait(20)
        process.send_signal(signal.SIGINT)
        assert process.wait(10) != 0
