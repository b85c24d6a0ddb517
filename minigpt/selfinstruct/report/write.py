"""Writes the report of a bootstrap run: `report.html` in its `--batch_dir`, a page without external resources.

It shows the figures of Self-Instruct (Wang et al. 2022, https://arxiv.org/abs/2212.10560, figures 3 to 5): verbs and
nouns, lengths, similarity; then examples dropped by each filter, the most and least novel tasks, and a searchable table
of all kept tasks. The same run files give the same bytes. With matplotlib, the figures are also written to
`report/*.png`, for a paper.
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
from minigpt.selfinstruct.report.figures import Histogram, Ring, draw_pngs, svg_bars, svg_histogram, svg_sunburst
from minigpt.selfinstruct.report.report_data import (
    NOUNS_PER_VERB,
    DroppedTask,
    KeptTask,
    RunData,
    count_words,
    length_histograms,
    read_run_data,
    similarity_histogram,
    verb_rings,
    verdict_bars,
)
from minigpt.selfinstruct.report.verb_noun import verb_noun

REPORT, PNG_FOLDER = "report.html", "report"
WEB = Path(__file__).parent / "web"
EXTREMES = 10  # most novel, least novel
FOLD_LENGTH = 180  # characters; longer texts are folded

REASONS = {
    "length": "three {unit}s or fewer, or more than 150",
    "banned_word": "contains one of the --banned_words",
    "programming": "asks for a program or a function",
    "punctuation": "starts with punctuation",
    "language": "starts with a non-ASCII character",
    "output": "output empty, or equal to the input",
    "novelty": "too similar, by ROUGE-L, to a seed task or an earlier kept task",
}
END_REASONS = {
    "target": "reached its target",
    "max_requests": "ended at its maximum number of requests",
    "max_stall": "ended after too many consecutive requests without a kept task",
    None: "has not ended yet",
}


def write_report(folder: Path, filters: Filters) -> Path:
    """Writes `report.html` and, if matplotlib is installed, the PNGs; returns the path of the page.

    Args:
        filters: the filters of the run, used to show why a task was dropped.

    Raises:
        ValueError: `FILE:LINE: what is wrong`; or the folder is not a run folder.
    """
    run = read_run_data(folder)
    page = _page(run, filters).encode("utf-8", errors="backslashreplace")  # a lone surrogate from JSON
    with writing_to(folder, "--batch_dir"):
        with whole_file(folder / REPORT) as path:
            path.write_bytes(page)
        figures = verb_rings(run), length_histograms(run), similarity_histogram(run), verdict_bars(run)
        if not draw_pngs(folder / PNG_FOLDER, *figures):
            print0(f"{'figures':16} no PNGs: they need matplotlib (pip install -c constraints.txt -e '.[plot]')")
    return folder / REPORT


# ---- the page


def _page(run: RunData, filters: Filters) -> str:
    style, script, template = (
        (WEB / name).read_text(encoding="utf-8") for name in ("report.css", "report.js", "report.html")
    )
    rings, lengths, similarity, verdicts = (
        verb_rings(run),
        length_histograms(run),
        similarity_histogram(run),
        verdict_bars(run),
    )
    by_score = sorted(run.kept, key=lambda kept: kept.score)
    return Template(template).substitute(
        name=escape(run.name),
        style=style,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        data=_data(run.kept),
        summary=_summary(run),
        tiles=_tiles(run),
        sunburst=svg_sunburst(rings, _query) if rings else "<p>None.</p>",
        about=_verb_noun_summary(run, rings),
        pairs=_pairs_table(rings),
        lengths="".join(map(_length_figure, lengths)),
        length_table=_length_table(run),
        similarity=svg_histogram(similarity, 680, 280),
        similarity_table=_bins_table(similarity),
        similarity_summary=_summary_table(
            "ROUGE-L", "Tasks", [("Kept", [kept.score for kept in run.kept]), ("Dropped", run.novelty_scores)], ".2f"
        ),
        most_novel=_neighbours(by_score[:EXTREMES]),
        least_novel=_neighbours(by_score[::-1][:EXTREMES]),
        filters=svg_bars(verdicts),
        dropped="".join(_dropped(run, filters, name, examples) for name, examples in run.dropped.items()),
    )


def _summary(run: RunData) -> str:
    seeds = f" from {len(run.seeds):,} seed tasks" if run.seeds else ""
    kept = f"{len(run.kept):,} instruction{'s' * (len(run.kept) != 1)}"
    return f"{kept} written by a model{seeds}. The run {END_REASONS[run.statistics.ended]}."


def _tiles(run: RunData) -> str:
    counts = run.statistics
    pairs = {kept.verb_noun[:2] for kept in run.kept if kept.verb_noun.noun}
    inputs = sum(bool(kept.task.input) for kept in run.kept)
    tiles = [
        ("kept", f"{counts.kept:,}", f"{_share(counts.kept, counts.tasks)} of the tasks read"),
        ("tasks read", f"{counts.tasks:,}", f"in {counts.completions:,} completions"),
        ("requests", f"{counts.requests:,}", f"{counts.kept / max(1, counts.requests):.2f} kept per request"),
        ("verb-noun pairs", f"{len(pairs):,}", f"distinct, in {len(run.kept):,} tasks"),
        ("median similarity", f"{median(kept.score for kept in run.kept):.2f}" if run.kept else "-", "ROUGE-L"),
        ("with an input", _share(inputs, len(run.kept)), f"{inputs:,} of the kept tasks"),
    ]
    return "".join(f"<div><dt>{name}</dt><dd>{value} <small>{more}</small></dd></div>" for name, value, more in tiles)


def _share(part: int, whole: int) -> str:
    return f"{part / max(1, whole):.1%}"


def _verb_noun_summary(run: RunData, rings: Sequence[Ring]) -> str:
    total = len(run.kept)
    kinds = Counter(
        "pair" if pair.noun else "verb" if pair.verb else "question" if pair.question else "none"
        for pair in (kept.verb_noun for kept in run.kept)
    )
    shown = sum(ring.shown for ring in rings)
    text = (
        f"The {len(rings)} most frequent verbs, with the {NOUNS_PER_VERB} most frequent nouns of each: "
        f"{shown:,} of {total:,} tasks ({_share(shown, total)}). "
        f"Of all tasks, {_share(kinds['pair'], total)} have a verb and a noun, "
        f"{_share(kinds['verb'], total)} only a verb; "
        f"{_share(kinds['question'], total)} are questions, which have no such verb, and in "
        f"{_share(kinds['none'], total)} no verb was found."
    )
    if run.seeds:
        seed_pairs = {verb_noun(seed)[:2] for seed in run.seeds}
        pairs = {kept.verb_noun[:2] for kept in run.kept if kept.verb_noun.noun}
        text += f" {len(pairs - seed_pairs):,} of the {len(pairs):,} distinct pairs do not occur in the seed tasks."
    return text


def _pairs_table(rings: Sequence[Ring]) -> str:
    rows = [
        (_link(ring.verb), f"{ring.tasks:,}", ", ".join(f"{_link(ring.verb, noun)} {n:,}" for noun, n in ring.nouns))
        for ring in rings
    ]
    return _table("Verbs and their nouns", ("Verb", "Tasks", "Most frequent nouns"), rows)


def _query(verb: str, noun: str = "") -> str:
    """The link that searches the table for a verb, or a verb-noun pair."""
    return f'#q=verb:"{verb}"' + f' noun:"{noun}"' * bool(noun)


def _link(verb: str, noun: str = "") -> str:
    return f'<a href="{escape(_query(verb, noun))}">{escape(noun or verb)}</a>'


def _table(name: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """An HTML table; the cells are HTML, already escaped."""
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
    return f"<details><summary>Data table</summary>{_table(chart.title, head, rows)}</details>"


def _length_figure(chart: Histogram) -> str:
    key = '<span class="key outline"></span> <span>seed tasks</span>' if chart.outline else ""
    return (
        f"<figure><figcaption>{chart.title} {key}</figcaption>{svg_histogram(chart, 400, 240)}"
        f"{_bins_table(chart)}</figure>"
    )


def _length_table(run: RunData) -> str:
    texts = (
        ("Seed instructions", run.seeds),
        ("Instructions", [kept.task.instruction for kept in run.kept]),
        ("Inputs", [kept.task.input for kept in run.kept if kept.task.input]),
        ("Outputs", [kept.task.output for kept in run.kept]),
    )
    return _summary_table(
        "Words", "Texts", [(name, [count_words(text) for text in group]) for name, group in texts], ",.0f"
    )


def _summary_table(unit: str, count: str, groups: Iterable[tuple[str, Sequence[float]]], digits: str) -> str:
    """A table of count, minimum, median, mean and maximum of each group of numbers."""
    rows = [
        (name, f"{len(values):,}", *(format(f(values), digits) for f in (min, median, mean, max)))
        for name, values in groups
        if values
    ]
    return _table(f"{unit}: summary", (unit, count, "Lowest", "Median", "Mean", "Highest"), rows)


def _neighbours(tasks: Sequence[KeptTask]) -> str:
    rows = [
        f'<li><span class="score">{kept.score:.2f}</span><div>{_text(kept.task.instruction)}'
        f"{_labelled_text('nearest', kept.nearest or 'none')}</div></li>"
        for kept in tasks
    ]
    return f'<ol class="tasks">{"".join(rows)}</ol>' if rows else "<p>None.</p>"


def _text(text: str) -> str:
    """A text, folded if it is long."""
    if len(text) <= FOLD_LENGTH:
        return f'<span class="text">{escape(text)}</span>'
    head = f'<summary class="text"><span>{escape(text[:FOLD_LENGTH].rstrip())}…</span></summary>'
    return f'<details class="long">{head}<span class="text">{escape(text)}</span></details>'


def _dropped(run: RunData, filters: Filters, name: str, examples: Sequence[DroppedTask]) -> str:
    count = run.statistics.rejected[name]
    reason = REASONS[name].format(unit=_unit(filters))
    head = f"<b>{name}</b> {count:,} ({_share(count, run.statistics.tasks)}) <small>{reason}</small>"
    if not examples:
        return f'<p class="none">{head}</p>'
    items = "".join(
        f'<li><span class="score">{escape(_reason(filters, name, example))}</span>'
        f"<div>{_text(example.task.instruction or '(blank)')}"
        f"{_labelled_text('nearest', example.nearest)}"
        f"{_labelled_text('input', example.task.input) if name == 'output' else ''}</div></li>"
        for example in (sorted(examples, key=lambda example: -(example.score or 0)) if name == "novelty" else examples)
    )
    return f'<details><summary>{head}</summary><ol class="tasks">{items}</ol></details>'


def _unit(filters: Filters) -> str:
    return "word" if filters.is_spaced else "character"


def _reason(filters: Filters, name: str, dropped: DroppedTask) -> str:
    """Why the filter dropped this task, in a few words: the score, the length, the banned word, ..."""
    instruction = dropped.task.instruction.strip()
    if name == "novelty":
        return f"{dropped.score:.2f}"
    if name == "length":
        count = filters.length(instruction)
        return f"{count} {_unit(filters)}{'s' * (count != 1)}"
    if name == "banned_word":
        match = filters.banned.search(instruction) if filters.banned else None
        return match[0] if match else "a word"
    if name == "output":
        return "same as input" if dropped.task.output.strip() else "empty"
    return instruction[:1] if name in ("punctuation", "language") else " ".join(instruction.split()[:3])


def _labelled_text(name: str, text: str | None) -> str:
    return f'<p class="near"><span>{name}</span> {_text(text)}</p>' if text else ""


def _data(kept: Sequence[KeptTask]) -> str:
    """The table's columns as JSON for a <script> element: `<` is escaped, so no text can close the element or open a
    comment.

    `nearest` is an index into the column of instructions, or, if negative, into `others`: -1 is its first.
    """
    index_of = {row.task.instruction: index for index, row in enumerate(kept)}
    others: dict[str, int] = {}
    columns = {
        "instruction": [row.task.instruction for row in kept],
        "input": [row.task.input for row in kept],
        "output": [row.task.output for row in kept],
        "words": [sum(map(count_words, row.task[:3])) for row in kept],
        "score": [round(row.score, 4) for row in kept],
        "request": [row.request for row in kept],
        "verb": [row.verb_noun.verb for row in kept],
        "noun": [row.verb_noun.noun for row in kept],
        "nearest": [
            index_of[row.nearest] if row.nearest in index_of else -1 - others.setdefault(row.nearest, len(others))
            for row in kept
        ],
    }
    text = json.dumps({**columns, "others": list(others)}, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")
