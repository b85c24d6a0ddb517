"""Filters 1 to 6: what is dropped before its novelty is measured.

The rules are those of Self-Instruct's bootstrap_instructions.py (length, banned words, "Write a program", first
character) and prepare_for_finetuning.py (input equals output, empty output); Stanford Alpaca's
generate_instruction.py adds banned words, ArmelRandy/Self-instruct "Write a function" and `--keep_programming`.
"""

import re
import string
from collections.abc import Iterable

from minigpt.selfinstruct.tasks import Task

NAMES = ("length", "banned_word", "programming", "punctuation", "language", "output", "novelty")
"""Every filter in the order they are asked, novelty (novelty.py) last. A task counts for the first that drops it."""

BANNED_WORDS = (
    *("image", "images", "graph", "graphs", "picture", "pictures", "file", "files", "map", "maps", "draw", "plot"),
    *("go to", "video", "audio", "music", "flowchart", "diagram"),
)
"""What a text model cannot look at, or make."""

_PROGRAMMING = ("write a program", "write a function")
_UNSPACED = {"zh", "ja", "th", "lo", "km", "my"}  # written without blanks between words


class Filters:
    """Filters 1 to 6, asked in order.

    >>> Filters().reject(Task("Write a program that sorts.", output="sorted(x)"))
    'programming'
    """

    def __init__(
        self, banned_words: Iterable[str] = BANNED_WORDS, keep_programming: bool = False, language: str = "en"
    ):
        """
        Args:
            banned_words: words that must not occur whole in an instruction, in any case; "go to" is two words with any
                blanks between them. None: no ban.
            keep_programming: "Write a program" and "Write a function" stay.
            language: ISO 639 code of the instructions. In any but English the first character need not be ASCII. In
                one that is written without blanks between words, length is counted in characters and a banned word
                is found anywhere, as BELLE does for Chinese.
        """
        self.keep_programming = keep_programming
        self.is_english = _is(language, {"en"})
        self.is_spaced = not _is(language, _UNSPACED)
        banned = "|".join(r"\s+".join(map(re.escape, word.split())) for word in banned_words if word.strip())
        around = r"(?<!\w)(?:{})(?!\w)" if self.is_spaced else "{}"
        self.banned = re.compile(around.format(banned), re.IGNORECASE) if banned else None

    def length(self, instruction: str) -> int:
        """Its words; its characters where no blanks stand between words."""
        words = instruction.split()
        return len(words) if self.is_spaced else len("".join(words))

    def reject(self, task: Task) -> str | None:
        """The name of the first filter that drops the task; None where it passes all six."""
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


def _is(language: str, codes: set[str]) -> bool:
    """Whether a code such as `zh` or `zh-Hant` is one of these languages."""
    return re.split("[-_]", language.lower())[0] in codes
