"""The exact output of `--inspect`."""

import json
import os
from unittest.mock import patch

import pytest

from minigpt.data.preview import mark_example, show_examples
from minigpt.data.prompts import get_template
from minigpt.data.tokenizer import Tokenizer

TOKENIZER = Tokenizer.tiny()
IO = get_template("io")
QUESTION, ANSWER = {"role": "user", "content": "Name it."}, {"role": "assistant", "content": "Paris."}
PROMPT, END = "### Instruction:\nName it.\n\n### Output:\n", "<|endoftext|>"
CYAN, GREEN, RED, PLAIN = "\033[36m", "\033[32m", "\033[9;31m", "\033[0m"
LENGTH = len(TOKENIZER.encode(PROMPT))
ANSWER_LENGTH = len(TOKENIZER.encode("Paris.")) + 1


def show(messages, max_seq_length=1000, *, terminal=False, no_color=None, **options) -> str:
    with patch("sys.stdout.isatty", return_value=terminal), patch.dict(os.environ):
        os.environ.pop("NO_COLOR", None)
        if no_color is not None:
            os.environ["NO_COLOR"] = no_color
        return mark_example(messages, IO, TOKENIZER, max_seq_length, **options)


def test_brackets_and_colors():
    head = f"{LENGTH + ANSWER_LENGTH} tokens, {ANSWER_LENGTH} supervised, 0 cut\n"
    assert show([QUESTION, ANSWER]) == f"{head}{PROMPT}[Paris.{END}]"
    assert show([QUESTION, ANSWER], terminal=True) == f"{head}{CYAN}{PROMPT}{PLAIN}{GREEN}Paris.{END}{PLAIN}"


def test_several_turns_and_train_on_prompt():
    messages = [QUESTION, ANSWER, QUESTION, ANSWER]
    assert show(messages).partition("\n")[2] == f"{PROMPT}[Paris.{END}]\n\n{PROMPT}[Paris.{END}]"
    whole = show(messages, train_on_prompt=True).partition("\n")[2]
    assert whole == f"[{PROMPT}Paris.{END}\n\n{PROMPT}Paris.{END}]"


def test_cut_tokens():
    ids = TOKENIZER.encode(PROMPT)
    cut, rest = TOKENIZER.decode(ids[:3]), TOKENIZER.decode(ids[3:])
    head = f"{LENGTH - 3 + ANSWER_LENGTH} tokens, {ANSWER_LENGTH} supervised, 3 cut\n"
    length = LENGTH - 3 + ANSWER_LENGTH - 1
    assert show([QUESTION, ANSWER], length) == f"{head}{{cut: {cut}}}{rest}[Paris.{END}]"
    assert show([QUESTION, ANSWER], length, terminal=True) == (
        f"{head}{RED}{cut}{PLAIN}{CYAN}{rest}{PLAIN}{GREEN}Paris.{END}{PLAIN}"
    )
    right = show([QUESTION, ANSWER], ANSWER_LENGTH - 1)
    assert right == (
        f"{ANSWER_LENGTH} tokens, {ANSWER_LENGTH - 1} supervised, {LENGTH} cut\n"
        f"{{cut: {TOKENIZER.decode(ids[:-1])}}}{TOKENIZER.decode(ids[-1:])}[Paris.]{{cut: {END}}}"
    )
    turns = show([QUESTION, ANSWER, QUESTION, ANSWER], LENGTH + ANSWER_LENGTH - 1)
    assert turns.partition("\n")[2] == f"{{cut: {PROMPT}Paris.{END}}}{PROMPT}[Paris.{END}]"


def test_a_dropped_example():
    assert show([{"role": "text", "content": ""}]) == "dropped: no supervised token within 1000 positions\n"


@pytest.mark.parametrize(("no_color", "colored"), [("", True), ("1", False), ("0", False)])
def test_no_color(no_color, colored):
    """no-color.org: "when present and not an empty string (regardless of its value)"."""
    text = show([QUESTION, ANSWER], terminal=True, no_color=no_color)
    assert text == show([QUESTION, ANSWER], terminal=colored)


def test_show_examples(tmp_path, capsys, monkeypatch):
    rows = [{"instruction": "Name it.", "output": "Paris."}, {"a": 1}, {"text": ""}, {"text": "Once"}, {"text": "Two"}]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    show_examples([str(path)], 3, IO, TOKENIZER, 1000)
    once = len(TOKENIZER.encode("Once")) + 1
    assert capsys.readouterr().out == (
        f"---- {path}:1: {LENGTH + ANSWER_LENGTH} tokens, {ANSWER_LENGTH} supervised, 0 cut\n{PROMPT}[Paris.{END}]\n"
        f"---- {path}:3: dropped: no supervised token within 1000 positions\n\n"
        f"---- {path}:4: {once} tokens, {once} supervised, 0 cut\n[Once{END}]\n"
    )
    monkeypatch.setenv("RANK", "1")  # regression: under a launcher every rank printed them
    show_examples([str(path)], 3, IO, TOKENIZER, 1000)
    assert capsys.readouterr().out == ""
