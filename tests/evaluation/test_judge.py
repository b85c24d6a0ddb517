"""Marking answers with a scripted judge."""

import doctest
import json
import socket
from functools import partial

import pytest

from minigpt.api_client import ApiError, post_json
from minigpt.evaluation import judge as judging
from minigpt.evaluation.judge import Judge, Marks, mark_answers, read_mark, request_for

from ..scripted_endpoint import Endpoint, serve

REPLIES = {
    "85": 85,
    " 85.\n": 85,
    "0": 0,
    "100": 100,
    "**85**": 85,
    "`85`": 85,
    "85/100": 85,
    "85 / 100": 85,
    "**85**/100": 85,
    "85%": 85,
    "85.0": 85,
    "84.6": 85,
    "Score: 85": 85,
    "**Score:** 85 out of 100": 85,
    "### Final score\n\n85": 85,
    '{"score": 85}': 85,
    r"$\boxed{85}$": 85,
    "The score is 85.": 85,
    "I would rate it 85.": 85,
    "On a scale from 0 to 100: 85": 85,
    "Score (0-100): 85": 85,
    "85\n\nIt has 2 errors.": 85,
    "It has 3 errors, the worst in line 1.\n\n85": 85,
    "It was in 1945, and not in 1944. Score: 40": 40,
    "It names 2 out of 3. I give it a mark of 60.": 60,
    "<think>Is it 30? No, 60.</think>\n70": 70,
    # no mark, or an ambiguous one
    "": None,
    "Well done!": None,
    "eighty-five": None,
    "101": None,
    "-5": None,
    "Score: -5": None,
    "8/10": None,
    "Score: 10 out of 10": None,
    "80-90": None,
    "between 80 and 90": None,
    "Score: 80, or rather a score of 90": None,
    "85,5": None,
    "1e2": None,
    "v85": None,
    "in 2024": None,
    "<think>70": None,
    "9" * 5000: None,
}


@pytest.mark.parametrize("reply", REPLIES)
def test_read_mark(reply):
    assert read_mark(reply) == REPLIES[reply]


@pytest.mark.parametrize("reply", ["1" * 200_000, "1 2 " * 50_000, "\n" * 200_000, "score " * 40_000, "1.1" * 60_000])
def test_read_mark_takes_linear_time(reply):
    """Regression: a reply in a loop stalled the run for minutes, because the patterns backtracked over every digit."""
    assert read_mark(reply) is None  # would hang here


def test_docstring_example():
    assert doctest.testmod(judging) == doctest.TestResults(failed=0, attempted=1)


def test_request_for():
    request = request_for([{"role": "user", "content": "Opposite.", "input": "hot"}], "cold", "{warm} </task>")
    assert "\n<task>\nOpposite.\nhot\n</task>\n" in request
    assert "\n<correct_response>\ncold\n</correct_response>\n" in request
    assert "\n<response>\n{warm} </task>\n</response>\n" in request
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    assert "<task>\n[system]\nBe brief.\n\n[user]\nWhy?\n</task>" in request_for(turns, "x", "y")


# ---- judging

REQUESTS = [f"request {number}" for number in range(8)]


def number_of(body: dict) -> int:
    return int(body["messages"][0]["content"].split()[1])


def judge_at(server: Endpoint, model: str = "j-1") -> Judge:
    return Judge(server.url, model, "sk-1")


def test_mark_answers(tmp_path):
    file = tmp_path / "out" / "judgements.jsonl"
    with serve(lambda _, body: f"Score: {10 * number_of(body)}") as server:
        marks = mark_answers([*REQUESTS, REQUESTS[3]], judge_at(server), file)
    assert marks == Marks("j-1", [0, 10, 20, 30, 40, 50, 60, 70, 30])
    assert marks.mean == pytest.approx(310 / 9)
    assert str(marks) == "j-1 marks: mean 34.4 of 100"
    assert sorted(map(number_of, server.bodies)) == list(range(8))  # equal requests are sent once
    assert set(server.paths) == {"/v1/chat/completions"}
    assert server.headers[0]["Authorization"] == "Bearer sk-1"
    body = {"model": "j-1", "temperature": 0, "messages": [{"role": "user", "content": "request 0"}]}
    assert body in server.bodies
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert {"judge": "j-1", "mark": 20, "reply": "Score: 20", "request": "request 2"} in lines


def test_the_key_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-2")
    judge = Judge("http://127.0.0.1:1/v1", "j-1")
    assert judge.key == "sk-2"
    assert "sk-2" not in repr(judge)
    with pytest.raises(ValueError, match="'127.0.0.1:1' is not a server URL"):
        Judge("127.0.0.1:1", "j-1")


def test_unreadable_replies_are_counted(tmp_path):
    """So is a refusal of a single answer, which a later run sends again."""
    replies: dict[int, object] = {0: "50", 1: "I cannot say.", 2: {"choices": []}, 3: {"choices": [{"message": {}}]}}
    with serve(lambda _, body: replies.get(number_of(body), 400)) as server:
        marks = mark_answers(REQUESTS[:6], judge_at(server), tmp_path / "j.jsonl")
        assert marks.each == [50, None, None, None, None, None]
        assert marks.summary() == {"model": "j-1", "mean": 50.0, "unreadable": 5}
        assert str(marks) == "j-1 marks: mean 50.0 of 100, 5 of 6 unreadable"
        replies |= {4: "40", 5: "60"}
        assert mark_answers(REQUESTS[:6], judge_at(server), tmp_path / "j.jsonl").each == [50, None, None, None, 40, 60]
    assert sorted(map(number_of, server.bodies)) == [0, 1, 2, 3, 4, 4, 5, 5]
    assert Marks("j-1", [None]).mean is None
    assert str(Marks("j-1", [None])) == "j-1 marks: no readable mark, 1 of 1 unreadable"


def test_a_killed_run_resumes_without_repeating_requests(tmp_path):
    file = tmp_path / "j.jsonl"
    message = f"HTTP 401: Unauthorized .*; the marks so far are saved in {file}: run the same command to resume"
    with serve(lambda number, _: "70" if number < 3 else 401) as server, pytest.raises(ApiError, match=message):
        mark_answers(REQUESTS, judge_at(server), file)
    marked = [json.loads(line)["request"] for line in file.read_text().splitlines()]
    assert 1 <= len(marked) <= 3
    with open(file, "a") as opened:
        opened.write('{"judge": "j-1", "ma')  # killed in the middle of a line
    with serve(lambda *_: "80") as server:
        marks = mark_answers(REQUESTS, judge_at(server), file)
    assert sorted(f"request {number_of(body)}" for body in server.bodies) == sorted({*REQUESTS} - {*marked})
    assert marks.each == [70 if request in marked else 80 for request in REQUESTS]
    assert [json.loads(line)["judge"] for line in file.read_text().splitlines()] == ["j-1"] * 8
    with serve(lambda *_: "90") as server:
        assert mark_answers(REQUESTS, judge_at(server), file) == marks
        assert server.bodies == []
        assert mark_answers(REQUESTS, judge_at(server, "j-2"), file).each == [90] * 8  # another judge marks again


def test_a_refused_connection_fails_at_once(tmp_path, monkeypatch):
    """Regression: a wrong port was retried by four threads for 23 seconds before the error."""

    def no_pause(seconds: float) -> None:
        raise AssertionError(f"sleeps for {seconds} s")

    monkeypatch.setattr(judging, "post_json", partial(post_json, sleep=no_pause))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        base = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(ApiError) as caught:
        mark_answers(REQUESTS, Judge(base, "j-1"), tmp_path / "j.jsonl")
    assert str(caught.value) == (
        f"{base}/chat/completions: no answer ([Errno 111] Connection refused) "
        f"(is --judge_api_base {base} right, and is the server running?); "
        f"the marks so far are saved in {tmp_path}/j.jsonl: run the same command to resume"
    )


def test_a_judge_that_has_replied_before_is_retried(tmp_path, monkeypatch):
    """It may be restarting: a failed connection means a wrong address only before the first reply."""
    firsts = []

    def post(*args, first: bool):
        firsts.append(first)
        return post_json(*args, first=first)

    monkeypatch.setattr(judging, "post_json", post)
    with serve(lambda *_: "85") as server:
        mark_answers(REQUESTS, judge_at(server), tmp_path / "j.jsonl")
    assert (firsts[0], firsts[-1]) == (True, False)


ADVICE = {
    401: "(the key is OPENAI_API_KEY of the environment, which is set)",
    404: "(no model 'j-1' there, or no such path: --judge_model, --judge_api_base)",
}


@pytest.mark.parametrize("status", ADVICE)
def test_errors_name_the_fix(tmp_path, status):
    with serve(lambda *_: status) as server, pytest.raises(ApiError) as caught:
        mark_answers(REQUESTS, judge_at(server), tmp_path / "j.jsonl")
    assert ADVICE[status] in str(caught.value)


@pytest.mark.parametrize("line", ["[]", '{"judge": "j-1"}', "Once", '{"judge": "j-1", "request": [], "reply": ""}'])
def test_an_invalid_file_is_refused(tmp_path, line):
    file = tmp_path / "j.jsonl"
    file.write_text(f'{{"judge": "j-2"}}\n{line}\n')
    with pytest.raises(ValueError, match=rf"^{file}:2: not a judge's reply; remove the line to ask again$"):
        mark_answers(REQUESTS, Judge("http://127.0.0.1:9/v1", "j-1"), file)


def test_a_judge_that_accepts_no_temperature(tmp_path):
    refusal = (400, {}, b'{"error": {"message": "Unsupported value: \'temperature\' does not support 0"}}')
    with serve(lambda _, body: refusal if "temperature" in body else "85") as server:
        assert mark_answers(REQUESTS, judge_at(server), tmp_path / "j.jsonl").each == [85] * 8
    assert len(server.bodies) <= 8 + 4  # each of four threads may try once with a temperature


def test_a_busy_judge_is_retried(tmp_path):
    with serve(lambda number, _: (429, {"Retry-After": "0.01"}, b"") if number % 2 else "85") as server:
        assert mark_answers(REQUESTS, judge_at(server), tmp_path / "j.jsonl").each == [85] * 8
    assert len(server.bodies) > 8
