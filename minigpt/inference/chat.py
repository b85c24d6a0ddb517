"""A conversation with a model: what was said, what the model is asked, what it answers, piece by piece."""

from collections.abc import Iterator, Sequence

from minigpt.data.dataset import encode_segments
from minigpt.data.prompts import Message, Template
from minigpt.data.tokenizer import Tokenizer
from minigpt.inference.sampling import stream
from minigpt.model.gpt2 import GPT


class Chat:
    """Keeps the messages, and answers with the template that the model was trained on."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, template: Template, system: str | None = None, **sampling):
        """`sampling`: settings of `generate`, max_new_tokens among them."""
        self.model, self.tokenizer, self.template, self.sampling = model, tokenizer, template, sampling
        self.messages: list[Message] = [{"role": "system", "content": system}] if system else []

    def ask(self, content: str, context: str | None = None) -> Iterator[str]:
        """Answers a user message (with Alpaca's input as `context`), and yields the answer as it is written.

        Question and answer, without the blanks around it, join the messages at the end, also where the reader stops
        listening in the middle. `turns_dropped` and `tokens_cut` then say what no longer fitted, as in `fit_prompt`.
        """
        question: Message = {"role": "user", "content": content, **({"input": context} if context else {})}
        room = self.model.config.n_positions - self.sampling["max_new_tokens"]
        ids, self.turns_dropped, self.tokens_cut = fit_prompt(
            [*self.messages, question], self.template, self.tokenizer, room
        )
        answer = ""
        try:
            for piece in _until_stop(self._pieces(ids), self.template.stop_strings()):
                piece = piece if answer else piece.lstrip()
                answer += piece
                if piece:
                    yield piece
        finally:
            self.messages += [question, {"role": "assistant", "content": answer.rstrip()}]

    def _pieces(self, ids: list[int]) -> Iterator[str]:
        decoder = self.tokenizer.stream_decoder()
        eot_id = self.tokenizer.eot_id
        stop = self.template.stop_strings()
        for token in stream(self.model, ids, eos_id=eot_id, stop=stop, tokenizer=self.tokenizer, **self.sampling):
            if token != eot_id:
                yield decoder.feed(token)
        # and no flush: half a character, where max_new_tokens cut it, is not shown


def fit_prompt(
    messages: Sequence[Message], template: Template, tokenizer: Tokenizer, room: int
) -> tuple[list[int], int, int]:
    """The prompt's ids, at most `room` of them, how many of the oldest turns were left out, how many ids were cut.

    The system message stays, whatever turns go. Where it and the last message alone are too long, their left end goes,
    as in training.

    Raises:
        ValueError: there is no room at all.
    """
    if room < 1:
        raise ValueError(f"room for {room} tokens of prompt: --max_new_tokens leaves nothing of the model's context")
    first = int(messages[0]["role"] == "system")

    def from_message(start: int) -> list[int]:
        kept = [*messages[:first], *messages[start:]]
        return list(encode_segments(template.render(kept, add_generation_prompt=True), tokenizer).ids)

    start = len(messages) - 1
    ids = from_message(start)
    if len(ids) > room:
        return ids[-room:], (start - first) // 2, len(ids) - room
    while start > first and len(longer := from_message(start - 2)) <= room:
        ids, start = longer, start - 2
    return ids, (start - first) // 2, 0


def _until_stop(pieces: Iterator[str], stops: Sequence[str]) -> Iterator[str]:
    """The text up to a stop string or to trailing blanks: what might be the beginning of either waits."""
    held = ""
    for piece in pieces:
        held += piece
        ends = [held.index(stop) for stop in stops if stop in held]
        if ends:
            yield held[: min(ends)].rstrip()
            return
        safe = len(held.rstrip())
        for stop in stops:
            for size in range(min(len(stop) - 1, len(held)), 0, -1):
                if held.endswith(stop[:size]):
                    safe = min(safe, len(held[: len(held) - size].rstrip()))
                    break
        if safe:
            yield held[:safe]
            held = held[safe:]
    yield held.rstrip()
