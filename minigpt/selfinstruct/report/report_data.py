"""Reads the `--batch_dir` of a bootstrap run, and counts what the figures of the report show."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from minigpt.data.read.streams import read_values
from minigpt.selfinstruct.report.figures import Bars, Histogram, Ring
from minigpt.selfinstruct.report.verb_noun import VerbNoun, verb_noun
from minigpt.selfinstruct.run_files import OR_OTHER_FOLDER, REQUESTS, SEED_TASKS, STATISTICS, TASKS, Statistics
from minigpt.selfinstruct.tasks import Task, read_seed_tasks

VERBS, NOUNS_PER_VERB = 20, 4  # in the sunburst
EXAMPLES = 8  # dropped tasks shown per filter


class KeptTask(NamedTuple):
    """A line of machine_generated_instructions.jsonl, with the verb and noun of its instruction."""

    task: Task
    nearest: str
    score: float
    request: int
    verb_noun: VerbNoun


class DroppedTask(NamedTuple):
    """A task that a filter dropped; nearest and score are set by the novelty filter only."""

    task: Task
    nearest: str | None
    score: float | None


class RunData(NamedTuple):
    """The committed content of a run folder."""

    name: str
    statistics: Statistics
    seeds: list[str]
    kept: list[KeptTask]
    dropped: dict[str, list[DroppedTask]]  # filter -> examples
    novelty_scores: list[float]  # of the tasks that the novelty filter dropped


def read_run_data(folder: Path) -> RunData:
    if not (folder / STATISTICS).exists():
        raise ValueError(
            f"{folder}: not a run folder, it has no {STATISTICS} (selfinstruct.py --batch_dir creates one)"
        )
    statistics = Statistics.read(folder / STATISTICS)
    seeds = (
        [task.instruction for task in read_seed_tasks(folder / SEED_TASKS)] if _has_content(folder / SEED_TASKS) else []
    )
    kept = [_kept_task(*line) for line in _lines(folder / TASKS, statistics.kept)]
    dropped: dict[str, list[DroppedTask]] = {name: [] for name in statistics.rejected}
    seen: Counter[str] = Counter()
    novelty_scores = []
    for source, line in _lines(folder / REQUESTS, statistics.requests):
        for values in _get(source, line, "tasks"):
            verdict = _get(source, values, "verdict")
            if verdict == "kept":
                continue
            if verdict not in dropped:
                raise ValueError(f"{source}: unknown verdict {json.dumps(verdict)}, not in {STATISTICS}")
            if verdict == "novelty":
                novelty_scores.append(_get(source, values, "score"))
            every = max(1, statistics.rejected[verdict] // EXAMPLES)  # spreads the examples over the whole run
            if seen[verdict] % every == 0 and len(dropped[verdict]) < EXAMPLES:
                dropped[verdict].append(DroppedTask(_task(source, values), values.get("nearest"), values.get("score")))
            seen[verdict] += 1
    return RunData(folder.resolve().name, statistics, seeds, kept, dropped, novelty_scores)


def _has_content(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


def _lines(path: Path, count: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """`("FILE:LINE", object)` of the first `count` lines; the lines after them were never committed."""
    lines = 0
    for line, value in islice(read_values(path), count) if _has_content(path) else ():
        if not isinstance(value, dict):
            raise ValueError(f"{path}:{line}: {value if isinstance(value, ValueError) else 'not an object'}")
        yield f"{path}:{line}", value
        lines += 1
    if lines < count:
        raise ValueError(f"{path}: {lines:,} lines, but {count:,} according to {STATISTICS}: restore the others")


def _get(source: str, line: dict[str, Any], key: str) -> Any:
    if key not in line:
        raise ValueError(f"{source}: {json.dumps(key)} is missing (restore the line, {OR_OTHER_FOLDER})")
    return line[key]


def _task(source: str, line: dict[str, Any]) -> Task:
    return Task(*(_get(source, line, key) for key in ("instruction", "input", "output")))


def _kept_task(source: str, line: dict[str, Any]) -> KeptTask:
    task = _task(source, line)
    nearest, score = next(iter(_get(source, line, "most_similar_instructions").items()), ("", 0.0))
    return KeptTask(task, nearest, score, _get(source, line, "request_idx"), verb_noun(task.instruction))


def verb_rings(run: RunData) -> list[Ring]:
    """The most frequent verbs that have a noun, each with its most frequent nouns."""
    verbs: dict[str, Counter[str]] = {}
    for kept in run.kept:
        if kept.verb_noun.noun:
            verbs.setdefault(kept.verb_noun.verb, Counter())[kept.verb_noun.noun] += 1
    ordered = sorted(verbs.items(), key=lambda item: (-item[1].total(), item[0]))
    return [Ring(verb, nouns.total(), _most_common(nouns)[:NOUNS_PER_VERB]) for verb, nouns in ordered[:VERBS]]


def _most_common(counts: Counter[str]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def length_histograms(run: RunData) -> list[Histogram]:
    """Word counts of the instructions, the non-empty inputs, and the outputs."""
    tasks = [kept.task for kept in run.kept]
    return [
        _length_histogram("Instructions", [task.instruction for task in tasks], run.seeds),
        _length_histogram("Inputs", [task.input for task in tasks if task.input], []),
        _length_histogram("Outputs", [task.output for task in tasks], []),
    ]


def count_words(text: str) -> int:
    return len(text.split())


def _length_histogram(title: str, texts: Sequence[str], seed_texts: Sequence[str]) -> Histogram:
    """At most 31 bins of a width like 1, 2, 5, 10; the last bin counts all texts beyond the 98th percentile."""
    kept, seeds = ([count_words(text) for text in group] for group in (texts, seed_texts))
    percentile_98 = max(sorted(counts)[math.ceil(0.98 * len(counts)) - 1] for counts in (kept, seeds, [1]) if counts)
    width = next(width for power in range(9) for step in (1, 2, 5) if percentile_98 / (width := step * 10**power) < 30)
    last = percentile_98 // width + 1

    def shares(counts: list[int]) -> list[float]:
        bins = Counter(min(count // width, last) for count in counts)
        return [100 * bins[index] / max(1, len(counts)) for index in range(last + 1)]

    chart = Histogram(title, "words", "% of tasks", 0, width, shares(kept), "kept tasks", open_end=True)
    return chart._replace(outline=shares(seeds), second="seed tasks") if seeds else chart


def similarity_histogram(run: RunData) -> Histogram:
    """Highest ROUGE-L of the kept tasks; stacked on it, of the tasks that the novelty filter dropped."""

    def counts(scores: Iterable[float]) -> list[float]:
        bins = Counter(min(int(score * 20 + 1e-9), 19) for score in scores)
        return [bins[index] for index in range(20)]

    kept, dropped = counts(kept.score for kept in run.kept), counts(run.novelty_scores)
    title = "Highest ROUGE-L with an earlier task"
    return Histogram(title, "ROUGE-L", "tasks", 0, 0.05, kept, "kept", above=dropped, second="dropped by novelty")


def verdict_bars(run: RunData) -> Bars:
    return Bars("Verdicts", [("kept", run.statistics.kept), *run.statistics.rejected.items()])
