"""Streams an answer's text from its tokens, for the terminal and the server."""

from collections.abc import Sequence

from minigpt.data.tokenizer import Tokenizer

NO_CHARACTER = "\ufffd"  # what invalid UTF-8 decodes to


class AnswerText:
    """Decodes an answer token by token. Text is held back while it may be the start of a stop string, a trailing
    blank or an incomplete character.

    End-of-text and bytes that are not valid UTF-8 are removed.

    Args:
        stops: the text ends before the first of them.
        trim_start, trim_end: remove whitespace at the start and the end of the text.

    >>> text = AnswerText(tokenizer, ["###"], trim_start=True, trim_end=True)
    >>> [text.feed(id) for id in tokenizer.encode(" Yes #")] + [text.end()]
    ['Y', 'es', '', '', ' #']
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], *, trim_start: bool, trim_end: bool):
        self._eot_id, self._decoder, self._stops = tokenizer.eot_id, tokenizer.stream_decoder(), stops
        self._trim_start, self._trim_end = trim_start, trim_end
        self._held = ""

    def feed(self, id: int) -> str:
        """Adds a token, and returns the text that can be shown now."""
        self._held += "" if id == self._eot_id else self._decoder.feed(id)
        return self._release(max((_overlap(stop, self._held) for stop in self._stops), default=0))

    def end(self) -> str:
        """The rest of the text, after the last token."""
        return self._release(0)

    def _release(self, held_back: int) -> str:
        """Returns the text up to a stop string, or all but the last `held_back` characters, and keeps the rest."""
        ends = [self._held.index(stop) for stop in self._stops if stop in self._held]
        text = self._held[: min(ends, default=len(self._held) - held_back)]
        if self._trim_end:
            text = text[: len(text.replace(NO_CHARACTER, " ").rstrip())]
        self._held = self._held[len(text) :]
        text = text.replace(NO_CHARACTER, "")
        if self._trim_start:
            text = text.lstrip()
            self._trim_start = not text
        return text


def _overlap(stop: str, text: str) -> int:
    """The number of characters at the end of the text that may be the start of the stop string."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
