"""Each filter at its boundaries, and the order of the filters."""

import doctest
import string

import pytest

from minigpt.selfinstruct import filters
from minigpt.selfinstruct.filters import BANNED_WORDS, NAMES, Filters
from minigpt.selfinstruct.tasks import Task


def verdict(instruction, input="", output="An answer.", **settings):
    return Filters(**settings).reject(Task(instruction, input, output))


def words(count):
    return " ".join(["Count"] + ["on"] * (count - 1))


def test_the_worked_example():
    assert doctest.testmod(filters) == doctest.TestResults(failed=0, attempted=1)


@pytest.mark.parametrize(
    ("count", "expected"), [(1, "length"), (3, "length"), (4, None), (150, None), (151, "length"), (400, "length")]
)
def test_length(count, expected):
    assert verdict(words(count)) == expected
    assert verdict(words(count).replace(" ", " \n\t ")) == expected  # any amount of any white space counts as one space


@pytest.mark.parametrize("instruction", ["", "  \n"])
def test_an_empty_instruction_is_too_short(instruction):
    assert verdict(instruction) == "length"


@pytest.mark.parametrize("word", [*BANNED_WORDS, "IMAGE", "Go To", "go \n to"])
def test_banned_words(word):
    assert verdict(f"{word} and say what it is") == "banned_word"
    assert verdict(f"Say what you see: {word}, or not") == "banned_word"
    assert verdict(f"Say what the user's {word}") == "banned_word"
    assert verdict(f"Say what the {word}’s point is") == "banned_word"


def test_the_default_banned_words():
    table = (
        "image(s), graph(s), picture(s), file(s), map(s), draw, plot, go to, video, audio, music, flowchart, diagram"
    )
    expected = [
        form for word in table.split(", ") for form in ([word[:-3], word[:-3] + "s"] if "(" in word else [word])
    ]
    assert sorted(BANNED_WORDS) == sorted(expected)


@pytest.mark.parametrize(
    "word",
    [
        *("imagery", "imagine", "paragraph", "profile", "filed", "mapping", "bitmap", "drawing", "plots", "musical"),
        *("videos", "ago to", "go tomorrow", "goto", "go and to", "picturesque", "file_name"),
    ],
)
def test_banned_words_match_whole_words_only(word):
    assert verdict(f"Say what {word} means here") is None


def test_custom_banned_words():
    assert verdict("Draw a picture of C++ code", banned_words=["c++"]) == "banned_word"
    assert verdict("Draw a picture of C+++ code", banned_words=["c+"]) == "banned_word"
    assert verdict("Draw a picture of acc++ code", banned_words=["c++"]) is None
    assert verdict("Draw a picture of a cat", banned_words=["new  york"]) is None
    assert verdict("Name a park in New\nYork", banned_words=["new  york"]) == "banned_word"
    assert verdict("Draw a picture of a.b", banned_words=["a?b"]) is None  # not a regular expression
    for disabled in ([], [""], [" "]):
        assert verdict("Draw a picture of a cat.", banned_words=disabled) is None


@pytest.mark.parametrize(
    "instruction",
    ["Write a program to add numbers", "write a program that sorts", "Write a  function\nfor sums"],
)
def test_programming(instruction):
    assert verdict(instruction) == "programming"
    assert verdict(instruction, keep_programming=True) is None
    assert verdict(f"Please {instruction}") is None


@pytest.mark.parametrize("first", string.punctuation)
def test_punctuation(first):
    assert verdict(f"{first}Say what it is") == "punctuation"
    assert verdict(f" {first} Say what it is") == "punctuation"


@pytest.mark.parametrize("first", ["É", "你", "“", "¿", "–", "😀", "\u200b", "Ａ"])
def test_language(first):
    assert verdict(f"{first}Say what it is now") == "language"
    assert verdict(f"{first}Say what it is now", language="en-GB") == "language"
    assert verdict(f"{first}Say what it is now", language="fr") is None
    assert verdict(f"Say {first} what it is now") is None


def test_an_instruction_may_start_with_a_digit():
    assert verdict("3 colours that I like") is None


@pytest.mark.parametrize(
    ("input", "output", "expected"),
    [
        ("", "", "output"),
        ("Paris", "", "output"),
        ("Paris", " \n", "output"),
        ("Paris", "Paris", "output"),
        ("Paris\n", " Paris", "output"),
        ("Paris", "paris", None),
        ("", "Paris", None),
    ],
)
def test_output(input, output, expected):
    assert verdict("Say what it is", input, output) == expected


def test_the_first_filter_that_matches_is_reported():
    """Case i fails filter i first; all but the last case also fail a later filter."""
    cases = [
        "Write maps “",
        "Write a program that draws maps",
        "Write a program that sorts words",
        "(Ééé) say what it is",
        "É say what it is",
        "Say what it is",
    ]
    assert [verdict(case, output="") for case in cases] == list(NAMES[:6])
    assert NAMES == ("length", "banned_word", "programming", "punctuation", "language", "output", "novelty")


def test_languages_without_spaces_count_characters():
    """Split at white space, a Chinese instruction is one word, so every one would be too short."""
    assert verdict("把下面的句子翻译成英语。") == "length"
    assert verdict("把下面的句子翻译成英语。", language="zh-CN") is None
    assert [verdict("字" * count, language="zh") for count in (3, 4, 150, 151)] == ["length", None, None, "length"]
    assert verdict("描述这张图片的内容。", language="zh", banned_words=["图片"]) == "banned_word"
    assert verdict("Décris le profil de Max", language="fr", banned_words=["profil"]) == "banned_word"
    assert verdict("Décris le défilé du jour", language="fr", banned_words=["fil"]) is None
