"""The report in a real browser, a headless Chromium; what is done in it is done by keyboard where that can be."""

import json
import re
import time

import pytest

from minigpt.selfinstruct.filters import Filters
from minigpt.selfinstruct.report.write import write_report

from .reported import EVIL, kept_of, make_run, some_tasks, task


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from ...serving.test_web import Browser  # skips where there is no Chromium

    browser = Browser(tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()


@pytest.fixture
def page(browser):
    """The browser; at the end its console has nothing to complain of."""
    browser.errors.clear()
    yield browser
    assert browser.errors == []


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    tasks = [task(instruction, text=text, output=text + "x" * 400) for instruction, text in EVIL]
    return write_report(make_run(tmp_path_factory.mktemp("report") / "run", [*some_tasks(400), *tasks]), Filters())


def visit(page, path, width=1200, hash=""):
    page.call("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 700)
    page.call("Page.navigate", url="about:blank")
    page.call("Page.navigate", url=path.as_uri() + hash)
    wait(page, "document.readyState === 'complete' && document.getElementById('status')?.textContent")


def wait(page, condition):
    end = time.monotonic() + 20
    while not page.js(f"Boolean({condition})"):
        assert time.monotonic() < end, f"never came: {condition}"
        time.sleep(0.01)


def search(page, words, status):
    page.js("document.getElementById('search').focus(); document.getElementById('search').select()")
    page.type(words)
    wait(page, f"document.getElementById('status').textContent === {json.dumps(status)}")


def rows(page, cell="td:first-child > .text"):
    return page.js(f"[...document.querySelectorAll('#table tbody tr {cell}')].map((cell) => cell.textContent)")


def test_search_in_all_tasks(page, report):
    visit(page, report)
    kept = kept_of(report.parent)
    assert page.text("#status") == "304 of 304 tasks"
    assert rows(page) == [line["instruction"] for line in kept[:50]]
    wanted = [
        line["instruction"] for line in kept if "joke" in line["instruction"] and "very very" in line["instruction"]
    ]
    search(page, 'JOKE "very very"', f"{len(wanted)} of 304 tasks")
    assert rows(page) == wanted
    search(page, "marhaba", "0 of 304 tasks")
    search(page, "مرحبا", "1 of 304 tasks")  # in an input
    assert rows(page) == [EVIL[3][0]]


def test_verbs_and_nouns_are_searched_by_a_link(page, report):
    visit(page, report)
    kept = [line["instruction"] for line in kept_of(report.parent)]
    link = next(hash for hash in page.js("[...document.links].map((link) => decodeURI(link.hash))") if "noun:" in hash)
    verb, noun = re.findall('"(.*?)"', link)
    wanted = [text for text in kept if text.startswith(f"{verb.capitalize()} a {noun} ")]
    visit(page, report, hash=link)
    assert rows(page) == wanted[:50]
    assert page.text("#status") == f"{len(wanted)} of 304 tasks"
    page.js("document.querySelector('.sunburst a').dispatchEvent(new MouseEvent('click', { bubbles: true }))")
    wait(page, "document.getElementById('search').value === 'verb:\"write\"'")


@pytest.mark.parametrize(("column", "cell"), [("words", 3), ("score", 4), ("request", 5)])
def test_sorting_by_keyboard(page, report, column, cell):
    visit(page, report)
    page.js(f"document.querySelector('[data-sort={column}]').focus()")
    page.press("Enter")
    down = [float(text.replace(",", "")) for text in rows(page, f"td:nth-child({cell})")]
    assert page.js(f"document.querySelector('[data-sort={column}]').closest('th').ariaSort") == "descending"
    page.press("Enter")
    up = [float(text.replace(",", "")) for text in rows(page, f"td:nth-child({cell})")]
    data = sorted(page.js(f"data.{column}"))
    assert up == [pytest.approx(value, abs=0.006) for value in data[:50]]
    assert down == [pytest.approx(value, abs=0.006) for value in data[:-51:-1]]


def test_pages_by_keyboard(page, report):
    visit(page, report)
    kept = [line["instruction"] for line in kept_of(report.parent)]
    assert page.text("#last") == "7"
    page.js("document.getElementById('next').focus()")
    page.press("Enter")
    assert rows(page) == kept[50:100]
    page.js("document.getElementById('page').select()")
    page.type("7")
    page.press("Enter")
    assert rows(page) == kept[300:]
    assert page.js("[previous.disabled, next.disabled]") == [False, True]


def test_a_row_opens_and_closes(page, report):
    visit(page, report)
    search(page, "gedicht", "1 of 304 tasks")
    assert rows(page, ".output")[0].endswith("x…")
    page.press("Tab")  # from the search to the first of the heads, and on to the row
    page.tab_to(".toggle")
    page.press("Enter")
    assert rows(page, ".output") == ["مرحبا" + "x" * 400]
    assert page.text("#table .task .part").startswith("NEAREST")
    assert page.js("[document.activeElement.className, document.activeElement.ariaExpanded]") == ["toggle", "true"]
    page.press("Enter")
    assert rows(page, ".output")[0].endswith("x…")


def test_no_task_runs_in_the_page(page, report):
    visit(page, report)
    for words in ("script", "comments", "latin"):
        search(page, words, "1 of 304 tasks")
        page.js("document.querySelector('.toggle').click()")
        assert page.js("document.querySelectorAll('#table img, #table svg, #table script, #table b b').length") == 0
    assert page.js("document.title") == "run - self-instruct report"


@pytest.mark.parametrize("width", [320, 390, 768, 1200])
def test_nothing_is_wider_than_the_window(page, report, width):
    visit(page, report, width)
    page.js("for (const one of document.querySelectorAll('details')) one.open = true")
    search(page, "x" * 100, "4 of 304 tasks")
    page.js("for (const one of document.querySelectorAll('.toggle')) one.click()")
    assert page.js("document.documentElement.scrollWidth <= innerWidth")
    assert page.js("[...document.querySelectorAll('td, li, p')].every((one) => one.scrollWidth <= innerWidth)")


def test_light_and_dark(page, report):
    visit(page, report)
    seen = {}
    for scheme in ("light", "dark"):
        page.prefer(scheme)
        seen[scheme] = page.js(
            "['body', '.sunburst path', '.bar'].map((one) => getComputedStyle(document.querySelector(one)))"
            ".map((style) => [style.backgroundColor, style.fill].join())"
        )
    page.prefer("light")
    assert all(light != dark for light, dark in zip(*seen.values(), strict=True))


def test_everything_has_a_name(page, report):
    visit(page, report)
    nodes = [node for node in page.call("Accessibility.getFullAXTree")["nodes"] if not node["ignored"]]
    roles = ("button", "link", "searchbox", "spinbutton", "table", "image", "navigation", "columnheader")
    names = [(node["role"]["value"], node["name"]["value"]) for node in nodes if node["role"]["value"] in roles]
    assert {role for role, _ in names} == set(roles)
    assert all(name for _, name in names)


@pytest.mark.slow
def test_fifty_thousand_tasks_stay_usable(page, tmp_path):
    """The bounds are those of a slow machine: some times of what was measured."""
    path = write_report(make_run(tmp_path / "run", some_tasks(66_668)), Filters())
    began = time.perf_counter()
    visit(page, path)
    opened = time.perf_counter() - began
    assert page.text("#status") == "50,001 of 50,001 tasks"
    page.js("text(0)")  # made at the first search, and not again
    spent = page.js(
        "(() => { const began = performance.now(); $('search').value = 'poem 77'; search();"
        " const found = performance.now(); document.querySelector('[data-sort=score]').click();"
        " return [found - began, performance.now() - found] })()"
    )
    assert len(rows(page)) == 50
    assert (opened < 10, spent[0] < 1000, spent[1] < 1000) == (True, True, True), (opened, spent)
