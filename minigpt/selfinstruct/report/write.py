"""What came of a bootstrap run, as one page that needs nothing else: `report.html` in its `--batch_dir`.

It holds what Self-Instruct shows of its data (Wang et al. 2022, https://arxiv.org/abs/2212.10560, figures 3 to 5):
verbs and nouns, lengths, similarity; then what each filter dropped, the most and the least novel tasks, and every kept
task, to search in. The same files give the same bytes. `report/*.png` are the figures for a paper, where matplotlib is.
"""

import base64
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from statistics import mean, median
from string import Template

from minigpt.distributed import print0
from minigpt.files import whole_file, writing_to
from minigpt.selfinstruct.filters import Filters
from minigpt.selfinstruct.report.figures import Histogram, Ring, draw_pictures, svg_bars, svg_histogram, svg_sunburst
from minigpt.selfinstruct.report.report_data import (
    NOUNS,
    Dropped,
    Kept,
    Run,
    ends,
    lengths,
    read_run,
    rings,
    similarity,
    words_of,
)
from minigpt.selfinstruct.report.verb_noun import verb_noun

REPORT, PICTURES = "report.html", "report"
WEB = Path(__file__).parent / "web"
EXTREMES = 10  # most novel, least novel
SHORT = 180  # characters of a text before it is folded

WHY = {
    "length": "three {unit}s or fewer, or more than 150",
    "banned_word": "holds one of the --banned_words",
    "programming": "asks for a program or a function",
    "punctuation": "begins with punctuation",
    "language": "begins with a character that is not ASCII",
    "output": "no output, or the input once more",
    "novelty": "too near, by ROUGE-L, to a seed task or to one kept before",
}
ENDED = {
    "target": "ended with as many tasks as it was asked for",
    "max_requests": "ended with its last allowed request",
    "max_stall": "ended because too many requests in a row brought nothing new",
    None: "has not ended yet",
}


def write_report(folder: Path, filters: Filters) -> Path:
    """Writes `report.html` and, where matplotlib is installed, the PNGs; returns the page's path.

    Args:
        filters: those that the run was made with; they tell what it was in a task that was dropped.

    Raises:
        ValueError: `FILE:LINE: what is wrong`; or the folder holds no run.
    """
    run = read_run(folder)
    page = _page(run, filters).encode("utf-8", errors="backslashreplace")  # a lone surrogate, which JSON may hold
    with writing_to(folder, "--batch_dir"):
        with whole_file(folder / REPORT) as path:
            path.write_bytes(page)
        if not draw_pictures(folder / PICTURES, rings(run), lengths(run), similarity(run), ends(run)):
            print0(f"{'pictures':16} none: they need matplotlib (pip install -c constraints.txt -e '.[plot]')")
    return folder / REPORT


# ---- the page


def _page(run: Run, filters: Filters) -> str:
    style, script, template = (
        (WEB / name).read_text(encoding="utf-8") for name in ("report.css", "report.js", "report.html")
    )
    sun, bins, near, bars = rings(run), lengths(run), similarity(run), ends(run)
    by_score = sorted(run.kept, key=lambda kept: kept.score)
    return Template(template).substitute(
        name=escape(run.name),
        style=style,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        data=_data(run.kept),
        summary=_summary(run),
        tiles=_tiles(run),
        sunburst=svg_sunburst(sun, _query) if sun else "<p>There is none.</p>",
        about=_about(run, sun),
        pairs=_pairs(sun),
        lengths="".join(map(_length_figure, bins)),
        length_facts=_length_facts(run),
        similarity=svg_histogram(near, 680, 280),
        similarity_table=_bins_table(near),
        similarity_facts=_facts(
            "ROUGE-L", "Tasks", [("Kept", [kept.score for kept in run.kept]), ("Dropped", run.near)], ".2f"
        ),
        most_novel=_neighbours(by_score[:EXTREMES]),
        least_novel=_neighbours(by_score[::-1][:EXTREMES]),
        filters=svg_bars(bars),
        dropped="".join(_dropped(run, filters, name, examples) for name, examples in run.dropped.items()),
    )


def _summary(run: Run) -> str:
    seeds = f" from {len(run.seeds):,} seed tasks" if run.seeds else ""
    kept = f"{len(run.kept):,} instruction{'s' * (len(run.kept) != 1)}"
    return f"{kept} that a model wrote{seeds}. The run {ENDED[run.statistics.ended]}."


def _tiles(run: Run) -> str:
    counts = run.statistics
    pairs = {kept.about[:2] for kept in run.kept if kept.about.noun}
    inputs = sum(bool(kept.task.input) for kept in run.kept)
    tiles = [
        ("kept", f"{counts.kept:,}", f"{_share(counts.kept, counts.tasks)} of what was read"),
        ("tasks read", f"{counts.tasks:,}", f"in {counts.completions:,} completions"),
        ("requests", f"{counts.requests:,}", f"{counts.kept / max(1, counts.requests):.2f} kept of each"),
        ("verb-noun pairs", f"{len(pairs):,}", f"different ones, in {len(run.kept):,} tasks"),
        ("median similarity", f"{median(kept.score for kept in run.kept):.2f}" if run.kept else "-", "ROUGE-L"),
        ("with an input", _share(inputs, len(run.kept)), f"{inputs:,} of the kept tasks"),
    ]
    return "".join(f"<div><dt>{name}</dt><dd>{value} <small>{more}</small></dd></div>" for name, value, more in tiles)


def _share(part: int, whole: int) -> str:
    return f"{part / max(1, whole):.1%}"


def _about(run: Run, sun: Sequence[Ring]) -> str:
    total = len(run.kept)
    kinds = Counter(
        "pair" if about.noun else "verb" if about.verb else "question" if about.question else "none"
        for about in (kept.about for kept in run.kept)
    )
    shown = sum(ring.shown for ring in sun)
    text = (
        f"The {len(sun)} most frequent verbs, and the {NOUNS} most frequent nouns of each: "
        f"{shown:,} of {total:,} tasks ({_share(shown, total)}). "
        f"A verb and its noun were found in {_share(kinds['pair'], total)} of all tasks, a verb alone in "
        f"{_share(kinds['verb'], total)}; {_share(kinds['question'], total)} are questions, which have no such verb, "
        f"and in {_share(kinds['none'], total)} none was found."
    )
    if run.seeds:
        known = {verb_noun(seed)[:2] for seed in run.seeds}
        pairs = {kept.about[:2] for kept in run.kept if kept.about.noun}
        text += f" {len(pairs - known):,} of the {len(pairs):,} different pairs are in no seed task."
    return text


def _pairs(sun: Sequence[Ring]) -> str:
    rows = [
        (_link(ring.verb), f"{ring.tasks:,}", ", ".join(f"{_link(ring.verb, noun)} {n:,}" for noun, n in ring.nouns))
        for ring in sun
    ]
    return _table("Verbs and their nouns", ("Verb", "Tasks", "Most frequent nouns"), rows)


def _query(verb: str, noun: str = "") -> str:
    """The address that shows the tasks of a verb, or of a pair, in the table."""
    return f'#q=verb:"{verb}"' + f' noun:"{noun}"' * bool(noun)


def _link(verb: str, noun: str = "") -> str:
    return f'<a href="{escape(_query(verb, noun))}">{escape(noun or verb)}</a>'


def _table(name: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; the cells are HTML."""
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    heads = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    table = f'<table aria-label="{escape(name)}"><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="wide">{table}</div>'


def _bins_table(chart: Histogram) -> str:
    series = [values for values in (chart.bars, chart.above, chart.outline) if values]
    head = (chart.x, chart.name, chart.second)[: 1 + len(series)]
    rows = [
        (chart.label(index), *(f"{value:,}" if isinstance(value, int) else f"{value:.1f}%" for value in values))
        for index, values in enumerate(zip(*series))
        if any(values)
    ]
    return f"<details><summary>The numbers</summary>{_table(chart.title, head, rows)}</details>"


def _length_figure(chart: Histogram) -> str:
    key = '<span class="key outline"></span> <span>seed tasks</span>' if chart.outline else ""
    return (
        f"<figure><figcaption>{chart.title} {key}</figcaption>{svg_histogram(chart, 400, 240)}"
        f"{_bins_table(chart)}</figure>"
    )


def _length_facts(run: Run) -> str:
    texts = (
        ("Seed instructions", run.seeds),
        ("Instructions", [kept.task.instruction for kept in run.kept]),
        ("Inputs", [kept.task.input for kept in run.kept if kept.task.input]),
        ("Outputs", [kept.task.output for kept in run.kept]),
    )
    return _facts("Words", "Texts", [(name, [words_of(text) for text in some]) for name, some in texts], ",.0f")


def _facts(unit: str, count: str, groups: Iterable[tuple[str, Sequence[float]]], digits: str) -> str:
    """A table of what lies in the middle and at the ends of each group of numbers."""
    rows = [
        (name, f"{len(some):,}", *(format(f(some), digits) for f in (min, median, mean, max)))
        for name, some in groups
        if some
    ]
    return _table(f"{unit} in short", (unit, count, "Lowest", "Median", "Mean", "Highest"), rows)


def _neighbours(tasks: Sequence[Kept]) -> str:
    rows = [
        f'<li><span class="score">{kept.score:.2f}</span><div>{_text(kept.task.instruction)}'
        f"{_beside('nearest', kept.nearest or 'none')}</div></li>"
        for kept in tasks
    ]
    return f'<ol class="tasks">{"".join(rows)}</ol>' if rows else "<p>There is none.</p>"


def _text(text: str) -> str:
    """A text, folded where it is long."""
    if len(text) <= SHORT:
        return f'<span class="text">{escape(text)}</span>'
    head = f'<summary class="text"><span>{escape(text[:SHORT].rstrip())}…</span></summary>'
    return f'<details class="long">{head}<span class="text">{escape(text)}</span></details>'


def _dropped(run: Run, filters: Filters, name: str, examples: Sequence[Dropped]) -> str:
    count = run.statistics.rejected[name]
    why = WHY[name].format(unit=_unit(filters))
    head = f"<b>{name}</b> {count:,} ({_share(count, run.statistics.tasks)}) <small>{why}</small>"
    if not examples:
        return f'<p class="none">{head}</p>'
    items = "".join(
        f'<li><span class="score">{escape(_reason(filters, name, one))}</span>'
        f"<div>{_text(one.task.instruction or '(blank)')}"
        f"{_beside('nearest', one.nearest)}{_beside('input', one.task.input) if name == 'output' else ''}</div></li>"
        for one in (sorted(examples, key=lambda one: -(one.score or 0)) if name == "novelty" else examples)
    )
    return f'<details><summary>{head}</summary><ol class="tasks">{items}</ol></details>'


def _unit(filters: Filters) -> str:
    return "word" if filters.is_spaced else "character"


def _reason(filters: Filters, name: str, one: Dropped) -> str:
    """What it was in this task, as far as the task alone tells."""
    instruction = one.task.instruction.strip()
    if name == "novelty":
        return f"{one.score:.2f}"
    if name == "length":
        count = filters.length(instruction)
        return f"{count} {_unit(filters)}{'s' * (count != 1)}"
    if name == "banned_word":
        found = filters.banned.search(instruction) if filters.banned else None
        return found[0] if found else "a word"
    if name == "output":
        return "repeated" if one.task.output.strip() else "empty"
    return instruction[:1] if name in ("punctuation", "language") else " ".join(instruction.split()[:3])


def _beside(name: str, text: str | None) -> str:
    return f'<p class="near"><span>{name}</span> {_text(text)}</p>' if text else ""


def _data(kept: Sequence[Kept]) -> str:
    """The table's columns as JSON that stays data inside a page: no `<` in it ends a script or begins a comment.

    `nearest` is an index of the column of instructions, or, below zero, of `others`: -1 is its first.
    """
    place = {one.task.instruction: index for index, one in enumerate(kept)}
    others: dict[str, int] = {}
    columns = {
        "instruction": [one.task.instruction for one in kept],
        "input": [one.task.input for one in kept],
        "output": [one.task.output for one in kept],
        "words": [sum(map(words_of, one.task[:3])) for one in kept],
        "score": [round(one.score, 4) for one in kept],
        "request": [one.request for one in kept],
        "verb": [one.about.verb for one in kept],
        "noun": [one.about.noun for one in kept],
        "nearest": [
            place[one.nearest] if one.nearest in place else -1 - others.setdefault(one.nearest, len(others))
            for one in kept
        ],
    }
    text = json.dumps({**columns, "others": list(others)}, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")
