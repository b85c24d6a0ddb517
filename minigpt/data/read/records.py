"""Converts instruction data and raw text of many formats to Conversations.

The format is detected for each record by its keys: Stanford Alpaca (with the variants of Self-Instruct and Belle),
databricks-dolly, LMFlow's datasets (https://optimalscale.github.io/LMFlow/examples/DATASETS.html), prompt/completion
pairs, messages, ShareGPT conversations, Self-Instruct seed tasks, and text, which is split into turns if it contains
the markers of HugChat or OIG.

Every Conversation is either one "text" message, or an optional system message followed by alternating user and
assistant messages, the last one the assistant's. Contents are verbatim, even empty ones; only turns that were split out
of a text are stripped of surrounding white space. Unknown keys are ignored, and if a key is repeated the last one wins,
as usual in JSON.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from minigpt.data.read.streams import (
    OnBytes,
    Paths,
    broken_character,
    find_data_files,
    is_raw_text,
    read_text,
    read_values,
)

Message = dict[str, str]

_ROLES = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}
_KEYS = ("instruction", "input", "output", "prompt", "completion", "response", "messages", "conversations", "text")
_FORMATS = '"instruction" and "output", "prompt" and "completion", "input" and "output", "messages" or "text"'
_NO_INPUT = re.compile(r"\W*no[\W_]*(input|output)\W*", re.IGNORECASE)
# HugChat's markers are at the start of a line, with or without brackets; OIG's may be anywhere.
_TEXT_TURN = re.compile(r"^[ \t]*(?:\[(?:Human|HugChat)\]|Human|HugChat):|<(?:human|bot)>:", re.MULTILINE)
_BELLE_TURN = re.compile(r"^[ \t]*(?:Human|Assistant):", re.MULTILINE)


@dataclass(frozen=True)
class Conversation:
    """Messages `{"role", "content"}` of role system, user, assistant or text; a user message may have an "input".

    The record `{"instruction": "Name the capital.", "input": "France", "output": "Paris."}` becomes the messages
    `[{"role": "user", "content": "Name the capital.", "input": "France"}, {"role": "assistant", "content": "Paris."}]`.
    """

    messages: list[Message]
    source: str = field(default="", compare=False)
    """`FILE:LINE` on which the record starts (parquet: `FILE:ROW`). If several records are on one line, as in an array
    written without line breaks, the later ones are `FILE:LINE, record 2` and so on."""


def read_records(
    paths: Paths,
    *,
    skip_bad_records: int = 0,
    bad_records: list[str] | None = None,
    on_bytes: OnBytes | None = None,
) -> Iterator[Conversation]:
    """Reads conversations from files, folders, globs and `hf://datasets/OWNER/NAME[@REVISION]/FILE`.

    Args:
        paths: one or several, read in this order: .json, .jsonl, .txt (each also .gz), .parquet. A .txt file is one
            text message.
        skip_bad_records: maximum number of invalid records to skip; one more raises its error.
        bad_records: a list to which the error message of each skipped record is appended.
        on_bytes: called with the number of bytes read from the files since the last call.

    Raises:
        FileNotFoundError: a path matches no file; raised immediately, before the first record is read.
        ValueError: `FILE:LINE: what is wrong, what was expected`, raised while reading; the location is that of
            `Conversation.source`.
    """
    files = find_data_files(paths)
    bad_records = [] if bad_records is None else bad_records

    def iterate() -> Iterator[Conversation]:
        for path in files:
            if is_raw_text(path):
                yield Conversation([_text_message("".join(read_text(path, on_bytes)))], f"{path}:1")
                continue
            for source, conversations in _read(path, _conversations, skip_bad_records, bad_records, on_bytes):
                for messages in conversations:
                    yield Conversation(messages, source)

    return iterate()


def read_texts(
    paths: Paths,
    *,
    skip_bad_records: int = 0,
    bad_records: list[str] | None = None,
    on_bytes: OnBytes | None = None,
) -> Iterator[Iterator[str]]:
    """Reads documents verbatim: each .txt file, and each record's "text". Arguments and errors as for `read_records`.

    A document is an iterator of chunks (see `read_text`), so that a .txt file may be larger than memory. Consume it
    before taking the next document.
    """
    files = find_data_files(paths)
    bad_records = [] if bad_records is None else bad_records

    def iterate() -> Iterator[Iterator[str]]:
        for path in files:
            if is_raw_text(path):
                yield read_text(path, on_bytes)
                continue
            for _, text in _read(path, _text, skip_bad_records, bad_records, on_bytes):
                yield iter((text,))

    return iterate()


def _read(
    path: Path, convert: Callable[[Any], Any], allowed: int, bad_records: list[str], on_bytes: OnBytes | None
) -> Iterator[tuple[str, Any]]:
    """Yields `(source, convert(record))` for each record; up to `allowed` bad ones go to `bad_records` instead."""
    last_line = number = 0
    for line, record in read_values(path, on_bytes):
        number = number + 1 if line == last_line else 1  # of the record on its line
        last_line = line
        source = f"{path}:{line}" if number == 1 else f"{path}:{line}, record {number}"
        try:
            if isinstance(record, ValueError):  # a line that is not JSON
                raise record
            if not isinstance(record, dict):
                raise ValueError(f"the record is {_describe(record)}, expected an object with {_FORMATS}")
            converted = convert(record)
        except ValueError as error:
            if len(bad_records) >= allowed:
                limit = f" (after {allowed} bad records, the limit of --skip_bad_records)" if allowed else ""
                raise ValueError(f"{source}: {error}{limit}") from None
            bad_records.append(f"{source}: {error}")
        else:
            yield source, converted


def _text(record: dict[str, Any]) -> str:
    if "text" not in record:
        raise ValueError(f"{_missing(record, 'text')}, expected raw text; instruction data is for sft.py")
    return _string(record, "text")


def _conversations(record: dict[str, Any]) -> list[list[Message]]:
    """The conversations of one record: one for each instance of a seed task, else a single one."""
    if "messages" in record:
        return [_from_messages(record, "messages")]
    if "conversations" in record:
        return [_from_messages(record, "conversations")]
    if "instances" in record:
        return _from_seed_task(record)
    if "instruction" in record:
        return [_from_alpaca(record)]
    if "prompt" in record:
        answer = "response" if "response" in record else "completion"
        return [_exchange(_string(record, "prompt"), _string(record, answer))]
    if "text" in record:
        text = _string(record, "text")
        return [_from_turns(text) or [_text_message(text)]]
    if "input" in record:
        return [_exchange(_string(record, "input"), _string(record, "output"))]
    raise ValueError(_unknown_format(record))


def _text_message(text: str) -> Message:
    return {"role": "text", "content": text}


def _exchange(content: str, answer: str, context: str = "") -> list[Message]:
    user = {"role": "user", "content": content}
    if _is_input(context):
        user["input"] = context
    return [user, {"role": "assistant", "content": answer}]


def _is_input(text: str) -> bool:
    """Whether `text` is a real input: neither blank nor a variant of `<noinput>`."""
    return bool(text) and not text.isspace() and not _NO_INPUT.fullmatch(text)


def _from_alpaca(record: dict[str, Any]) -> list[Message]:
    """Alpaca's keys, or databricks-dolly's: `response` instead of `output`, `context` instead of `input`."""
    dolly = "response" in record and "output" not in record
    instruction, answer = _string(record, "instruction"), _string(record, "response" if dolly else "output")
    context = _string(record, "context" if dolly and "context" in record else "input", default="")
    return _from_belle(instruction, answer, context) or _exchange(instruction, answer, context)


def _from_belle(instruction: str, answer: str, context: str) -> list[Message] | None:
    """Splits an instruction that contains earlier turns; None if it is not a dialogue that ends with the user's turn.

    `"Human: Hi.\\nAssistant: Hello.\\nHuman: Who are you?\\nAssistant:"` -> user, assistant, user, and `answer`.
    """
    if "Assistant:" not in instruction or not instruction.lstrip().startswith("Human:"):
        return None
    messages = _split(instruction, _BELLE_TURN)
    if messages[-1] == {"role": "assistant", "content": ""}:
        messages.pop()
    if [message["role"] for message in messages] != ["user", "assistant"] * (len(messages) // 2) + ["user"]:
        return None
    return messages[:-1] + _exchange(messages[-1]["content"], answer, context)


def _from_turns(text: str) -> list[Message] | None:
    """Splits a text into turns; None unless it contains the markers of both user and assistant.

    `"Human: Hi. \\n HugChat: Hello. \\n\\n"` -> user "Hi.", assistant "Hello."; text before the first turn -> system.
    """
    if "HugChat" not in text and "<bot>:" not in text:
        return None
    messages = _split(text, _TEXT_TURN)
    if {"user", "assistant"} - {message["role"] for message in messages}:
        return None
    return _validated(messages)


def _split(text: str, marker: re.Pattern[str]) -> list[Message]:
    markers = list(marker.finditer(text))
    if not markers:
        return []
    before = text[: markers[0].start()].strip()
    messages = [{"role": "system", "content": before}] if before else []
    for match, end in zip(markers, [following.start() for following in markers[1:]] + [len(text)], strict=True):
        role = "user" if "human" in match[0].lower() else "assistant"
        messages.append({"role": role, "content": text[match.end() : end].strip()})
    return messages


def _from_seed_task(record: dict[str, Any]) -> list[list[Message]]:
    instances, instruction = _objects(record, "instances"), _string(record, "instruction")
    if not instances:
        raise ValueError('"instances" is empty: there is nothing to learn from')
    return [
        _exchange(instruction, _string(instance, "output"), _string(instance, "input", default=""))
        for instance in instances
    ]


def _from_messages(record: dict[str, Any], key: str) -> list[Message]:
    messages = []
    if system := _string(record, "system", default=""):
        messages.append({"role": "system", "content": system})
    for number, message in enumerate(_objects(record, key), 1):
        try:
            messages.append(_from_message(message))
        except ValueError as error:
            raise ValueError(f"message {number} of {json.dumps(key)}: {error}") from None
    return _validated(messages)


def _from_message(message: dict[str, Any]) -> Message:
    role_key, content_key = ("from", "value") if "from" in message else ("role", "content")
    role = _string(message, role_key)
    if role not in _ROLES:
        hints = [f" (did you mean {json.dumps(near)}?)" for near in get_close_matches(role, _ROLES, n=1)]
        raise ValueError(f"the role {json.dumps(role)}{''.join(hints)}, expected one of {_listed(_ROLES)}")
    turn = {"role": _ROLES[role], "content": _string(message, content_key)}
    context = _string(message, "input", default="")
    if turn["role"] == "user" and _is_input(context):
        turn["input"] = context
    return turn


def _validated(messages: list[Message]) -> list[Message]:
    """The messages without a last, unanswered user message; ValueError if the roles do not alternate."""
    turns = messages[1:] if messages and messages[0]["role"] == "system" else messages
    if turns and turns[-1]["role"] == "user":
        messages, turns = messages[:-1], turns[:-1]
    if not any(turn["role"] == "assistant" for turn in turns):
        raise ValueError("no assistant turn: there is nothing to learn from")
    for number, turn in enumerate(turns):
        role, expected = turn["role"], ("user", "assistant")[number % 2]
        if role != expected:
            which = f"turn {number + 1}" if number else "the first turn"
            raise ValueError(
                f"{which} has the role {json.dumps(role)}, expected {json.dumps(expected)} "
                "(a system message first, if any, then user and assistant alternating)"
            )
    return messages


def _objects(record: dict[str, Any], key: str) -> list[dict[str, Any]]:
    values = record[key]
    if not isinstance(values, list):
        raise ValueError(f"{json.dumps(key)} is {_describe(values)}, expected an array of objects")
    for number, value in enumerate(values, 1):
        if not isinstance(value, dict):
            raise ValueError(f"item {number} of {json.dumps(key)} is {_describe(value)}, expected an object")
    return values


def _string(record: dict[str, Any], key: str, default: str | None = None) -> str:
    value = record.get(key)
    if isinstance(value, str):
        if not value.isascii() and (broken := broken_character(value)):
            raise ValueError(f"{json.dumps(key)} contains {broken[1]}")
        return value
    if value is None and default is not None:
        return default
    if key in record:
        raise ValueError(f"{json.dumps(key)} is {_describe(value)}, expected a string")
    raise ValueError(_missing(record, key))


def _missing(record: dict[str, Any], key: str) -> str:
    hints = [_rename(near, key) for near in get_close_matches(key, record, n=1)]
    return f"{json.dumps(key)} is missing, found {_listed(record)}{''.join(hints)}"


def _unknown_format(record: dict[str, Any]) -> str:
    unknown = [key for key in record if key not in _KEYS]
    hints = [_rename(key, near) for key in unknown for near in get_close_matches(key, _KEYS, n=1)]
    return f"a record of unknown format, found {_listed(record)}{''.join(hints)}, expected {_FORMATS}"


def _rename(key: str, known: str) -> str:
    return f" (rename {json.dumps(key)} to {json.dumps(known)}?)"


def _listed(keys: Iterable[str]) -> str:
    return ", ".join(map(json.dumps, keys)) or "no keys"


def _describe(value: Any) -> str:
    """A description of a JSON value: `a number (3)`, `a string ("abc")`, `null`."""
    if value is None:
        return "null"
    names = {bool: "a boolean", str: "a string", list: "an array", dict: "an object"}
    text = json.dumps(value, default=str)
    return f"{names.get(type(value), 'a number')} ({text if len(text) <= 40 else text[:37] + '...'})"
