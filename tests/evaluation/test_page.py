"""The predictions page: its data, escaping, filters and ordering. (Its layout is not tested.)"""

import json
import re
from contextlib import closing
from pathlib import Path

import pytest

from minigpt.evaluation.page import PredictionRun, check_questions, read_predictions, write_page, write_predictions

from ..browser import Browser
from .predictions_page import Page, page_data

HOSTILE = [
    "</script><script>alert(1)</script>",
    "<!-- <script>",
    "]]> & &lt; \u2028 \u2029 \\u003c {{data}}",
    "é 日本 😀 \0 \"quoted\" 'twice'",
    "",
]


def run(folder: Path, answers: list[str] = HOSTILE, **more) -> PredictionRun:
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
    return PredictionRun("a/model", folder, lines, scores)


def test_markup_in_the_data_stays_text(tmp_path):
    """An unescaped `</script>` in an answer would end the data, and the text after it would run as a script."""
    write_page(tmp_path / "p.html", "data.json", [run(tmp_path)])
    data = page_data(tmp_path / "p.html")
    assert [row["answers"][0]["prediction"] for row in data["rows"]] == HOSTILE
    assert [row["prompt"][0]["input"] for row in data["rows"]] == HOSTILE
    assert data["source"] == "data.json"
    assert data["runs"] == [{"name": "a/model", "folder": str(tmp_path), "scores": run(tmp_path).scores}]
    assert "</script><script>" not in (tmp_path / "p.html").read_text(encoding="utf-8")


def test_the_page_loads_no_external_resources(tmp_path):
    write_page(tmp_path / "p.html", "data.json", [run(tmp_path)])
    text = (tmp_path / "p.html").read_text(encoding="utf-8")
    elements = Page(text).elements
    for _, attributes in elements:
        for name in ("src", "href", "action"):
            assert attributes.get(name, "data:").startswith("data:")
    style, script = text[text.index("<style>") : text.index("</style>")], text[text.rindex("<script>") :]
    assert not re.search(r"url\(|@import|https?:", style + script)
    markup = r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b"
    assert not re.search(markup, script)  # data is never turned into markup
    [policy] = [a["content"] for tag, a in elements if tag == "meta" and "http-equiv" in a]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def test_two_runs_and_their_marks(tmp_path):
    second = run(tmp_path / "b", ["no"] * 5)._replace(name="b/model")
    write_page(tmp_path / "p.html", "data.json", [run(tmp_path, mark=None), second])
    first, other = page_data(tmp_path / "p.html")["rows"][0]["answers"]
    assert first == {"prediction": HOSTILE[0], "stopped": True, "exact_match": True, "rouge_l": 0.5, "mark": None}
    assert other == {"prediction": "no", "stopped": True, "exact_match": False, "rouge_l": 0.5}  # not judged


def test_written_and_read_again(tmp_path):
    """U+2028 ends a line for str.splitlines, but not in JSON lines."""
    written = run(tmp_path / "a")
    write_predictions(written, "data.json")
    assert read_predictions(tmp_path / "a") == written


BROKEN = {
    "half a line": ("predictions.jsonl", '{"prompt": ', r"predictions.jsonl:1: not a prediction; run --predict again"),
    "a list": ("predictions.jsonl", "[]\n", r"predictions.jsonl:1: not a prediction"),
    "no reference": (
        "predictions.jsonl",
        '{"prompt": [], "prediction": "", "rouge_l": 1}\n',
        r"jsonl:1: not a prediction",
    ),
    "not JSON": ("scores.json", "{", r"scores.json:1: not JSON"),
    "other scores": ("scores.json", '{"answers": 5}', r"scores.json: exact_match is missing"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_errors_name_the_broken_file(what, tmp_path):
    file, content, message = BROKEN[what]
    write_predictions(run(tmp_path), "data.json")
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_predictions(tmp_path)


def test_errors_name_the_first_other_question(tmp_path):
    own = run(tmp_path)
    questions = [(line["prompt"], line["reference"]) for line in own.predictions]
    check_questions(own, questions, "data.json")
    with pytest.raises(ValueError, match=r"predictions.jsonl:2: not the question that data.json has there"):
        check_questions(own, [questions[0], (questions[1][0], "else"), *questions[2:]], "data.json")
    with pytest.raises(ValueError, match=r"predictions.jsonl: has 5 answers, but data.json has 6 questions"):
        check_questions(own, [*questions, questions[0]], "data.json")


# ---- in a browser


def test_in_a_browser(tmp_path):
    """Filters, orders and searches."""
    others = [*HOSTILE[:3], "no", "x" * 500]
    runs = [run(tmp_path / "a", [*HOSTILE[:4], "no"]), run(tmp_path / "b", others)]
    for own, marks in zip(runs, ([10, 30, None, 20, 5], [10, 10, 10, 50, 5])):
        for line, mark in zip(own.predictions, marks):
            line["mark"] = mark
    write_page(tmp_path / "p.html", "data.json", runs)
    with closing(Browser(tmp_path / "browser")) as page:

        def visible_rows():
            return page.js(
                "[...document.querySelectorAll('#rows > li')].map((row) => Number(row.children[0].innerText))"
            )

        def in_order(name):
            page.js(f"$('order').value = {json.dumps(name)}; $('order').dispatchEvent(new Event('change'))")
            return visible_rows()

        def filtered(name):
            page.js(f"[...$('filters').children].find((button) => button.textContent.startsWith('{name}')).click()")
            return visible_rows()

        def searched(words):
            page.js("$('search').focus(); $('search').select()")
            page.type(words)
            return visible_rows()

        page.open((tmp_path / "p.html").as_uri())
        assert page.js("document.title") == "Predictions: data.json"
        assert page.js("[...$('filters').children].map((button) => button.textContent)") == [
            *("All 5", "Right 4", "Wrong 1", "Differ 2")
        ]
        assert visible_rows() == [5, 1, 4, 2, 3]  # the lowest mark first; rows without a mark come last
        assert in_order("Highest mark first") == [2, 4, 1, 5, 3]
        assert in_order("Most gained first") == [2, 1, 5, 4, 3]
        assert in_order("As in the file") == [1, 2, 3, 4, 5]
        assert [filtered(name) for name in ("Right", "Wrong", "Differ")] == [[1, 2, 3, 4], [5], [4, 5]]
        filtered("All")
        assert searched("QUOTED <  twice") == []
        assert page.text("#none") == "No matching answers."
        assert searched("日本 twice") == [4]
        assert page.text("#shown") == "1 of 5"
        page.js("$('search').value = ''; $('search').dispatchEvent(new Event('input'))")
        texts = page.js("[...document.querySelectorAll('.answer .text')].map((text) => text.textContent)")
        assert texts == [text for pair in zip([*HOSTILE[:4], "no"], others) for text in pair]
        assert page.js("document.documentElement.scrollWidth <= innerWidth")  # a long word is wrapped
        assert page.errors == []
