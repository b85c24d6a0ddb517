"""The demo's tasks: seed tasks for selfinstruct.py, and task lists for pretraining.

The real GPT-2 has seen many lists; a model pretrained only on facts.py's corpus has not. So a part of the demo's raw
text is lists of tasks in the prompt format of selfinstruct.py. They are about tuned facts only: no seed task and no
list asks about a held-out or control fact. `build(folder, seed)` writes

    seed_tasks.jsonl    the seed tasks of the bootstrap
    task_lists.jsonl    the lists, one per document; they contain no instruction of a seed task

`told` and `is_right` check whether a generated task is new and whether its answer is correct.
"""

import json
import random
import re
from functools import cache
from pathlib import Path

from facts import KINDS, Fact, Split, read_facts, split_facts

from minigpt.selfinstruct.request import TaskFormat
from minigpt.selfinstruct.tasks import Task

FORMAT = TaskFormat("io", output="Answer")  # short: prompt and answer share 80 tokens
FRAMES = (  # in addition to the questions of each kind
    "Find {subject}.",
    "Write down {subject}.",
    "Look up {subject}.",
    "Say what {subject} is.",
    "Please tell me {subject}.",
    "Can you give {subject}?",
    "Do you know {subject}?",
    "I forgot {subject}.",
    "I want {subject}.",
    "Remember {subject}.",
)
UNFRAMED = ("units", "sentiments")  # the frames do not fit: "Look up one minute."
SEEDS_PER_KIND = 2


def phrasings(fact: Fact) -> list[str]:
    """All instructions in the demo that ask for a fact."""
    questions = [question.format(key=fact.key) for question in fact.kind.questions]
    frames = () if fact.kind.name in UNFRAMED else FRAMES
    return questions + [frame.format(subject=fact.subject) for frame in frames]


def seed_tasks(split: Split, seed: int) -> list[Task]:
    """`SEEDS_PER_KIND` tasks about tuned facts of each kind."""
    rng = random.Random(f"seed tasks {seed}")
    tasks = []
    for kind in KINDS:
        facts = rng.sample([fact for fact in split.tuned if fact.kind is kind], SEEDS_PER_KIND)
        tasks += [_asked(fact, rng.choice(phrasings(fact))) for fact in facts]
    rng.shuffle(tasks)
    return tasks


def task_lists(split: Split, seed: int) -> list[list[Task]]:
    """Lists of two or three tasks, one task per tuned fact; none of them is a seed task."""
    rng = random.Random(f"task lists {seed}")
    taken = {task.instruction for task in seed_tasks(split, seed)}
    tasks = [_asked(fact, rng.choice([text for text in phrasings(fact) if text not in taken])) for fact in split.tuned]
    rng.shuffle(tasks)
    lists = []
    while tasks:
        size = rng.choice((2, 3))
        lists.append(tasks[:size])
        tasks = tasks[size:]
    return lists


def _asked(fact: Fact, instruction: str) -> Task:
    return Task(instruction, "", fact.statement, is_classification=fact.kind.name == "sentiments")


def list_text(tasks: list[Task]) -> str:
    r"""A prompt with its completion: the finished list, after which the model stops.

    >>> print(list_text([Task("Say hi.", "", "Hi."), Task("Name the capital of Peru.", "", "Lima.")]))
    Write a list of diverse tasks, each with its Instruction and its Answer.
    ###
    1. Instruction: Say hi.
    1. Answer:
    Hi.
    ###
    2. Instruction: Name the capital of Peru.
    2. Answer:
    Lima.
    """
    *shots, last = tasks
    return f"{FORMAT.render(shots)} {last.instruction}\n{len(tasks)}. {FORMAT.output}:\n{last.output}"


def build(folder: Path, seed: int = 42) -> None:
    """Writes seed_tasks.jsonl and task_lists.jsonl for the split of that seed; the same seed gives the same bytes."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    split = split_facts(seed)
    seeds = [
        {
            "id": f"seed_task_{number}",
            "name": f"demo_{number}",
            "instruction": task.instruction,
            "instances": [{"input": task.input, "output": task.output}],
            "is_classification": task.is_classification,
        }
        for number, task in enumerate(seed_tasks(split, seed))
    ]
    lists = [{"text": list_text(tasks)} for tasks in task_lists(split, seed)]
    for name, rows in (("seed_tasks", seeds), ("task_lists", lists)):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8", newline="\n")


# ---- checks of generated tasks


def words(text: str) -> str:
    """Normalized words of a text, to compare texts by: `What is 1 + 1?` -> ` what is 1 1 `."""
    return " ".join(["", *re.findall(r"\w+", text.lower()), ""])


def told(folder: Path) -> str:
    """The words of all training data and seed tasks; an instruction that is in them is not new."""
    folder = Path(folder)
    texts = [(folder / "corpus.txt").read_text(encoding="utf-8")]
    for name in ("task_lists", "seed_tasks"):
        lines = (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        texts += [row.get("text") or row["instruction"] for row in map(json.loads, lines)]
    rows = json.loads((folder / "instructions.json").read_text(encoding="utf-8"))
    texts += [f"{row['instruction']}\n{row['input']}\n{row['output']}" for row in rows]
    return "".join(map(words, texts))


def is_right(instruction: str, output: str) -> bool:
    """Whether the instruction asks for a fact in a known phrasing and the output is the correct answer."""
    return _answers().get(instruction) == output


@cache
def _answers() -> dict[str, str]:
    return {phrasing: fact.statement for fact in read_facts() for phrasing in phrasings(fact)}
