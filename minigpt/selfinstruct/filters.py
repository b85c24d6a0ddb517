"""Filters 1 to 6: rules that drop a task before its novelty is scored.

The rules are those of Self-Instruct's bootstrap_instructions.py (length, banned words, "Write a program", first
character) and prepare_for_finetuning.py (input equals output, empty output); Stanford Alpaca's
generate_instruction.py adds banned words, ArmelRandy/Self-instruct "Write a function" and `--keep_programming`.
"""

import re
import string
from collections.abc import Iterable

from minigpt.selfinstruct.tasks import Task

NAMES = ("length", "banned_word", "programming", "punctuation", "language", "output", "novelty")
"""All filters in the order they run; novelty (novelty.py) is last. A task is counted for the first that drops it."""

BANNED_WORDS = (
    *("image", "images", "graph", "graphs", "picture", "pictures", "file", "files", "map", "maps", "draw", "plot"),
    *("go to", "video", "audio", "music", "flowchart", "diagram"),
)
"""Things that a text model can neither see nor produce."""

_PROGRAMMING = ("write a program", "write a function")
_UNSPACED = {"zh", "ja", "th", "lo", "km", "my"}  # written without spaces between words


class Filters:
    """Runs filters 1 to 6 in order.

    >>> Filters().reject(Task("Write a program that sorts.", output="sorted(x)"))
    'programming'
    """

    def __init__(
        self, banned_words: Iterable[str] = BANNED_WORDS, keep_programming: bool = False, language: str = "en"
    ):
        """
        Args:
            banned_words: matched as whole words, case-insensitively; "go to" matches with any white space between its
                words. Empty: nothing is banned.
            keep_programming: accept "Write a program" and "Write a function".
            language: ISO 639 code of the instructions. For any but English the first character may be non-ASCII. For
                languages written without spaces between words, length is counted in characters and a banned word
                matches anywhere, as BELLE does for Chinese.
        """
        self.keep_programming = keep_programming
        self.is_english = _is_language(language, {"en"})
        self.is_spaced = not _is_language(language, _UNSPACED)
        banned = "|".join(r"\s+".join(map(re.escape, word.split())) for word in banned_words if word.strip())
        around = r"(?<!\w)(?:{})(?!\w)" if self.is_spaced else "{}"
        self.banned = re.compile(around.format(banned), re.IGNORECASE) if banned else None

    def length(self, instruction: str) -> int:
        """Number of words; of characters if the language has no spaces between words."""
        words = instruction.split()
        return len(words) if self.is_spaced else len("".join(words))

    def reject(self, task: Task) -> str | None:
        """The name of the first filter that drops the task; None if it passes all six."""
        instruction = " ".join(task.instruction.split())
        if not 3 < self.length(instruction) <= 150:
            return "length"
        if self.banned and self.banned.search(instruction):
            return "banned_word"
        if not self.keep_programming and instruction.lower().startswith(_PROGRAMMING):
            return "programming"
        if instruction[0] in string.punctuation:
            return "punctuation"
        if self.is_english and not instruction[0].isascii():
            return "language"
        if task.output.strip() in ("", task.input.strip()):
            return "output"
        return None


def _is_language(language: str, codes: set[str]) -> bool:
    """Whether a language code such as `zh` or `zh-Hant` is one of `codes`."""
    return re.split("[-_]", language.lower())[0] in codes
