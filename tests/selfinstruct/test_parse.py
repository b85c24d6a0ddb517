"""Parsing tasks from completions, well formatted and badly formatted."""

import random
import time

import pytest

from minigpt.selfinstruct.request import TaskFormat
from minigpt.selfinstruct.tasks import Task

PARIS = Task("Name the capital.", "France", "Paris.")
HELLO = Task("Say hello to me.", "", "Hello!")
POEM = Task("Write a very short poem.", "", "Roses are red.\n\nViolets are blue.")

NUMBERED = """ Name the capital.
9. Input:
France
9. Output:
Paris.
###
10. Instruction: Say hello to me.
10. Input:
<noinput>
10. Output:
Hello!
"""

COMPLETIONS = {  # after the open slot "9. Instruction:"; name -> (completion, tasks)
    "requested layout": (NUMBERED, [PARIS, HELLO]),
    "requested layout, with the stop string": (NUMBERED + "###\n11. Instruction:", [PARIS, HELLO]),
    "requested layout, truncated at the stop string": (NUMBERED + "###", [PARIS, HELLO]),
    "CRLF": (NUMBERED.replace("\n", "\r\n"), [PARIS, HELLO]),
    "non-ASCII white space": (NUMBERED.replace("\n", "\u00a0\n\u3000").replace("9. ", "9.\u00a0"), [PARIS, HELLO]),
    "no numbers": (NUMBERED.replace("9. ", "").replace("10. ", ""), [PARIS, HELLO]),
    "no numbers at input and output": (
        NUMBERED.replace("9. ", "").replace("10. O", "O").replace("10. Inp", "Inp"),
        [PARIS, HELLO],
    ),
    "wrong numbers": (NUMBERED.replace("9. ", "1. ").replace("10. ", "7. "), [PARIS, HELLO]),
    "the same number twice": (NUMBERED.replace("10. ", "9. "), [PARIS, HELLO]),
    "no number after a separator": (NUMBERED.replace("10. Instruction", "Instruction"), [PARIS, HELLO]),
    "numbers from the second task on": (NUMBERED.replace("9. ", "").replace("10. ", "9. "), [PARIS, HELLO]),
    "other number styles": (NUMBERED.replace("9. ", "9) ").replace("10. ", "10 "), [PARIS, HELLO]),
    "no separator": (NUMBERED.replace("###\n", ""), [PARIS, HELLO]),
    "no separator, no numbers": (NUMBERED.replace("###\n", "").replace("9. ", "").replace("10. ", ""), [PARIS, HELLO]),
    "blank lines": (NUMBERED.replace("\n", "\n\n"), [PARIS, HELLO]),
    "a separator before every field": (
        NUMBERED.replace("9. ", "###\n9. ").replace("10. ", "###\n10. "),
        [PARIS, HELLO],
    ),
    "headings": (
        " Name the capital.\n\n### Input:\nFrance\n\n### Output:\nParis.\n\n"
        "### Instruction:\nSay hello to me.\n\n### Output:\nHello!",
        [PARIS, HELLO],
    ),
    "headings with numbers": (
        NUMBERED.replace("###\n", "").replace("9. ", "### 9. ").replace("10. ", "### 10. "),
        [PARIS, HELLO],
    ),
    "a space before the colon": (NUMBERED.replace(":", " :"), [PARIS, HELLO]),
    "a fullwidth colon": (NUMBERED.replace(":", "："), [PARIS, HELLO]),
    "any case": (NUMBERED.replace("Output", "OUTPUT").replace("Input", "input"), [PARIS, HELLO]),
    "bold": (
        " Name the capital.\n**Input:** France\n**Output:**\nParis.\n\n**10. Instruction:** Say hello to me.\n"
        "**10. Output:** Hello!",
        [PARIS, HELLO],
    ),
    "text on the marker's line": (" Name the capital.\n9. Input: France\n9. Output: Paris.", [PARIS]),
    "the slot repeated": (" 9. Instruction:" + NUMBERED, [PARIS, HELLO]),
    "the slot repeated without number": ("\nInstruction:" + NUMBERED, [PARIS, HELLO]),
    "the slot repeated with another number": ("10. Instruction:" + NUMBERED.replace("9. ", "10. "), [PARIS, HELLO]),
    "an introduction": (" Here are some more tasks!\n\n###\n9. Instruction:" + NUMBERED, [PARIS, HELLO]),
    "an introduction, no separator": (" Here are more:\n9. Instruction:" + NUMBERED, [PARIS, HELLO]),
    "a closing remark": (NUMBERED + "###\n\nI hope that these help.", [PARIS, HELLO]),
    "no input line": (" Say hello to me.\n9. Output:\nHello!\n", [HELLO]),
    "a multi-line output": (f" {POEM.instruction}\n9. Input:\n<noinput>\n9. Output:\n{POEM.output}\n###\n", [POEM]),
    "empty": ("", []),
    "blank": (" \n\n", []),
    "a separator": ("\n###\n", []),
    "prose": (" capital of France is Paris. It is said that the output: 3 was", []),
    "no output": (" Name the capital.\n9. Input:\nFrance\n", []),
    "no output, then a task": (
        " Name the capital.\n9. Input:\nFrance\n###\n10. Instruction: Say hello to me.\n10. Output:\nHello!",
        [HELLO],
    ),
    "an output that is blank": (" Say hello to me.\n9. Input:\n\n9. Output:\n", [HELLO._replace(output="")]),
    "<nooutput>": (" Say hello to me.\n9. Output:\n<nooutput>", [HELLO._replace(output="")]),
    "no instruction": (
        "\n9. Input:\nFrance\n9. Output:\nParis.\n###\n10. Instruction: Say hello to me.\n10. Output: Hello!",
        [HELLO],
    ),
    "a task without its trigger word": (
        " Say hello to me.\n9. Output:\nHello!\n###\n10. Name the capital.\n10. Input:\nFrance\n10. Output:\nParis.",
        [HELLO],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPLETIONS)
def test_completions(name):
    completion, tasks = COMPLETIONS[name]
    assert TaskFormat().parse(completion, 9) == tasks


def answer(text, question="Say what you know."):
    return f" {question}\n9. Input:\n<noinput>\n9. Output:\n{text}\n###\n10. Instruction: Say hello"


ANSWERS = {
    "a year": "It was founded in\n2020.\nThe end came in 20. or 20 .",
    "a list": "1. First, boil it.\n2. Then, eat it.\n10. At last, sleep.",
    "a year before a marker": "2020. Output: 3 tons.\n2021. Input: 4 tons.\n2022. Instruction: stop.",
    "code": "### Reads the words.\ndef read():\n    return 1\n    ### The end.\n#### more\n# Output: 1",
    "markers in sentences": "The Instruction: it says what to do. An Input: what with. The Output: what for.",
    "markers without numbers": "It has three parts.\n\nInstruction: what to do\nInput: what with\nOutput: what for",
    "fields of an example": "For example:\nInput: 3\nOutput: 9\n9. Input: 4\nOutput: 16",
    "horizontal rules": "Above.\n---\n***\n# ###\n### ###\nBelow.",
    "markers in a code block": "print(x)\n    10. Instruction: x",
    "no input": "None",
}


@pytest.mark.parametrize("name", ANSWERS)
def test_an_output_that_looks_like_markers_is_not_split(name):
    assert TaskFormat().parse(answer(ANSWERS[name]), 9, finished=False) == [
        Task("Say what you know.", "", ANSWERS[name])
    ]
    question = Task("Say what\nInstruction: this\nOutput: means", "Input: 3\n2. Output: 4\n###\nx", "y")
    rendered = TaskFormat().render([question])
    assert TaskFormat().parse(rendered.partition("1. Instruction:")[2], 1) == [question]


def test_unnumbered_fields_are_recognised_by_order():
    """If the model omits the numbers, fields are recognised by their order only."""
    text = " Square the number.\nInput:\n3\nOutput:\n9, for example:\nInput: 4\nOutput: 16\n###\nInstruction: Say"
    assert TaskFormat().parse(text, 9) == [
        Task("Square the number.", "3", "9, for example:\nInput: 4\nOutput: 16"),
    ]


@pytest.mark.parametrize(
    "text",
    [
        *("<noinput>", "<NoInput>", "<no input>", "< no_input >", "noinput", "No input.", "no-input", "[no input]"),
        *("<none>", "None", "none.", "(None)", "N/A", "n/a.", "<N/A>", "Not applicable", "<not_applicable>"),
        *("<nothing>", "<empty>", "(no additional input needed)", "No input is provided.", "", " \n "),
    ],
)
def test_ways_to_write_no_input(text):
    assert TaskFormat().parse(f" Say hello to me.\n9. Input:\n{text}\n9. Output:\nHello!", 9) == [HELLO]


@pytest.mark.parametrize(
    "text",
    [
        *("Na", "nothing", "Nothing.", "null", "No", "x = None", "`None`", '"None"', "[None]", "None of them", "empty"),
        *("[]", "no inputs of the kind", "<html>", "0", "-"),
    ],
)
def test_inputs_that_look_empty_are_kept(text):
    assert TaskFormat().parse(f" Say hello to me.\n9. Input:\n{text}\n9. Output:\nHello!", 9) == [
        HELLO._replace(input=text)
    ]


# ---- truncated completions


@pytest.mark.parametrize(
    "rest", ["###", "###\n", "\n ### \n", "###\n10. Ins", "10. Instruction:", "###\n10. Instruction: Say"]
)
def test_a_last_task_known_to_be_complete_is_kept(rest):
    assert TaskFormat().parse(NUMBERED.partition("###")[0] + rest, 9, finished=False) == [PARIS]


@pytest.mark.parametrize("rest", ["", "Lyon", "\n", "##", "### of", "10", "10. Instruc", "2020."])
def test_a_last_task_that_may_be_truncated_is_dropped(rest):
    cut = NUMBERED.partition("###")[0] + rest
    assert TaskFormat().parse(cut, 9, finished=False) == []
    assert [task.instruction for task in TaskFormat().parse(cut, 9)] == [PARIS.instruction]


def test_truncation_at_any_position_keeps_the_complete_tasks():
    """At every position: no incomplete task is returned, and no complete one is lost."""
    text = NUMBERED + "###\n11. Instruction: Write a very short poem.\n11. Output:\nRoses are red.\n###\n"
    ends = [text.index("###") + 3, text.index("###\n11.") + 3, text.rindex("###") + 3]
    tasks = [PARIS, HELLO, Task("Write a very short poem.", "", "Roses are red.")]
    for cut in range(len(text) + 1):
        complete = sum(end <= cut for end in ends)
        assert TaskFormat().parse(text[:cut], 9, finished=False) == tasks[:complete], text[:cut]


# ---- trigger words


@pytest.mark.parametrize(
    "words",
    [
        ("Request", "Context", "Answer"),
        ("Task (new)", "What [is] given?", "A*"),
        ("$^", "|", "\\d"),
        ("Input", "Input data", "Input data out"),
        ("指令", "输入", "输出"),
        ("in", "IN", "In"),
        ("1st", "2nd", "3rd"),
        ("### Q", "**Given**", "### A"),
    ],
)
def test_custom_trigger_words(words):
    tasks = [PARIS, HELLO, Task("Instruction: what is it?", "Output:\n3", "Input: 4"), POEM]
    rendered = TaskFormat("iio", *words).render(tasks)
    slot = f"1. {words[0]}:"
    assert TaskFormat("iio", *words).parse(rendered.partition(slot)[2], 1) == tasks


def test_trigger_words_of_another_format_are_text():
    text = " Say hello.\nInput: x\n9. Output: y\n9. Context:\nz\n9. Answer:\nHello!"
    assert TaskFormat("iio", "Request", "Context", "Answer").parse(text, 9) == [
        Task("Say hello.\nInput: x\n9. Output: y", "z", "Hello!")
    ]


# ---- round trip

PIECES = (
    *(
        "a",
        "word",
        "and 3.5",
        "Zürich",
        "日本",
        "😀",
        "\u00a0",
        "\n",
        "\n\n",
        "\n\n\n",
        "    indented",
        "\t",
        "#",
        "###",
    ),
    *("\n1. First", "\n2) Second", "\n2020. Output:", "\nOutput: 3", "\nInput:", "\nInstruction: do", "\n### comment"),
    *(
        "\n- Output:",
        "\n77. Input: x",
        "\n77. Output:",
        "**bold**",
        "\n**Input:**",
        "\n#",
        "\n## Output",
        ":",
        "\n---\n",
    ),
)


def draw(rng):
    text = "".join(rng.choice(PIECES) + " " * rng.randrange(2) for _ in range(rng.randrange(1, 12))).strip()
    lines = text.split("\n")
    return text if "###" not in [line.strip() for line in lines] else draw(rng)


def reads_as_slot(text):
    """Whether a text starts like a repetition of the slot, which the parser removes."""
    return text.startswith("Instruction")


@pytest.mark.parametrize("name", ["iio", "io"])
@pytest.mark.parametrize("finished", [True, False])
def test_random_tasks_round_trip(name, finished):
    rng = random.Random(0)
    total = 0
    for _ in range(400):
        tasks = [
            Task(instruction, draw(rng) if name == "iio" and rng.random() < 0.7 else "", draw(rng) or "x")
            for _ in range(rng.randrange(1, 6))
            if (instruction := draw(rng)) and not reads_as_slot(instruction)
        ]
        rendered = TaskFormat(name).render(tasks)
        completion = rendered[rendered.index("1. Instruction:") + len("1. Instruction:") :]
        assert TaskFormat(name).parse(completion, 1, finished=finished) == tasks, completion
        total += len(tasks)
    assert total > 1000


def test_texts_that_do_not_round_trip():
    """A text with separators or markers of the layout is truncated, or split into two tasks."""

    def round_trip(task):
        return TaskFormat().parse(TaskFormat().render([task]).partition("1. Instruction:")[2], 1)

    assert round_trip(Task("Show a rule.", "", "Above.\n###\nBelow.")) == [Task("Show a rule.", "", "Above.")]
    assert round_trip(Task("Show a rule.", "", "Above.\n4. Instruction: no\n4. Output:\nBelow.")) == [
        Task("Show a rule.", "", "Above."),
        Task("no", "", "Below."),
    ]
    assert round_trip(Task("Show a rule.", "Above.\n1. Output:\nno", "Below.")) == [
        Task("Show a rule.", "Above.", "no\n1. Output:\nBelow.")
    ]
    assert round_trip(Task("Show a rule.", "None", " Below.\r\n")) == [Task("Show a rule.", "", "Below.")]


@pytest.mark.parametrize("unit", [" ", "\n", "#", "###\n", "9", "*", "\u00a0", "### ", "9. ", "_", "no ", "###\n\n \n"])
def test_parsing_time_is_bounded(unit):
    """A looping model fills a completion with one character; a backtracking pattern would take hours."""
    start = time.process_time()
    text = f" Say hello.\n9. Input:\n{unit * 20_000}x\n9. Output:\n{unit * 20_000}x"
    TaskFormat().parse(text, 9)
    assert time.process_time() - start < 2
