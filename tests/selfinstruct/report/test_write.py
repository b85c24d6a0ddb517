"""The report page: content, escaping, numbers, errors and figures."""

import json
import math
import re
import struct
import sys
import time
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest

from minigpt.selfinstruct.filters import Filters
from minigpt.selfinstruct.report import write as report
from minigpt.selfinstruct.report.figures import DPI, INNER, SIZES, Histogram, Ring, sectors, svg_histogram
from minigpt.selfinstruct.report.report_data import (
    length_histograms,
    read_run_data,
    similarity_histogram,
    verb_rings,
    verdict_bars,
)
from minigpt.selfinstruct.report.write import write_report

from .run_folders import HOSTILE_TASKS, make_run, read_kept, some_tasks, task


class Page(HTMLParser):
    """The parsed page: elements, script contents and text; checks that all elements are closed."""

    def __init__(self, path: Path):
        super().__init__()
        self.elements, self.open, self.scripts, self.words = [], [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag not in ("meta", "link", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        (self.scripts if self.open[-1:] == ["script"] else self.words).append(text)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    @property
    def data(self) -> dict:
        return json.loads(self.scripts[0])


@pytest.fixture(autouse=True)
def no_pngs(request, monkeypatch):
    """Drawing the PNGs takes most of the time, so only tests with the fixture `pngs` draw them."""
    if "pngs" not in request.fixturenames:
        monkeypatch.setattr(report, "draw_pngs", lambda *_: False)


@pytest.fixture
def pngs():
    pytest.importorskip("matplotlib", reason="the extra plot is not installed")


def test_the_page_contains_every_kept_task(tmp_path):
    folder = make_run(tmp_path / "run", some_tasks(400))
    data, kept = Page(write_report(folder, Filters())).data, read_kept(folder)
    assert len(kept) == 300
    for column in ("instruction", "input", "output"):
        assert data[column] == [line[column] for line in kept]
    assert data["request"] == [line["request_idx"] for line in kept]
    best = [next(iter(line["most_similar_instructions"].items())) for line in kept]
    assert data["score"] == [round(score, 4) for _, score in best]
    nearest = [data["instruction"][index] if index >= 0 else data["others"][-1 - index] for index in data["nearest"]]
    assert nearest == [text for text, _ in best]
    words = [sum(len(line[column].split()) for column in ("instruction", "input", "output")) for line in kept]
    assert data["words"] == words


def test_task_texts_are_escaped(tmp_path):
    """An unescaped `</script>` in a task would close the data element, and the browser would run the text after it."""
    tasks = [task(instruction, text=text, output=text + "." * 300) for instruction, text in HOSTILE_TASKS]
    tasks += [
        task(HOSTILE_TASKS[0][0], "novelty", 0.9, nearest=HOSTILE_TASKS[0][0] + "<script>"),
        task(HOSTILE_TASKS[1][1], "punctuation", None),
        task(HOSTILE_TASKS[0][1], "output", output=""),
    ]
    page = Page(write_report(make_run(tmp_path / "<b>run", tasks, seeds=[HOSTILE_TASKS[1][0] + "!"]), Filters()))
    assert [page.data["instruction"], page.data["input"]] == [
        list(column) for column in zip(*HOSTILE_TASKS, strict=True)
    ]
    tags = Counter(tag for tag, _ in page.elements)
    assert [tags[tag] for tag in ("script", "img", "textarea", "head", "body")] == [2, 0, 0, 1, 1]
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert all(
        text in page.text for text in ("</script><script>document.title", '<b>bold</b> &amp; "quotes"', "<b>run")
    )


def test_the_page_has_no_external_resources(tmp_path):
    path = write_report(make_run(tmp_path / "run", some_tasks(40)), Filters())
    for tag, attributes in Page(path).elements:
        for name in ("src", "href", "action", "srcset"):
            assert attributes.get(name, "#").startswith(("#", "data:image/svg+xml,")), (tag, attributes)
    text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?://|@import|url\(|innerHTML|insertAdjacentHTML|eval\(", text)


def test_the_same_files_give_the_same_bytes(tmp_path, monkeypatch, pngs):
    folder = make_run(tmp_path / "run", some_tasks(60))

    def write_and_read():
        write_report(folder, Filters())
        return {
            path.name: path.read_bytes() for path in (folder / "report.html", *sorted((folder / "report").iterdir()))
        }

    first = write_and_read()
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert write_and_read() == first
    assert sorted(first) == ["filters.png", "lengths.png", "report.html", "similarity.png", "verbs_nouns.png"]


def test_the_numbers_match_the_files(tmp_path):
    folder = make_run(tmp_path / "run", some_tasks(4000))
    page, counts = Page(write_report(folder, Filters())), json.loads((folder / "statistics.json").read_text())
    assert "3,000 instructions written by a model from 2 seed tasks." in page.text
    assert "kept 3,000 75.0% of the tasks read" in page.text
    for name, count in counts["rejected"].items():
        assert f"{name} {count:,} ({count / 4000:.1%})" in page.text
    run, kept = read_run_data(folder), read_kept(folder)
    assert all(len(examples) == 8 for examples in run.dropped.values())
    # the sunburst matches the templates of the instructions
    pairs = Counter(re.match(r"(\w+) a (\w+)", line["instruction"].lower()).groups() for line in kept)
    rings = verb_rings(run)
    assert rings[0].verb == "write"
    for ring in rings:
        nouns = Counter({noun: count for (verb, noun), count in pairs.items() if verb == ring.verb})
        assert ring.tasks == nouns.total()
        assert [count for _, count in ring.nouns] == [count for _, count in nouns.most_common(4)]
        assert all(nouns[noun] == count for noun, count in ring.nouns)
    # the histograms count every task once
    assert [round(sum(chart.bars), 6) for chart in length_histograms(run)] == [100, 100, 100]
    chart = similarity_histogram(run)
    assert (sum(chart.bars), sum(chart.above)) == (3000, counts["rejected"]["novelty"])
    # here kept tasks score below 0.6, dropped ones at least 0.7
    assert sum(chart.bars[12:]) == sum(chart.above[:14]) == 0
    assert verdict_bars(run).counts == [("kept", 3000), *counts["rejected"].items()]


def test_most_and_least_novel(tmp_path):
    tasks = [task(f"Write about item number {n}.", score=n / 100) for n in range(60)]
    text = Page(write_report(make_run(tmp_path / "run", tasks), Filters())).text
    most_novel, rest = text.split("Most novel")[1].split("Least novel")
    assert re.findall(r"0\.\d\d", most_novel) == [f"{n / 100:.2f}" for n in range(10)]
    assert re.findall(r"0\.\d\d", rest.split("Verdicts on")[0]) == [f"{n / 100:.2f}" for n in range(59, 49, -1)]
    assert "Write about item number 59. nearest Write about item number 58." in rest


def test_why_a_task_was_dropped(tmp_path):
    tasks = [
        task("Go on", "length", None),
        task("Please draw the Map of it.", "banned_word", None),
        task("Write a program that halts.", "programming", None),
        task("- a list", "punctuation", None),
        task("Écris un poème.", "language", None),
        task("Say it again and again.", "output", None, text="this", output="this"),
        task("Write a poem about the rain.", "novelty", 0.9231, nearest="Write a poem about rain."),
    ]
    text = Page(write_report(make_run(tmp_path / "run", tasks), Filters())).text
    for reason in (
        *("2 words Go on", "draw Please draw the Map", "Write a program Write a program that", "- - a list"),
        *(
            "É Écris un",
            "same as input Say it again and again. input this",
            "0.92 Write a poem about the rain. nearest Write a poem about rain.",
        ),
    ):
        assert reason in text


@pytest.mark.parametrize(
    ("filters", "tasks", "reasons"),
    [
        (
            Filters(["Go to", "poem"]),
            [task("Draw me a poem.", "banned_word", None), task("Please go \n to bed.", "banned_word", None)],
            ["poem Draw me a poem.", "go to Please go to bed.", "three words or fewer"],
        ),
        (
            Filters(["图片"], language="zh"),
            [task("你好", "length", None), task("描述这张图片的内容。", "banned_word", None)],
            ["2 characters 你好", "图片 描述这张图片的内容。", "three characters or fewer, or more than 150"],
        ),
    ],
)
def test_the_reasons_use_the_filters_of_the_run(tmp_path, filters, tasks, reasons):
    """The default banned words were used: the reason was "Draw" although the run had dropped the task for "poem". And a
    Chinese instruction was always counted as one word."""
    text = Page(write_report(make_run(tmp_path / "run", tasks), filters)).text
    assert [reason for reason in reasons if reason not in text] == []


def test_a_run_that_kept_nothing(tmp_path):
    """As with a weak model: only dropped tasks and their reasons are shown."""
    folder = make_run(tmp_path / "run", [task("No.", "length", None)] * 5, seeds=(), ended="max_stall")
    page = Page(write_report(folder, Filters()))
    assert "0 instructions written by a model. The run ended after too many consecutive requests" in page.text
    assert "length 5 (100.0%)" in page.text
    assert page.data["instruction"] == []


def test_a_run_without_requests(tmp_path):
    page = Page(write_report(make_run(tmp_path / "run", [], ended=None), Filters()))
    assert "0 instructions written by a model from 2 seed tasks. The run has not ended yet." in page.text


# ---- reading the files


def test_uncommitted_lines_are_ignored(tmp_path):
    folder = make_run(tmp_path / "run", some_tasks(40))
    before = write_report(folder, Filters()).read_bytes()
    for name in ("machine_generated_instructions.jsonl", "requests.jsonl"):
        lines = (folder / name).read_text()
        (folder / name).write_text(lines + lines.splitlines(keepends=True)[0] + '{"instruction": "Cut o')
    assert write_report(folder, Filters()).read_bytes() == before


def test_a_folder_without_a_run_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="not a run folder, it has no statistics.json"):
        write_report(tmp_path, Filters())


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"instruction": "', '"instruct": "', r"machine_generated_instructions.jsonl:1: \"instruction\" is missing"),
        ("{", "", r"machine_generated_instructions.jsonl:1: not"),
    ],
)
def test_a_damaged_line_is_an_error_with_its_number(tmp_path, old, new, message):
    folder = make_run(tmp_path / "run", some_tasks(8))
    path = folder / "machine_generated_instructions.jsonl"
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(ValueError, match=message):
        write_report(folder, Filters())


def test_missing_lines_are_an_error(tmp_path):
    folder = make_run(tmp_path / "run", some_tasks(12))
    path = folder / "requests.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(ValueError, match="requests.jsonl: 3 lines, but 4 according to statistics.json"):
        write_report(folder, Filters())


# ---- figures


def test_the_sunburst_covers_the_circle_once():
    rings = [Ring("write", 9, [("poem", 3), ("story", 1)]), Ring("name", 4, [("river", 4)])]
    segments = list(sectors(rings))
    assert [(segment.verb, segment.noun) for segment in segments] == [
        *(("write", ""), ("write", "poem"), ("write", "story"), ("name", ""), ("name", "river"))
    ]
    turns = [(round(segment.begin / math.tau, 6), round(segment.end / math.tau, 6)) for segment in segments]
    assert turns == [(0, 0.5), (0, 0.375), (0.375, 0.5), (0.5, 1), (0.5, 1)]
    assert segments[0].inner == INNER
    assert segments[0].outer == segments[1].inner


def test_histogram_bars_are_to_scale():
    chart = Histogram("Words", "words", "tasks", 0, 5, [4, 8, 0], "kept", open_end=True)
    assert [chart.label(index) for index in range(3)] == ["0-4", "5-9", "10 or more"]
    heights = [float(height) for height in re.findall(r'height="([\d.]+)"><title>', svg_histogram(chart))]
    assert heights[1] == pytest.approx(2 * heights[0], abs=0.1)
    assert len(heights) == 2  # an empty bin has no bar
    assert "<title>5-9 words: 8 kept</title>" in svg_histogram(chart)


def test_png_sizes(tmp_path, pngs):
    folder = make_run(tmp_path / "run", some_tasks(40))
    write_report(folder, Filters())
    for name, (width, height) in SIZES.items():
        head = (folder / "report" / name).read_bytes()[:24]
        assert head[:8] == b"\x89PNG\r\n\x1a\n"
        assert struct.unpack(">II", head[16:]) == (round(width * DPI), round(height * DPI))


def test_without_matplotlib_only_the_page_is_written(tmp_path, monkeypatch, pngs):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    folder = make_run(tmp_path / "run", some_tasks(8))
    assert write_report(folder, Filters()).exists()
    assert not (folder / "report").exists()
