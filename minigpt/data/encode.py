"""Conversations in, examples out: encoded segment by segment, joined, cut to length."""

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
    """Token ids, and which of them the model learns to write."""

    ids: Ids
    supervised: Mask

    def __len__(self) -> int:
        return len(self.ids)


class Encoding(NamedTuple):
    """How a conversation becomes an example: the settings of `encode_example`."""

    template: Template
    tokenizer: Tokenizer
    max_seq_length: int
    train_on_prompt: bool = False


@dataclass(frozen=True)
class Fitted:
    """An example cut to its limit, and the ids that were cut off on either side of it."""

    example: Example | None
    """None where no supervised token was left."""
    cut_left: list[int]
    cut_right: list[int]
    prompt_length: int
    """Ids before the first answer; 0 in a text."""


def encode_segments(segments: Sequence[Segment], tokenizer: Tokenizer) -> Example:
    """Each segment on its own, joined. This is what training reads, and what chat asks."""
    return _join(segments, _encode(segments, tokenizer))


def encode_example(
    conversation: Conversation,
    template: Template,
    tokenizer: Tokenizer,
    max_seq_length: int,
    train_on_prompt: bool = False,
) -> Example | None:
    """A conversation as ids, at most `max_seq_length` + 1 of them, because the shift eats one.

    What is too long loses its oldest whole turns first, then the prompt's left end, and last the answer's right end;
    never the answer's beginning.

    Args:
        conversation: messages, as `read_records` gives them.
        template: how they are written out.
        tokenizer: how that becomes ids.
        max_seq_length: positions that the model is to look at.
        train_on_prompt: the whole text is supervised, and not the answers alone.

    Returns:
        The example, or None where no supervised token was left.
    """
    return fit_example(conversation.messages, template, tokenizer, max_seq_length, train_on_prompt).example


def fit_example(
    messages: Sequence[Message],
    template: Template,
    tokenizer: Tokenizer,
    max_seq_length: int,
    train_on_prompt: bool = False,
) -> Fitted:
    """`encode_example`, which also says what was cut."""
    limit = max_seq_length + 1
    segments = template.render(messages)
    whole = pieces = _encode(segments, tokenizer)

    # ---- the oldest turns, each of them a prompt, an answer and its end; the system message stays
    system = [message for message in messages[:1] if message["role"] == "system"]
    dropped = 0
    while sum(map(len, pieces)) > limit and len(pieces) > 3:
        dropped += 1
        turn = messages[len(system) + 2 * dropped :][:2]
        first = template.render([*system, *turn])[:1]  # what begins a conversation stands before this turn now
        pieces = [*_encode(first, tokenizer), *whole[3 * dropped + 1 :]]
    segments = segments[3 * dropped :]
    cut_left = [i for piece in whole[: 3 * dropped] for i in piece]

    # ---- then the prompt's left end, then the answer's right end
    joined = _join(segments, pieces)
    ids, supervised = list(joined.ids), list(joined.supervised)
    if train_on_prompt:
        supervised = [True] * len(ids)
    prompt = len(pieces[0]) if len(segments) >= 3 else 0  # a text has no prompt
    left = min(max(0, len(ids) - limit), max(0, prompt - 1))  # one token stays: the answer's first follows it
    cut_left += ids[:left]
    cut_right = ids[left + limit :]
    ids, supervised = ids[left : left + limit], supervised[left : left + limit]
    example = Example(ids, supervised) if any(supervised[1:]) else None
    return Fitted(example, cut_left, cut_right, prompt - left)


def _encode(segments: Sequence[Segment], tokenizer: Tokenizer) -> list[list[int]]:
    """The ids of each segment."""
    return [[tokenizer.special_tokens[s.text]] if s.special else tokenizer.encode(s.text) for s in segments]


def _join(segments: Sequence[Segment], pieces: Sequence[Sequence[int]]) -> Example:
    return Example(
        [i for piece in pieces for i in piece],
        [segment.supervised for segment, piece in zip(segments, pieces, strict=True) for _ in piece],
    )
