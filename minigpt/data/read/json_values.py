"""JSON as a stream of values with line numbers: arrays, JSON lines and objects, of any size.

The grammar is the standard library's (`json.JSONDecoder.raw_decode`, https://docs.python.org/3/library/json.html);
added here is a window that moves over the text, so that no more of a file is held than its longest value needs.
"""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

_CHUNK = 1 << 20  # characters read at a time
_LONGEST = 1 << 28  # characters of one value: beyond, a bracket is missing rather than a record that long
_SPACE = re.compile(r"[ \t\r\n]*")
_decoder = json.JSONDecoder()


def json_values(path: Path, text: IO[str]) -> Iterator[tuple[int, Any]]:
    """Yields `(line, value)` for each record of a JSON text: the line it starts in, and the value.

    An array gives its elements, JSON lines their lines, a single object itself, and a dataset object
    (`{"type": ..., "instances": [...]}`, LMFlow's layout) its instances. A line that does not parse comes as the
    ValueError that says why, so that the caller may go on behind it; a syntax error inside an array or object is
    raised, because nothing tells where the next record starts.

    `[\\n  {"text": "a"},\\n  {"text": "b"}\\n]` -> `(2, {"text": "a"})`, `(3, {"text": "b"})`

    Args:
        path: the file's name, for messages.
        text: the file, rewindable, opened so that a line is what ends with a line feed (`newline="\\n"`).
    """
    for line, value in _values(path, text):
        if isinstance(value, dict) and isinstance(value.get("instances"), list) and _is_dataset(value):
            yield from ((line, instance) for instance in value["instances"])
        else:
            yield line, value


def _is_dataset(keys: Iterable[str]) -> bool:
    """Whether an object with `instances` is a dataset (else: a seed task, which has an instruction)."""
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
    """Whether a text that starts with an object is JSON lines, and not an object over many lines.

    It is, when its first line is an object, or would be but for an error inside it. Where the line ends between
    two parts of an object, the object goes on in the next line; inside a string no line can end.
    """
    line, newline, _ = text.partition("\n")
    if not newline and not whole:
        return False  # a line longer than what was looked at: the window reads it as well
    error = _syntax_error(line)
    return error is None or not newline or not _is_cut(error) or "Unterminated" in error.msg


def _syntax_error(line: str) -> json.JSONDecodeError | None:
    try:
        _decoder.decode(line.rstrip())
    except json.JSONDecodeError as error:
        return error
    return None


def _is_cut(error: json.JSONDecodeError) -> bool:
    """Whether the text was right so far, and ended too early."""
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
    if not _is_cut(error):
        return f"not valid JSON at column {error.colno}, near {_quoted(error.doc[error.pos :])}: {error.msg}"
    if line.endswith("\n"):
        return f"the line ends in the middle of a record (column {len(error.doc)}): a record must stand on one line"
    return (
        f"the last line is cut off (column {len(error.doc)}): the file was not written to its end; "
        "delete the line, or write the file again"
    )


def _quoted(text: str) -> str:
    """The first characters of a line; as bytes where they are not UTF-8."""
    start = text.partition("\n")[0][:20]
    return repr(start.encode(errors="surrogateescape") if re.search("[\udc80-\udcff]", start) else start)


def _array(window: "_Window") -> Iterator[tuple[int, Any]]:
    for _ in window.items("]"):
        yield window.line(), window.value()


def _object(window: "_Window") -> Iterator[tuple[int, Any]]:
    """One object over many lines: a record, or a dataset whose instances are streamed."""
    line = window.line()
    record: dict[str, Any] = {}
    instances = None
    for _ in window.items("}"):
        if window.peek() != '"':
            raise window.error("Expecting property name enclosed in double quotes")
        key = window.value()
        if window.peek() != ":":
            raise window.error("Expecting ':' delimiter")
        window.pos += 1
        if window.peek() == "[" and key == "instances" and "instruction" not in record:
            instances = window.line()
            yield from _array(window)
        else:
            record[key] = window.value()
    if instances is None:
        yield line, record
    elif record and not _is_dataset(record):
        raise ValueError(
            f'{window.path}:{instances}: "instances" belongs to a dataset, which has a "type", or to a seed task, '
            f'which has its "instruction" before them; found {", ".join(map(json.dumps, record))}'
        )


class _Window:
    """The part of a text that is in memory: it moves over the text, and grows until a whole value is in it."""

    def __init__(self, path: Path, file: IO[str]):
        self.path, self.file = path, file
        self.text, self.pos = "", 0  # what is in memory, and how far it is read
        self.first_column = 1  # the column of text[0]
        self.counted, self.counted_line = 0, 1  # text[counted] stands in this line
        self.ended = False

    def line(self) -> int:
        """The line of the next character."""
        self.counted_line += self.text.count("\n", self.counted, self.pos)
        self.counted = self.pos
        return self.counted_line

    def column(self) -> int:
        newline = self.text.rfind("\n", 0, self.pos)
        return self.pos - newline if newline >= 0 else self.first_column + self.pos

    def grow(self) -> None:
        """Forgets what is read, and at least doubles what is left."""
        line, column = self.line(), self.column()
        rest = self.text[self.pos :]
        more = self.file.read(max(_CHUNK, len(rest)))
        self.text, self.pos, self.ended = rest + more, 0, not more
        self.first_column, self.counted, self.counted_line = column, 0, line

    def peek(self) -> str:
        """The next character that is not white space; "" at the end of the file."""
        while True:
            character = self.text[self.pos : self.pos + 1]
            if character and character not in " \t\r\n":
                return character
            self.pos = _SPACE.match(self.text, self.pos).end()  # type: ignore[union-attr]
            if self.pos == len(self.text):
                if self.ended:
                    return ""
                self.grow()

    def items(self, closing: str) -> Iterator[None]:
        """Stops at each item of the array or object that starts here; the caller takes the item."""
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
                # An error far from the end of the window is one; near it, the text may only be cut there:
                # inside a number, an escape or a literal; a string that is cut may have begun anywhere.
                if self.ended or (error.pos < len(self.text) - 32 and "Unterminated" not in error.msg):
                    raise self.error(error.msg, error.pos) from None
            else:
                if end + 2 < len(self.text) or self.ended:  # or "12" could be the beginning of "12e+3"
                    self.pos = end
                    return value
            if len(self.text) - self.pos > _LONGEST:
                raise ValueError(
                    f"{self.path}:{self.line()}: a record of more than {_LONGEST:,} characters starts here: a bracket "
                    'is missing, or the records stand under a key that is not "instances"'
                )
            self.grow()

    def error(self, message: str, pos: int | None = None) -> ValueError:
        start, line = self.pos, self.line()
        self.pos = start if pos is None else pos
        where = f"{self.path}:{self.line()}"
        if self.ended and ("Unterminated" in message or self.pos >= len(self.text)):
            inside = f" in the middle of what starts at line {line}" if self.pos > start else ""
            return ValueError(f"{where}: the file is cut off{inside}: write or fetch it again")
        near = self.text[self.pos :] + self.file.read(20)
        return ValueError(
            f"{where}: not valid JSON at column {self.column()}, near {_quoted(near)}: {message} "
            "(inside an array or object a syntax error cannot be skipped: correct it, or write one record per line)"
        )
