"""AnswerText: no stop string and no incomplete character is shown, wherever the token boundaries are."""

import random

import pytest

from minigpt.data.tokenizer import Tokenizer
from minigpt.inference.answer_text import AnswerText


def test_docstring_example():
    tokenizer = Tokenizer.tiny()
    text = AnswerText(tokenizer, ["###"], trim_start=True, trim_end=True)
    pieces = [text.feed(id) for id in tokenizer.encode(" Yes #")]
    assert [*pieces, text.end()] == ["Y", "es", "", "", " #"]


def test_stop_strings_are_never_shown_even_across_token_boundaries():
    tokenizer, rng = Tokenizer.tiny(), random.Random(0)
    for _ in range(500):
        text = "".join(rng.choice(["a", "b", "ab", "# ", "##", "\n", " ", "日本", "🙂", "é"]) for _ in range(30))
        start = rng.randrange(len(text) - 6)
        stops = [text[start : start + rng.randint(1, 6)], "##\n#"]
        trim_start, trim_end = rng.random() < 0.5, rng.random() < 0.5
        answer = AnswerText(tokenizer, stops, trim_start=trim_start, trim_end=trim_end)
        pieces = [answer.feed(id) for id in [*tokenizer.encode(text), tokenizer.eot_id]]
        shown = "".join([*pieces, answer.end()])
        expected = text[: min(text.index(stop) for stop in stops if stop in text)]
        expected = expected.lstrip() if trim_start else expected
        assert shown == (expected.rstrip() if trim_end else expected)


def test_a_partial_stop_string_is_held_back_only_while_it_may_become_one():
    tokenizer = Tokenizer.tiny()
    answer = AnswerText(tokenizer, ["###"], trim_start=False, trim_end=True)
    pieces = ["".join(answer.feed(id) for id in tokenizer.encode(part)) for part in ("Yes", ". ", "\n", "##", " No")]
    assert pieces == ["Yes", ".", "", "", " \n## No"]
    assert ["".join(answer.feed(id) for id in tokenizer.encode(part)) for part in ("##", "# and more")] == ["", ""]
    assert answer.end() == ""


@pytest.mark.parametrize("trim", [False, True])
def test_invalid_utf8_is_not_shown(trim):
    """Regression: invalid bytes at the end kept a space before them from being trimmed."""
    tokenizer = Tokenizer.tiny()
    incomplete = [id for sign in "🙂日" for id in tokenizer.encode(sign)[:-1]]
    assert len(incomplete) > 2
    answer = AnswerText(tokenizer, [], trim_start=trim, trim_end=trim)
    ids = [
        *incomplete,
        *tokenizer.encode(" a"),
        *incomplete,
        *tokenizer.encode("b🙂 "),
        *incomplete,
        *tokenizer.encode(" "),
    ]
    text = "".join(answer.feed(id) for id in [*ids, incomplete[0]]) + answer.end()
    assert text == ("ab🙂" if trim else " ab🙂  ")
