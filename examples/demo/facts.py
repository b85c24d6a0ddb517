"""The data of the offline demo: text to pretrain on, instructions to tune on, questions to test on.

A fact is a kind, a key and a value: (capitals, China, Beijing). The tables in `tables/` list them, one
`key<TAB>value` per line; a key belongs to one fact only. `build(folder, seed)` splits the facts of each tested kind
(those that no rule yields) into tuned, held-out and control facts, and writes four files:

    corpus.txt          raw text: tuned and held-out facts as plain statements, tuned ones as questions and answers too
    instructions.json   alpaca rows about the tuned facts
    heldout.json        one question per held-out fact: stated in the corpus, but in no training question
    control.json        one question per control fact: in no training data, so the model cannot know it

A model that answers held-out questions applies what tuning taught it to facts that it only read in pretraining. If it
answers control questions, they leaked into its training data and the measurement is invalid.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

TABLES = Path(__file__).with_name("tables")
WORD_LISTS = 2  # how often the corpus lists and repeats all keys, to train copying
EXAMPLE = "China"  # always held out, because the README asks for its capital
HELD_OUT_SHARE, CONTROL_SHARE = 0.12, 0.06  # of each tested kind


@dataclass(frozen=True)
class Kind:
    """The statement and the questions about the facts of one table; `{key}` and `{value}` are filled in.

    Every answer is `statement`, with the key before the value. A key always follows a space, never a newline or an
    opening quote, so that it has the same tokens everywhere.
    """

    name: str
    statement: str
    questions: tuple[str, ...]
    instruction: str  # asks about the key in the input field
    input: str
    tested: bool = True  # False: can be answered by a rule or a guess, so it is used for training only


class Fact(NamedTuple):
    kind: Kind
    key: str
    value: str

    @property
    def statement(self) -> str:
        return self.kind.statement.format(key=self.key, value=self.value)

    @property
    def subject(self) -> str:
        """The subject of the statement: `the capital of China`."""
        return _uncapitalized(self.statement.partition(" is ")[0])


class Split(NamedTuple):
    """Facts for tuning, facts that only the corpus states, and facts in no training data."""

    tuned: list[Fact]
    held_out: list[Fact]
    control: list[Fact]


def _noun_kind(
    name: str, noun: str, asked: str, verb: str, given: str, what: str = "What", tested: bool = True
) -> Kind:
    """A kind about `{noun} of {key}`; the noun includes its article.

    >>> _noun_kind("capitals", "the capital", "Which city", "Name", "place").questions[3]
    'Which city is the capital of {key}?'
    """
    of_key = f"{noun} of {{key}}"
    return Kind(
        name,
        statement=f"{_capitalized(of_key)} is {{value}}.",
        questions=(
            f"{what} is {of_key}?",
            f"{verb} {of_key}.",
            f"Tell me {of_key}.",
            f"{asked} is {of_key}?",
        ),
        instruction=f"{verb} {noun} of the {given}.",
        input=f"{given.capitalize()}: {{key}}",
        tested=tested,
    )


def _translation_kind(language: str) -> Kind:
    the_word = f"the {language} word for {{key}}"
    return Kind(
        language.lower(),
        statement=f"{_capitalized(the_word)} is {{value}}.",
        questions=(
            f"What is {the_word}?",
            f"Give {the_word}.",
            f"Tell me {the_word}.",
            f"How do you say {{key}} in {language}?",
        ),
        instruction=f"Translate the word into {language}.",
        input="Word: {key}",
    )


def _capitalized(text: str) -> str:
    return text[0].upper() + text[1:]


def _uncapitalized(text: str) -> str:
    return text[0].lower() + text[1:]


KINDS = (
    _noun_kind("capitals", "the capital", "Which city", "Name", "place"),
    _noun_kind("opposites", "the opposite", "Which word", "Give", "word"),
    _noun_kind("synonyms", "a synonym", "Which word", "Give", "word"),
    _noun_kind("past_tenses", "the past tense", "Which form", "Give", "verb"),
    _noun_kind(
        "chemical_symbols",
        "the chemical symbol",
        "Which abbreviation",
        "Give",
        "element",
    ),
    _noun_kind("authors", "the author", "Which writer", "Name", "book", what="Who"),
    _translation_kind("French"),
    _translation_kind("German"),
    _translation_kind("Spanish"),
    _noun_kind("plurals", "the plural", "Which form", "Give", "noun", tested=False),
    _noun_kind("spellings", "the correct spelling", "Which word", "Give", "word", tested=False),
    _noun_kind("sums", "the sum", "Which number", "Give", "numbers", tested=False),
    Kind(
        "young_animals",
        statement="The young of the {key} is the {value}.",
        questions=(
            "What is the young of the {key}?",
            "Name the young of the {key}.",
            "Tell me the young of the {key}.",
            "Which animal is the young of the {key}?",
        ),
        instruction="Name the young of the animal.",
        input="Animal: the {key}",
        tested=False,
    ),
    Kind(
        "units",
        statement="One {key} is {value}.",
        questions=(
            "How much is one {key}?",
            "Convert one {key} to a smaller unit.",
            "Tell me how much one {key} is.",
            "What is one {key}?",
        ),
        instruction="Convert the unit to a smaller one.",
        input="Unit: {key}",
        tested=False,
    ),
    Kind(
        "sentiments",
        statement="The review that says {key} is {value}.",
        questions=(
            "Is the review that says {key} positive or negative?",
            "Judge the review that says {key}.",
            "Tell me the mood of the review that says {key}.",
            "What is the mood of the review that says {key}?",
        ),
        instruction="Say whether the review is positive or negative.",
        input="Review: {key}",
        tested=False,
    ),
)

# Sentences that name the key before the statement, and some after it too.
INTRODUCTIONS = (
    "About {key}. {statement}",
    "A note on {key}: {uncapitalized}",
    "We come to {key}. {statement}",
    "As for {key}, {uncapitalized}",
    "First {key}. {statement} So much for {key}.",
    "Here is {key} again. {statement}",
)


def read_facts() -> list[Fact]:
    """All facts of all tables, in the order of `KINDS` and of the lines."""
    return [
        Fact(kind, *line.split("\t"))
        for kind in KINDS
        for line in (TABLES / f"{kind.name}.tsv").read_text(encoding="utf-8").splitlines()
    ]


def split_facts(seed: int) -> Split:
    """Splits the facts of each kind; all facts of untested kinds are tuned on."""
    rng = random.Random(seed)
    facts = read_facts()
    split = Split([], [], [])
    for kind in KINDS:
        rows = [fact for fact in facts if fact.kind is kind]
        rng.shuffle(rows)
        rows.sort(key=lambda fact: fact.key != EXAMPLE)  # stable: the rest stays shuffled
        held_out = round(HELD_OUT_SHARE * len(rows)) if kind.tested else 0
        control = round(CONTROL_SHARE * len(rows)) if kind.tested else 0
        split.held_out.extend(rows[:held_out])
        split.control.extend(rows[held_out : held_out + control])
        split.tuned.extend(rows[held_out + control :])
    return split


def corpus_text(split: Split, seed: int) -> str:
    """Plain statements of all tuned and held-out facts, and one question with its answer per tuned fact."""
    rng = random.Random(f"corpus {seed}")
    known = split.tuned + split.held_out
    lines = []
    for fact in known:
        lines.append(fact.statement)
        for introduction in rng.sample(INTRODUCTIONS, 3):
            lower = _uncapitalized(fact.statement)
            lines.append(introduction.format(key=fact.key, statement=fact.statement, uncapitalized=lower))
    rng.shuffle(known)
    for three in zip(known[::3], known[1::3], known[2::3], strict=False):
        first, second, third = (fact.key for fact in three)
        told = " ".join(fact.statement for fact in rng.sample(three, 3))  # in random order
        lines.append(f"We speak of {first}, {second} and {third}. {told}")
    for _ in range(WORD_LISTS):
        rng.shuffle(known)
        keys = [fact.key for fact in known]
        while keys:
            size = rng.randint(3, 8)
            words, keys = ", ".join(keys[:size]), keys[size:]
            lines.append(f"A list of words: {words}. The same list again: {words}.")
    for fact in split.tuned:
        question = rng.choice(fact.kind.questions).format(key=fact.key)
        lines.append(f"Question: {question} Answer: {fact.statement}")
    rng.shuffle(lines)
    return "\n".join(lines) + "\n"


def instruction_rows(
    facts: Sequence[Fact], seed: int, questions: int = 2, with_input: float = 0.25
) -> list[dict[str, str]]:
    """Alpaca rows: `questions` phrasings per fact; a share of `with_input` has the key in `input` in one of them."""
    rng = random.Random(f"questions {seed}")
    rows = []
    for fact in facts:
        asked = [(question, "") for question in rng.sample(fact.kind.questions, questions)]
        if rng.random() < with_input:
            asked[0] = (fact.kind.instruction, fact.kind.input)
        for instruction, given in asked:
            filled = {"instruction": instruction.format(key=fact.key), "input": given.format(key=fact.key)}
            rows.append({**filled, "output": fact.statement})
    rng.shuffle(rows)
    return rows


def build(folder: Path, seed: int = 42) -> None:
    """Writes corpus.txt, instructions.json, heldout.json and control.json; the same seed gives the same bytes."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    split = split_facts(seed)
    (folder / "corpus.txt").write_text(corpus_text(split, seed), encoding="utf-8", newline="\n")
    for name, rows in (
        ("instructions", instruction_rows(split.tuned, seed)),
        ("heldout", instruction_rows(split.held_out, seed, questions=1, with_input=0.0)),
        ("control", instruction_rows(split.control, seed, questions=1, with_input=0.0)),
    ):
        text = json.dumps(rows, ensure_ascii=False, indent=1) + "\n"
        (folder / f"{name}.json").write_text(text, encoding="utf-8", newline="\n")
