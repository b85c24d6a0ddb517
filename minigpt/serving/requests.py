"""Converts a request to rows of the worker's batch, and streams their tokens back as text."""

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
from minigpt.serving.guard import HttpError
from minigpt.serving.schema import ChatRequest, CompletionRequest, SamplingFields, Truncated
from minigpt.serving.worker import QueueFull, Token, Worker, WorkerEnded

COMPLETION_TOKENS = 16  # max_tokens of a completion that does not set it, as in OpenAI's API


class GenerationRequest(NamedTuple):
    """The rows that a request asks the worker for, and how to show their text."""

    rows: list[tuple[list[int], Sampling]]
    prompt_tokens: int
    trim: bool
    truncated: Truncated | None = None


@dataclass
class RequestBuilder:
    """Converts requests to `GenerationRequest`s. `sampling` (settings of `Sampling`) holds the defaults.

    Raises `HttpError` of status 400 for a request that cannot be served.
    """

    model: CausalLM
    tokenizer: Tokenizer
    template: Template
    sampling: Mapping[str, Any]
    system: str | None = None

    def chat(self, body: ChatRequest) -> GenerationRequest:
        """Renders the conversation with the template, for `body.n` answers."""
        messages: list[Message] = [message.as_message() for message in body.messages]
        if self.system and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.system})
        is_plain_text = self.template.name == "none"
        if is_plain_text:
            messages = as_one_text(messages)
        max_tokens = body.max_completion_tokens or body.max_tokens
        context = self.model.config.context
        truncated = None
        try:
            if body.truncation == "auto":
                max_tokens = min(max_tokens or self.sampling["max_new_tokens"], context // 2)
                prompt = fit_prompt(messages, self.template, self.tokenizer, context - max_tokens)
                ids = prompt.ids
                truncated = Truncated(turns_dropped=prompt.turns_dropped, tokens_cut=prompt.tokens_cut)
            else:
                segments = self.template.render(messages, add_generation_prompt=True)
                ids = list(encode_segments(segments, self.tokenizer).ids)
        except ValueError as error:
            raise HttpError(400, str(error), param="messages") from None
        stops = (*self.template.stop_strings(), *body.stops)
        sampling = self._sampling(body, [ids], max_tokens, self.sampling["max_new_tokens"], stops)
        return GenerationRequest(_rows([ids], sampling, body.n or 1), len(ids), not is_plain_text, truncated)

    def completion(self, body: CompletionRequest) -> GenerationRequest:
        """Continues the prompts verbatim. An empty text becomes end-of-text, which precedes a document in training."""
        prompt, eot = body.prompt, [self.tokenizer.eot_id]
        texts_or_ids = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
        prompts: list[list[int]] = [
            (self.tokenizer.encode(entry) or eot) if isinstance(entry, str) else list(entry)  # type: ignore[arg-type]
            for entry in texts_or_ids
        ]
        size = self.model.config.vocab_size
        if unknown := [id for ids in prompts for id in ids if id >= size]:
            raise HttpError(400, f"token {unknown[0]} is not in the vocabulary of {size}", param="prompt")
        sampling = self._sampling(body, prompts, body.max_tokens, COMPLETION_TOKENS, body.stops)
        return GenerationRequest(_rows(prompts, sampling, body.n or 1), sum(map(len, prompts)), trim=False)

    def _sampling(
        self,
        body: SamplingFields,
        prompts: list[list[int]],
        max_tokens: int | None,
        default: int,
        stops: tuple[str, ...],
    ) -> Sampling:
        longest, context = max(map(len, prompts)), self.model.config.context
        if longest + (max_tokens or 1) > context:
            total = f"{longest} tokens of prompt and {max_tokens or 1} of answer"
            raise HttpError(400, f"{total} are more than the context of {context}", code="context_length_exceeded")
        if longest == 0:
            raise HttpError(400, "the prompt is empty", param="messages")
        names = ("temperature", "top_p", "top_k", "repetition_penalty", "seed")
        overrides = {name: value for name in names if (value := getattr(body, name)) is not None}
        settings = {**self.sampling, **overrides, "max_new_tokens": max_tokens or default}
        if settings["seed"] is not None:
            settings["seed"] %= 2**63  # OpenAI allows negative seeds
        return Sampling(**settings, eos_id=self.tokenizer.eot_id, stop=stops)


def _rows(prompts: list[list[int]], sampling: Sampling, n: int) -> list[tuple[list[int], Sampling]]:
    """A row for each choice, in the order of the prompts, each with its own seed."""
    seeds = [None if sampling.seed is None else (sampling.seed + i) % 2**63 for i in range(len(prompts))]
    return [
        (prompt, replace(sampling, seed=sequence_seed(seed, index)))
        for prompt, seed in zip(prompts, seeds, strict=True)
        for index in range(n)
    ]


class TextChunk(NamedTuple):
    """The next text of a choice. `reason` is why the choice ends with it."""

    choice: int
    text: str
    reason: str | None


class AnswerStream:
    """A request that the worker is generating. Iterating yields a `TextChunk` for every token, in order of generation.

    Raises:
        HttpError: 400 for more rows than the batch and the queue hold, 429 if the queue is full, 503 if the worker has
            ended; while iterating, 500 if the worker ends.
    """

    def __init__(self, generation: GenerationRequest, worker: Worker, tokenizer: Tokenizer):
        if (n_rows := len(generation.rows)) > worker.capacity:
            raise HttpError(400, f"{n_rows} answers in one request; the limit is {worker.capacity}", param="n")
        loop = asyncio.get_running_loop()
        self._tokens: asyncio.Queue[Token | WorkerEnded] = asyncio.Queue()

        def deliver(token: Token | WorkerEnded) -> None:
            with suppress(RuntimeError):  # the event loop is closed: the server has ended
                loop.call_soon_threadsafe(self._tokens.put_nowait, token)

        self._worker = worker
        trim = generation.trim
        self._texts = [
            AnswerText(tokenizer, sampling.stop, trim_start=trim, trim_end=trim) for _, sampling in generation.rows
        ]
        self.new_tokens = 0
        self.started = time.perf_counter()
        self.first_token_s: float | None = None
        try:
            self._job = worker.submit(generation.rows, deliver)
        except QueueFull as error:
            raise HttpError(429, str(error), type="rate_limit_error", headers={"Retry-After": "1"}) from None
        except WorkerEnded as error:
            raise HttpError(503, str(error), type="server_error") from None

    async def __aiter__(self) -> AsyncIterator[TextChunk]:
        unfinished = len(self._texts)
        while unfinished:
            token = await self._tokens.get()
            if isinstance(token, WorkerEnded):
                raise HttpError(500, str(token), type="server_error")
            self.new_tokens += 1
            self.first_token_s = self.first_token_s or time.perf_counter() - self.started
            unfinished -= token.reason is not None
            text = self._texts[token.row]
            chunk = text.feed(token.id) + (text.end() if token.reason else "")
            yield TextChunk(token.row, chunk, token.reason)

    def cancel(self) -> None:
        """Frees the rows that have not ended."""
        self._worker.cancel(self._job)
