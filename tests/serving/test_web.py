"""The chat page in a real browser, operated by keyboard."""

# ruff: noqa: E402  # the extras may not be installed

import json
import re

import pytest

httpx = pytest.importorskip("httpx", reason="the extra test is not installed")
pytest.importorskip("fastapi", reason="the extra serve is not installed")

from minigpt.serving import server as server_module

from ..browser import Browser
from .running_server import make_model, serving, wait_for


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()


@pytest.fixture
def page(browser):
    """The browser, with an empty page; at the end, the console must have no errors."""
    browser.call("Page.navigate", url="about:blank")
    browser.errors.clear()
    yield browser
    assert browser.errors == []


def visit(page, server, width=1000, height=800, focus="question"):
    """Opens the page, and waits until it shows the model's name and the right element has the focus."""
    page.open(server.url, width, height)
    ready = f"document.activeElement?.id === '{focus}'"
    page.wait(ready + " && document.getElementById('model').textContent" * (focus == "question"))


def ask(page, question):
    page.tab_to("#question")
    page.type(question)
    page.press("Enter")


def wait_for_answer(page):
    page.wait("document.getElementById('stop').hidden && !document.querySelector('.busy')")
    return page.text(".answer")


def api_answer(server, *messages, **more):
    """The API's answer to the same conversation."""
    body = {"messages": [{"role": role, "content": content} for role, content in messages], **more}
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=30).json()["choices"][0]["message"][
        "content"
    ]


@pytest.fixture(scope="module")
def slow_server():
    """10 ms per token, so that streaming can be observed and stopped."""
    with serving(make_model(context=512, step_s=0.01), max_batch_size=1) as server:
        yield server


def test_a_conversation_by_keyboard(page, slow_server):
    visit(page, slow_server)
    assert page.js("document.title") == "tiny - minigpt"
    page.js(
        "window.seen = []; new MutationObserver(() => seen.push(document.querySelector('.answer')?.textContent.length))"
        ".observe(document.getElementById('turns'), { subtree: true, childList: true, characterData: true })"
    )
    page.type("First line")
    page.press("Enter", shift=True)
    page.type("second line")
    page.press("Enter")
    first = wait_for_answer(page)
    assert page.text(".question") == "First line\nsecond line"
    assert first == api_answer(slow_server, ("user", "First line\nsecond line"))
    assert len(set(page.js("seen"))) > 10  # it was streamed
    assert page.text("#status").startswith("20 tokens, ")
    assert page.text(".note") == "The answer reached the token limit."
    assert page.js("document.activeElement.id") == "question"
    ask(page, "And <b>now</b>?")
    second = wait_for_answer(page)
    turns = [("user", "First line\nsecond line"), ("assistant", first), ("user", "And <b>now</b>?")]
    assert second == api_answer(slow_server, *turns)
    assert page.text(".question") == "And <b>now</b>?"  # text, not markup


def test_stop_and_retry(page, slow_server):
    visit(page, slow_server)
    page.tab_to("#settings-button")
    page.press("Enter")
    page.tab_to("#max_tokens")
    page.type("90")
    ask(page, "A long one")
    wait_for(lambda: len(page.text(".answer")) > 10)
    page.press("Escape")
    part = wait_for_answer(page)
    assert page.text(".note") == "Stopped."
    wait_for(lambda: slow_server.worker.rows == 0)
    whole = api_answer(slow_server, ("user", "A long one"), max_tokens=90)
    assert whole.startswith(part)
    assert len(part) < len(whole)
    page.tab_to(".retry")
    page.press("Enter")
    assert wait_for_answer(page) == whole
    page.press("Escape")  # no answer is running, so Escape closes the settings
    assert page.js("settings.hidden")
    page.tab_to("#stop, #send")
    assert page.js("document.activeElement.id") == "send"


def test_settings_are_sent_and_stored(page, slow_server):
    visit(page, slow_server)
    page.js("localStorage.clear()")
    visit(page, slow_server)
    page.tab_to("#settings-button")
    page.press("Enter")
    for name, value in {"temperature": "0", "top_p": "0.5", "max_tokens": "7", "system": "Be brief."}.items():
        page.tab_to(f"#{name}")
        page.type(value)
    ask(page, "Hi")
    assert wait_for_answer(page) == api_answer(slow_server, ("system", "Be brief."), ("user", "Hi"), max_tokens=7)
    visit(page, slow_server)
    assert page.js("[temperature.value, top_p.value, max_tokens.value, system.value]") == ["0", "0.5", "7", "Be brief."]
    page.js("top_p.value = 3")
    ask(page, "Hi")
    assert page.text(".note.bad") == "Top-p: Value must be less than or equal to 1."
    page.js("localStorage.clear()")


def test_light_and_dark(page, slow_server):
    visit(page, slow_server)

    def background():
        return page.js("getComputedStyle(document.body).backgroundColor")

    page.prefer("light")
    light = background()
    page.prefer("dark")
    dark = background()
    assert light != dark
    page.tab_to("#theme")
    seen = []
    for _ in range(3):
        page.press("Enter")
        seen.append((page.text("#theme"), background()))
    assert seen == [("Theme: light", light), ("Theme: dark", dark), ("Theme: auto", dark)]
    page.prefer("light")


def test_export_and_copy(page, slow_server):
    visit(page, slow_server)
    page.js("URL.createObjectURL = (blob) => { window.saved = blob.text(); return 'blob:x' }")
    page.js("HTMLAnchorElement.prototype.click = function () { window.savedAs = this.download }")
    page.js("navigator.clipboard.writeText = async (text) => { window.copied = text }")
    page.tab_to("#export")
    page.press("Enter")
    assert page.text("#status") == "There is no conversation to export yet"
    ask(page, "Hi")
    answer = wait_for_answer(page)
    page.tab_to(".copy")
    page.press("Enter")
    assert page.js("copied") == answer
    page.tab_to("#export")
    page.press("Enter")
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": answer}]
    assert (json.loads(page.js("saved")), page.js("savedAs")) == ({"messages": messages}, "conversation.json")
    page.tab_to("#new")
    page.press("Enter")
    assert (page.js("document.querySelectorAll('.turn').length"), page.text("#empty")) == (0, "Ask something.")


def test_dropped_turns_are_reported(page, slow_server):
    visit(page, slow_server)
    for number in range(3):
        ask(page, f"{number} " + "cats and dogs " * 40)
        wait_for_answer(page)
    notes = page.js("[...document.querySelectorAll('.turn:last-child .note')].map((note) => note.textContent)")
    assert notes[0].startswith("The context is full: the oldest ")


def test_a_server_with_an_api_key(page):
    with serving(make_model(), api_key="secret") as server:
        visit(page, server, focus="key")
        page.type("wrong")
        page.press("Enter")
        wait_for(lambda: page.text("#key-wrong"))
        assert page.text("#key-wrong") == "Wrong key."
        page.type("secret")
        page.press("Enter")
        wait_for(lambda: page.text("#model") == "tiny")
        ask(page, "Hi")
        assert wait_for_answer(page)
    assert all('"status of 401' in error or "status of 401" in error for error in page.errors)
    page.errors.clear()


def test_a_server_restart(page):
    model = make_model(context=512, step_s=0.01)
    with serving(model) as server:
        port = int(server.url.rpartition(":")[2])
        visit(page, server)
        ask(page, "Hi")
        first = wait_for_answer(page)
    ask(page, "Are you there?")
    wait_for(lambda: page.text(".note.bad"))
    assert page.text(".note.bad") == "The server could not be reached."
    status = "The server cannot be reached. Waiting for it to come back; your conversation is kept."
    assert page.text("#status") == status
    with serving(model, port=port) as server:
        wait_for(lambda: page.text("#status") == "The server is back. Press Retry to ask again.")
        page.tab_to(".retry")
        page.press("Enter")
        turns = [("user", "Hi"), ("assistant", first), ("user", "Are you there?")]
        assert wait_for_answer(page) == api_answer(server, *turns)
        assert page.js("document.querySelectorAll('.note.bad').length") == 0
    assert all("ERR_CONNECTION_REFUSED" in error for error in page.errors)
    page.errors.clear()


def test_an_answer_that_the_server_aborts(page, monkeypatch):
    monkeypatch.setattr(server_module, "GRACE_S", 0.1)
    with serving(make_model(context=512, step_s=0.05)) as server:
        visit(page, server)
        ask(page, "Hi")
        wait_for(lambda: page.text(".answer"))
    answer = wait_for_answer(page)
    assert answer
    assert page.text(".note.bad").startswith("The server ended the answer: the server is shutting down")


@pytest.mark.parametrize("width", [320, 360, 1000])
def test_nothing_is_wider_than_the_window(page, slow_server, width):
    visit(page, slow_server, width=width, height=640)
    page.js("document.getElementById('settings-button').click()")
    ask(page, "w" * 300)
    wait_for_answer(page)
    assert page.js("document.documentElement.scrollWidth") == width
    assert page.js("main.scrollWidth <= main.clientWidth")
    assert page.js("main.clientHeight") > 60


def test_the_page_loads_nothing_from_other_sites(slow_server):
    """The content security policy forbids it, and the files contain no other URL; nor do they turn text into markup."""
    response = httpx.get(slow_server.url)
    policy = response.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self';")
    for path in ("/", "/chat.js", "/chat.css"):
        text = httpx.get(slow_server.url + path).text.replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|//cdn|@import|innerHTML|insertAdjacentHTML|eval\(|style=|onclick=", text)


def test_every_control_has_an_accessible_name(page, slow_server):
    visit(page, slow_server)
    page.js("document.getElementById('settings-button').click()")
    ask(page, "Hi")
    wait_for_answer(page)
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    controls = [node for node in nodes if node["role"]["value"] in ("button", "textbox", "spinbutton", "list")]
    names = [node["name"]["value"] for node in controls if not node["ignored"]]
    assert len(names) >= 11
    assert all(names)
