"""Task, the unit that requests show and models write; and reading the human-written seed pool.

Sources: seed_tasks.jsonl of Self-Instruct (Wang et al. 2022); Stanford Alpaca's generate_instruction.py and
ArmelRandy/Self-instruct use the first instance of each task.
"""

import json
from pathlib import Path
from typing import NamedTuple

from minigpt.data.read.records import read_records
from minigpt.data.read.streams import find_data_files, read_values

SEED_TASKS = Path(__file__).parents[1] / "assets" / "seed_tasks.jsonl"
"""The bundled seed pool."""


class Task(NamedTuple):
    """An instruction, its optional input, and a good output."""

    instruction: str
    input: str = ""
    output: str = ""
    is_classification: bool = False


def read_seed_tasks(path: str | Path) -> list[Task]:
    """Reads a seed pool in file order: Self-Instruct's seed tasks, or any format that `--data` accepts.

    The line `{"instruction": "Name the capital.", "instances": [{"input": "France", "output": "Paris."}]}` is
    `Task("Name the capital.", "France", "Paris.")`. Only the first instance of a task and the first record of an
    instruction are used, because requests and the novelty pool must contain an instruction once.

    Raises:
        FileNotFoundError: no file matches the path.
        ValueError: `FILE:LINE: what is wrong, what was expected`.
    """
    conversations = list(read_records(path))
    classification = _classification_instructions(path)
    tasks: dict[str, Task] = {}
    for conversation in conversations:
        roles = [message["role"] for message in conversation.messages]
        if roles != ["user", "assistant"]:
            raise ValueError(
                f"{conversation.source}: a record of {', '.join(roles)}, expected one instruction and its output"
            )
        question, answer = conversation.messages
        task = Task(question["content"], question.get("input", ""), answer["content"])
        for name in ("instruction", "output"):
            if not getattr(task, name).strip():
                raise ValueError(f"{conversation.source}: the {name} is blank: write it, or delete the record")
        tasks.setdefault(task.instruction, task._replace(is_classification=task.instruction in classification))
    return list(tasks.values())


def _classification_instructions(path: str | Path) -> set[str]:
    """The instructions with `"is_classification": true`, read separately because a Conversation does not hold it."""
    instructions = set()
    for file in find_data_files(path):
        for line, record in read_values(file):
            label = record.get("is_classification", False)
            if not isinstance(label, bool):
                raise ValueError(f'{file}:{line}: "is_classification" is {json.dumps(label)}, expected true or false')
            if label:
                instructions.add(str(record.get("instruction")))
    return instructions
