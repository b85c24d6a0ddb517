"""Every template's exact strings, trigger words, and the file saved with a model.

The equivalent jinja template is tested in test_chat_template.py.
"""

import doctest
import json
import random
from dataclasses import replace

import jinja2
import pytest

from minigpt import hub
from minigpt.data import prompts
from minigpt.data.encode import encode_segments, fit_example
from minigpt.data.prompts import TEMPLATES, Segment, Template, get_template, template_of
from minigpt.data.tokenizer import END_OF_TEXT, Tokenizer

QUESTION = {"role": "user", "content": "Name the capital."}
WITH_INPUT = {**QUESTION, "input": "France"}
ANSWER = {"role": "assistant", "content": "Paris."}
SYSTEM = {"role": "system", "content": "Be brief."}
TEXT = {"role": "text", "content": "Once upon\n a time "}
EOT = Segment(END_OF_TEXT, supervised=True, special=True)

CASES = {
    "one turn": [QUESTION, ANSWER],
    "input": [WITH_INPUT, ANSWER],
    "system": [SYSTEM, WITH_INPUT, ANSWER],
    "turns": [QUESTION, ANSWER, QUESTION, ANSWER, WITH_INPUT, ANSWER],
}

BELOW = "Below is an instruction that describes a task"
FURTHER = ", paired with an input that provides further context"
WRITE = ". Write a response that appropriately completes the request.\n\n"
ASKED = "### Instruction:\nName the capital.\n\n### Response:\n"
ASKED_WITH_INPUT = "### Instruction:\nName the capital.\n\n### Input:\nFrance\n\n### Response:\n"
IIO = "### Instruction:\nName the capital.\n\n### Input:\n\n\n### Output:\n"
IIO_WITH_INPUT = "### Instruction:\nName the capital.\n\n### Input:\nFrance\n\n### Output:\n"

# (prompt, answer) pairs
ALPACA = {
    "one turn": [(BELOW + WRITE + ASKED, "Paris.")],
    "input": [(BELOW + FURTHER + WRITE + ASKED_WITH_INPUT, "Paris.")],
    "system": [("Be brief.\n\n" + ASKED_WITH_INPUT, "Paris.")],
    "turns": [(BELOW + WRITE + ASKED, "Paris."), ("\n\n" + ASKED, "Paris."), ("\n\n" + ASKED_WITH_INPUT, "Paris.")],
}
RENDERED = {
    "alpaca": ALPACA,
    "alpaca-short": ALPACA | {"input": [(BELOW + WRITE + ASKED_WITH_INPUT, "Paris.")]},
    "hugchat": {
        "one turn": [("Human: Name the capital. \n HugChat:", " Paris.")],
        "input": [("Human: Name the capital.\nFrance \n HugChat:", " Paris.")],
        "system": [("Be brief.\n\nHuman: Name the capital.\nFrance \n HugChat:", " Paris.")],
        "turns": [
            ("Human: Name the capital. \n HugChat:", " Paris."),
            (" \n\n Human: Name the capital. \n HugChat:", " Paris."),
            (" \n\n Human: Name the capital.\nFrance \n HugChat:", " Paris."),
        ],
    },
    "input-output": {
        "one turn": [("Input: Name the capital. \n Output:", " Paris.")],
        "input": [("Input: Name the capital.\nFrance \n Output:", " Paris.")],
        "system": [("Be brief.\n\nInput: Name the capital.\nFrance \n Output:", " Paris.")],
        "turns": [
            ("Input: Name the capital. \n Output:", " Paris."),
            (" \n Input: Name the capital. \n Output:", " Paris."),
            (" \n Input: Name the capital.\nFrance \n Output:", " Paris."),
        ],
    },
    "io": {
        "one turn": [("### Instruction:\nName the capital.\n\n### Output:\n", "Paris.")],
        "input": [("### Instruction:\nName the capital.\nFrance\n\n### Output:\n", "Paris.")],
        "system": [("Be brief.\n\n### Instruction:\nName the capital.\nFrance\n\n### Output:\n", "Paris.")],
        "turns": [
            ("### Instruction:\nName the capital.\n\n### Output:\n", "Paris."),
            ("\n\n### Instruction:\nName the capital.\n\n### Output:\n", "Paris."),
            ("\n\n### Instruction:\nName the capital.\nFrance\n\n### Output:\n", "Paris."),
        ],
    },
    "iio": {
        "one turn": [(IIO, "Paris.")],
        "input": [(IIO_WITH_INPUT, "Paris.")],
        "system": [("Be brief.\n\n" + IIO_WITH_INPUT, "Paris.")],
        "turns": [(IIO, "Paris."), ("\n\n" + IIO, "Paris."), ("\n\n" + IIO_WITH_INPUT, "Paris.")],
    },
    "none": {
        "one turn": [("Name the capital.", "\nParis.")],
        "input": [("Name the capital.\nFrance", "\nParis.")],
        "system": [("Be brief.\n\nName the capital.\nFrance", "\nParis.")],
        "turns": [
            ("Name the capital.", "\nParis."),
            ("\nName the capital.", "\nParis."),
            ("\nName the capital.\nFrance", "\nParis."),
        ],
    },
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("case", CASES)
def test_exact_strings(name, case):
    template, expected = get_template(name), []
    for prompt, answer in RENDERED[name][case]:
        expected += [Segment(prompt, supervised=name == "none"), Segment(answer, supervised=True), EOT]
    assert template.render(CASES[case]) == expected
    # with a generation prompt, the same segments up to the last answer; without, the open question is left out
    assert template.render(CASES[case][:-1], add_generation_prompt=True) == expected[:-2]
    assert template.render(CASES[case][:-1]) == expected[:-3]


@pytest.mark.parametrize("name", TEMPLATES)
def test_plain_text_is_verbatim(name):
    assert get_template(name).render([]) == []
    text = Segment("Once upon\n a time ", supervised=True)
    assert get_template(name).render([TEXT]) == [text, EOT]
    assert get_template(name).render([TEXT], add_generation_prompt=True) == [text]


def test_docstring_example():
    assert doctest.testmod(prompts) == doctest.TestResults(failed=0, attempted=2)


WRONG_ROLES = {
    "an answer first": ([ANSWER], False, "turn 1 has the role 'assistant', expected 'user'"),
    "two questions": ([SYSTEM, QUESTION, QUESTION], False, "turn 2 has the role 'user', expected 'assistant'"),
    "a late system message": ([QUESTION, ANSWER, SYSTEM], False, "turn 3 has the role 'system', expected 'user'"),
    "two system messages": ([SYSTEM, SYSTEM], False, "turn 1 has the role 'system', expected 'user'"),
    "an unknown role": ([{"role": "tool", "content": ""}], False, "turn 1 has the role 'tool', expected 'user'"),
    "a message after a text": ([TEXT, QUESTION], False, "turn 1 has the role 'text', expected 'user'"),
    "nothing to answer": ([QUESTION, ANSWER], True, "the last message must be a user's, because the model answers it"),
    "only a system message": ([SYSTEM], True, "the last message must be a user's, because the model answers it"),
    "no messages": ([], True, "the last message must be a user's, because the model answers it"),
}


@pytest.mark.parametrize("name", WRONG_ROLES)
def test_wrong_roles_are_errors(name):
    messages, add_generation_prompt, message = WRONG_ROLES[name]
    with pytest.raises(ValueError) as caught:
        get_template("alpaca").render(messages, add_generation_prompt)
    assert str(caught.value) == message


def text_of(segments: list[Segment]) -> str:
    return "".join(segment.text for segment in segments)


TRIGGERS = {
    "alpaca": (
        {"instruction": "Request", "input": "Given", "output": "Answer"},
        "### Request:\nName the capital.\n\n### Given:\nFrance\n\n### Answer:\nParis.<|endoftext|>",
        ("### Request:",),
    ),
    "io": (
        {"instruction": "Request", "output": "Answer"},
        "### Request:\nName the capital.\nFrance\n\n### Answer:\nParis.<|endoftext|>",
        ("### Request:",),
    ),
    "iio": (
        {"output": "Answer"},
        "### Instruction:\nName the capital.\n\n### Input:\nFrance\n\n### Answer:\nParis.<|endoftext|>",
        ("### Instruction:",),
    ),
    "hugchat": (
        {"human": "Q", "assistant": "A"},
        "Q: Name the capital.\nFrance \n A: Paris.<|endoftext|>",
        ("Q:",),
    ),
    "input-output": (
        {"human": "Q"},
        "Q: Name the capital.\nFrance \n Output: Paris.<|endoftext|>",
        ("Q:",),
    ),
}


@pytest.mark.parametrize("name", TRIGGERS)
def test_trigger_words_are_replaced_everywhere(name):
    words, text, stop = TRIGGERS[name]
    template = get_template(name, **words)
    assert text_of(template.render([WITH_INPUT, ANSWER])).endswith(text)
    assert template.stop_strings() == stop
    assert template.read_answer(f" Paris.\n\n{stop[0]} more") == "Paris."
    assert get_template(name) == TEMPLATES[name]  # the built-in template is unchanged
    assert get_template(name, **{**words, min(words): ""}).triggers[min(words)] == ""  # empty is a word too


def test_stop_strings_of_the_built_in_templates():
    assert {name: template.stop_strings() for name, template in TEMPLATES.items()} == {
        "alpaca": ("### Instruction:",),
        "alpaca-short": ("### Instruction:",),
        "hugchat": ("Human:",),
        "input-output": ("Input:",),
        "io": ("### Instruction:",),
        "iio": ("### Instruction:",),
        "none": (),
    }


UNKNOWN_TRIGGERS = {
    ("io", "input"): "template io has no trigger_input; it has trigger_instruction, trigger_output",
    ("alpaca", "human"): (
        "template alpaca has no trigger_human; it has trigger_instruction, trigger_input, trigger_output"
    ),
    ("hugchat", "output"): "template hugchat has no trigger_output; it has trigger_human, trigger_assistant",
    ("none", "assistant"): "template none has no trigger_assistant; it has no trigger words",
}


@pytest.mark.parametrize(("name", "trigger"), UNKNOWN_TRIGGERS)
def test_unknown_trigger_words_are_errors(name, trigger):
    with pytest.raises(ValueError) as caught:
        get_template(name, **{trigger: "X"})
    assert str(caught.value) == UNKNOWN_TRIGGERS[name, trigger]


def test_read_answer_ends_at_the_first_stop_string():
    template = replace(get_template("hugchat"), stop=("{human}:", "{assistant}:"))
    assert template.read_answer(" \n Paris. \n\n Human: and HugChat: no") == "Paris."
    assert template.read_answer("Paris.HugChat: Human:") == "Paris."
    assert template.read_answer("Paris. ") == "Paris."
    assert template.read_answer("Human: Paris.") == ""


# ---- byte-pair merges across the boundary of prompt and answer


def test_training_and_inference_tokenize_the_prompt_alike():
    """Tokenizing the joined text may merge the prompt's last bytes with the answer's first, which chat never does."""
    tokenizer, rng = Tokenizer.tiny(), random.Random(0)
    pieces = ["Name", " the", "capital", " ", "\n", "\n", ".", ":", "é", "日", "😀", END_OF_TEXT, "{", "}", "'s"]

    def text() -> str:
        return "".join(rng.choices(pieces, k=rng.randint(0, 6)))

    merged, templates = 0, list(TEMPLATES.values())
    for _ in range(100):
        template, conversations = rng.choice(templates), []
        for _ in range(100):
            user, answer = {"role": "user", "content": text(), "input": rng.choice(["", text()])}, text()
            turns = [user, {"role": "assistant", "content": answer}]
            conversations.append([*rng.choice([[], turns]), *turns])
        for messages in conversations:
            fitted = fit_example(messages, template, tokenizer, 1000)
            prompt = encode_segments(template.render(messages[:-1], add_generation_prompt=True), tokenizer).ids
            answer = tokenizer.encode(template.answer.format(content=messages[-1]["content"]))
            assert fitted.example.ids == [*prompt, *answer, tokenizer.eot_id]
            if len(messages) == 2:
                merged += tokenizer.encode(text_of(template.render(messages)[:-1])) != [*prompt, *answer]
    assert merged  # the joined text has other ids at least once, so the test covers the trap


# ---- the file saved with a model


@pytest.mark.parametrize("name", TEMPLATES)
def test_save_and_load(name, tmp_path):
    words = {word: f"<{word} é {{0}} '\\>" for word in TEMPLATES[name].triggers}
    template = get_template(name, **words)
    template.save_pretrained(tmp_path / "new folder")
    assert get_template(tmp_path / "new folder") == template
    assert get_template(str(tmp_path / "new folder" / "prompt_template.json")) == template
    assert get_template(tmp_path / "new folder", **dict.fromkeys(words)) == template
    assert template_of(tmp_path / "new folder") == tmp_path / "new folder" / "prompt_template.json"
    assert get_template(template_of(tmp_path / "new folder")) == template


def test_the_default_template_is_alpaca(tmp_path):
    assert template_of(tmp_path) == "alpaca"


def test_a_raw_text_model_is_tuned_with_alpaca(tmp_path):
    get_template("none").save_pretrained(tmp_path)
    assert template_of(tmp_path) == tmp_path / "prompt_template.json"
    assert template_of(tmp_path, to_tune=True) == "alpaca"
    get_template("io").save_pretrained(tmp_path)
    assert template_of(tmp_path, to_tune=True) == tmp_path / "prompt_template.json"


def test_a_template_file_needs_three_keys(tmp_path):
    (tmp_path / "prompt_template.json").write_text(
        '{"name": "qa", "user": "Q {content} A ", "user_with_input": "{context} {{}}"}'
    )
    template = get_template(tmp_path)
    assert template == Template(name="qa", user="Q {content} A ", user_with_input="{context} {{}}")
    assert text_of(template.render([WITH_INPUT, ANSWER, QUESTION, ANSWER])) == (
        "France {}Paris.<|endoftext|>\n\nQ Name the capital. A Paris.<|endoftext|>"
    )


GOOD = {"name": "qa", "user": "{content}", "user_with_input": "{content}", "triggers": {"human": "Q"}}
BROKEN = {
    "truncated": ('{"name": "qa",\n "user', "2: not JSON: Unterminated string starting at (correct"),
    "not UTF-8": ('{"name": "\udcff"}', "not UTF-8 text (byte 10), so not JSON"),
    "a list": ("[]", "expected a JSON object"),
    "missing key": ({"name": "qa", "user": ""}, "a template has the keys name, user, user_with_input"),
    "unknown key": (GOOD | {"users": ""}, "a template has the keys name, user, user_with_input"),
    "a number": (GOOD | {"user": 5}, 'user is 5, expected a value like "### {instruction}:'),
    "null": (GOOD | {"system": None}, r'system is null, expected a value like "{content}\n\n"'),
    "stop is a string": (GOOD | {"stop": "Q:"}, 'stop is "Q:", expected a value like ["### {instruction}:"]'),
    "a number in stop": (GOOD | {"stop": [5]}, "AttributeError("),
    "unknown placeholder": (
        GOOD | {"user": "{humn}"},
        "KeyError('humn'): the placeholders of a pattern are content, context, human; a literal brace is doubled",
    ),
    "unknown placeholder in stop": (GOOD | {"stop": ["{assistant}"]}, "KeyError('assistant')"),
    "content in stop": (GOOD | {"stop": ["{content}"]}, "KeyError('content')"),
    "an open brace": (GOOD | {"separator": "{content"}, "ValueError("),
    "empty placeholder": (GOOD | {"preamble_with_input": "{}"}, "IndexError("),
    "attribute access": (GOOD | {"answer": "{content.x}"}, "AttributeError("),
    "a trigger named content": (GOOD | {"triggers": {"content": "Q"}}, "TypeError("),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_one_line_errors_with_the_path(name, tmp_path):
    content, message = BROKEN[name]
    path = tmp_path / "prompt_template.json"
    content = content if isinstance(content, str) else json.dumps(content)
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError) as caught:
        get_template(tmp_path)
    assert str(caught.value).removeprefix(f"{path}:").lstrip().startswith(message)
    assert "\n" not in str(caught.value)


def test_no_such_template(tmp_path, monkeypatch):
    names = "one of alpaca, alpaca-short, hugchat, input-output, io, iio, none, or a folder with prompt_template.json"
    monkeypatch.setattr(hub, "fetch", None)  # a misspelt name must not query the hub
    for folder in ("alpca", tmp_path, tmp_path / "absent", tmp_path / "absent" / "prompt_template.json"):
        with pytest.raises(ValueError) as caught:
            get_template(folder)
        assert str(caught.value) == f"no template '{folder}'; {names}"


# ---- user input


def test_an_input_of_none_is_no_input():
    """Tabular datasets have `input` in every row, None if there is none; not every tool removes it."""
    template, messages = get_template("iio"), [{**QUESTION, "input": None}, ANSWER]
    assert text_of(template.render(messages)) == IIO + "Paris.<|endoftext|>"
    rendered = jinja2.Template(template.to_jinja()).render(messages=messages, eos_token=END_OF_TEXT)
    assert rendered == IIO + "Paris.<|endoftext|>"


@pytest.mark.parametrize("name", TEMPLATES)
def test_braces_in_messages_are_literal(name):
    user = {"role": "user", "content": "{content} {0} {{x}} }", "input": "{context} {"}
    template = get_template(name, **dict.fromkeys(TEMPLATES[name].triggers, "{output}{"))
    text = text_of(template.render([user, {"role": "assistant", "content": "{human} }}"}]))
    assert "{content} {0} {{x}} }" in text
    assert "{context} {" in text
    assert text.endswith("{human} }}<|endoftext|>")
    assert all("{output}{:" in stop for stop in template.stop_strings())
