"""The server under load: full queue, disconnecting clients, worker failure, metrics, and shutdown."""

# ruff: noqa: E402  # the extras may not be installed

import random
import re
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

for extra in ("fastapi", "uvicorn", "httpx"):
    pytest.importorskip(extra, reason="the extras serve and test are not installed")
import httpx

from minigpt.serving import server as server_module
from minigpt.serving.guard import ServerMetrics

from .running_server import CHAT, ask, events, make_model, post, serving, wait_for


def test_a_full_queue_gives_429(slow_model):
    with serving(slow_model, max_batch_size=1, max_queue=1) as server, ThreadPoolExecutor(2) as pool:
        running = [pool.submit(post, server, ask(max_tokens=20)) for _ in range(2)]
        wait_for(lambda: server.worker.rows == 2)
        response = post(server, ask())
        assert (response.status_code, response.headers["retry-after"]) == (429, "1")
        assert response.json()["error"]["type"] == "rate_limit_error"
        response = post(server, ask(n=3))
        assert (response.status_code, response.json()["error"]["param"]) == (400, "n")  # exceeds the capacity
        assert [request.result().status_code for request in running] == [200, 200]
        assert post(server, ask(max_tokens=1)).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_disconnected_client_frees_its_rows(slow_model, stream):
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


def test_a_worker_failure_is_reported_to_all_requests(capfd):
    """Regression: the worker thread had died, and the requests waited for it forever."""
    failing = make_model(step_s=0.01)
    with serving(failing, max_batch_size=2) as server, ThreadPoolExecutor(4) as pool:
        whole = [pool.submit(post, server, ask(max_tokens=150)) for _ in range(3)]
        with httpx.stream("POST", server.url + CHAT, json=ask(max_tokens=150, stream=True)) as response:
            lines = response.iter_lines()
            first = next(lines)  # the role; two of the four rows are waiting
            wait_for(lambda: server.worker.rows == 4)

            def fail(*_):
                raise RuntimeError("out of memory")

            failing.register_forward_pre_hook(fail)
            streamed = events([first, *lines])
        assert "the model failed" in streamed[-1]["error"]["message"]
        assert [request.result().status_code for request in whole] == [500] * 3
        health = httpx.get(server.url + "/health")
        assert (health.status_code, health.json()["error"]["type"]) == (503, "server_error")
        assert post(server, ask()).status_code == 503
        assert "minigpt_up 0\n" in httpx.get(server.url + "/metrics").text
    expected = "error: the worker ended: RuntimeError: out of memory (a --max_batch_size below 2 needs less)\n"
    assert expected in capfd.readouterr().err


def test_metrics(served_model):
    with serving(served_model) as server:
        usage = [post(server, ask(max_tokens=number)).json()["usage"] for number in (3, 4)]
        post(server, ask(temperature=-1))
        httpx.get(server.url + "/nowhere/" + "x" * 50)
        text = httpx.get(server.url + "/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert values['minigpt_requests_total{path="/v1/chat/completions",status="200"}'] == "2"
    assert values['minigpt_requests_total{path="/v1/chat/completions",status="400"}'] == "1"
    assert values['minigpt_requests_total{path="other",status="404"}'] == "1"
    assert values["minigpt_prompt_tokens_total"] == str(sum(entry["prompt_tokens"] for entry in usage))
    assert values["minigpt_completion_tokens_total"] == "7"
    assert values["minigpt_answer_seconds_count"] == values["minigpt_first_token_seconds_count"] == "2"
    assert (values["minigpt_rows_running"], values["minigpt_rows_waiting"], values["minigpt_up"]) == ("0", "0", "1")
    pattern = re.compile(r'minigpt_\w+(\{\w+="[^"]*"(,\w+="[^"]*")*\})? [-+.\de]+|# (HELP|TYPE) minigpt_\w+ .+')
    assert all(pattern.fullmatch(line) for line in text.splitlines())
    assert ServerMetrics().text().count("# TYPE") == 8


# ---- shutdown


def test_running_answers_finish_at_shutdown(slow_model, capfd):
    with serving(slow_model) as server, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(post, server, ask(max_tokens=25))
        wait_for(lambda: server.worker.rows)
        server.should_exit = True
        assert answer.result().json()["usage"]["completion_tokens"] == 25
    assert "shutting down: 1 running answer may take 15 seconds\nshut down\n" in capfd.readouterr().err


def test_running_answers_are_aborted_after_the_grace_period(slow_model, monkeypatch, capfd):
    monkeypatch.setattr(server_module, "GRACE_S", 0.3)
    with serving(slow_model) as server, ThreadPoolExecutor(1) as pool:
        whole = pool.submit(post, server, ask(max_tokens=200))
        with httpx.stream("POST", server.url + CHAT, json=ask(max_tokens=200, stream=True)) as response:
            wait_for(lambda: server.worker.rows == 2)
            server.should_exit = True
            assert "the server is shutting down" in events(response.iter_lines())[-1]["error"]["message"]
        assert whole.result().status_code == 500
    assert "2 answers are aborted\nshut down\n" in capfd.readouterr().err


# ---- random clients


def soak(server, requests, seed=0):
    """Sends random requests, 16 at a time, some of which disconnect or time out; counts the outcomes."""
    rng = random.Random(seed)
    plans = [
        (rng.choice(["whole", "stream", "disconnect", "disconnect", "timeout"]), rng.randint(1, 60))
        for _ in range(requests)
    ]

    def request(plan):
        kind, tokens = plan
        body = ask("word " * (tokens % 9), max_tokens=tokens, temperature=1.0, n=1 + tokens % 2)
        try:
            if kind in ("whole", "timeout"):
                timeout = 30 if kind == "whole" else 0.02
                return httpx.post(server.url + CHAT, json=body, timeout=timeout).status_code
            with httpx.stream("POST", server.url + CHAT, json={**body, "stream": True}, timeout=30) as response:
                for number, _ in enumerate(response.iter_lines()):
                    if kind == "disconnect" and number > tokens // 2:
                        return "disconnected"
                return response.status_code
        except httpx.TimeoutException:
            return "disconnected"

    with ThreadPoolExecutor(16) as pool:
        outcomes = list(pool.map(request, plans))
    wait_for(lambda: server.worker.rows == 0 and not server.worker._inbox)
    assert not server.worker._owners
    return Counter(outcomes)


@pytest.mark.slow
def test_randomly_disconnecting_clients_leak_no_rows_or_threads(served_model):
    with serving(served_model, max_batch_size=8) as server:
        outcomes = soak(server, 100)
        assert outcomes.keys() <= {200, "disconnected"}
        assert outcomes["disconnected"] > 10
        threads = threading.active_count()
        soak(server, 50, seed=1)
        assert threading.active_count() <= threads + 2
