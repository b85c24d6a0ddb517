"""Curation without a model: `lint` drops empty answers, links, duplicates, and overlap with evaluation data.

The output files are described in curate.py.
"""

import re

from minigpt.data.read.records import read_records
from minigpt.data.read.streams import Paths
from minigpt.distributed import print0, progress_bar
from minigpt.selfinstruct.curation.curate import Curated, Drop, make_entry, read_entries, write_results
from minigpt.selfinstruct.novelty import NoveltyFilter, unicode_words

NGRAM = 13  # words; a shared 13-gram counts as contamination (Brown et al. 2020, arXiv:2005.14165, appendix C)
CHECKS = ("empty_output", "link", "input_is_output", "evaluation", "repeated", "near_duplicate")
_LINK = re.compile(r"\b(?:https?://|www\.)\w", re.IGNORECASE)


def lint(path: str, *, eval_data: Paths = (), threshold: float = 0.7, output_dir: str | None = None) -> Curated:
    """Keeps the records that pass all checks.

    - empty_output: an answer of white space only.
    - link: http://, https:// or www. in the question or the answer.
    - input_is_output: input and output are equal, ignoring case and white space.
    - evaluation: the question equals that of an evaluation record, ignoring case and white space, or question or answer
      share 13 consecutive words with the question or answer of one.
    - repeated, near_duplicate: instruction and input equal those of an earlier kept record, or their ROUGE-L with it is
      at or above the threshold.

    Args:
        eval_data: the data that the model will be evaluated on: files, folders or globs, in any supported format.
        threshold: ROUGE-L F-measure, above 0 and at most 1.
        output_dir: folder for the two output files; None: the folder of the instruction file.
    """
    entries, base = read_entries(path, output_dir)
    evaluation, pool = _Evaluation(eval_data), NoveltyFilter(threshold, unicode_words)
    kept: dict[str, str] = {}  # question -> source
    drops: list[Drop] = []
    with progress_bar(len(entries), "task", "checking") as bar:
        for index, (source, _, _, context, outputs) in enumerate(entries):
            question, answer = entries[index].question, entries[index].output
            faults = []
            if not all(output.strip() for output in outputs):
                faults.append(Drop(index, "empty_output"))
            if _LINK.search(question) or _LINK.search(answer):
                faults.append(Drop(index, "link"))
            if context and _normalize(context) == _normalize(answer):
                faults.append(Drop(index, "input_is_output"))
            if shared := evaluation.shared(question, answer):
                faults.append(Drop(index, "evaluation", *shared))
            if not faults and question in kept:  # a dropped record does not count as an original
                faults.append(Drop(index, "repeated", question, kept[question], 1.0))
            elif not faults and pool.highest(question) >= threshold:
                nearest, score = next(iter(pool.check(question).neighbours.items()))
                faults.append(Drop(index, "near_duplicate", nearest, kept[nearest], score))
            if not faults:
                kept[question] = source
                pool.add(question)
            drops += faults
            bar.update()
    curated = write_results(base, "lint", entries, drops, CHECKS)
    by_length = sorted(entries, key=lambda entry: len(entry.output))
    for name, entry in ("shortest", by_length[0]), ("longest", by_length[-1]):
        print0(f"  {name} output {len(entry.output):8,} characters: {entry.source}")
    return curated


class _Evaluation:
    """Index of the questions and 13-grams of the evaluation data."""

    def __init__(self, paths: Paths):
        self.questions: dict[str, str] = {}  # normalized question -> source
        self.ngrams: dict[str, str] = {}  # 13-gram -> source
        for conversation in read_records(paths):
            entry = make_entry({}, [conversation])
            self.questions.setdefault(_normalize(entry.question), entry.source)
            for ngram in _ngrams(entry.question) + _ngrams(entry.output):
                self.ngrams.setdefault(ngram, entry.source)

    def shared(self, question: str, answer: str) -> tuple[str, str] | None:
        """The question or 13-gram that a record has in common with the evaluation data, and its source there."""
        if source := self.questions.get(_normalize(question)):
            return question, source
        ngrams = _ngrams(question) + _ngrams(answer)
        return next(((ngram, self.ngrams[ngram]) for ngram in ngrams if ngram in self.ngrams), None)


def _ngrams(text: str) -> list[str]:
    words = unicode_words(text)
    return [" ".join(words[start : start + NGRAM]) for start in range(len(words) - NGRAM + 1)]


def _normalize(text: str) -> str:
    return " ".join(text.casefold().split())
