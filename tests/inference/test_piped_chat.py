"""chat.py as a filter: questions on stdin, answers on stdout."""

import os
import re
import subprocess
import sys

import pytest

from minigpt.data.prompts import get_template

from .pseudo_terminal import ROOT, answer, environment_of


@pytest.fixture
def pipe(untrained_models):
    def pipe(stdin: str | bytes, *arguments: object, code: int = 0, **settings) -> tuple[str, str]:
        command = [sys.executable, ROOT / "chat.py", "--model_name_or_path", "brief", *map(str, arguments)]
        stdin = stdin.encode() if isinstance(stdin, str) else stdin
        settings |= {
            "input": stdin,
            "capture_output": True,
            "cwd": untrained_models,
            "env": environment_of(untrained_models),
        }
        done = subprocess.run(command, timeout=120, **settings)
        assert done.returncode == code, done.stderr
        return done.stdout.decode(), done.stderr.decode()

    return pipe


def test_stdout_has_only_the_answers(pipe, twin):
    expected = answer(twin, "Hello.") + answer(twin, "two\n\nlines\n") + answer(twin, "broken \ufffd byte")
    lines = ["Hello.", "/stats", "/save piped.json", '"""', "two", "", "lines", "", '"""', "/params seed 1"]
    out, err = pipe("\n".join([*lines, ""]).encode() + b"broken \xff byte\r\n\nnever read\n")
    assert out == expected
    assert err.startswith("brief: template hugchat; an empty line ends\nlast answer  ")
    assert "piped.json: 1 turn saved)\n" in err
    assert "\x1b" not in out + err


def test_a_failed_line_gives_exit_code_1(pipe, twin):
    out, err = pipe('/load q\n/edit\nHello.\n/edit\n"""never closed\n', code=1)
    assert out == answer(twin, "Hello.")
    assert err.splitlines()[1:] == [
        "error: q: no such file or folder",
        "error: no question has been asked yet",
        "error: /edit has no line editing here: write the new text after it",
        'error: the input ended inside a block; close it with """',
    ]


def test_debug_shows_the_traceback_of_a_failed_line(pipe, twin):
    """Regression: unexpected errors advise --debug for the traceback, but it had no effect in a conversation."""
    out, err = pipe("/load q\nHello.\n", "--debug", code=1)
    assert out == answer(twin, "Hello.")
    assert err.splitlines()[1] == "Traceback (most recent call last):"
    assert err.splitlines()[-1] == "FileNotFoundError: q: no such file or folder"


def test_a_base_model_continues_text(pipe, twin):
    twin.template = get_template("none")
    expected = [answer(twin, "Once upon"), answer(twin, "And then")]
    assert expected[0].startswith(" ")
    assert pipe("Once upon\nAnd then\n", "--template", "none")[0] == "".join(expected)


def test_prompt_flag(pipe, twin):
    assert pipe("never read", "--prompt", "Hello.") == (answer(twin, "Hello."), "")
    twin.clear()
    assert pipe("", "--prompt", "Hello.", preexec_fn=lambda: os.close(0)) == (answer(twin, "Hello."), "")


def test_a_system_text_that_is_too_long_is_an_error(pipe):
    out, err = pipe("", "--system", "word " * 300, "--prompt", "Hi", code=1)
    assert out == ""
    assert re.fullmatch(r"error: \d+ tokens of system text and template leave none for a message: 128 fit .*\n", err)
