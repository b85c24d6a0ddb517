"""A streaming JSON reader: yields records with line numbers from arrays, JSON lines and objects of any size.

Values are parsed by the standard library (`json.JSONDecoder.raw_decode`,
https://docs.python.org/3/library/json.html). This module adds a sliding window over the text, so that no more of a file
is in memory than its longest value needs.
"""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

_CHUNK = 1 << 20  # characters read at a time
_LONGEST = 1 << 28  # characters of one value; a longer one is taken for a missing bracket
_SPACE = re.compile(r"[ \t\r\n]*")
_decoder = json.JSONDecoder()


def json_values(path: Path, text: IO[str]) -> Iterator[tuple[int, Any]]:
    """Yields `(line, value)` for each record of a JSON text: the line on which it starts, and the value.

    The records are the elements of an array, the lines of JSON lines, a single object, or the instances of a dataset
    object (`{"type": ..., "instances": [...]}`, LMFlow's layout). For a line that does not parse the value is a
    ValueError with the reason, so that the caller can skip it. A syntax error inside an array or object is raised,
    because the start of the next record is unknown.

    `[\\n  {"text": "a"},\\n  {"text": "b"}\\n]` -> `(2, {"text": "a"})`, `(3, {"text": "b"})`

    Args:
        path: the file's name, for messages.
        text: the file, seekable, opened with `newline="\\n"`, so that only a line feed ends a line.
    """
    for line, value in _values(path, text):
        if isinstance(value, dict) and isinstance(value.get("instances"), list) and _is_dataset(value):
            yield from ((line, instance) for instance in value["instances"])
        else:
            yield line, value


def _is_dataset(keys: Iterable[str]) -> bool:
    """Whether an object with `instances` is a dataset; otherwise it is a seed task, which has an instruction."""
    return "instruction" not in keys and ("type" in keys or set(keys) <= {"instances"})


def _values(path: Path, text: IO[str]) -> Iterator[tuple[int, Any]]:
    head = text.read(_CHUNK)
    text.seek(0)
    start = head.lstrip()
    if start.startswith("{") and _is_lines(start, whole=len(head) < _CHUNK):
        yield from _lines(text)
    elif start.startswith(("[", "{")):
        window = _Window(path, text)
        while opening := window.peek():
            if opening == "[":
                yield from _array(window)
            elif opening == "{":
                yield from _object(window)
            else:
                raise window.error("Extra data")
    elif start:
        raise ValueError(
            f"{path}:1: not JSON: it begins with {_quoted(start)}, expected {{ or [ (raw text is read from .txt files)"
        )


def _is_lines(text: str, whole: bool) -> bool:
    """Whether a text that starts with an object is JSON lines, rather than one object over several lines.

    It is JSON lines if the first line is a complete object or has a syntax error, such as an unterminated string. If
    the line ends between two tokens of an object, the object continues on the next line.
    """
    line, newline, _ = text.partition("\n")
    if not newline and not whole:
        return False  # the line is longer than `text`: read it through the sliding window
    error = _syntax_error(line)
    return error is None or not newline or not _is_truncated(error) or "Unterminated" in error.msg


def _syntax_error(line: str) -> json.JSONDecodeError | None:
    try:
        _decoder.decode(line.rstrip())
    except json.JSONDecodeError as error:
        return error
    return None


def _is_truncated(error: json.JSONDecodeError) -> bool:
    """Whether the text is a valid beginning of JSON that ends too early."""
    rest = error.doc[error.pos :]
    return "Unterminated" in error.msg or any(word.startswith(rest) for word in ("true", "false", "null"))


def _lines(text: IO[str]) -> Iterator[tuple[int, Any]]:
    decode = _decoder.decode
    for number, line in enumerate(text, 1):
        try:
            value = decode(line)
        except ValueError as error:
            if not line.strip():
                continue
            value = ValueError(_line_error(line) or f"not valid JSON: {error}")
        yield number, value


def _line_error(line: str) -> str | None:
    error = _syntax_error(line)
    if error is None:
        return None
    if not _is_truncated(error):
        return f"not valid JSON at column {error.colno}, near {_quoted(error.doc[error.pos :])}: {error.msg}"
    if line.endswith("\n"):
        return f"the line ends in the middle of a record (column {len(error.doc)}): a record must be on one line"
    return (
        f"the last line is truncated (column {len(error.doc)}): the file was not written completely; "
        "delete the line, or write the file again"
    )


def _quoted(text: str) -> str:
    """The first 20 characters of a line, quoted; as bytes if they are not UTF-8."""
    start = text.partition("\n")[0][:20]
    return repr(start.encode(errors="surrogateescape") if re.search("[\udc80-\udcff]", start) else start)


def _array(window: "_Window") -> Iterator[tuple[int, Any]]:
    for _ in window.items("]"):
        yield window.line(), window.value()


def _object(window: "_Window") -> Iterator[tuple[int, Any]]:
    """One object over several lines: yields it as a record, or streams the instances of a dataset."""
    line = window.line()
    record: dict[str, Any] = {}
    instances_line = None
    for _ in window.items("}"):
        if window.peek() != '"':
            raise window.error("Expecting property name enclosed in double quotes")
        key = window.value()
        if window.peek() != ":":
            raise window.error("Expecting ':' delimiter")
        window.pos += 1
        if window.peek() == "[" and key == "instances" and "instruction" not in record:
            instances_line = window.line()
            yield from _array(window)
        else:
            record[key] = window.value()
    if instances_line is None:
        yield line, record
    elif record and not _is_dataset(record):
        raise ValueError(
            f'{window.path}:{instances_line}: "instances" belongs to a dataset, which has a "type", or to a seed task, '
            f'which has its "instruction" before them; found {", ".join(map(json.dumps, record))}'
        )


class _Window:
    """A sliding window over a text file: the part in memory, extended until it contains a whole value."""

    def __init__(self, path: Path, file: IO[str]):
        self.path, self.file = path, file
        self.text, self.pos = "", 0  # the part in memory, and the read position in it
        self.first_column = 1  # the column of text[0]
        self.counted, self.counted_line = 0, 1  # text[counted] is on line counted_line
        self.at_end = False

    def line(self) -> int:
        """The line number of the next character."""
        self.counted_line += self.text.count("\n", self.counted, self.pos)
        self.counted = self.pos
        return self.counted_line

    def column(self) -> int:
        newline = self.text.rfind("\n", 0, self.pos)
        return self.pos - newline if newline >= 0 else self.first_column + self.pos

    def grow(self) -> None:
        """Drops the text before `pos`, and reads at least as much as is left."""
        line, column = self.line(), self.column()
        rest = self.text[self.pos :]
        chunk = self.file.read(max(_CHUNK, len(rest)))
        self.text, self.pos, self.at_end = rest + chunk, 0, not chunk
        self.first_column, self.counted, self.counted_line = column, 0, line

    def peek(self) -> str:
        """The next character that is not white space; "" at the end of the file."""
        while True:
            character = self.text[self.pos : self.pos + 1]
            if character and character not in " \t\r\n":
                return character
            self.pos = _SPACE.match(self.text, self.pos).end()  # type: ignore[union-attr]
            if self.pos == len(self.text):
                if self.at_end:
                    return ""
                self.grow()

    def items(self, closing: str) -> Iterator[None]:
        """Yields at the start of each item of the array or object that starts here; the caller reads the item."""
        self.pos += 1
        if self.peek() != closing:
            yield
            while (character := self.peek()) != closing:
                if character != ",":
                    raise self.error("Expecting ',' delimiter")
                self.pos += 1
                self.peek()
                yield
        self.pos += 1

    def value(self) -> Any:
        while True:
            try:
                value, end = _decoder.raw_decode(self.text, self.pos)
            except json.JSONDecodeError as error:
                # Far from the end of the window this is a syntax error. Near it, a number, escape or literal may be
                # incomplete, so read on. The position of "Unterminated" is the start of a string, anywhere before.
                if self.at_end or (error.pos < len(self.text) - 32 and "Unterminated" not in error.msg):
                    raise self.error(error.msg, error.pos) from None
            else:
                if end + 2 < len(self.text) or self.at_end:  # otherwise "12" may be the beginning of "12e+3"
                    self.pos = end
                    return value
            if len(self.text) - self.pos > _LONGEST:
                raise ValueError(
                    f"{self.path}:{self.line()}: a record of more than {_LONGEST:,} characters starts here: a bracket "
                    'is missing, or the records are under a key other than "instances"'
                )
            self.grow()

    def error(self, message: str, pos: int | None = None) -> ValueError:
        start, line = self.pos, self.line()
        self.pos = start if pos is None else pos
        location = f"{self.path}:{self.line()}"
        if self.at_end and ("Unterminated" in message or self.pos >= len(self.text)):
            inside = f" inside the value that starts at line {line}" if self.pos > start else ""
            return ValueError(f"{location}: the file is truncated{inside}: write or fetch it again")
        near = self.text[self.pos :] + self.file.read(20)
        return ValueError(
            f"{location}: not valid JSON at column {self.column()}, near {_quoted(near)}: {message} "
            "(inside an array or object a syntax error cannot be skipped: correct it, or write one record per line)"
        )
