"""Encoding conversations: which ids are supervised, and how long ones are truncated."""

import random

import pytest

from minigpt.data.encode import Example, Fitted, encode_example, encode_segments, fit_example
from minigpt.data.prompts import TEMPLATES, Segment, get_template
from minigpt.data.read.records import Conversation
from minigpt.data.tokenizer import END_OF_TEXT, Tokenizer

TOKENIZER = Tokenizer.tiny()
EOT = TOKENIZER.eot_id
IO = get_template("io")


def ids_of(*texts: str) -> list[int]:
    return [id for text in texts for id in TOKENIZER.encode(text)]


def user(content: str, **more: str) -> dict[str, str]:
    return {"role": "user", "content": content, **more}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def encode(messages, max_seq_length=1000, template=IO, **options) -> Example | None:
    return encode_example(Conversation(messages), template, TOKENIZER, max_seq_length, **options)


def question(text: str, first: bool = True) -> list[int]:
    return ids_of(f"{'' if first else chr(10) * 2}### Instruction:\n{text}\n\n### Output:\n")


def test_answer_and_end_of_text_are_supervised():
    example = encode([user("Name the capital."), assistant("Paris.")])
    prompt, answer = question("Name the capital."), ids_of("Paris.")
    assert example.ids == [*prompt, *answer, EOT]
    assert example.supervised == [False] * len(prompt) + [True] * (len(answer) + 1)
    assert len(example) == len(prompt) + len(answer) + 1


def test_every_answer_of_a_dialogue_is_supervised():
    system = {"role": "system", "content": "Be brief."}
    example = encode(
        [system, user("One?"), assistant("1"), user("Two?"), assistant(""), user("Three?"), assistant("3")]
    )
    parts = [
        (ids_of("Be brief.\n\n### Instruction:\nOne?\n\n### Output:\n"), False),
        ([*ids_of("1"), EOT], True),
        (question("Two?", first=False), False),
        ([EOT], True),  # an empty answer still trains end-of-text
        (question("Three?", first=False), False),
        ([*ids_of("3"), EOT], True),
    ]
    assert example.ids == [id for ids, _ in parts for id in ids]
    assert example.supervised == [supervised for ids, supervised in parts for _ in ids]


def test_train_on_prompt_supervises_everything():
    messages = [user("One?"), assistant("1"), user("Two?"), assistant("2")]
    example = encode(messages, train_on_prompt=True)
    assert example.ids == encode(messages).ids
    assert example.supervised == [True] * len(example)


def test_plain_text_is_fully_supervised():
    example = encode([{"role": "text", "content": "Once upon a time"}])
    assert example == Example([*ids_of("Once upon a time"), EOT], [True] * (len(ids_of("Once upon a time")) + 1))


def test_template_none_supervises_the_prompt():
    example = encode([user("Name"), assistant("Paris.")], template=get_template("none"))
    assert example.ids == [*ids_of("Name"), *ids_of("\nParis."), EOT]
    assert all(example.supervised)


@pytest.mark.parametrize("name", TEMPLATES)
def test_typed_end_of_text_is_not_the_special_token(name):
    typed = f"a{END_OF_TEXT}b {END_OF_TEXT}"
    messages = [
        {"role": "system", "content": typed},
        user(typed, input=typed),
        assistant(typed),
        user(typed),
        assistant(typed),
    ]
    ids = encode(messages, template=get_template(name)).ids
    assert ids.count(EOT) == 2
    assert TOKENIZER.decode(ids).count(END_OF_TEXT) == 2 + 2 * 6
    for text in (typed, END_OF_TEXT):
        assert encode([{"role": "text", "content": text}], template=get_template(name)).ids.count(EOT) == 1
        assert encode([user(text), assistant(text)], template=get_template(name)).ids.count(EOT) == 1


def test_segments_are_tokenized_separately():
    segments = [Segment("Par", False), Segment("is.", True), Segment(END_OF_TEXT, True, special=True)]
    example = encode_segments(segments, TOKENIZER)
    assert example.ids == [*ids_of("Par", "is."), EOT] != [*ids_of("Paris."), EOT]
    assert example.supervised == [False] * len(ids_of("Par")) + [True] * (len(ids_of("is.")) + 1)
    assert encode_segments([], TOKENIZER) == Example([], [])


# ---- truncation

CAPITAL = [user("Name the capital of France."), assistant("The capital of France is Paris.")]
PROMPT, ANSWER = question("Name the capital of France."), [*ids_of("The capital of France is Paris."), EOT]


def test_the_limit_is_max_seq_length_plus_one_ids():
    whole = len(PROMPT) + len(ANSWER)
    assert fit_example(CAPITAL, IO, TOKENIZER, whole - 1) == Fitted(
        Example(PROMPT + ANSWER, [False] * len(PROMPT) + [True] * len(ANSWER)), [], [], len(PROMPT)
    )
    assert fit_example(CAPITAL, IO, TOKENIZER, whole - 2) == Fitted(
        Example(PROMPT[1:] + ANSWER, [False] * (len(PROMPT) - 1) + [True] * len(ANSWER)),
        PROMPT[:1],
        [],
        len(PROMPT) - 1,
    )


def test_the_prompt_is_truncated_before_the_answer():
    assert fit_example(CAPITAL, IO, TOKENIZER, len(ANSWER)) == Fitted(
        Example(PROMPT[-1:] + ANSWER, [False] + [True] * len(ANSWER)), PROMPT[:-1], [], 1
    )
    assert fit_example(CAPITAL, IO, TOKENIZER, len(ANSWER) - 2) == Fitted(
        Example(PROMPT[-1:] + ANSWER[:-2], [False] + [True] * (len(ANSWER) - 2)), PROMPT[:-1], ANSWER[-2:], 1
    )
    assert fit_example(CAPITAL, IO, TOKENIZER, 1) == Fitted(
        Example([PROMPT[-1], ANSWER[0]], [False, True]), PROMPT[:-1], ANSWER[1:], 1
    )


def test_plain_text_is_truncated_on_the_right():
    ids = [*ids_of("Once upon a time there was a king."), EOT]
    assert fit_example([{"role": "text", "content": "Once upon a time there was a king."}], IO, TOKENIZER, 4) == Fitted(
        Example(ids[:5], [True] * 5), [], ids[5:], 0
    )


def test_oldest_turns_are_dropped_and_the_system_message_kept():
    system = {"role": "system", "content": "Be brief."}
    turns = [[user(f"Question {n}?"), assistant(f"Answer {n}.")] for n in range(4)]
    expected = encode([system, *turns[2], *turns[3]])
    messages = [system, *[message for turn in turns for message in turn]]
    fitted = fit_example(messages, IO, TOKENIZER, len(expected) - 1)
    assert fitted.example == expected
    assert fitted.cut_left == [
        *ids_of("Be brief.\n\n### Instruction:\nQuestion 0?\n\n### Output:\n", "Answer 0."),
        EOT,
        *question("Question 1?", first=False),
        *ids_of("Answer 1."),
        EOT,
    ]
    assert fitted.cut_right == []
    assert fitted.prompt_length == len(ids_of("Be brief.\n\n### Instruction:\nQuestion 2?\n\n### Output:\n"))
    assert encode(messages, len(expected) - 2) == encode([system, *turns[3]])


def test_no_more_turns_are_dropped_than_needed():
    """In hugchat a turn that becomes the first loses its separator, and is then just short enough."""
    hugchat = get_template("hugchat")
    turns = [[user(f"Question {n}?"), assistant(f"Answer {n}.")] for n in range(3)]
    expected = encode([*turns[1], *turns[2]], template=hugchat)
    assert encode([*turns[0], *turns[1], *turns[2]], len(expected) - 1, hugchat) == expected


def test_nothing_supervised_gives_none():
    assert encode([]) is None
    assert encode([user("Name the capital.")]) is None
    assert encode([user("Name the capital.")], train_on_prompt=True) is None
    assert encode([{"role": "text", "content": ""}]) is None  # only end-of-text: no target is left after the shift
    assert encode(CAPITAL, max_seq_length=0) is None


def naive(messages, template, max_seq_length) -> Fitted:
    """Reference implementation: one step at a time, rendering the remaining messages again each time."""

    def pieces() -> list[tuple[list[int], bool]]:
        return [
            ([EOT] if segment.special else TOKENIZER.encode(segment.text), segment.supervised)
            for segment in template.render(messages)
        ]

    whole, first, cut_left = pieces(), int(messages[0]["role"] == "system"), []
    while sum(len(ids) for ids, _ in pieces()) > max_seq_length + 1 and len(messages) - first > 2:
        del messages[first : first + 2]
    for ids, _ in whole[: len(whole) - len(pieces())]:
        cut_left += ids
    ids = [id for piece, _ in pieces() for id in piece]
    supervised = [mask for piece, mask in pieces() for _ in piece]
    prompt_length = len(pieces()[0][0])
    if len(messages) - first == 2:
        while len(ids) > max_seq_length + 1 and prompt_length > 1:
            cut_left.append(ids.pop(0))
            supervised.pop(0)
            prompt_length -= 1
    n = max_seq_length + 1
    return Fitted(Example(ids[:n], supervised[:n]), cut_left, ids[n:], prompt_length)


def random_conversation(rng: random.Random) -> list[dict[str, str]]:
    def text() -> str:
        return " ".join(rng.choices(["a", "king", "Name", "the", "capital", "1", "é日"], k=rng.randint(1, 12)))

    messages = [{"role": "system", "content": text()}] if rng.random() < 0.3 else []
    for _ in range(rng.choice([1, 1, 2, 3, 6])):
        messages += [user(text(), input=rng.choice(["", text()])), assistant(text())]
    return messages


@pytest.mark.parametrize("name", TEMPLATES)
def test_random_conversations_match_the_reference_implementation(name):
    rng, template = random.Random(name), get_template(name)
    for _ in range(150):
        messages, length = random_conversation(rng), rng.choice([1, 2, 5, 20, 40, 60, 80, 120, 200])
        assert fit_example(messages, template, TOKENIZER, length) == naive(list(messages), template, length)
