"""From a request to rows of the worker's batch, and from their tokens to text that may be sent."""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from minigpt.data.encode import encode_segments
from minigpt.data.prompts import Message, Template
from minigpt.data.tokenizer import Tokenizer
from minigpt.inference.answer_text import AnswerText
from minigpt.inference.chat import as_one_text, fit_prompt
from minigpt.inference.sampling import Sampling, sequence_seed
from minigpt.model.base import CausalLM
from minigpt.serving.guard import ApiError
from minigpt.serving.schema import ChatRequest, CompletionRequest, Sampled, Truncated
from minigpt.serving.worker import QueueFull, Token, Worker, WorkerEnded

COMPLETION_TOKENS = 16  # of a completion that names no limit, as OpenAI has it


class GenerationRequest(NamedTuple):
    """What a request asks of the worker, and how the tokens become text."""

    rows: list[tuple[list[int], Sampling]]
    prompt_tokens: int
    trim: bool
    truncated: Truncated | None = None


@dataclass
class RequestBuilder:
    """Turns requests into questions. What a request leaves out is as in `sampling`, the settings of `Sampling`.

    Refusals are `ApiError`s of status 400.
    """

    model: CausalLM
    tokenizer: Tokenizer
    template: Template
    sampling: Mapping[str, Any]
    system: str | None = None

    def chat(self, body: ChatRequest) -> GenerationRequest:
        """The conversation as the template has it, with one answer or several to come."""
        messages: list[Message] = [message.as_message() for message in body.messages]
        if self.system and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.system})
        continues = self.template.name == "none"
        if continues:
            messages = as_one_text(messages)
        wanted = body.max_completion_tokens or body.max_tokens
        context = self.model.config.context
        truncated = None
        try:
            if body.truncation == "auto":
                room = min(wanted or self.sampling["max_new_tokens"], context // 2)
                ids, *left_out = fit_prompt(messages, self.template, self.tokenizer, context - room)
                truncated = Truncated(turns_dropped=left_out[0], tokens_cut=left_out[1])
                wanted = room
            else:
                segments = self.template.render(messages, add_generation_prompt=True)
                ids = list(encode_segments(segments, self.tokenizer).ids)
        except ValueError as error:
            raise ApiError(400, str(error), param="messages") from None
        stops = (*self.template.stop_strings(), *body.stops)
        sampling = self._sampling(body, [ids], wanted, self.sampling["max_new_tokens"], stops)
        return GenerationRequest(_rows([ids], sampling, body.n or 1), len(ids), not continues, truncated)

    def completion(self, body: CompletionRequest) -> GenerationRequest:
        """The prompts as they are. An empty text is continued from end-of-text, as a document begins."""
        prompt, eot = body.prompt, [self.tokenizer.eot_id]
        texts_or_ids = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
        prompts: list[list[int]] = [
            (self.tokenizer.encode(one) or eot) if isinstance(one, str) else list(one)  # type: ignore[arg-type]
            for one in texts_or_ids
        ]
        size = self.model.config.vocab_size
        if unknown := [id for ids in prompts for id in ids if id >= size]:
            raise ApiError(400, f"token {unknown[0]} is not in the vocabulary of {size}", param="prompt")
        sampling = self._sampling(body, prompts, body.max_tokens, COMPLETION_TOKENS, body.stops)
        return GenerationRequest(_rows(prompts, sampling, body.n or 1), sum(map(len, prompts)), trim=False)

    def _sampling(
        self, body: Sampled, prompts: list[list[int]], wanted: int | None, default: int, stops: tuple[str, ...]
    ) -> Sampling:
        longest, context = max(map(len, prompts)), self.model.config.context
        if longest + (wanted or 1) > context:
            asked = f"{longest} tokens of prompt and {wanted or 1} of answer"
            raise ApiError(400, f"{asked} are more than the context of {context}", code="context_length_exceeded")
        if longest == 0:
            raise ApiError(400, "there is nothing to continue", param="messages")
        names = ("temperature", "top_p", "top_k", "repetition_penalty", "seed")
        own = {name: value for name in names if (value := getattr(body, name)) is not None}
        settings = {**self.sampling, **own, "max_new_tokens": wanted or default}
        if settings["seed"] is not None:
            settings["seed"] %= 2**63  # OpenAI's may be negative
        return Sampling(**settings, eos_id=self.tokenizer.eot_id, stop=stops)


def _rows(prompts: list[list[int]], sampling: Sampling, n: int) -> list[tuple[list[int], Sampling]]:
    """A row for each choice: those of the first prompt, those of the second, ... Each has a stream of its own."""
    seeds = [None if sampling.seed is None else (sampling.seed + i) % 2**63 for i in range(len(prompts))]
    return [
        (prompt, replace(sampling, seed=sequence_seed(seed, index)))
        for prompt, seed in zip(prompts, seeds, strict=True)
        for index in range(n)
    ]


class Piece(NamedTuple):
    """What a choice says next. `reason` says why it ends with it."""

    choice: int
    text: str
    reason: str | None


class Answer:
    """A question under way in the worker. Its iteration yields a `Piece` for every token, in the order they come.

    Raises:
        ApiError: 400 for more rows than could ever run, 429 where the queue is full, 503 where the worker has ended;
            while iterating, 500 where the worker ends.
    """

    def __init__(self, question: GenerationRequest, worker: Worker, tokenizer: Tokenizer):
        if len(question.rows) > worker.capacity:
            raise ApiError(400, f"{len(question.rows)} answers in one request; at most {worker.capacity}", param="n")
        loop = asyncio.get_running_loop()
        self._tokens: asyncio.Queue[Token | WorkerEnded] = asyncio.Queue()

        def deliver(token: Token | WorkerEnded) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody listens
                loop.call_soon_threadsafe(self._tokens.put_nowait, token)

        self._worker = worker
        trim = question.trim
        self._texts = [
            AnswerText(tokenizer, sampling.stop, trim_start=trim, trim_end=trim) for _, sampling in question.rows
        ]
        self.new_tokens = 0
        self.started = time.perf_counter()
        self.first_token_s: float | None = None
        try:
            self._job = worker.submit(question.rows, deliver)
        except QueueFull as error:
            raise ApiError(429, str(error), type="rate_limit_error", headers={"Retry-After": "1"}) from None
        except WorkerEnded as error:
            raise ApiError(503, str(error), type="server_error") from None

    async def __aiter__(self) -> AsyncIterator[Piece]:
        left = len(self._texts)
        while left:
            token = await self._tokens.get()
            if isinstance(token, WorkerEnded):
                raise ApiError(500, str(token), type="server_error")
            self.new_tokens += 1
            self.first_token_s = self.first_token_s or time.perf_counter() - self.started
            left -= token.reason is not None
            text = self._texts[token.row]
            shown = text.feed(token.id) + (text.end() if token.reason else "")
            yield Piece(token.row, shown, token.reason)

    def leave(self) -> None:
        """Frees the rows, where they are not done."""
        self._worker.cancel(self._job)
