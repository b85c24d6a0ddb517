"""Encodes conversations as Examples: each segment tokenized on its own, concatenated, truncated to a length."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from minigpt.data.prompts import Message, Segment, Template
from minigpt.data.read.records import Conversation
from minigpt.data.tokenizer import Tokenizer

Ids = Sequence[int] | np.ndarray
Mask = Sequence[bool] | np.ndarray


@dataclass(frozen=True)
class Example:
    """Token ids, and a mask of those that are supervised (that the loss counts)."""

    ids: Ids
    supervised: Mask

    def __len__(self) -> int:
        return len(self.ids)


class Encoding(NamedTuple):
    """The settings of `encode_example` in one tuple."""

    template: Template
    tokenizer: Tokenizer
    max_seq_length: int
    train_on_prompt: bool = False


@dataclass(frozen=True)
class Fitted:
    """An example truncated to its maximum length, and the ids that were cut off on the left and right."""

    example: Example | None
    """None if no supervised token was left."""
    cut_left: list[int]
    cut_right: list[int]
    prompt_length: int
    """Number of ids before the first answer; 0 for plain text."""


def encode_segments(segments: Sequence[Segment], tokenizer: Tokenizer) -> Example:
    """Tokenizes each segment separately and concatenates. Training and chat share it, so they get the same ids."""
    return _join(segments, _encode(segments, tokenizer))


def encode_example(
    conversation: Conversation,
    template: Template,
    tokenizer: Tokenizer,
    max_seq_length: int,
    train_on_prompt: bool = False,
) -> Example | None:
    """Encodes a conversation as at most `max_seq_length` + 1 ids, because the shift consumes one.

    If it is too long, the oldest whole turns are dropped first, then the prompt is truncated on the left, and last the
    answer on the right; the beginning of the answer is always kept.

    Args:
        conversation: messages, as `read_records` yields them.
        template: renders the messages as text.
        tokenizer: encodes the text as ids.
        max_seq_length: number of positions in the model's input.
        train_on_prompt: supervise the whole text, not only the answers.

    Returns:
        The example, or None if no supervised token was left.
    """
    return fit_example(conversation.messages, template, tokenizer, max_seq_length, train_on_prompt).example


def fit_example(
    messages: Sequence[Message],
    template: Template,
    tokenizer: Tokenizer,
    max_seq_length: int,
    train_on_prompt: bool = False,
) -> Fitted:
    """Like `encode_example`, and also returns what was cut off."""
    limit = max_seq_length + 1
    segments = template.render(messages)
    whole = pieces = _encode(segments, tokenizer)

    # ---- drop the oldest turns (each is 3 segments: prompt, answer, end-of-text); keep the system message
    system = [message for message in messages[:1] if message["role"] == "system"]
    dropped = 0
    while sum(map(len, pieces)) > limit and len(pieces) > 3:
        dropped += 1
        turn = messages[len(system) + 2 * dropped :][:2]
        first = template.render([*system, *turn])[:1]  # now the first turn: it gets the system text or preamble
        pieces = [*_encode(first, tokenizer), *whole[3 * dropped + 1 :]]
    segments = segments[3 * dropped :]
    cut_left = [i for piece in whole[: 3 * dropped] for i in piece]

    # ---- then truncate the prompt on the left, then the answer on the right
    joined = _join(segments, pieces)
    ids, supervised = list(joined.ids), list(joined.supervised)
    if train_on_prompt:
        supervised = [True] * len(ids)
    prompt = len(pieces[0]) if len(segments) >= 3 else 0  # plain text has no prompt
    left = min(max(0, len(ids) - limit), max(0, prompt - 1))  # keep one token to predict the answer's first from
    cut_left += ids[:left]
    cut_right = ids[left + limit :]
    ids, supervised = ids[left : left + limit], supervised[left : left + limit]
    example = Example(ids, supervised) if any(supervised[1:]) else None
    return Fitted(example, cut_left, cut_right, prompt - left)


def _encode(segments: Sequence[Segment], tokenizer: Tokenizer) -> list[list[int]]:
    """The ids of each segment, tokenized separately."""
    return [[tokenizer.special_tokens[s.text]] if s.special else tokenizer.encode(s.text) for s in segments]


def _join(segments: Sequence[Segment], pieces: Sequence[Sequence[int]]) -> Example:
    return Example(
        [i for piece in pieces for i in piece],
        [segment.supervised for segment, piece in zip(segments, pieces, strict=True) for _ in piece],
    )
