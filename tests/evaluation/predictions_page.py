"""Parses predictions.html."""

import json
from html.parser import HTMLParser
from pathlib import Path


class Page(HTMLParser):
    """The elements of a page with their attributes, and the text of the data element."""

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
    """The data in the page."""
    page = Page(file.read_text(encoding="utf-8"))
    assert [tag for tag, _ in page.elements].count("script") == 2
    data = page.data.split("\n  \n")[0]
    return json.loads(data)
