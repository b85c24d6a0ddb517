"""The embedded seed pool: well-formed, varied, short enough for GPT-2, and as check_seed_tasks.py checked it."""

import hashlib
import random
from collections import Counter
from itertools import combinations

from rouge_score.rouge_scorer import RougeScorer

from minigpt.data.tokenizer import Tokenizer
from minigpt.selfinstruct.filters import Filters
from minigpt.selfinstruct.request import TaskFormat
from minigpt.selfinstruct.tasks import Task, read_seed_tasks

from . import check_seed_tasks
from .check_seed_tasks import BY_NAME, PATH, ROWS

# ---- the pool


def test_every_row_has_the_shape_of_the_original():
    assert [row["id"] for row in ROWS] == [f"seed_task_{number}" for number in range(len(ROWS))]
    assert len(BY_NAME) == len(ROWS)
    for row in ROWS:
        assert list(row) == ["id", "name", "instruction", "instances", "is_classification"]
        assert isinstance(row["is_classification"], bool) and row["instances"]
        texts = [row["instruction"], *(text for instance in row["instances"] for text in instance.values())]
        assert all(text == text.strip() for text in texts)
        for instance in row["instances"]:
            assert list(instance) == ["input", "output"]
            assert instance["output"] and instance["output"] != instance["input"]
    tasks = read_seed_tasks(PATH)  # as selfinstruct.py reads it
    assert [(task.instruction, task.is_classification) for task in tasks] == [
        (row["instruction"], row["is_classification"]) for row in ROWS
    ]


def test_there_are_enough_of_each_kind():
    kinds = Counter(row["name"].partition("_")[0] for row in ROWS)
    assert set(kinds) == {"general", "code"} and min(kinds.values()) >= 40
    assert sum(row["is_classification"] for row in ROWS) >= 8  # the classification branch shows some of them
    with_input = sum(bool(row["instances"][0]["input"]) for row in ROWS)
    assert 0.3 < with_input / len(ROWS) < 0.7
    first_words = Counter(row["instruction"].split()[0] for row in ROWS)
    assert len(first_words) > 45 and max(first_words.values()) <= 0.1 * len(ROWS)


def test_they_pass_the_filters_and_are_unlike_each_other():
    for row in ROWS:
        for instance in row["instances"]:
            assert Filters().reject(Task(row["instruction"], **instance)) is None, row["instruction"]
    rouge = RougeScorer(["rougeL"], use_stemmer=False)
    for a, b in combinations((row["instruction"] for row in ROWS), 2):
        assert rouge.score(a, b)["rougeL"].fmeasure < 0.7, (a, b)


def test_classification_answers_are_labels():
    for row in ROWS:
        if row["is_classification"]:
            assert all(len(instance["output"].split()) <= 2 for instance in row["instances"]), row["name"]


def test_a_request_leaves_gpt2_room_for_its_answer(shared_data):
    """Of its 1,024 tokens --max_length takes 512: six shots nearly always fit beside it. Eight never take all."""
    tokenizer = Tokenizer.from_pretrained(str(shared_data / "gpt2"))
    request, tasks, rng = TaskFormat("iio"), read_seed_tasks(PATH), random.Random(0)
    six, eight = (
        [len(tokenizer.encode(request.render(rng.sample(tasks, shots)))) for _ in range(100)] for shots in (6, 8)
    )
    assert sum(length <= 512 for length in six) > 85
    assert max(eight) < 1024 - 128


# ---- what the answers do


def test_the_pool_is_the_one_that_was_checked():
    """Running the answers takes seconds, bash, git, node and SQLite, and changes only where the data do."""
    checked = check_seed_tasks.STAMP.read_text(encoding="utf-8").split()[0]
    found = hashlib.sha256(PATH.read_bytes()).hexdigest()
    assert found == checked, f"{PATH.name} has changed: run python tests/assets/check_seed_tasks.py"


def test_every_python_answer_is_judged():
    names = {row["name"].removeprefix("code_python_") for row in ROWS if row["name"].startswith("code_python_")}
    assert names == {*check_seed_tasks.CALLS, *check_seed_tasks.PRINTED, *check_seed_tasks.TESTS}
