"""The demonstration's tasks: in the form of a request, true, and silent about what the model will be tested on."""

import json
import re
from itertools import chain
from pathlib import Path

import demo_tasks
import facts
import pytest
import yaml
from demo_tasks import FORMAT, is_right, list_text, seed_tasks, task_lists, told, words
from facts import read_facts, split_facts

from minigpt.data.tokenizer import Tokenizer
from minigpt.selfinstruct.filters import Filters
from minigpt.selfinstruct.tasks import Task, read_seed_tasks

SEEDS = (1, 2, 3)
CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.fixture(params=SEEDS, scope="module")
def made(request):
    """Split, seed tasks and lists of one seed."""
    split = split_facts(request.param)
    return split, seed_tasks(split, request.param), task_lists(split, request.param)


def test_no_seed_and_no_list_speaks_of_a_fact_that_is_tested(made):
    """Or the demo's claim, that no question about the held-out facts was ever seen, would be a lie."""
    split, seeds, lists = made
    texts = [words(f"{task.instruction}\n{task.input}\n{task.output}") for task in [*seeds, *chain(*lists)]]
    everything = "".join(texts)
    for fact in split.held_out + split.control:
        assert words(fact.subject) not in everything, fact
        assert words(fact.statement) not in everything
        assert not any(words(question.format(key=fact.key)) in everything for question in fact.kind.questions)
        assert [text for text in texts if words(fact.key) in text and words(fact.value) in text] == []


def test_the_lists_ask_for_every_tuned_fact_once(made):
    split, _, lists = made
    tasks = list(chain(*lists))
    assert sorted(task.output for task in tasks) == sorted(fact.statement for fact in split.tuned)
    assert {len(tasks) for tasks in lists[:-1]} == {2, 3}


def test_seeds_and_lists_are_true_and_apart(made):
    _, seeds, lists = made
    tasks = [*seeds, *chain(*lists)]
    assert [task for task in tasks if not is_right(task.instruction, task.output)] == []
    assert {words(task.instruction) for task in seeds}.isdisjoint(words(t.instruction) for t in chain(*lists))
    assert len(seeds) >= 20 and len({task.instruction for task in seeds}) == len(seeds)
    assert [task for task in seeds if Filters().reject(task) not in (None, "banned_word")] == []


def test_a_list_is_a_request_with_its_answer(made):
    """Byte for byte what selfinstruct.py asks, and what it reads."""
    _, _, lists = made
    for tasks in lists:
        text = list_text(tasks)
        plain = [task._replace(is_classification=False) for task in tasks]
        for shots in range(len(tasks)):
            request = FORMAT.render(tasks[:shots])
            assert text.startswith(request)
            assert FORMAT.parse(text[len(request) :], number=shots + 1) == plain[shots:]


def test_a_request_and_its_answer_stay_where_the_model_has_learnt_to_read(made):
    """GPT-2 knows a position by having seen it: past the blocks it was trained on, its answers were 90% wrong."""
    _, seeds, _ = made
    config = yaml.safe_load((CONFIGS / "demo_selfinstruct.yaml").read_text("utf-8"))
    blocks = [
        yaml.safe_load((CONFIGS / name).read_text("utf-8"))[key]
        for name, key in (("demo_train.yaml", "block_size"), ("demo_sft.yaml", "max_seq_length"))
    ]
    tokenizer = Tokenizer.tiny()
    lengths = [len(tokenizer.encode(FORMAT.render([task]))) for task in seeds]
    assert sum(lengths) / len(lengths) + config["max_length"] <= min(blocks)
    assert max(lengths) + config["max_length"] <= 128
    assert (config["format"], config["trigger_output"]) == (FORMAT.name, FORMAT.output)
    assert (config["num_prompt_instructions"], config["num_prompt_synthetic_instructions"]) == (1, 0)


def test_worked_example():
    tasks = [Task("Say hi.", "", "Hi."), Task("Name the capital of Peru.", "", "Lima.")]
    assert list_text(tasks) == (
        "Write a list of diverse tasks, each with its Instruction and its Answer.\n"
        "###\n1. Instruction: Say hi.\n1. Answer:\nHi.\n"
        "###\n2. Instruction: Name the capital of Peru.\n2. Answer:\nLima."
    )


def test_the_same_seed_writes_the_same_bytes(tmp_path):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        demo_tasks.build(tmp_path / name, seed)
    a, b, c = (
        [(tmp_path / name / f"{file}.jsonl").read_bytes() for file in ("seed_tasks", "task_lists")] for name in "abc"
    )
    assert a == b
    assert all(x != y for x, y in zip(a, c, strict=True))
    assert read_seed_tasks(tmp_path / "a" / "seed_tasks.jsonl") == seed_tasks(split_facts(5), 5)
    assert "### Instruction" not in (tmp_path / "a" / "task_lists.jsonl").read_text("utf-8")  # the prompt of the test


# ---- what the model writes


@pytest.mark.parametrize(
    ("instruction", "output", "right"),
    [
        ("Find the capital of France.", "The capital of France is Paris.", True),
        ("How do you say dog in French?", "The French word for dog is chien.", True),
        ("How do you say dog in German?", "The French word for dog is chien.", False),
        ("Find the capital of France.", "The capital of France is Lima.", False),
        ("Find the capital of France.", "The capital of Peru is Lima.", False),
        ("Find the capital of France.", "The capital of France is Paris. It is.", False),
        ("Find the opposite of France.", "The capital of France is Paris.", False),
        ("Find the capital of France and the capital of Peru.", "The capital of France is Paris.", False),
        ("Say what the capital of France is Paris.", "The capital of France is Paris.", False),  # gives it away
        ("What is the sum of 1 and 2?", "The sum of 1 and 2 is 3.", True),
    ],
)
def test_an_answer_is_judged_by_the_tables(instruction, output, right):
    assert is_right(instruction, output) is right


def test_no_two_facts_are_asked_for_in_the_same_words():
    phrasings = [words(phrasing) for fact in read_facts() for phrasing in demo_tasks.phrasings(fact)]
    assert len(set(phrasings)) == len(phrasings) > 10_000


def test_told_holds_whatever_the_model_read(tmp_path):
    facts.build(tmp_path, 1)
    demo_tasks.build(tmp_path, 1)
    text = told(tmp_path)
    split = split_facts(1)
    shown = [*seed_tasks(split, 1), *chain(*task_lists(split, 1))]
    rows = json.loads((tmp_path / "instructions.json").read_text("utf-8"))
    for instruction in [task.instruction for task in shown] + [row["instruction"] for row in rows[::10]]:
        assert words(instruction) in text
        assert words(instruction.upper()) in text  # other letters make no new task
    corpus = (tmp_path / "corpus.txt").read_text("utf-8")
    assert words(re.search("Question: (.*) Answer", corpus)[1]) in text
    for row in json.loads((tmp_path / "heldout.json").read_text("utf-8")):
        assert words(row["instruction"]) not in text
        assert words(row["output"]) in text  # stated, not asked
    assert words("Find the capital") not in words("Find the capitals")
