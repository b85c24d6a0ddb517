"""Curation that needs no model: `lint` finds empty answers, links, repeats, and what an evaluation asks as well.

What it writes, curation.py says.
"""

import re

from minigpt.data.read.records import read_records
from minigpt.data.read.streams import Paths
from minigpt.distributed import print0, progress_bar
from minigpt.selfinstruct.curation.curate import Curated, Drop, make_entry, read_entries, write_results
from minigpt.selfinstruct.novelty import NoveltyFilter, unicode_words

GRAM = 13  # words in common that mean more than chance (Brown et al. 2020, arXiv:2005.14165, appendix C)
CHECKS = ("empty_output", "link", "input_is_output", "evaluation", "repeated", "near_duplicate")
_LINK = re.compile(r"\b(?:https?://|www\.)\w", re.IGNORECASE)


def lint(path: str, *, eval_data: Paths = (), threshold: float = 0.7, output_dir: str | None = None) -> Curated:
    """Keeps the records that no check speaks against.

    - empty_output: an answer of blanks.
    - link: http://, https:// or www. in the question or the answer.
    - input_is_output: the same, case and blanks aside.
    - evaluation: the question of an evaluation record, case and blanks aside, or 13 words in a row of its question or
      its answer.
    - repeated, near_duplicate: instruction and input equal those of a record kept before, or their ROUGE-L with one is
      at the threshold or above.

    Args:
        eval_data: what the model will be judged on: files, folders, globs, in any of the known formats.
        threshold: of the F-measure of ROUGE-L, above 0 and at most 1.
        output_dir: where the two files go; None is beside the instruction file.
    """
    entries, base = read_entries(path, output_dir)
    evaluation, pool = _Evaluation(eval_data), NoveltyFilter(threshold, unicode_words)
    kept: dict[str, str] = {}  # question -> where it stands
    drops: list[Drop] = []
    with progress_bar(len(entries), "task", "checking") as bar:
        for place, (source, _, _, context, outputs) in enumerate(entries):
            question, answer = entries[place].question, entries[place].output
            found = []
            if not all(output.strip() for output in outputs):
                found.append(Drop(place, "empty_output"))
            if _LINK.search(question) or _LINK.search(answer):
                found.append(Drop(place, "link"))
            if context and _plain(context) == _plain(answer):
                found.append(Drop(place, "input_is_output"))
            if shared := evaluation.shared(question, answer):
                found.append(Drop(place, "evaluation", *shared))
            if not found and question in kept:  # what goes for another fault stands for nothing
                found.append(Drop(place, "repeated", question, kept[question], 1.0))
            elif not found and pool.highest(question) >= threshold:
                nearest, score = next(iter(pool.check(question).neighbours.items()))
                found.append(Drop(place, "near_duplicate", nearest, kept[nearest], score))
            if not found:
                kept[question] = source
                pool.add(question)
            drops += found
            bar.update()
    curated = write_results(base, "lint", entries, drops, CHECKS)
    by_length = sorted(entries, key=lambda entry: len(entry.output))
    for name, entry in ("shortest", by_length[0]), ("longest", by_length[-1]):
        print0(f"  {name} output {len(entry.output):8,} characters: {entry.source}")
    return curated


class _Evaluation:
    """The questions of evaluation data, and its runs of 13 words."""

    def __init__(self, paths: Paths):
        self.questions: dict[str, str] = {}  # as _plain writes them -> where they stand
        self.grams: dict[str, str] = {}  # 13 words -> where they stand
        for conversation in read_records(paths):
            entry = make_entry({}, [conversation])
            self.questions.setdefault(_plain(entry.question), entry.source)
            for gram in _grams(entry.question) + _grams(entry.output):
                self.grams.setdefault(gram, entry.source)

    def shared(self, question: str, answer: str) -> tuple[str, str] | None:
        """What a record shares with it, and where that stands."""
        if source := self.questions.get(_plain(question)):
            return question, source
        grams = _grams(question) + _grams(answer)
        return next(((gram, self.grams[gram]) for gram in grams if gram in self.grams), None)


def _grams(text: str) -> list[str]:
    words = unicode_words(text)
    return [" ".join(words[start : start + GRAM]) for start in range(len(words) - GRAM + 1)]


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
