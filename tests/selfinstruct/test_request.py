"""Rendering requests, and the prompts of the classification branch."""

import doctest
from textwrap import dedent

import pytest

from minigpt.selfinstruct import request
from minigpt.selfinstruct.request import TaskFormat
from minigpt.selfinstruct.tasks import Task

PARIS = Task("Name the capital.", "France", "Paris.")
HELLO = Task("Say hello to me.", "", "Hello!")


def test_the_worked_examples():
    assert doctest.testmod(request) == doctest.TestResults(failed=0, attempted=2)


def test_iio():
    assert TaskFormat().render([PARIS, HELLO]).partition("\n")[2] == (
        "###\n1. Instruction: Name the capital.\n1. Input:\nFrance\n1. Output:\nParis.\n"
        "###\n2. Instruction: Say hello to me.\n2. Input:\n<noinput>\n2. Output:\nHello!\n"
        "###\n3. Instruction:"
    )


def test_io_has_no_input_lines():
    """The input follows its instruction, as in the template io; without it the output would not make sense."""
    assert TaskFormat("io").render([PARIS, HELLO]) == (
        "Write a list of diverse tasks, each with its Instruction and its Output.\n"
        "###\n1. Instruction: Name the capital.\nFrance\n1. Output:\nParis.\n"
        "###\n2. Instruction: Say hello to me.\n2. Output:\nHello!\n"
        "###\n3. Instruction:"
    )


def test_trigger_words_are_settings():
    text = TaskFormat("iio", "Request", "Context", "Answer").render([PARIS])
    assert text.endswith("\n1. Request: Name the capital.\n1. Context:\nFrance\n1. Answer:\nParis.\n###\n2. Request:")
    assert "Instruction" not in text and "Input" not in text and "Output" not in text
    assert TaskFormat("io", "Request", output="Answer").stop_strings(20) == ("\n20. Request:",)


def test_without_shots_the_first_slot_is_open():
    assert TaskFormat("io").render([]).endswith(".\n###\n1. Instruction:")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "alpaca"}, "io or iio, not 'alpaca'"),
        ({"output": " "}, "--trigger_output ' ': expected one line, no"),
        ({"instruction": "Do\nthis"}, "--trigger_instruction 'Do.nthis': expected one line, no"),
        ({"input": "Output"}, "the trigger words Instruction, Output, Output must differ"),
    ],
)
def test_formats_that_cannot_be_parsed_back_are_rejected(settings, message):
    with pytest.raises(ValueError, match=message):
        TaskFormat(**settings)


# ---- the classification branch

MOOD = Task("Is the review good or bad?", "I loved it.", "Good", is_classification=True)


def test_the_classification_prompt():
    assert TaskFormat().render_is_classification([MOOD, PARIS], "Is this word a verb?") == dedent("""\
        Is the task classification: is its answer one of a few labels that are known beforehand?
        ###
        1. Instruction: Is the review good or bad?
        1. Classification: Yes
        ###
        2. Instruction: Name the capital.
        2. Classification: No
        ###
        3. Instruction: Is this word a verb?
        3. Classification:""")


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        *((" Yes", True), ("yes.\n###", True), (" **Yes**", True), (" \n YES", True)),
        *((" No", False), ("", False), (" Yesterday", False), (" It is. Yes", False)),
    ],
)
def test_yes_or_no(completion, expected):
    assert TaskFormat.parse_is_classification(completion) is expected


def test_the_label_first_prompt():
    assert TaskFormat().render_label_first([MOOD], "Is this word a verb?") == dedent("""\
        Give for each task a possible Output first, then an Input that has this Output.
        ###
        1. Instruction: Is the review good or bad?
        1. Output:
        Good
        1. Input:
        I loved it.
        ###
        2. Instruction: Is this word a verb?
        2. Output:""")


VERB = Task("Is this word a verb?", "run", "Verb", is_classification=True)


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("\nVerb\n2. Input:\nrun\n###\n3. Instruction:", VERB),
        (" Verb\n2. Input: run", VERB),
        ("\nVerb\n\n### Input:\nrun\n", VERB),
        ("2. Output:\nVerb\n2. Input:\nrun", VERB),
        ("\n2. Instruction: Is this word a verb?\n2. Output:\nVerb\n2. Input:\nrun", VERB),
        ("\r\nVerb\r\n2. Input:\r\nrun\r\n", VERB),
        ("\nVerb\n2. Input:\nrun\nOutput: x", VERB._replace(input="run\nOutput: x")),
        ("\nVerb\n2. Input:\n<noinput>", VERB._replace(input="")),
        ("\nVerb", None),
        ("\n2. Input:\nrun", None),
        ("", None),
        ("\nVerb\n###\n3. Instruction: Is it red?\n3. Output:\nYes\n3. Input:\na rose\n###", None),
    ],
)
def test_parsing_label_and_input(completion, expected):
    assert TaskFormat().parse_label_first(completion, VERB.instruction, 2) == expected


def test_a_truncated_input_is_dropped():
    truncated = "\nVerb\n2. Input:\nru"
    assert TaskFormat().parse_label_first(truncated, VERB.instruction, 2, finished=False) is None
    assert TaskFormat().parse_label_first(truncated + "n\n###\n3. Ins", VERB.instruction, 2, finished=False) == VERB


def test_io_has_no_classification_branch():
    with pytest.raises(ValueError, match="the classification branch needs the format iio"):
        TaskFormat("io").render_label_first([MOOD], "Is this word a verb?")
