"""A conversation with a model: stores the messages, builds each prompt and streams each answer."""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from minigpt.data.encode import encode_segments
from minigpt.data.prompts import Message, Template
from minigpt.data.read.records import read_records
from minigpt.data.tokenizer import Tokenizer
from minigpt.files import whole_file, writing_to
from minigpt.inference.answer_text import AnswerText
from minigpt.inference.generate import stream
from minigpt.model.base import CausalLM


@dataclass
class AnswerStats:
    """Token counts and timings of one answer."""

    prompt_tokens: int
    turns_dropped: int
    """Oldest turns that were left out of the prompt."""
    tokens_cut: int
    """Tokens truncated from the left end of a message that was too long."""
    new_tokens: int = 0
    first_token_s: float = 0.0
    """Seconds until the first token, prefill included."""
    seconds: float = 0.0
    """Seconds until the last token."""


class Chat:
    """A conversation, rendered with the template that the model was trained on.

    The template `none` has no turns: user input and model output are concatenated into one growing text.

    Attributes:
        model, tokenizer, template: may be replaced between two answers.
        sampling: settings of `generate`, max_new_tokens among them. An answer gets at most half of the context.
        messages: the whole conversation, including turns that no longer fit into a prompt.
        answers: the `AnswerStats` of each answer, the newest last.
    """

    def __init__(
        self, model: CausalLM, tokenizer: Tokenizer, template: Template, system: str | None = None, **sampling: Any
    ):
        """Raises `ValueError` if the system text leaves no tokens for a question."""
        self.model, self.tokenizer, self.template, self.sampling = model, tokenizer, template, sampling
        self.messages: list[Message] = []
        self.answers: list[AnswerStats] = []
        self._attempt = 0  # how many times the last question has been retried
        self.system = system

    @property
    def system(self) -> str | None:
        """The system text, which is part of every prompt."""
        return self.messages[0]["content"] if self.messages and self.messages[0]["role"] == "system" else None

    @system.setter
    def system(self, text: str | None) -> None:
        message: list[Message] = [{"role": "system", "content": text}] if text else []
        self.load([*message, *self.messages[self.system is not None :]])

    def load(self, messages: Sequence[Message]) -> None:
        """Replaces the messages; raises `ValueError` if their system text leaves no tokens for a question."""
        system = [message for message in messages[:1] if message["role"] == "system"]
        self._fit([*system, {"role": "user", "content": "?"}])
        self.messages = list(messages)

    @property
    def max_answer_tokens(self) -> int:
        """The maximum number of tokens in an answer."""
        return min(self.sampling["max_new_tokens"], self.model.config.context // 2)

    def ask(self, content: str, context: str | None = None, *, replace: bool = False) -> Iterator[str]:
        """Answers a user message (with Alpaca's input as `context`) and streams the answer's text.

        The question and its answer are appended to `messages` when the answer ends, or when the caller stops
        iterating early after some text; after an error they are not. `answers[-1]` is there before the first token,
        and says which turns and tokens did not fit.

        Args:
            content: the message.
            context: the message's input, if any.
            replace: the last question and answer are replaced by this one.

        Raises:
            ValueError: the prompt cannot be truncated enough, see `fit_prompt`.
        """
        self._attempt = 0
        return self._answer({"role": "user", "content": content, **({"input": context} if context else {})}, replace)

    def retry(self) -> Iterator[str]:
        """Answers the last question again and replaces its answer. With sampling, the draws differ.

        Raises:
            ValueError: there is no last question.
        """
        question = self.last_question
        self._attempt += 1
        return self._answer(question, replace=True)

    @property
    def last_question(self) -> Message:
        """The last user message; raises `ValueError` if there is none."""
        if len(self.messages) < 2:
            raise ValueError("no question has been asked yet")
        return self.messages[-2]

    def undo(self) -> Message:
        """Removes the last question and its answer, and returns the question; raises `ValueError` if there is none."""
        question = self.last_question
        del self.messages[-2:]
        return question

    def clear(self) -> None:
        """Removes all messages except the system text."""
        del self.messages[self.system is not None :]

    def _fit(self, messages: Sequence[Message]) -> "FittedPrompt":
        if self.template.name == "none":
            messages = as_one_text(messages)
        return fit_prompt(messages, self.template, self.tokenizer, self.model.config.context - self.max_answer_tokens)

    def _answer(self, question: Message, replace: bool) -> Iterator[str]:
        messages = [*(self.messages[:-2] if replace else self.messages), question]
        prompt = self._fit(messages)
        stats = AnswerStats(len(prompt.ids), prompt.turns_dropped, prompt.tokens_cut)
        self.answers.append(stats)
        return self._stream(messages, prompt.ids, stats)

    def _stream(self, messages: list[Message], prompt: list[int], stats: AnswerStats) -> Iterator[str]:
        settings = {**self.sampling, "max_new_tokens": self.max_answer_tokens}
        if settings.get("seed") is not None:
            settings["seed"] += self._attempt
        stop, eot_id = self.template.stop_strings(), self.tokenizer.eot_id
        ids = stream(self.model, prompt, eos_id=eot_id, stop=stop, tokenizer=self.tokenizer, **settings)
        text = AnswerText(self.tokenizer, stop, trim_start=self.template.name != "none", trim_end=True)
        answer = ""
        try:
            for id in _record_stats(ids, stats):
                if piece := text.feed(id):
                    answer += piece
                    yield piece
            if piece := text.end():
                answer += piece
                yield piece
        except (GeneratorExit, KeyboardInterrupt):
            if answer:
                self.messages = [*messages, {"role": "assistant", "content": answer}]
            raise
        self.messages = [*messages, {"role": "assistant", "content": answer}]


class FittedPrompt(NamedTuple):
    """A prompt that fits into the context, and how much of the conversation was left out."""

    ids: list[int]
    turns_dropped: int
    tokens_cut: int


def fit_prompt(
    messages: Sequence[Message], template: Template, tokenizer: Tokenizer, max_prompt_tokens: int
) -> FittedPrompt:
    """The prompt that asks for an answer to the last message, in at most `max_prompt_tokens` ids.

    The oldest turns are dropped first, whole. If the last message alone is too long, it is truncated from the left:
    first its input, then its content. The system message is always kept whole.

    Raises:
        ValueError: nothing of the last message fits; or the roles are not those of a question, see `Template.render`.
    """
    if max_prompt_tokens < 1:
        raise ValueError(
            f"{max_prompt_tokens} tokens are left for the prompt: lower --max_new_tokens, which uses up the model's "
            "context"
        )
    template.render(messages, add_generation_prompt=True)  # rejects wrong roles even in turns that will be dropped
    first = int(messages[0]["role"] == "system")

    def encode(rest: Sequence[Message]) -> list[int]:
        rendered = template.render([*messages[:first], *rest], add_generation_prompt=True)
        return list(encode_segments(rendered, tokenizer).ids)

    start = len(messages) - 1
    ids = encode(messages[start:])
    if len(ids) > max_prompt_tokens:
        ids, tokens_cut = _truncate_left(messages[start], max_prompt_tokens, encode, tokenizer)
        return FittedPrompt(ids, (start - first) // 2, tokens_cut)
    while start > first and len(longer := encode(messages[start - 2 :])) <= max_prompt_tokens:
        ids, start = longer, start - 2
    return FittedPrompt(ids, (start - first) // 2, 0)


def _truncate_left(
    message: Message,
    max_prompt_tokens: int,
    encode: Callable[[list[Message]], list[int]],
    tokenizer: Tokenizer,
) -> tuple[list[int], int]:
    """The ids of the prompt with as much of the message's right end as fits, and how many of its tokens were cut."""
    all_cut = 0
    ids = encode([message])
    for key in ("input", "content"):
        text = message.get(key, "")
        tokens, cut = tokenizer.encode(text), 0
        while len(ids) > max_prompt_tokens and cut < len(tokens):
            cut = min(len(tokens), cut + len(ids) - max_prompt_tokens)
            # A cut inside a character decodes to text that ends in U+FFFD, so the whole character is dropped.
            message = {**message, key: text[len(tokenizer.decode(tokens[:cut])) :]}
            ids = encode([message])
        all_cut += cut
    if len(ids) > max_prompt_tokens or not message["content"]:
        raise ValueError(
            f"{len(ids)} tokens of system text and template leave none for a message: {max_prompt_tokens} fit beside "
            "an answer (shorten the system text, or lower max_new_tokens)"
        )
    return ids, all_cut


def as_one_text(messages: Sequence[Message]) -> list[Message]:
    """Joins turns into one user message, for a model that continues text: a user message starts on a new line, an
    assistant message continues the line.

    >>> as_one_text([{"role": "user", "content": "A cat"}, {"role": "assistant", "content": " sat."},
    ...              {"role": "user", "content": "It"}])
    [{'role': 'user', 'content': 'A cat sat.\\nIt'}]
    """
    first = int(messages[0]["role"] == "system")
    text = ""
    for message in messages[first:]:
        if message["role"] == "user":
            text += ("\n" if text else "") + "\n".join(filter(None, [message["content"], message.get("input")]))
        else:
            text += message["content"]
    return [*messages[:first], {"role": "user", "content": text}]


def _record_stats(ids: Iterable[int], stats: AnswerStats) -> Iterator[int]:
    """Yields the ids and counts and times them in `stats`."""
    started = time.perf_counter()
    for id in ids:
        stats.new_tokens += 1
        stats.seconds = time.perf_counter() - started
        stats.first_token_s = stats.first_token_s or stats.seconds
        yield id


def save_messages(messages: Sequence[Message], path: Path, overwrite: bool = False) -> None:
    """Writes a conversation as `{"messages": [...]}`, a format of `read_records`.

    Raises:
        FileExistsError: the file exists and `overwrite` is not set.
        ValueError: there is no answer to save, or the file name does not end in .json or .jsonl.
    """
    if path.suffix not in (".json", ".jsonl"):
        raise ValueError(f"{path}: expected a name that ends in .json or .jsonl")
    if not messages or messages[-1]["role"] != "assistant":
        raise ValueError("there is no conversation to save yet")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path}: already exists (give another name)")
    with writing_to(path.parent, "another name"), whole_file(path) as temporary:
        temporary.write_text(json.dumps({"messages": messages}, ensure_ascii=False) + "\n", encoding="utf-8")


def load_messages(path: str) -> tuple[list[Message], bool]:
    """The first conversation in a file of any format of `read_records`, and whether the file holds more.

    Raises:
        ValueError: the file holds no conversation.
    """
    conversations = read_records(path)
    first = next(conversations, None)
    if first is None or first.messages[0]["role"] == "text":
        raise ValueError(f"{first.source if first else path}: no conversation in it, expected messages")
    return list(first.messages), next(conversations, None) is not None
