"""Where completions come from: a model in this process, or in one process for each GPU. endpoint.py asks a server.

All generators keep one promise: `complete(prompts, how)`, `count(text)` and `context`. What a prompt gets depends on
its seed alone, and so neither on its neighbours nor on the number of processes; on a GPU, or with weights that are not
packed, up to rounding, for there the size of a batch changes the last bits.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from minigpt.distributed import all_or_none, rank, start_process_group, world_size
from minigpt.selfinstruct.tasks import Task
from minigpt.settings.groups import check_range

if TYPE_CHECKING:  # it brings tiktoken, and --help need not wait for it
    from minigpt.data.tokenizer import Tokenizer


class Prompt(NamedTuple):
    """What a model is to continue."""

    text: str
    seed: int
    """Fixes the draws."""


class Completion(NamedTuple):
    """What a model went on with."""

    text: str
    finished: bool
    """The model ended it, with end-of-text or a stop string (which is cut off), and not the lack of room."""


OnArrival = Callable[[int, list[Completion]], None]


class Generator(Protocol):
    """Anything that continues prompts."""

    context: int
    """The most tokens of a prompt and its completion together."""

    def count(self, text: str) -> int:
        """The tokens of a text, or a safe guess."""

    def complete(
        self, prompts: Sequence[Prompt], how: "How", on_arrival: OnArrival | None = None
    ) -> list[list[Completion]]:
        """Continues each prompt, `num_return_sequences` times.

        Args:
            on_arrival: called with the place of a prompt and its completions, as soon as they have come from afar.
                What a local model does it can do again, so it tells nothing.
        """


@dataclass
class GeneratorArguments:
    """How the model is asked."""

    max_length: int = 512
    """Longest completion in new tokens. Shots take the rest of the model's context."""
    request_batch_size: int = 5
    """Requests that run together; four times as many are a round, whose shots are drawn before it starts."""
    temperature: float | None = None
    """0 takes the likeliest token each time; more is livelier. Unset: 1, and 0 for a beam search."""
    top_p: float = 1.0
    """Draw from the fewest likeliest tokens that together reach this probability."""
    num_beams: int = 1
    """Above 1: beam search with that many beams, which draws nothing."""
    repetition_penalty: float = 1.0
    """Above 1: tokens that were there before become less likely."""
    num_return_sequences: int = 1
    """Completions of each request."""
    stop_words: list[str] = field(default_factory=list)
    """Further strings that end a completion."""
    seed: int = 42
    """Fixes shots and draws."""

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
            raise ValueError(f"--num_beams {self.num_beams} searches, it does not draw: --temperature must be 0")
        if 1 < self.num_beams < self.num_return_sequences:
            raise ValueError(f"--num_return_sequences {self.num_return_sequences} is more than --num_beams")
        if self.num_beams == 1 < self.num_return_sequences and not self.temperature:
            raise ValueError("--num_return_sequences above 1 would be alike at --temperature 0")
        if "" in self.stop_words:
            raise ValueError("--stop_words: an empty string would end every completion before it begins")


class How(NamedTuple):
    """A way to continue prompts."""

    settings: GeneratorArguments
    stop: tuple[str, ...] = ()
    """Strings that end a completion, besides end-of-text."""


class LocalGenerator:
    """A model in this process."""

    def __init__(self, model: Any, tokenizer: "Tokenizer"):
        """`model`: a CausalLM in eval mode, on any device; on a CPU, as `inference.fast.for_generation` packs it."""
        self.model, self.tokenizer = model, tokenizer
        self.context: int = model.config.context

    def count(self, text: str) -> int:
        return len(self.tokenizer.encode(text))

    def complete(
        self, prompts: Sequence[Prompt], how: How, on_arrival: OnArrival | None = None
    ) -> list[list[Completion]]:
        """Raises ValueError where a prompt is empty or fills the context."""
        from minigpt.inference.generate import generate

        settings, stop = how
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
        found = []
        for ids in sequences:
            ended = ids[-1:] == [eot]
            found.append(cut(self.tokenizer.decode(ids[:-1] if ended else ids), ended, stop))
        n = settings.num_return_sequences
        return [found[start : start + n] for start in range(0, len(found), n)]


def cut(text: str, finished: bool, stop: Sequence[str]) -> Completion:
    """A completion without the first stop string in it and what follows.

    >>> cut("4 apples\\n###\\n10. Instr", False, ["\\n###\\n10."])
    Completion(text='4 apples', finished=True)
    """
    ends = [place for place in map(text.find, stop) if place >= 0]
    return Completion(text[: min(ends)], True) if ends else Completion(text, finished)


def fit_shots(
    generator: Generator, render: Callable[[Sequence[Task]], str], shots: Sequence[Task], max_new_tokens: int
) -> tuple[list[Task], str] | None:
    """As many shots, from the first, as leave room for a completion, and the prompt; None where not one does."""
    for count in range(len(shots), 0, -1):
        prompt = render(shots[:count])
        if generator.count(prompt) + max_new_tokens <= generator.context:
            return list(shots[:count]), prompt
    return None


class Ranks:
    """The same generator on every rank, as one: rank r completes the prompts r, r + W, ...

    Rank 0 asks; the others `help` until it closes.
    """

    def __init__(self, generator: LocalGenerator):
        self.generator = generator
        self.context, self.count = generator.context, generator.count
        start_process_group(generator.model.device.type)

    def complete(
        self, prompts: Sequence[Prompt], how: How, on_arrival: OnArrival | None = None
    ) -> list[list[Completion]]:
        self._from_rank_0((prompts, how))
        parts = self._share(prompts, how)
        assert parts is not None
        return [parts[place % len(parts)][place // len(parts)] for place in range(len(prompts))]

    def help(self) -> None:
        """Does this rank's share until rank 0 closes."""
        while (work := self._from_rank_0(None)) is not None:
            self._share(*work)
        self._leave()

    def close(self) -> None:
        """Lets the other ranks go."""
        self._from_rank_0(None)
        self._leave()

    def _from_rank_0(self, work: Any) -> Any:
        from torch import distributed

        box = [work]
        distributed.broadcast_object_list(box, src=0)
        return box[0]

    def _share(self, prompts: Sequence[Prompt], how: How) -> list[Any] | None:
        """All ranks' completions, on rank 0."""
        from torch import distributed

        with all_or_none():
            found = self.generator.complete(prompts[rank() :: world_size()], how)
        parts: list[Any] | None = [None] * world_size() if rank() == 0 else None
        distributed.gather_object(found, parts, dst=0)
        return parts

    @staticmethod
    def _leave() -> None:
        from torch import distributed

        distributed.destroy_process_group()
