"""Prints examples as the model will see them, with prompt, supervised and truncated tokens marked (`--inspect`)."""

import os
import sys
from collections.abc import Sequence
from itertools import islice

from minigpt.data.encode import fit_example
from minigpt.data.prompts import Message, Template
from minigpt.data.read.records import read_records
from minigpt.data.tokenizer import Tokenizer
from minigpt.distributed import print0

STYLES = {"prompt": "\033[36m", "supervised": "\033[32m", "cut": "\033[9;31m"}  # cyan, green, red struck through
BRACKETS = {"prompt": ("", ""), "supervised": ("[", "]"), "cut": ("{cut: ", "}")}


def show_examples(
    paths: Sequence[str],
    count: int,
    template: Template,
    tokenizer: Tokenizer,
    max_seq_length: int,
    train_on_prompt: bool = False,
) -> None:
    """Prints the first examples of a dataset."""
    for conversation in islice(read_records(paths, skip_bad_records=sys.maxsize), count):
        text = mark_example(conversation.messages, template, tokenizer, max_seq_length, train_on_prompt)
        print0(f"---- {conversation.source}: {text}")


def mark_example(
    messages: Sequence[Message],
    template: Template,
    tokenizer: Tokenizer,
    max_seq_length: int,
    train_on_prompt: bool = False,
) -> str:
    """One example as text with marked tokens: colours on a terminal, else `[supervised]` and `{cut: ...}`."""
    color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")  # https://no-color.org
    fitted = fit_example(messages, template, tokenizer, max_seq_length, train_on_prompt)
    spans: list[tuple[str, list[int]]] = [("cut", fitted.cut_left)]
    if fitted.example is not None:
        for token, supervised in zip(fitted.example.ids, fitted.example.supervised, strict=True):
            kind = "supervised" if supervised else "prompt"
            if spans[-1][0] != kind:
                spans.append((kind, []))
            spans[-1][1].append(int(token))
    spans.append(("cut", fitted.cut_right))
    text = "".join(_mark(kind, tokenizer.decode(ids), color) for kind, ids in spans if ids)
    if fitted.example is None:
        return f"dropped: no supervised token within {max_seq_length} positions\n{text}"
    count = sum(map(bool, fitted.example.supervised))
    cut = len(fitted.cut_left) + len(fitted.cut_right)
    return f"{len(fitted.example)} tokens, {count} supervised, {cut} cut\n{text}"


def _mark(kind: str, text: str, color: bool) -> str:
    if color:
        return f"{STYLES[kind]}{text}\033[0m"
    before, after = BRACKETS[kind]
    return f"{before}{text}{after}"
