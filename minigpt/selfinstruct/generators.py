"""Generators of completions: a local model, in one process or one per GPU. endpoint.py is the one for a server.

All generators implement `complete(prompts, params)`, `count(text)` and `context`. A completion depends only on its
prompt and seed, not on the rest of the batch or the number of processes. On a GPU, or with unpacked weights, this holds
only up to rounding, because the batch size changes the last bits.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from minigpt.distributed import all_or_none, rank, start_process_group, world_size
from minigpt.selfinstruct.tasks import Task
from minigpt.settings.groups import check_range

if TYPE_CHECKING:  # importing it imports tiktoken, which would slow down --help
    from minigpt.data.tokenizer import Tokenizer


class SeededPrompt(NamedTuple):
    """A text to continue, and the seed for sampling its completion."""

    text: str
    seed: int


class Completion(NamedTuple):
    """A generated continuation of a prompt."""

    text: str
    finished: bool
    """Ended by end-of-text or a stop string (neither is part of the text); False if truncated at the token limit."""


OnCompletion = Callable[[int, list[Completion]], None]


class Generator(Protocol):
    """Generates completions of prompts."""

    context: int
    """Maximum number of tokens in a prompt and its completion together."""

    def count(self, text: str) -> int:
        """Number of tokens in a text, or an upper bound."""

    def complete(
        self, prompts: Sequence[SeededPrompt], params: "SamplingParams", on_completion: OnCompletion | None = None
    ) -> list[list[Completion]]:
        """Generates `num_return_sequences` completions of each prompt.

        Args:
            on_completion: called with a prompt's index and its completions as soon as a server returns them, so that
                they can be saved. Local models never call it, because they can regenerate the same completions.
        """


@dataclass
class GeneratorArguments:
    """Settings of generation."""

    max_length: int = 512
    """Maximum new tokens per completion. The rest of the model's context is for the prompt."""
    request_batch_size: int = 5
    """Requests per batch. A round is four batches; its shots are sampled before it starts."""
    temperature: float | None = None
    """Sampling temperature; 0 is greedy. Unset: 1, and 0 for beam search."""
    top_p: float = 1.0
    """Nucleus sampling: sample from the smallest set of likeliest tokens with at least this total probability."""
    num_beams: int = 1
    """Above 1: beam search with this many beams, without sampling."""
    repetition_penalty: float = 1.0
    """Above 1: tokens that already occurred become less likely."""
    num_return_sequences: int = 1
    """Completions per request."""
    stop_words: list[str] = field(default_factory=list)
    """Additional strings that end a completion."""
    seed: int = 42
    """Seed for choosing shots and for sampling."""

    def __post_init__(self) -> None:
        if self.temperature is None:
            self.temperature = 0.0 if self.num_beams > 1 else 1.0
        check_range(self, "at least 1", lambda x: x >= 1, "max_length", "request_batch_size", "num_beams")
        check_range(self, "at least 1", lambda x: x >= 1, "num_return_sequences")
        check_range(self, "at least 0 and finite", lambda x: 0 <= x < math.inf, "temperature")
        check_range(self, "above 0 and at most 1", lambda x: 0 < x <= 1, "top_p")
        check_range(self, "above 0 and finite", lambda x: 0 < x < math.inf, "repetition_penalty")
        check_range(self, "at least 0 and below 2^63", lambda x: 0 <= x < 2**63, "seed")
        if self.num_beams > 1 and self.temperature:
            raise ValueError(f"--num_beams {self.num_beams}: beam search does not sample, so --temperature must be 0")
        if 1 < self.num_beams < self.num_return_sequences:
            raise ValueError(f"--num_return_sequences {self.num_return_sequences} is more than --num_beams")
        if self.num_beams == 1 < self.num_return_sequences and not self.temperature:
            raise ValueError("--num_return_sequences above 1 would return identical completions at --temperature 0")
        if "" in self.stop_words:
            raise ValueError("--stop_words: an empty string would end every completion at once")


class SamplingParams(NamedTuple):
    """Settings of generation, and stop strings."""

    settings: GeneratorArguments
    stop: tuple[str, ...] = ()
    """Strings that end a completion, in addition to end-of-text."""


class LocalGenerator:
    """A model in this process."""

    def __init__(self, model: Any, tokenizer: "Tokenizer"):
        """`model`: a CausalLM in eval mode, on any device; on a CPU, packed by `inference.packed.for_generation`."""
        self.model, self.tokenizer = model, tokenizer
        self.context: int = model.config.context

    def count(self, text: str) -> int:
        return len(self.tokenizer.encode(text))

    def complete(
        self, prompts: Sequence[SeededPrompt], params: SamplingParams, on_completion: OnCompletion | None = None
    ) -> list[list[Completion]]:
        """Raises ValueError if a prompt is empty or fills the context."""
        from minigpt.inference.generate import generate

        settings, stop = params
        eot = self.tokenizer.eot_id
        assert settings.temperature is not None
        sequences = generate(
            self.model,
            [self.tokenizer.encode(prompt.text) for prompt in prompts],
            max_new_tokens=settings.max_length,
            temperature=settings.temperature,
            top_p=settings.top_p,
            repetition_penalty=settings.repetition_penalty,
            num_beams=settings.num_beams,
            num_return_sequences=settings.num_return_sequences,
            eos_id=eot,
            stop=stop,
            tokenizer=self.tokenizer,
            seed=[prompt.seed for prompt in prompts],
            batch_size=settings.request_batch_size * max(settings.num_return_sequences, settings.num_beams),
        )
        completions = []
        for ids in sequences:
            finished = ids[-1:] == [eot]
            text = self.tokenizer.decode(ids[:-1] if finished else ids)
            completions.append(truncate_at_stop(text, finished, stop))
        n = settings.num_return_sequences
        return [completions[start : start + n] for start in range(0, len(completions), n)]


def truncate_at_stop(text: str, finished: bool, stop: Sequence[str]) -> Completion:
    """Truncates a completion before the first stop string that occurs in it.

    >>> truncate_at_stop("4 apples\\n###\\n10. Instr", False, ["\\n###\\n10."])
    Completion(text='4 apples', finished=True)
    """
    ends = [index for index in map(text.find, stop) if index >= 0]
    return Completion(text[: min(ends)], True) if ends else Completion(text, finished)


def fit_shots(
    generator: Generator, render: Callable[[Sequence[Task]], str], shots: Sequence[Task], max_new_tokens: int
) -> tuple[list[Task], str] | None:
    """The longest prefix of the shots whose prompt fits the context with `max_new_tokens`, and the prompt; or None."""
    for count in range(len(shots), 0, -1):
        prompt = render(shots[:count])
        if generator.count(prompt) + max_new_tokens <= generator.context:
            return list(shots[:count]), prompt
    return None


class Ranks:
    """Data-parallel generation: every rank holds the model, and rank r of W completes the prompts r, r + W, ...

    Rank 0 calls `complete`; the other ranks run `help` until rank 0 calls `close`.
    """

    def __init__(self, generator: LocalGenerator):
        self.generator = generator
        self.context, self.count = generator.context, generator.count
        start_process_group(generator.model.device.type)

    def complete(
        self, prompts: Sequence[SeededPrompt], params: SamplingParams, on_completion: OnCompletion | None = None
    ) -> list[list[Completion]]:
        self._broadcast((prompts, params))
        shards = self._complete_shard(prompts, params)
        assert shards is not None
        return [shards[index % len(shards)][index // len(shards)] for index in range(len(prompts))]

    def help(self) -> None:
        """Completes this rank's shard of every call, until rank 0 closes."""
        while (request := self._broadcast(None)) is not None:
            self._complete_shard(*request)
        self._destroy_process_group()

    def close(self) -> None:
        """Ends `help` on the other ranks."""
        self._broadcast(None)
        self._destroy_process_group()

    def _broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        from torch import distributed

        values = [value]
        distributed.broadcast_object_list(values, src=0)
        return values[0]

    def _complete_shard(self, prompts: Sequence[SeededPrompt], params: SamplingParams) -> list[Any] | None:
        """Completes this rank's shard. Returns the shards of all ranks on rank 0, None on the others."""
        from torch import distributed

        with all_or_none():
            completions = self.generator.complete(prompts[rank() :: world_size()], params)
        shards: list[Any] | None = [None] * world_size() if rank() == 0 else None
        distributed.gather_object(completions, shards, dst=0)
        return shards

    @staticmethod
    def _destroy_process_group() -> None:
        from torch import distributed

        distributed.destroy_process_group()
