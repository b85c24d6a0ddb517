"""Records of every format are converted to Conversations; errors name file, line and fix."""

import json

import pytest

from minigpt.data.read.records import Conversation, read_records, read_texts

PARIS = [
    {"role": "user", "content": "Name the capital.", "input": "France"},
    {"role": "assistant", "content": "Paris."},
]
HELLO = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
SYSTEM = {"role": "system", "content": "Be brief."}


def text(content):
    return [{"role": "text", "content": content}]


def read(tmp_path, content, name="data.json", **options):
    """The messages of every conversation in a file with this content."""
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8", newline="")
    return [conversation.messages for conversation in read_records(path, **options)]


FORMATS = {
    "alpaca": (
        [
            {"instruction": "Name the capital.", "input": "France", "output": "Paris."},
            {"instruction": "Hi.", "input": "", "output": "Hello."},
            {"instruction": "Hi.", "output": "Hello."},
            {"instruction": "Hi.", "input": None, "output": "Hello.", "text": "Below is an instruction ..."},
        ],
        [PARIS, HELLO, HELLO, HELLO],
    ),
    "databricks-dolly": (
        [
            {"instruction": "Name the capital.", "context": "France", "response": "Paris.", "category": "closed_qa"},
            {"instruction": "Hi.", "context": "", "response": "Hello.", "category": "open_qa"},
            {"instruction": "Hi.", "response": "Hello."},
            {"instruction": "Name the capital.", "input": "France", "response": "Paris."},
            {"instruction": "Hi.", "output": "Hello.", "context": "not Alpaca's", "response": "not Alpaca's"},
        ],
        [PARIS, HELLO, HELLO, PARIS, HELLO],
    ),
    "text2text": ({"type": "text2text", "instances": [{"input": "Hi.", "output": "Hello."}]}, [HELLO]),
    "text_only": ({"type": "text_only", "instances": [{"text": "One."}, {"text": ""}]}, [text("One."), text("")]),
    "text": (
        {"text": " Human beings are social. \n\nHuman: a noun. \n"},
        [text(" Human beings are social. \n\nHuman: a noun. \n")],
    ),
    "text, HugChat": (
        [
            {"text": "Human: Hi. \n HugChat: Hello. \n\n"},
            {"text": "[Human]: Hi. \n [HugChat]: Hello. \n\n"},
            {"text": "Be brief.\n\nHuman: Hi. \n HugChat: Hello. \n\n Human: Say:\n- a \n HugChat: a\n\nb \n\n"},
        ],
        [
            HELLO,
            HELLO,
            [SYSTEM, *HELLO, {"role": "user", "content": "Say:\n- a"}, {"role": "assistant", "content": "a\n\nb"}],
        ],
    ),
    "text, OIG": (
        [
            {"text": "<human>: Hi.\n<bot>: Hello.", "metadata": {"source": "x"}},
            {"text": "Be brief. <human>: Hi. <bot>: Hello. <human>: Bye."},
        ],
        [HELLO, [SYSTEM, *HELLO]],
    ),
    "prompt and completion": ({"prompt": "Hi.", "completion": "Hello."}, [HELLO]),
    "prompt and response": ({"prompt": "Hi.", "response": "Hello.", "source": "x"}, [HELLO]),
    "messages": (
        [
            {"prompt": "Hi.", "messages": HELLO},
            {"messages": [SYSTEM, *HELLO, *PARIS, {"role": "user", "content": "And of Spain?"}]},
        ],
        [HELLO, [SYSTEM, *HELLO, *PARIS]],
    ),
    "LMFlow conversation": (
        {
            "type": "conversation",
            "instances": [
                {"conversation_id": 1, "system": "Be brief.", "tools": [], "messages": HELLO},
                {"messages": HELLO},
                {"system": "", "messages": HELLO},
            ],
        },
        [[SYSTEM, *HELLO], HELLO, HELLO],
    ),
    "ShareGPT": (
        [
            {"conversations": [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello."}]},
            {
                "id": "x",
                "conversations": [
                    {"from": "system", "value": "Be brief."},
                    {"from": "user", "value": "Hi."},
                    {"from": "assistant", "value": "Hello."},
                ],
            },
        ],
        [HELLO, [SYSTEM, *HELLO]],
    ),
    "seed tasks": (
        {
            "id": "seed_task_0",
            "name": "capitals",
            "instruction": "Name the capital.",
            "instances": [{"input": "France", "output": "Paris."}, {"input": "", "output": "Which country?"}],
            "is_classification": False,
        },
        [PARIS, [{"role": "user", "content": "Name the capital."}, {"role": "assistant", "content": "Which country?"}]],
    ),
    "seed tasks, required keys": ({"instruction": "Hi.", "instances": [{"output": "Hello."}]}, [HELLO]),
    "self-instruct output": (
        [
            {
                "instruction": "Name the capital.",
                "input": "France",
                "output": "Paris.",
                "most_similar_instructions": {"Hi.": 0.1},
                "avg_similarity_score": 0.01,
                "request_idx": 7,
            },
            {
                "instruction": "Hi.",
                "input": "<noinput>",
                "output": "Hello.",
                "most_similar": {},
                "avg_similarity_score": 0,
            },
        ],
        [PARIS, HELLO],
    ),
    "Belle": (
        [
            {"instruction": "Hi.", "input": "", "output": "Hello."},
            {
                "instruction": "Human:Hi. \nAssistant:Hello. \nHuman:你是谁?\nAssistant:",
                "input": "",
                "output": "我是 A。",
            },
            {"instruction": "Human: Hi.\nAssistant: Hello.\nSum this up.", "input": "", "output": "A greeting."},
        ],
        [
            HELLO,
            [*HELLO, {"role": "user", "content": "你是谁?"}, {"role": "assistant", "content": "我是 A。"}],
            [
                {"role": "user", "content": "Human: Hi.\nAssistant: Hello.\nSum this up."},
                {"role": "assistant", "content": "A greeting."},
            ],
        ],
    ),
}


@pytest.mark.parametrize("layout", ["array", "lines", "indented"])
@pytest.mark.parametrize("name", FORMATS)
def test_formats(tmp_path, name, layout):
    records, expected = FORMATS[name]
    if layout == "lines":
        rows = records if isinstance(records, list) else [records]
        assert read(tmp_path, "".join(json.dumps(row) + "\n" for row in rows)) == expected
    else:
        assert read(tmp_path, json.dumps(records, indent=2 if layout == "indented" else None)) == expected


def test_a_txt_file_is_one_verbatim_message(tmp_path):
    story = '{"text": 1}\n\n  Human: Hi. \n HugChat: Hello. \n'
    assert read(tmp_path, story, "story.txt") == [text(story)]


def test_formats_may_be_mixed_in_one_file(tmp_path):
    lines = ['{"text": "One."}', '{"prompt": "Hi.", "completion": "Hello."}', '{"text": "<human>: Hi. <bot>: Hello."}']
    assert read(tmp_path, "\n".join(lines)) == [text("One."), HELLO, HELLO]


def test_source_is_file_and_line_and_is_not_compared(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('\n{"text": "a"}\n\n{"text": "a"}\n')
    first, second = read_records(path)
    assert (first.source, second.source) == (f"{path}:2", f"{path}:4")
    assert first == second == Conversation(text("a"))


def test_source_distinguishes_records_on_one_line(tmp_path):
    """Regression: json.dump writes an array on one line, so all its records had the source FILE:1."""
    path = tmp_path / "data.json"
    path.write_text('[{"text": "a"}, {"text": "b"},\n {"text": "c"}, {"text": "d"}, 5]')
    locations, bad = ["1", "1, record 2", "2", "2, record 2"], []
    records = list(read_records(path, skip_bad_records=1, bad_records=bad))
    assert [record.source for record in records] == [f"{path}:{location}" for location in locations]
    assert bad[0].startswith(f"{path}:2, record 3: the record is a number (5)")

    (tmp_path / "dataset.jsonl").write_text('{"type": "text_only", "instances": [{"text": "a"}, {"text": "b"}]}\n')
    (tmp_path / "tasks.json").write_text(
        json.dumps([FORMATS["seed tasks"][0]] * 2)
    )  # each record has two conversations
    sources = [record.source.removeprefix(f"{tmp_path}/") for record in read_records(tmp_path, skip_bad_records=1)][4:]
    tasks = ["tasks.json:1"] * 2 + ["tasks.json:1, record 2"] * 2
    assert sources == ["dataset.jsonl:1", "dataset.jsonl:1, record 2", *tasks]


@pytest.mark.parametrize(
    "blank", ["", " \n", "<noinput>", "<nooutput>", "<No input>", "Noinput", "[no_input]", "no input."]
)
def test_a_blank_input_is_no_input(tmp_path, blank):
    assert read(tmp_path, {"instruction": "Hi.", "input": blank, "output": "Hello."}) == [HELLO]


@pytest.mark.parametrize("content", ["  spaces \n", "a\r\nb", "no inputs here", "None", "a\u2028b"])
def test_contents_are_verbatim(tmp_path, content):
    expected = [{"role": "user", "content": content, "input": content}, {"role": "assistant", "content": content}]
    assert read(tmp_path, {"instruction": content, "input": content, "output": content}) == [expected]


def test_an_empty_answer_is_valid(tmp_path):
    record = {"instruction": "Say nothing.", "input": "", "output": ""}
    assert read(tmp_path, record) == [
        [{"role": "user", "content": "Say nothing."}, {"role": "assistant", "content": ""}]
    ]


def test_the_last_of_repeated_keys_wins(tmp_path):
    assert read(tmp_path, '{"text": "a", "text": "b"}') == [text("b")]


FORMAT_LIST = '"instruction" and "output", "prompt" and "completion", "input" and "output", "messages" or "text"'
TURNS = "(a system message first, if any, then user and assistant alternating)"
BAD_RECORDS = [
    (3, f"the record is a number (3), expected an object with {FORMAT_LIST}"),
    (["a"], f'the record is an array (["a"]), expected an object with {FORMAT_LIST}'),
    ("a", f'the record is a string ("a"), expected an object with {FORMAT_LIST}'),
    (None, f"the record is null, expected an object with {FORMAT_LIST}"),
    (True, f"the record is a boolean (true), expected an object with {FORMAT_LIST}"),
    ({}, f"a record of unknown format, found no keys, expected {FORMAT_LIST}"),
    ({"a": 1, "b": 2}, f'a record of unknown format, found "a", "b", expected {FORMAT_LIST}'),
    (
        {"instrucion": "Hi.", "output": "Hello."},
        'a record of unknown format, found "instrucion", "output" (rename "instrucion" to "instruction"?), '
        f"expected {FORMAT_LIST}",
    ),
    ({"instruction": "Hi."}, '"output" is missing, found "instruction"'),
    (
        {"instruction": "Hi.", "ouput": "Hello."},
        '"output" is missing, found "instruction", "ouput" (rename "ouput" to "output"?)',
    ),
    ({"instruction": 3, "output": "Hello."}, '"instruction" is a number (3), expected a string'),
    ({"instruction": "Hi.", "output": None}, '"output" is null, expected a string'),
    ({"instruction": "Hi.", "context": 1, "response": "Hello."}, '"context" is a number (1), expected a string'),
    (
        {"instruction": "Hi.", "input": ["x" * 50], "output": ""},
        f'"input" is an array (["{"x" * 35}...), expected a string',
    ),
    ({"prompt": "Hi.", "answer": "Hello."}, '"completion" is missing, found "prompt", "answer"'),
    ({"input": "Hi."}, '"output" is missing, found "input"'),
    ({"text": {"a": 1}}, '"text" is an object ({"a": 1}), expected a string'),
    ({"text": "\ud83d"}, '"text" contains half of a surrogate pair (\\ud83d), which is not a character: remove it'),
    ({"text": "Human: a \n HugChat: b \n HugChat: c"}, f'turn 3 has the role "assistant", expected "user" {TURNS}'),
    ({"messages": "Hi."}, '"messages" is a string ("Hi."), expected an array of objects'),
    ({"messages": ["Hi."]}, 'item 1 of "messages" is a string ("Hi."), expected an object'),
    ({"messages": []}, "no assistant turn: there is nothing to learn from"),
    ({"messages": HELLO[:1]}, "no assistant turn: there is nothing to learn from"),
    ({"messages": HELLO[1:]}, f'the first turn has the role "assistant", expected "user" {TURNS}'),
    ({"messages": [HELLO[0], *HELLO]}, f'turn 2 has the role "user", expected "assistant" {TURNS}'),
    ({"messages": [*HELLO, SYSTEM, *HELLO]}, f'turn 3 has the role "system", expected "user" {TURNS}'),
    ({"system": "A", "messages": [SYSTEM, *HELLO]}, f'the first turn has the role "system", expected "user" {TURNS}'),
    (
        {"messages": [HELLO[0], {"role": "asistant", "content": "Hello."}]},
        'message 2 of "messages": the role "asistant" (did you mean "assistant"?), '
        'expected one of "system", "user", "assistant", "human", "gpt"',
    ),
    (
        {"messages": [HELLO[0], {"role": "assistant", "content": None}]},
        'message 2 of "messages": "content" is null, expected a string',
    ),
    (
        {"conversations": [{"from": "human", "text": "Hi."}]},
        'message 1 of "conversations": "value" is missing, found "from", "text"',
    ),
    ({"instruction": "Hi.", "instances": {}}, '"instances" is an object ({}), expected an array of objects'),
    ({"instruction": "Hi.", "instances": []}, '"instances" is empty: there is nothing to learn from'),
    ({"instruction": "Hi.", "instances": [{"input": "a"}]}, '"output" is missing, found "input"'),
    (
        {"id": 1, "instrucion": "Hi.", "instances": [{"output": "a"}]},
        '"instruction" is missing, found "id", "instrucion", "instances" (rename "instrucion" to "instruction"?)',
    ),
]


@pytest.mark.parametrize(("record", "message"), BAD_RECORDS, ids=[json.dumps(record)[:40] for record, _ in BAD_RECORDS])
def test_bad_records(tmp_path, record, message):
    lines = ['{"text": "good"}', json.dumps(record)]
    for content, line in ("\n".join(lines), 2), ("[\n\n" + ",\n".join(lines) + "]", 4):
        with pytest.raises(ValueError) as error:
            read(tmp_path, content)
        assert str(error.value) == f"{tmp_path / 'data.json'}:{line}: {message}"


def test_skip_bad_records_is_a_limit_over_all_files(tmp_path):
    good = '{"text": "good"}\n'
    (tmp_path / "a.jsonl").write_text(good + "{\n" + good)
    (tmp_path / "b.json").write_text('[{"text": "good"}, 3,\n {"text": 4}]')
    bad = [
        f"{tmp_path}/a.jsonl:2: the line ends in the middle of a record (column 1): a record must be on one line",
        f"{tmp_path}/b.json:1, record 2: the record is a number (3), expected an object with {FORMAT_LIST}",
        f'{tmp_path}/b.json:2: "text" is a number (4), expected a string',
    ]
    skipped: list[str] = []
    assert len(list(read_records(tmp_path, skip_bad_records=3, bad_records=skipped))) == 3
    assert skipped == bad

    skipped = []
    with pytest.raises(ValueError) as error:
        list(read_records(tmp_path, skip_bad_records=2, bad_records=skipped))
    assert str(error.value) == f"{bad[2]} (after 2 bad records, the limit of --skip_bad_records)"
    assert skipped == bad[:2]


def test_read_texts(tmp_path):
    (tmp_path / "a.txt").write_text("Human: One.\n")
    (tmp_path / "b.jsonl").write_text('{"text": "Human: Hi. \\n HugChat: Hello."}\n{"text": "Two."}\n')
    texts = ["".join(chunks) for chunks in read_texts([tmp_path / "b.jsonl", tmp_path / "a.txt"])]
    assert texts == ["Human: Hi. \n HugChat: Hello.", "Two.", "Human: One.\n"]

    (tmp_path / "c.jsonl").write_text('{"instruction": "Hi.", "output": "Hello."}\n')
    with pytest.raises(ValueError) as error:
        list(read_texts(tmp_path / "c.jsonl"))
    assert str(error.value) == (
        f'{tmp_path}/c.jsonl:1: "text" is missing, found "instruction", "output", expected raw text; '
        "instruction data is for sft.py"
    )


def test_real_instruction_data(shared_data):
    path = shared_data / "instruction-data.json"
    rows = json.loads(path.read_text())
    conversations = list(read_records(path))
    assert len(conversations) == 1100
    for row, conversation in zip(rows, conversations, strict=True):
        user = {"role": "user", "content": row["instruction"]} | ({"input": row["input"]} if row["input"] else {})
        assert conversation.messages == [user, {"role": "assistant", "content": row["output"]}]
    assert conversations[2].source == f"{path}:12"


def test_real_seed_tasks(shared_data):
    path = shared_data / "seed_tasks.jsonl"
    tasks = [json.loads(line) for line in path.read_text().splitlines()]
    conversations = list(read_records(path))
    assert len(conversations) == 175
    for number, (task, conversation) in enumerate(zip(tasks, conversations, strict=True), 1):
        (instance,) = task["instances"]
        user = {"role": "user", "content": task["instruction"]}
        if instance["input"]:
            user["input"] = instance["input"]
        assert conversation.messages == [user, {"role": "assistant", "content": instance["output"]}]
        assert conversation.source == f"{path}:{number}"
