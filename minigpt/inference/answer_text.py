"""Tokens as text that may be shown at once, in the terminal and by the server."""

from collections.abc import Sequence

from minigpt.data.tokenizer import Tokenizer

NO_CHARACTER = "\ufffd"  # what bytes that are none decode to


class AnswerText:
    """An answer's text as its tokens come. What may begin a stop string waits, as do blanks and halves of characters.

    End-of-text, and bytes that are no character, are not shown.

    Args:
        stops: the text ends before the first of them.
        trim_start, trim_end: take off the blanks before the text, and after it.

    >>> text = AnswerText(tokenizer, ["###"], trim_start=True, trim_end=True)
    >>> [text.feed(id) for id in tokenizer.encode(" Yes #")] + [text.end()]
    ['Y', 'es', '', '', ' #']
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], *, trim_start: bool, trim_end: bool):
        self._eot_id, self._decoder, self._stops = tokenizer.eot_id, tokenizer.stream_decoder(), stops
        self._trim_start, self._trim_end = trim_start, trim_end
        self._held = ""

    def feed(self, id: int) -> str:
        """The text that may be shown now."""
        self._held += "" if id == self._eot_id else self._decoder.feed(id)
        return self._show(max((_begun(stop, self._held) for stop in self._stops), default=0))

    def end(self) -> str:
        """What of the text is still to be shown when no more tokens come."""
        return self._show(0)

    def _show(self, waiting: int) -> str:
        """Takes what is held off to a stop string, or to so many characters before the end."""
        ends = [self._held.index(stop) for stop in self._stops if stop in self._held]
        shown = self._held[: min(ends, default=len(self._held) - waiting)]
        if self._trim_end:
            shown = shown[: len(shown.replace(NO_CHARACTER, " ").rstrip())]
        self._held = self._held[len(shown) :]
        shown = shown.replace(NO_CHARACTER, "")
        if self._trim_start:
            shown = shown.lstrip()
            self._trim_start = not shown
        return shown


def _begun(stop: str, text: str) -> int:
    """How many characters at the end of the text might begin the stop string."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
