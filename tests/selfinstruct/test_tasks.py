"""Reading seed pools; errors name file and line."""

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


def test_the_first_instance_is_used(tmp_path):
    assert read(tmp_path, lines(SEED, LABEL)) == [
        Task("Name the capital.", "France", "Paris.", is_classification=False),
        Task("Is it a fruit?", "Oak", "No", is_classification=True),
    ]


def test_is_classification_is_read_per_record_if_all_are_on_one_line(tmp_path):
    """The flag must not be looked up by line: in an array on one line all tasks, or none, would have it."""
    tasks = read(tmp_path, json.dumps([SEED, LABEL]), "seeds.json")
    assert [task.is_classification for task in tasks] == [False, True]


def test_an_instruction_is_used_once(tmp_path):
    """Alpaca has the same instruction with several inputs; repeated shots would encourage the model to repeat tasks."""
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
def test_any_data_format_can_be_a_seed_pool(tmp_path, record):
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
def test_an_invalid_record_is_an_error_with_its_line(tmp_path, record, message):
    with pytest.raises(ValueError) as error:
        read(tmp_path, lines(SEED, record))
    assert str(error.value).startswith(f"{tmp_path}/{message}")
    assert "\n" not in str(error.value)


def test_a_broken_line_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"seeds.jsonl:2: .*truncated"):
        read(tmp_path, lines(SEED) + '{"instruction": "Say')
