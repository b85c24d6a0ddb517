"""Finds data files, and reads them as streams: decompresses gzip, detects the encoding, reads parquet.

The type of a file is detected from its first bytes (gzip, parquet, encoding, binary); only raw text is recognized by
its name (.txt). Files are read in chunks, so they may be larger than memory.
"""

import codecs
import glob
import gzip
import io
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from minigpt.data.read.json_values import json_values
from minigpt.hub import fetch

SUFFIXES = (".json", ".jsonl", ".txt", ".parquet")  # each may be followed by .gz
Paths = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]
OnBytes = Callable[[int], object]

_CHUNK = 1 << 20  # characters read at a time
_HUB = re.compile(
    r"hf://datasets/(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>refs/(?:pr|convert)/[^/]+|[^/]+))?/(?P<file>.+)"
)
_WORD_END = re.compile(r"\S(?=[ \n])")


def find_data_files(paths: Paths) -> list[Path]:
    """Resolves files, folders (all data files in them, sorted, without hidden ones), globs and `hf://` files, in order.

    Raises `FileNotFoundError` if a path matches no file.
    """
    return [file for path in ([paths] if isinstance(paths, str | os.PathLike) else paths) for file in _find(str(path))]


def _find(name: str) -> list[Path]:
    if name.startswith("hf://"):
        return [_find_on_hub(name)]
    path = Path(name).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        files = [
            file
            for file in sorted(path.rglob("*"))
            if file.name.removesuffix(".gz").endswith(SUFFIXES)
            and file.is_file()
            and not any(part.startswith(".") for part in file.relative_to(path).parts)
        ]
        if not files:
            raise FileNotFoundError(f"{name}: a folder without data files (expected {' '.join(SUFFIXES)}, or with .gz)")
        return files
    if glob.has_magic(name):
        files = [Path(file) for file in sorted(glob.glob(str(path), recursive=True)) if os.path.isfile(file)]
        if not files:
            raise FileNotFoundError(f"{name}: no file matches this pattern")
        return files
    siblings = [sibling.name for sibling in path.parent.iterdir()] if path.parent.is_dir() else []
    hints = [
        f" (did you mean {path.with_name(near)}?)" for near in get_close_matches(path.name, siblings, n=1, cutoff=0.8)
    ]
    raise FileNotFoundError(f"{name}: no such file or folder{''.join(hints)}")


def _find_on_hub(name: str) -> Path:
    match = _HUB.fullmatch(name)
    if not match:
        raise FileNotFoundError(
            f"{name}: expected hf://datasets/OWNER/NAME/FILE, or hf://datasets/OWNER/NAME@REVISION/FILE"
        )
    revision = unquote(match["revision"]) if match["revision"] else None
    path = fetch(match["repo"], match["file"], revision=revision, repo_type="dataset")
    if path is None:
        raise FileNotFoundError(f"{name}: the dataset {match['repo']} has no such file at {revision or 'main'}")
    return path


def is_raw_text(path: Path) -> bool:
    """Whether the name ends in .txt or .txt.gz."""
    return path.name.removesuffix(".gz").endswith(".txt")


def read_text(path: Path, on_bytes: OnBytes | None = None) -> Iterator[str]:
    """Yields the text of a file in chunks of about a million characters, with `\\n` line ends.

    A chunk ends after a word, before a space or line end. No token of GPT-2's pre-tokenizer spans that position, so the
    chunks can be tokenized separately.
    """
    line, rest, empty = 1, "", True
    with _open(path, None, on_bytes) as text:
        while chunk := text.read(_CHUNK):
            if broken := broken_character(chunk):
                line += chunk.count("\n", 0, broken[0])
                raise ValueError(f"{path}:{line}: the text contains {broken[1]}")
            line, rest, empty = line + chunk.count("\n"), rest + chunk, False
            cut = max((match.end() for match in _WORD_END.finditer(rest, max(0, len(rest) - 4096))), default=0)
            if cut:
                yield rest[:cut]
                rest = rest[cut:]
    if empty:
        raise ValueError(f"{path}: no text in it: delete the file, or fetch it again")
    if rest:
        yield rest


def broken_character(text: str) -> tuple[int, str] | None:
    """The index and description of the first character of a text that is not valid Unicode text, or None."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        if 0xDC80 <= code <= 0xDCFF:  # surrogateescape: a byte that is not UTF-8
            return error.start, f"the byte 0x{code - 0xDC00:02X}, which is not UTF-8: save the file as UTF-8"
        return error.start, f"half of a surrogate pair (\\u{code:04x}), which is not a character: remove it"
    return None


def read_values(path: Path, on_bytes: OnBytes | None = None) -> Iterator[tuple[int, Any]]:
    """Yields `(line, value)` for each record of a file, like `json_values`; for parquet, `(row, value)`.

    Bytes that are not UTF-8 are decoded as lone surrogates, which `broken_character` detects.
    """
    empty = True
    with path.open("rb") as file:
        is_parquet = file.read(4) == b"PAR1"
    for value in _parquet_rows(path, on_bytes) if is_parquet else _json_values(path, on_bytes):
        empty = False
        yield value
    if empty:
        raise ValueError(f"{path}: no record in it: delete the file, or fetch it again")


def _json_values(path: Path, on_bytes: OnBytes | None) -> Iterator[tuple[int, Any]]:
    with _open(path, "\n", on_bytes) as text:
        yield from json_values(path, text)


def _parquet_rows(path: Path, on_bytes: OnBytes | None) -> Iterator[tuple[int, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{path}: parquet needs pyarrow: pip install -c constraints.txt -e '.[parquet]'") from None
    row, reported, size = 0, 0, path.stat().st_size
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=1024):
                yield from enumerate(batch.to_pylist(), row + 1)
                row += batch.num_rows
                if on_bytes:
                    on_bytes(size * row // table.metadata.num_rows - reported)
                    reported = size * row // table.metadata.num_rows
    except pyarrow.ArrowException as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path}: a damaged parquet file ({reason}): fetch it again") from error


@contextmanager
def _open(path: Path, newline: str | None, on_bytes: OnBytes | None) -> Iterator[io.TextIOWrapper]:
    """Opens a file as text: decompressed if it is gzip, decoded by its byte-order mark, else as UTF-8."""
    raw = _Counted(path, on_bytes) if on_bytes else io.FileIO(path)
    with io.BufferedReader(raw, 1 << 18) as buffered:
        stream = gzip.GzipFile(fileobj=buffered) if buffered.peek(2)[:2] == b"\x1f\x8b" else buffered
        try:
            head = stream.peek(4096)[:4096]
            if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                encoding = "utf-16"
            elif b"\0" in head:
                raise ValueError(
                    f"{path}: a binary file (it contains NUL bytes), expected JSON, JSON lines, text or parquet "
                    "(UTF-16 needs its byte-order mark)"
                )
            else:
                encoding = "utf-8-sig" if head.startswith(codecs.BOM_UTF8) else "utf-8"
            yield io.TextIOWrapper(stream, encoding, errors="surrogateescape", newline=newline)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{path}: a damaged gzip file ({error}): fetch it again, or compress it again") from error
        except UnicodeDecodeError as error:  # UTF-16 only: invalid UTF-8 is decoded as lone surrogates
            raise ValueError(f"{path}: damaged {error.encoding.upper()} ({error.reason}): save it as UTF-8") from error


class _Counted(io.FileIO):
    """A file that reports the bytes read from disk, for a progress bar."""

    def __init__(self, path: Path, on_bytes: OnBytes):
        super().__init__(path)
        self.on_bytes, self.reported = on_bytes, 0

    def readinto(self, buffer: Any) -> int | None:
        size = super().readinto(buffer)
        if self.tell() > self.reported:  # not on a second read of the start
            self.on_bytes(self.tell() - self.reported)
            self.reported = self.tell()
        return size
