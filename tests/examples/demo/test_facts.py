"""The demonstration's data: what each file may hold, and that the tested facts leak nowhere."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from facts import KINDS, TABLES, Split, build, corpus_text, instruction_rows, read_facts, split_facts

SEEDS = (1, 2, 3)


@pytest.fixture(params=SEEDS)
def built(request, tmp_path):
    """Split, corpus lines, and the rows of the three JSON files of one seed."""
    build(tmp_path, request.param)
    rows = {
        name: json.loads((tmp_path / f"{name}.json").read_text("utf-8"))
        for name in ("instructions", "heldout", "control")
    }
    return split_facts(request.param), (tmp_path / "corpus.txt").read_text("utf-8").splitlines(), rows


def test_every_table_belongs_to_a_kind_and_every_key_to_one_fact():
    assert sorted(path.stem for path in TABLES.iterdir()) == sorted(kind.name for kind in KINDS)
    facts = read_facts()
    assert [key for key, count in Counter(fact.key for fact in facts).items() if count > 1] == []
    assert all(text == text.strip() and text for fact in facts for text in (fact.key, fact.value))
    # A value that could be guessed would let the control pass: each stands for one key of its kind.
    tested = Counter((fact.kind.name, fact.value) for fact in facts if fact.kind.tested)
    assert [pair for pair, count in tested.items() if count > 1] == []


def test_a_split_deals_every_fact_once():
    for seed in SEEDS:
        split = split_facts(seed)
        assert sorted(f.key for hand in split for f in hand) == sorted(f.key for f in read_facts())
        assert all(fact.kind.tested for fact in split.held_out + split.control)
        assert len(split.held_out) >= 100 and len(split.control) >= 50 and len(split.tuned) > 7 * len(split.held_out)
        assert "China" in {fact.key for fact in split.held_out}
    assert {f.key for f in split_facts(1).held_out} != {f.key for f in split_facts(2).held_out}


def test_the_same_seed_writes_the_same_bytes(tmp_path):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        build(tmp_path / name, seed)
    files = ("corpus.txt", "instructions.json", "heldout.json", "control.json")
    a, b, c = ([(tmp_path / name / file).read_bytes() for file in files] for name in "abc")
    assert a == b
    assert all(x != y for x, y in zip(a, c, strict=True))


def test_held_out_facts_are_stated_and_never_asked(built):
    split, corpus, rows = built
    questions = [line for line in corpus if "Question:" in line or "?" in line]
    statements = [line for line in corpus if line not in set(questions)]
    asked = questions + [f"{row['instruction']}\n{row['input']}\n{row['output']}" for row in rows["instructions"]]
    for fact in split.held_out:
        assert sum(fact.statement in line for line in statements) >= 2
        phrasings = [q.format(key=fact.key) for q in fact.kind.questions] + [
            fact.statement,
            fact.kind.input.format(key=fact.key),
        ]
        assert [text for text in asked if any(names(text, p) for p in phrasings)] == []
        assert [text for text in asked if names(text, fact.key) and names(text, fact.value)] == []
    tested = {row["output"] for row in rows["heldout"]}
    assert tested == {fact.statement for fact in split.held_out}
    assert tested.isdisjoint(row["output"] for row in rows["instructions"])


def test_control_facts_stand_nowhere(built):
    split, corpus, rows = built
    texts = corpus + [f"{row['instruction']}\n{row['input']}\n{row['output']}" for row in rows["instructions"]]
    told = {(fact.kind.name, fact.key) for fact in split.tuned + split.held_out}
    for fact in split.control:
        assert (fact.kind.name, fact.key) not in told
        assert [text for text in texts if names(text, fact.key) and names(text, fact.value)] == []
        assert [text for text in texts if fact.statement in text] == []
    assert [row["output"] for row in rows["control"]] and {row["output"] for row in rows["control"]} == {
        fact.statement for fact in split.control
    }


def test_the_corpus_never_shows_the_prompt(built):
    _, corpus, _ = built
    assert [line for line in corpus if "###" in line or "Instruction" in line or "Response" in line] == []


def test_a_key_always_follows_a_blank(built):
    """After a newline or a sign a key is another token than after a blank, and copying it is another task."""
    split, _, rows = built
    for fact in split.held_out:
        texts = [f"{row['instruction']}\n{row['input']}" for row in rows["heldout"] if row["output"] == fact.statement]
        assert len(texts) == 1 and f" {fact.key}" in texts[0]
    assert all(kind.input.endswith(" {key}") or "the {key}" in kind.input for kind in KINDS)
    assert all(" {key}" in question for kind in KINDS for question in kind.questions)


def test_one_question_in_full():
    """The example of the README: asked about China, the row reads so."""
    china = next(fact for fact in read_facts() if fact.key == "China")
    rows = instruction_rows([china], seed=0, questions=4, with_input=0.0)
    assert {
        "instruction": "What is the capital of China?",
        "input": "",
        "output": "The capital of China is Beijing.",
    } in rows
    text = corpus_text(Split([], [china], []), seed=0)
    assert "The capital of China is Beijing.\n" in text
    assert "?" not in text


def test_some_rows_use_the_input_field(built):
    _, _, rows = built
    share = sum(bool(row["input"]) for row in rows["instructions"]) / len(rows["instructions"])
    assert 0.04 < share < 0.15


def names(text: str, phrase: str) -> bool:
    """Whether the phrase stands in the text, from the beginning of a word to the end of one."""
    return phrase in text and re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", text) is not None


def test_tables_are_plain_utf8_lines():
    for path in sorted(Path(TABLES).iterdir()):
        text = path.read_bytes().decode("utf-8")
        assert text.endswith("\n") and "\r" not in text, path.name
        assert all(line.count("\t") == 1 for line in text.splitlines()), path.name
