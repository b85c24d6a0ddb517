"""What a bootstrap run came to: its `--batch_dir` read, and counted for the report's figures."""

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

VERBS, NOUNS = 20, 4  # of the sunburst
EXAMPLES = 8  # of what a filter dropped


class Kept(NamedTuple):
    """A line of machine_generated_instructions.jsonl, and what it is about."""

    task: Task
    nearest: str
    score: float
    request: int
    about: VerbNoun


class Dropped(NamedTuple):
    """A task that a filter dropped; where that was the novelty filter, what it was too near to, and how near."""

    task: Task
    nearest: str | None
    score: float | None


class Run(NamedTuple):
    """What the files of a batch folder hold, up to the last round that was committed."""

    name: str
    statistics: Statistics
    seeds: list[str]
    kept: list[Kept]
    dropped: dict[str, list[Dropped]]  # examples of each filter
    near: list[float]  # the scores of what the novelty filter dropped


def read_run(folder: Path) -> Run:
    if not (folder / STATISTICS).exists():
        raise ValueError(f"{folder}: no {STATISTICS} in it, so no run (selfinstruct.py --batch_dir makes one)")
    statistics = Statistics.read(folder / STATISTICS)
    seeds = [task.instruction for task in read_seed_tasks(folder / SEED_TASKS)] if _holds(folder / SEED_TASKS) else []
    kept = [_kept(*line) for line in _lines(folder / TASKS, statistics.kept)]
    dropped: dict[str, list[Dropped]] = {name: [] for name in statistics.rejected}
    seen: Counter[str] = Counter()
    near = []
    for source, line in _lines(folder / REQUESTS, statistics.requests):
        for found in _get(source, line, "tasks"):
            verdict = _get(source, found, "verdict")
            if verdict == "kept":
                continue
            if verdict not in dropped:
                raise ValueError(f"{source}: the verdict {json.dumps(verdict)}, of which {STATISTICS} knows nothing")
            if verdict == "novelty":
                near.append(_get(source, found, "score"))
            every = max(1, statistics.rejected[verdict] // EXAMPLES)  # examples from the whole of the run
            if seen[verdict] % every == 0 and len(dropped[verdict]) < EXAMPLES:
                dropped[verdict].append(Dropped(_task(source, found), found.get("nearest"), found.get("score")))
            seen[verdict] += 1
    return Run(folder.resolve().name, statistics, seeds, kept, dropped, near)


def _holds(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


def _lines(path: Path, count: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """`("FILE:LINE", object)` of the first lines: those after them are of a round that was never committed."""
    found = 0
    for line, value in islice(read_values(path), count) if _holds(path) else ():
        if not isinstance(value, dict):
            raise ValueError(f"{path}:{line}: {value if isinstance(value, ValueError) else 'not an object'}")
        yield f"{path}:{line}", value
        found += 1
    if found < count:
        raise ValueError(f"{path}: {found:,} lines, but {STATISTICS} speaks of {count:,}: put them back")


def _get(source: str, line: dict[str, Any], key: str) -> Any:
    if key not in line:
        raise ValueError(f"{source}: {json.dumps(key)} is missing (put back what was there, {OR_OTHER_FOLDER})")
    return line[key]


def _task(source: str, line: dict[str, Any]) -> Task:
    return Task(*(_get(source, line, key) for key in ("instruction", "input", "output")))


def _kept(source: str, line: dict[str, Any]) -> Kept:
    task = _task(source, line)
    nearest, score = next(iter(_get(source, line, "most_similar_instructions").items()), ("", 0.0))
    return Kept(task, nearest, score, _get(source, line, "request_idx"), verb_noun(task.instruction))


def rings(run: Run) -> list[Ring]:
    """The most frequent verbs that have a noun, each with its most frequent nouns."""
    verbs: dict[str, Counter[str]] = {}
    for kept in run.kept:
        if kept.about.noun:
            verbs.setdefault(kept.about.verb, Counter())[kept.about.noun] += 1
    ordered = sorted(verbs.items(), key=lambda item: (-item[1].total(), item[0]))
    return [Ring(verb, nouns.total(), _most(nouns)[:NOUNS]) for verb, nouns in ordered[:VERBS]]


def _most(counts: Counter[str]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def lengths(run: Run) -> list[Histogram]:
    """Words of the instructions, of the inputs that are there, and of the outputs."""
    tasks = [kept.task for kept in run.kept]
    return [
        _length_histogram("Instructions", [task.instruction for task in tasks], run.seeds),
        _length_histogram("Inputs", [task.input for task in tasks if task.input], []),
        _length_histogram("Outputs", [task.output for task in tasks], []),
    ]


def words_of(text: str) -> int:
    return len(text.split())


def _length_histogram(title: str, texts: Sequence[str], seed_texts: Sequence[str]) -> Histogram:
    """At most 31 bins of a round width; what is longer than nearly all stands in the last."""
    kept, seeds = ([words_of(text) for text in some] for some in (texts, seed_texts))
    usual = max(sorted(counts)[math.ceil(0.98 * len(counts)) - 1] for counts in (kept, seeds, [1]) if counts)
    width = next(width for power in range(9) for step in (1, 2, 5) if usual / (width := step * 10**power) < 30)
    last = usual // width + 1

    def shares(counts: list[int]) -> list[float]:
        bins = Counter(min(count // width, last) for count in counts)
        return [100 * bins[index] / max(1, len(counts)) for index in range(last + 1)]

    chart = Histogram(title, "words", "% of tasks", 0, width, shares(kept), "kept tasks", open_end=True)
    return chart._replace(outline=shares(seeds), second="seed tasks") if seeds else chart


def similarity(run: Run) -> Histogram:
    """Highest ROUGE-L of the kept tasks, and above them of those that the novelty filter dropped."""

    def counts(scores: Iterable[float]) -> list[float]:
        bins = Counter(min(int(score * 20 + 1e-9), 19) for score in scores)
        return [bins[index] for index in range(20)]

    kept, near = counts(kept.score for kept in run.kept), counts(run.near)
    title = "Highest ROUGE-L with an earlier task"
    return Histogram(title, "ROUGE-L", "tasks", 0, 0.05, kept, "kept", above=near, second="dropped as not new")


def ends(run: Run) -> Bars:
    return Bars("What became of the tasks", [("kept", run.statistics.kept), *run.statistics.rejected.items()])
