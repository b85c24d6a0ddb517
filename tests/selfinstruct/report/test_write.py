"""The report of a run: what its files hold, counted and shown."""

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
from minigpt.selfinstruct.report.report_data import ends, lengths, read_run, rings, similarity
from minigpt.selfinstruct.report.write import write_report

from .reported import EVIL, kept_of, make_run, some_tasks, task


class Page(HTMLParser):
    """What a parser finds in the page: the elements, what the scripts hold, the text; and that all is closed."""

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
def no_pictures(request, monkeypatch):
    """The PNGs take most of a report's time: they are drawn where a test is about them."""
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr(report, "draw_pictures", lambda *_: False)


@pytest.fixture
def pictures():
    pytest.importorskip("matplotlib", reason="the extra plot is not installed")


def test_the_page_holds_every_kept_task(tmp_path):
    folder = make_run(tmp_path / "run", some_tasks(400))
    data, kept = Page(write_report(folder, Filters())).data, kept_of(folder)
    assert len(kept) == 300
    for column in ("instruction", "input", "output"):
        assert data[column] == [line[column] for line in kept]
    assert data["request"] == [line["request_idx"] for line in kept]
    best = [next(iter(line["most_similar_instructions"].items())) for line in kept]
    assert data["score"] == [round(score, 4) for _, score in best]
    nearest = [data["instruction"][at] if at >= 0 else data["others"][-1 - at] for at in data["nearest"]]
    assert nearest == [text for text, _ in best]
    words = [sum(len(line[column].split()) for column in ("instruction", "input", "output")) for line in kept]
    assert data["words"] == words


def test_what_a_model_wrote_stays_text(tmp_path):
    """A `</script>` in a task would end the data, and what follows it would run."""
    tasks = [task(instruction, text=text, output=text + "." * 300) for instruction, text in EVIL]
    tasks += [
        task(EVIL[0][0], "novelty", 0.9, nearest=EVIL[0][0] + "<script>"),
        task(EVIL[1][1], "punctuation", None),
        task(EVIL[0][1], "output", output=""),
    ]
    page = Page(write_report(make_run(tmp_path / "<b>run", tasks, seeds=[EVIL[1][0] + "!"]), Filters()))
    assert [page.data["instruction"], page.data["input"]] == [list(column) for column in zip(*EVIL, strict=True)]
    tags = Counter(tag for tag, _ in page.elements)
    assert [tags[tag] for tag in ("script", "img", "textarea", "head", "body")] == [2, 0, 0, 1, 1]
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert all(
        text in page.text for text in ("</script><script>document.title", '<b>bold</b> &amp; "quotes"', "<b>run")
    )


def test_the_page_needs_nothing_from_elsewhere(tmp_path):
    path = write_report(make_run(tmp_path / "run", some_tasks(40)), Filters())
    for tag, attributes in Page(path).elements:
        for name in ("src", "href", "action", "srcset"):
            assert attributes.get(name, "#").startswith(("#", "data:image/svg+xml,")), (tag, attributes)
    text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?://|@import|url\(|innerHTML|insertAdjacentHTML|eval\(", text)


def test_the_same_files_give_the_same_bytes(tmp_path, monkeypatch, pictures):
    folder = make_run(tmp_path / "run", some_tasks(60))

    def written():
        write_report(folder, Filters())
        return {
            path.name: path.read_bytes() for path in (folder / "report.html", *sorted((folder / "report").iterdir()))
        }

    first = written()
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert written() == first
    assert sorted(first) == ["filters.png", "lengths.png", "report.html", "similarity.png", "verbs_nouns.png"]


def test_the_numbers_are_those_of_the_files(tmp_path):
    folder = make_run(tmp_path / "run", some_tasks(4000))
    page, counts = Page(write_report(folder, Filters())), json.loads((folder / "statistics.json").read_text())
    assert "3,000 instructions that a model wrote from 2 seed tasks." in page.text
    assert "kept 3,000 75.0% of what was read" in page.text
    for name, count in counts["rejected"].items():
        assert f"{name} {count:,} ({count / 4000:.1%})" in page.text
    run, kept = read_run(folder), kept_of(folder)
    assert all(len(examples) == 8 for examples in run.dropped.values())
    # the sunburst against the sentences as they were put together
    pairs = Counter(re.match(r"(\w+) a (\w+)", line["instruction"].lower()).groups() for line in kept)
    sun = rings(run)
    assert sun[0].verb == "write"
    for ring in sun:
        nouns = Counter({noun: count for (verb, noun), count in pairs.items() if verb == ring.verb})
        assert ring.tasks == nouns.total()
        assert [count for _, count in ring.nouns] == [count for _, count in nouns.most_common(4)]
        assert all(nouns[noun] == count for noun, count in ring.nouns)
    # the histograms hold every task once
    assert [round(sum(chart.bars), 6) for chart in lengths(run)] == [100, 100, 100]
    chart = similarity(run)
    assert (sum(chart.bars), sum(chart.above)) == (3000, counts["rejected"]["novelty"])
    assert sum(chart.bars[12:]) == sum(chart.above[:14]) == 0  # kept below 0.6 here, dropped from 0.7 on
    assert ends(run).counts == [("kept", 3000), *counts["rejected"].items()]


def test_most_and_least_novel(tmp_path):
    tasks = [task(f"Write about item number {n}.", score=n / 100) for n in range(60)]
    text = Page(write_report(make_run(tmp_path / "run", tasks), Filters())).text
    novel, rest = text.split("Most novel")[1].split("Least novel")
    assert re.findall(r"0\.\d\d", novel) == [f"{n / 100:.2f}" for n in range(10)]
    assert re.findall(r"0\.\d\d", rest.split("What became")[0]) == [f"{n / 100:.2f}" for n in range(59, 49, -1)]
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
            "repeated Say it again and again. input this",
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
def test_the_reasons_are_those_of_the_run(tmp_path, filters, tasks, reasons):
    """They were looked for with the usual banned words: "Draw", where the run had dropped the task for "poem"; and a
    Chinese instruction was always one word."""
    text = Page(write_report(make_run(tmp_path / "run", tasks), filters)).text
    assert [reason for reason in reasons if reason not in text] == []


def test_a_run_that_kept_nothing(tmp_path):
    """A weak model's run: what was dropped, and why, is all there is to see."""
    folder = make_run(tmp_path / "run", [task("No.", "length", None)] * 5, seeds=(), ended="max_stall")
    page = Page(write_report(folder, Filters()))
    assert "0 instructions that a model wrote. The run ended because too many requests in a row" in page.text
    assert "length 5 (100.0%)" in page.text
    assert page.data["instruction"] == []


def test_a_run_that_has_only_begun(tmp_path):
    page = Page(write_report(make_run(tmp_path / "run", [], ended=None), Filters()))
    assert "0 instructions that a model wrote from 2 seed tasks. The run has not ended yet." in page.text


# ---- the files


def test_what_was_never_committed_does_not_count(tmp_path):
    folder = make_run(tmp_path / "run", some_tasks(40))
    before = write_report(folder, Filters()).read_bytes()
    for name in ("machine_generated_instructions.jsonl", "requests.jsonl"):
        lines = (folder / name).read_text()
        (folder / name).write_text(lines + lines.splitlines(keepends=True)[0] + '{"instruction": "Cut o')
    assert write_report(folder, Filters()).read_bytes() == before


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(ValueError, match="no statistics.json in it, so no run"):
        write_report(tmp_path, Filters())


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"instruction": "', '"instruct": "', r"machine_generated_instructions.jsonl:1: \"instruction\" is missing"),
        ("{", "", r"machine_generated_instructions.jsonl:1: not"),
    ],
)
def test_damage_is_named_with_its_line(tmp_path, old, new, message):
    folder = make_run(tmp_path / "run", some_tasks(8))
    path = folder / "machine_generated_instructions.jsonl"
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(ValueError, match=message):
        write_report(folder, Filters())


def test_lines_that_are_gone(tmp_path):
    folder = make_run(tmp_path / "run", some_tasks(12))
    path = folder / "requests.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(ValueError, match="requests.jsonl: 3 lines, but statistics.json speaks of 4"):
        write_report(folder, Filters())


# ---- the figures


def test_the_sunburst_goes_once_around():
    sun = [Ring("write", 9, [("poem", 3), ("story", 1)]), Ring("name", 4, [("river", 4)])]
    pieces = list(sectors(sun))
    assert [(piece.verb, piece.noun) for piece in pieces] == [
        *(("write", ""), ("write", "poem"), ("write", "story"), ("name", ""), ("name", "river"))
    ]
    turns = [(round(piece.begin / math.tau, 6), round(piece.end / math.tau, 6)) for piece in pieces]
    assert turns == [(0, 0.5), (0, 0.375), (0.375, 0.5), (0.5, 1), (0.5, 1)]
    assert pieces[0].inner == INNER
    assert pieces[0].outer == pieces[1].inner


def test_a_histogram_is_drawn_to_scale():
    chart = Histogram("Words", "words", "tasks", 0, 5, [4, 8, 0], "kept", open_end=True)
    assert [chart.label(index) for index in range(3)] == ["0-4", "5-9", "10 or more"]
    heights = [float(height) for height in re.findall(r'height="([\d.]+)"><title>', svg_histogram(chart))]
    assert heights[1] == pytest.approx(2 * heights[0], abs=0.1)
    assert len(heights) == 2  # nothing is drawn of nothing
    assert "<title>5-9 words: 8 kept</title>" in svg_histogram(chart)


def test_the_pictures_are_as_large_as_they_say(tmp_path, pictures):
    folder = make_run(tmp_path / "run", some_tasks(40))
    write_report(folder, Filters())
    for name, (width, height) in SIZES.items():
        head = (folder / "report" / name).read_bytes()[:24]
        assert head[:8] == b"\x89PNG\r\n\x1a\n"
        assert struct.unpack(">II", head[16:]) == (round(width * DPI), round(height * DPI))


def test_without_matplotlib_there_is_the_page_alone(tmp_path, monkeypatch, pictures):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    folder = make_run(tmp_path / "run", some_tasks(8))
    assert write_report(folder, Filters()).exists()
    assert not (folder / "report").exists()
