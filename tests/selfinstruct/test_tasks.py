"""Seed pools become tasks; what cannot is refused with file and line."""

import json

import pytest

from minigpt.selfinstruct.tasks import Task, read_seed_tasks

SEED = {
    "id": "seed_task_0",
    "name": "capitals",
    "instruction": "Name the capital.",
    "instances": [{"input": "France", "output": "Paris."}, {"input": "Spain", "output": "Madrid."}],
    "is_classification": False,
}
LABEL = {"instruction": "Is it a fruit?", "instances": [{"input": "Oak", "output": "No"}], "is_classification": True}


def read(tmp_path, content, name="seeds.jsonl"):
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    return read_seed_tasks(path)


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


def test_the_worked_example(tmp_path):
    line = '{"instruction": "Name the capital.", "instances": [{"input": "France", "output": "Paris."}]}'
    assert read(tmp_path, line) == [Task("Name the capital.", "France", "Paris.")]


def test_the_first_instance_is_shown(tmp_path):
    assert read(tmp_path, lines(SEED, LABEL)) == [
        Task("Name the capital.", "France", "Paris.", is_classification=False),
        Task("Is it a fruit?", "Oak", "No", is_classification=True),
    ]


def test_a_mark_is_kept_where_all_records_stand_on_one_line(tmp_path):
    """By the line alone, an array that was written without line ends would mark all of its tasks, or none."""
    tasks = read(tmp_path, json.dumps([SEED, LABEL]), "seeds.json")
    assert [task.is_classification for task in tasks] == [False, True]


def test_an_instruction_comes_once(tmp_path):
    """Alpaca's data asks the same of many inputs; a request that showed one instruction twice would ask for repeats."""
    records = [{"instruction": "Say it in French.", "input": word, "output": word + "e"} for word in ("grand", "petit")]
    tasks = read(tmp_path, lines(records[0], {"instruction": "Say hi.", "output": "Hi."}, records[1]))
    assert tasks == [Task("Say it in French.", "grand", "grande"), Task("Say hi.", "", "Hi.")]


@pytest.mark.parametrize(
    "record",
    [
        {"instruction": "Say hi.", "input": "<noinput>", "output": "Hi."},
        {"instruction": "Say hi.", "output": "Hi.", "most_similar_instructions": {}, "request_idx": 3},
        {"prompt": "Say hi.", "completion": "Hi."},
        {"messages": [{"role": "user", "content": "Say hi."}, {"role": "assistant", "content": "Hi."}]},
    ],
    ids=["alpaca", "self-instruct output", "prompt and completion", "messages"],
)
def test_other_formats_are_seed_pools_too(tmp_path, record):
    assert read(tmp_path, json.dumps([record]), "data.json") == [Task("Say hi.", "", "Hi.")]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"instruction": "Say hi."}, 'seeds.jsonl:2: "output" is missing, found "instruction"'),
        ({"instruction": "Say hi.", "instances": []}, 'seeds.jsonl:2: "instances" is empty'),
        ({**LABEL, "is_classification": "no"}, 'seeds.jsonl:2: "is_classification" is "no", expected true or false'),
        ({"instruction": " \n", "output": "Hi."}, "seeds.jsonl:2: the instruction is blank: write it, or delete"),
        ({"instruction": "Say hi.", "output": " "}, "seeds.jsonl:2: the output is blank: write it, or delete"),
        ({"text": "Say hi."}, "seeds.jsonl:2: a record of text, expected one instruction and its output"),
        (
            {"instruction": "Human: Hi.\nAssistant: Hello.\nHuman: Bye.\nAssistant:", "input": "", "output": "Bye."},
            "seeds.jsonl:2: a record of user, assistant, user, assistant, expected one instruction and its output",
        ),
    ],
)
def test_a_bad_line_is_named(tmp_path, record, message):
    with pytest.raises(ValueError) as error:
        read(tmp_path, lines(SEED, record))
    assert str(error.value).startswith(f"{tmp_path}/{message}")
    assert "\n" not in str(error.value)


def test_a_broken_line_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"seeds.jsonl:2: .*truncated"):
        read(tmp_path, lines(SEED) + '{"instruction": "Say')
