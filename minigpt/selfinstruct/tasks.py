"""Tasks: what a request shows and a model writes, and the seed pool that people wrote.

Sources: seed_tasks.jsonl of Self-Instruct (Wang et al. 2022); Stanford Alpaca's generate_instruction.py and
ArmelRandy/Self-instruct show the first instance of each.
"""

import json
from pathlib import Path
from typing import NamedTuple

from minigpt.data.read.records import read_records
from minigpt.data.read.streams import find_data_files, read_values

SEED_TASKS = Path(__file__).parents[1] / "assets" / "seed_tasks.jsonl"
"""The pool that comes along."""


class Task(NamedTuple):
    """An instruction, what it is about if anything, and what a good answer is."""

    instruction: str
    input: str = ""
    output: str = ""
    is_classification: bool = False


def read_seed_tasks(path: str | Path) -> list[Task]:
    """The tasks of a seed pool, in the order of the file: seed tasks, or instructions in any format of `--data`.

    The line `{"instruction": "Name the capital.", "instances": [{"input": "France", "output": "Paris."}]}` is
    `Task("Name the capital.", "France", "Paris.")`. Of several instances, and of several records with the same
    instruction, the first counts: a request shows an instruction once, and novelty is measured against it once.

    Raises:
        FileNotFoundError: the path leads to no file.
        ValueError: `FILE:LINE: what is wrong, what was expected`.
    """
    conversations = list(read_records(path))
    classification = _classification(path)
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


def _classification(path: str | Path) -> set[str]:
    """The instructions that are marked as classification, which is not kept of a record in a Conversation."""
    marked = set()
    for file in find_data_files(path):
        for line, record in read_values(file):
            mark = record.get("is_classification", False)
            if not isinstance(mark, bool):
                raise ValueError(f'{file}:{line}: "is_classification" is {json.dumps(mark)}, expected true or false')
            if mark:
                marked.add(str(record.get("instruction")))
    return marked
