"""The page of answers side by side: what is in it, and that nothing in it can get out. (Looks are for eyes.)"""

import json
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest

from minigpt.inference.compare import Run, check_questions, read_run, write_page, write_run

HOSTILE = [
    "</script><script>alert(1)</script>",
    "<!-- <script>",
    "]]> & &lt; \u2028 \u2029 \\u003c {{data}}",
    "é 日本 😀 \0 \"quoted\" 'twice'",
    "",
]


class _Page(HTMLParser):
    """The elements of a page with their attributes, and the text of the data."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.data = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.elements and self.elements[-1] == ("script", {"type": "application/json", "id": "data"}):
            self.data += data


def page_data(file: Path) -> dict:
    """What a browser would find in the page."""
    page = _Page(file.read_text(encoding="utf-8"))
    assert [tag for tag, _ in page.elements].count("script") == 2
    data = page.data.split("\n  \n")[0]
    return json.loads(data)


def run(folder: Path, answers: list[str] = HOSTILE, **more) -> Run:
    lines = [
        {
            "prompt": [{"role": "user", "content": text, "input": text}],
            "reference": text,
            "prediction": answer,
            "stopped": True,
            "exact_match": answer == text,
            "rouge_l": 0.5,
            **more,
        }
        for text, answer in zip(HOSTILE, answers, strict=True)
    ]
    scores = {"model": "a/model", "answers": 5, "exact_match": 1.0, "rouge_l": 0.5, "stop_rate": 1.0}
    return Run("a/model", folder, lines, scores)


def test_what_people_write_stays_text(tmp_path):
    """`</script>` in an answer would end the data, and what follows would run."""
    write_page(tmp_path / "p.html", "data.json", [run(tmp_path)])
    data = page_data(tmp_path / "p.html")
    assert [row["answers"][0]["prediction"] for row in data["rows"]] == HOSTILE
    assert [row["prompt"][0]["input"] for row in data["rows"]] == HOSTILE
    assert data["source"] == "data.json"
    assert data["runs"] == [{"name": "a/model", "folder": str(tmp_path), "scores": run(tmp_path).scores}]
    assert "</script><script>" not in (tmp_path / "p.html").read_text(encoding="utf-8")


def test_nothing_comes_from_elsewhere(tmp_path):
    write_page(tmp_path / "p.html", "data.json", [run(tmp_path)])
    text = (tmp_path / "p.html").read_text(encoding="utf-8")
    elements = _Page(text).elements
    for _, attributes in elements:
        for name in ("src", "href", "action"):
            assert attributes.get(name, "data:").startswith("data:")
    style, script = text[text.index("<style>") : text.index("</style>")], text[text.rindex("<script>") :]
    assert not re.search(r"url\(|@import|https?:", style + script)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b", script)  # text stays text
    [policy] = [a["content"] for tag, a in elements if tag == "meta" and "http-equiv" in a]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def test_two_runs_and_their_marks(tmp_path):
    second = run(tmp_path / "b", ["no"] * 5)._replace(name="b/model")
    write_page(tmp_path / "p.html", "data.json", [run(tmp_path, mark=None), second])
    first, other = page_data(tmp_path / "p.html")["rows"][0]["answers"]
    assert first == {"prediction": HOSTILE[0], "stopped": True, "exact_match": True, "rouge_l": 0.5, "mark": None}
    assert other == {"prediction": "no", "stopped": True, "exact_match": False, "rouge_l": 0.5}  # never judged


def test_written_and_read_again(tmp_path):
    """U+2028 ends a line for str.splitlines, and for no reader of JSON lines."""
    written = run(tmp_path / "a")
    write_run(written, "data.json")
    assert read_run(tmp_path / "a") == written


BROKEN = {
    "half a line": ("predictions.jsonl", '{"prompt": ', r"predictions.jsonl:1: no prediction; answer the questions"),
    "a list": ("predictions.jsonl", "[]\n", r"predictions.jsonl:1: no prediction"),
    "no reference": (
        "predictions.jsonl",
        '{"prompt": [], "prediction": "", "rouge_l": 1}\n',
        r"jsonl:1: no prediction",
    ),
    "not JSON": ("scores.json", "{", r"scores.json:1: not JSON"),
    "other scores": ("scores.json", '{"answers": 5}', r"scores.json: exact_match is missing"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_file_is_named(what, tmp_path):
    file, content, message = BROKEN[what]
    write_run(run(tmp_path), "data.json")
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_run(tmp_path)


def test_other_questions_are_named(tmp_path):
    own = run(tmp_path)
    questions = [(line["prompt"], line["reference"]) for line in own.predictions]
    check_questions(own, questions, "data.json")
    with pytest.raises(
        ValueError, match=r"predictions.jsonl:2: the answer to another question than data.json asks there"
    ):
        check_questions(own, [questions[0], (questions[1][0], "else"), *questions[2:]], "data.json")
    with pytest.raises(ValueError, match=r"predictions.jsonl: answers 5 questions; data.json has 6"):
        check_questions(own, [*questions, questions[0]], "data.json")


# ---- in a browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
USER = """
<script>{
  const seen = () => [...document.querySelectorAll("#rows > li")].map((row) => Number(row.children[0].textContent));
  const press = (name) => [...filtersBox.children].find((button) => button.textContent.startsWith(name)).click();
  const pick = (name) => { order.value = name; order.dispatchEvent(new Event("change")); };
  const type = (text) => { search.value = text; search.dispatchEvent(new Event("input")); };
  const filtersBox = document.getElementById("filters"), order = document.getElementById("order");
  const search = document.getElementById("search"), found = {};
  found.title = document.title;
  found.filters = [...filtersBox.children].map((button) => button.textContent);
  found.lowest = seen();
  pick("Highest mark first"); found.highest = seen();
  pick("Most gained first"); found.gained = seen();
  pick("As in the file"); found.file = seen();
  for (const name of ["Right", "Wrong", "Differ"]) { press(name); found[name] = seen(); }
  press("All"); type("QUOTED \\u003c  twice"); found.none = [seen().length, document.getElementById("none").hidden];
  type("日本 twice"); found.searched = [seen(), document.getElementById("shown").textContent];
  type("");
  found.texts = [...document.querySelectorAll(".answer .text")].map((text) => text.textContent);
  found.wide = document.documentElement.scrollWidth > innerWidth;
  document.body.textContent = JSON.stringify(found);
}</script>
"""


def test_in_a_browser(tmp_path):
    """Somebody filters, orders and searches; what was written stays text."""
    if CHROMIUM is None:
        pytest.skip("no Chromium here: the page is not tested")
    others = [*HOSTILE[:3], "no", "x" * 500]
    runs = [run(tmp_path / "a", [*HOSTILE[:4], "no"]), run(tmp_path / "b", others)]
    for own, marks in zip(runs, ([10, 30, None, 20, 5], [10, 10, 10, 50, 5])):
        for line, mark in zip(own.predictions, marks):
            line["mark"] = mark
    write_page(tmp_path / "p.html", "data.json", runs)
    page = (tmp_path / "p.html").read_text(encoding="utf-8")
    (tmp_path / "p.html").write_text(page.replace("</body>", USER + "</body>"), encoding="utf-8")
    arguments = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--dump-dom")
    profile = f"--user-data-dir={tmp_path}/profile"
    done = subprocess.run(
        [CHROMIUM, *arguments, profile, (tmp_path / "p.html").as_uri()], capture_output=True, timeout=60, check=True
    )
    body = done.stdout.decode().partition("<body>")[2].partition("</body>")[0]
    found = json.loads(unescape(body))
    assert found["title"] == "Predictions: data.json"
    assert found["filters"] == ["All 5", "Right 4", "Wrong 1", "Differ 2"]
    assert found["lowest"] == [5, 1, 4, 2, 3]  # what has no mark comes last
    assert found["highest"] == [2, 4, 1, 5, 3]
    assert found["gained"] == [2, 1, 5, 4, 3]
    assert found["file"] == [1, 2, 3, 4, 5]
    assert (found["Right"], found["Wrong"], found["Differ"]) == ([1, 2, 3, 4], [5], [4, 5])
    assert found["none"] == [0, False]
    assert found["searched"] == [[4], "1 of 5"]
    assert found["texts"] == [text for pair in zip([*HOSTILE[:4], "no"], others) for text in pair]
    assert not found["wide"]  # a long word breaks, and does not push the page aside
