"""A conversation with a model: what was said, what the model is asked, what it answers, piece by piece."""

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
class Answer:
    """What was counted of one answer."""

    prompt_tokens: int
    turns_dropped: int
    """Oldest turns that were left out of the prompt."""
    tokens_cut: int
    """Tokens that were cut from the left end of a message too long."""
    new_tokens: int = 0
    first_token_s: float = 0.0
    """Seconds until the first token, the prompt's reading included."""
    seconds: float = 0.0
    """Seconds until the last."""


class Chat:
    """Keeps the messages, and answers with the template that the model was trained on.

    With the template `none` there are no turns: what is said and what the model adds make one text, which grows.

    Attributes:
        model, tokenizer, template: may be exchanged between two answers.
        sampling: settings of `generate`, max_new_tokens among them. No answer gets more than half of the context.
        messages: all that was said, whatever of it still fits into a prompt.
        answers: an `Answer` for each, the newest last.
    """

    def __init__(
        self, model: CausalLM, tokenizer: Tokenizer, template: Template, system: str | None = None, **sampling: Any
    ):
        """Raises `ValueError` where the system text leaves no room for a question."""
        self.model, self.tokenizer, self.template, self.sampling = model, tokenizer, template, sampling
        self.messages: list[Message] = []
        self.answers: list[Answer] = []
        self._attempt = 0  # how often the last question was answered anew
        self.system = system

    @property
    def system(self) -> str | None:
        """The system text, which is in every prompt."""
        return self.messages[0]["content"] if self.messages and self.messages[0]["role"] == "system" else None

    @system.setter
    def system(self, text: str | None) -> None:
        message: list[Message] = [{"role": "system", "content": text}] if text else []
        self.load([*message, *self.messages[self.system is not None :]])

    def load(self, messages: Sequence[Message]) -> None:
        """Goes on from these messages; a `ValueError` where their system text leaves no room for a question."""
        system = [message for message in messages[:1] if message["role"] == "system"]
        self._fit([*system, {"role": "user", "content": "?"}])
        self.messages = list(messages)

    @property
    def room(self) -> int:
        """The most tokens that an answer gets."""
        return min(self.sampling["max_new_tokens"], self.model.config.context // 2)

    def ask(self, content: str, context: str | None = None, *, replace: bool = False) -> Iterator[str]:
        """Answers a user message (with Alpaca's input as `context`), and yields the answer as it is written.

        Question and answer join the messages at the end, also where the reader stops listening in the middle; not
        where nothing was said by then, or an error ended it. `answers[-1]` says at once what no longer fitted.

        Args:
            content: the message.
            context: the message's input, if any.
            replace: the last question and answer leave the messages for this one.

        Raises:
            ValueError: the prompt cannot be made to fit, see `fit_prompt`.
        """
        self._attempt = 0
        return self._answer({"role": "user", "content": content, **({"input": context} if context else {})}, replace)

    def retry(self) -> Iterator[str]:
        """Answers the last question anew, and replaces its answer. Where tokens are drawn, they are drawn otherwise.

        Raises:
            ValueError: there is no last question.
        """
        question = self.last_question
        self._attempt += 1
        return self._answer(question, replace=True)

    @property
    def last_question(self) -> Message:
        """The last user message; a `ValueError` where there is none."""
        if len(self.messages) < 2:
            raise ValueError("nothing has been asked yet")
        return self.messages[-2]

    def undo(self) -> Message:
        """Removes the last question and its answer, and returns the question; a `ValueError` where there is none."""
        question = self.last_question
        del self.messages[-2:]
        return question

    def clear(self) -> None:
        """Forgets all but the system text."""
        del self.messages[self.system is not None :]

    def _fit(self, messages: Sequence[Message]) -> "Prompt":
        if self.template.name == "none":
            messages = as_one_text(messages)
        return fit_prompt(messages, self.template, self.tokenizer, self.model.config.context - self.room)

    def _answer(self, question: Message, replace: bool) -> Iterator[str]:
        messages = [*(self.messages[:-2] if replace else self.messages), question]
        prompt = self._fit(messages)
        counted = Answer(len(prompt.ids), prompt.turns_dropped, prompt.tokens_cut)
        self.answers.append(counted)
        return self._pieces(messages, prompt.ids, counted)

    def _pieces(self, messages: list[Message], prompt: list[int], counted: Answer) -> Iterator[str]:
        settings = {**self.sampling, "max_new_tokens": self.room}
        if settings.get("seed") is not None:
            settings["seed"] += self._attempt
        stop, eot_id = self.template.stop_strings(), self.tokenizer.eot_id
        ids = stream(self.model, prompt, eos_id=eot_id, stop=stop, tokenizer=self.tokenizer, **settings)
        text = AnswerText(self.tokenizer, stop, trim_start=self.template.name != "none", trim_end=True)
        answer = ""
        try:
            for id in _counting(ids, counted):
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


class Prompt(NamedTuple):
    """What a model is asked, and what of the conversation is not in it."""

    ids: list[int]
    turns_dropped: int
    tokens_cut: int


def fit_prompt(messages: Sequence[Message], template: Template, tokenizer: Tokenizer, room: int) -> Prompt:
    """The prompt that asks for an answer to the last message, in at most `room` ids.

    The oldest turns are left out first, whole. Where the last message alone is too long, its left end goes: that of
    its input, and then its own. The system message is always there, whole.

    Raises:
        ValueError: there is no room for any of the last message; or the roles are not those of a question, see
            `Template.render`.
    """
    if room < 1:
        raise ValueError(f"room for {room} tokens of prompt: --max_new_tokens leaves nothing of the model's context")
    template.render(messages, add_generation_prompt=True)  # refuses wrong roles in turns that may not be looked at
    first = int(messages[0]["role"] == "system")

    def encode(rest: Sequence[Message]) -> list[int]:
        rendered = template.render([*messages[:first], *rest], add_generation_prompt=True)
        return list(encode_segments(rendered, tokenizer).ids)

    start = len(messages) - 1
    ids = encode(messages[start:])
    if len(ids) > room:
        shorter, cut = _cut_left(messages[start], room, encode, tokenizer)
        return Prompt(shorter, (start - first) // 2, cut)
    while start > first and len(longer := encode(messages[start - 2 :])) <= room:
        ids, start = longer, start - 2
    return Prompt(ids, (start - first) // 2, 0)


def _cut_left(
    message: Message, room: int, encode: Callable[[list[Message]], list[int]], tokenizer: Tokenizer
) -> tuple[list[int], int]:
    """The ids of the prompt with as much of the message's right end as fits, and how many of its tokens went."""
    all_cut = 0
    ids = encode([message])
    for key in ("input", "content"):
        text = message.get(key, "")
        tokens, cut = tokenizer.encode(text), 0
        while len(ids) > room and cut < len(tokens):
            cut = min(len(tokens), cut + len(ids) - room)
            # What is decoded ends with U+FFFD for a character that the cut would halve: it goes as a whole.
            message = {**message, key: text[len(tokenizer.decode(tokens[:cut])) :]}
            ids = encode([message])
        all_cut += cut
    if len(ids) > room or not message["content"]:
        raise ValueError(
            f"{len(ids)} tokens of system text and template leave no room for a message: {room} fit beside an answer "
            "(shorten the system text, or lower max_new_tokens)"
        )
    return ids, all_cut


def as_one_text(messages: Sequence[Message]) -> list[Message]:
    """Turns as one message, for a model that continues text: what was typed begins a line, what came goes on there.

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


def _counting(ids: Iterable[int], counted: Answer) -> Iterator[int]:
    started = time.perf_counter()
    for id in ids:
        counted.new_tokens += 1
        counted.seconds = time.perf_counter() - started
        counted.first_token_s = counted.first_token_s or counted.seconds
        yield id


def save_messages(messages: Sequence[Message], path: Path, overwrite: bool = False) -> None:
    """Writes a conversation as `{"messages": [...]}`, as `read_records` reads it.

    Raises:
        FileExistsError: the file is there, and `overwrite` is not set.
        ValueError: nothing has been said, or the name would not be read as JSON.
    """
    if path.suffix not in (".json", ".jsonl"):
        raise ValueError(f"{path}: expected a name that ends in .json or .jsonl")
    if not messages or messages[-1]["role"] != "assistant":
        raise ValueError("nothing has been said yet")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path}: is there already (give another name)")
    with writing_to(path.parent, "another name"), whole_file(path) as temporary:
        temporary.write_text(json.dumps({"messages": messages}, ensure_ascii=False) + "\n", encoding="utf-8")


def load_messages(path: str) -> tuple[list[Message], bool]:
    """The first conversation of a file in any format of `read_records`, and whether there are more.

    Raises:
        ValueError: there is none in it.
    """
    conversations = read_records(path)
    first = next(conversations, None)
    if first is None or first.messages[0]["role"] == "text":
        raise ValueError(f"{first.source if first else path}: no conversation, expected messages")
    return list(first.messages), next(conversations, None) is not None
