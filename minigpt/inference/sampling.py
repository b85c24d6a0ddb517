"""Which token comes next: the settings of a request, and what they make of the logits.

The settings work in the order of Hugging Face's processors: repetition penalty, minimum length, temperature, top-k,
top-p.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from minigpt.data.tokenizer import Tokenizer

MIN_TEMPERATURE = 1e-30  # a temperature below it does what it does, and does not vanish in fp32
NUCLEI = (128, 2048)  # top-p orders that many tokens first: nearly always they reach p, and the vocabulary is slow
SEQUENCE_STRIDE = 0x9E3779B97F4A7C15  # between the seeds of one prompt's sequences: far from its neighbours' seeds


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How one prompt is continued. Raises `ValueError`, which names the setting, where a value is out of its range."""

    max_new_tokens: int
    """The most that a row gets; it also ends where the model's context does."""
    temperature: float = 0.0
    """0 takes the likeliest token; above, logits are divided by it and a token is drawn."""
    top_k: int = 0
    """Draw from the k likeliest; 0 is all."""
    top_p: float = 1.0
    """Draw from the fewest likeliest tokens whose probabilities reach p (Holtzman et al. 2020, arXiv:1904.09751);
    1.0 is all."""
    repetition_penalty: float = 1.0
    """Above 1, tokens of the prompt and of the answer so far become less likely (Keskar et al. 2019,
    arXiv:1909.05858): their logits are divided by it where positive, else multiplied."""
    min_new_tokens: int = 0
    """Before that many, `eos_id` cannot come and stop strings end nothing."""
    eos_id: int | None = None
    """A row ends with it; None never ends early."""
    stop: Sequence[str] = ()
    """A row ends once its text holds one of these, wherever tokens begin and end."""
    seed: int | None = None
    """Of the row's own stream of draws; None is a fresh one."""

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            raise ValueError(f"stop must be a list of strings, got the string {self.stop!r}")
        object.__setattr__(self, "stop", tuple(self.stop))
        for name, wanted, holds in (
            ("max_new_tokens", "at least 0", self.max_new_tokens >= 0),
            ("temperature", "at least 0", 0 <= self.temperature < float("inf")),
            ("top_k", "at least 0", self.top_k >= 0),
            ("top_p", "above 0 and at most 1", 0 < self.top_p <= 1),
            ("repetition_penalty", "above 0", 0 < self.repetition_penalty < float("inf")),
            ("min_new_tokens", "at least 0", self.min_new_tokens >= 0),
            ("eos_id", "at least 0", self.eos_id is None or self.eos_id >= 0),
            ("stop", "strings that are not empty", all(self.stop)),
            ("seed", "at least 0 and below 2^63", self.seed is None or 0 <= self.seed < 2**63),
        ):
            if not holds:
                raise ValueError(f"{name} must be {wanted}, got {getattr(self, name)}")


def sequence_seed(seed: int | None, index: int) -> int | None:
    """The seed of a prompt's sequence: the first has the prompt's own."""
    return seed if seed is None or index == 0 else (seed + index * SEQUENCE_STRIDE) % 2**63


class Row:
    """One sequence under way."""

    def __init__(self, prompt: Sequence[int], sampling: Sampling, room: int, tokenizer: Tokenizer | None):
        """`room`: the most new tokens. `tokenizer`: needed for stop strings alone."""
        self.sampling = sampling
        self.ids = list(prompt)
        self.prompt_length = len(prompt)
        self.room = room
        self._decoder = tokenizer.stream_decoder() if sampling.stop and tokenizer else None
        self._tail = ""  # of the text: what a stop string may begin in

    @cached_property
    def random(self) -> torch.Generator:
        """The row's own stream of draws, made when it first draws: thousands of rows may be waiting."""
        generator = torch.Generator()
        if self.sampling.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.sampling.seed)
        return generator

    @property
    def new(self) -> int:
        """How many tokens it has got."""
        return len(self.ids) - self.prompt_length

    def append(self, token: int) -> str | None:
        """Takes a token; says why the row ends with it: "stop", "length", or not at all."""
        self.ids.append(token)
        stopped = self._says_stop(token) or token == self.sampling.eos_id
        if stopped and self.new >= self.sampling.min_new_tokens:
            return "stop"
        return "length" if self.new == self.room else None

    def _says_stop(self, token: int) -> bool:
        if self._decoder is None:
            return False
        stop = self.sampling.stop
        text = self._tail + self._decoder.feed(token)
        found = any(word in text for word in stop)  # one that came too early, before min_new_tokens, is forgotten
        self._tail = "" if found else text[max(0, len(text) - max(map(len, stop)) + 1) :]
        return found


def apply_penalties(scores: Tensor, ids: Sequence[int], new: int, sampling: Sampling) -> None:
    """Repetition penalty and minimum length on one row's (V,) logits or log-probabilities, in place.

    `ids` are those of prompt and answer so far, the last `new` of them the answer.
    """
    penalty = sampling.repetition_penalty
    if penalty != 1:
        places = torch.tensor(ids, device=scores.device)
        seen = scores[places]
        scores[places] = torch.where(seen > 0, seen / penalty, seen * penalty)  # what came twice is penalised once
    if sampling.eos_id is not None and new < sampling.min_new_tokens:
        scores[sampling.eos_id] = float("-inf")


def next_tokens(logits: Tensor, rows: Sequence[Row]) -> list[int]:
    """One token for each row, by its own settings and from its own stream: (B,V) logits -> B ids."""
    logits = logits.float()
    alike: dict[tuple[float, int, float], list[int]] = {}  # rows that draw alike are drawn together
    for place, row in enumerate(rows):
        apply_penalties(logits[place], row.ids, row.new, row.sampling)
        alike.setdefault((row.sampling.temperature, row.sampling.top_k, row.sampling.top_p), []).append(place)
    tokens = [0] * len(rows)
    for (temperature, top_k, top_p), places in alike.items():
        own = logits if len(places) == len(rows) else logits[places]
        if temperature == 0:
            # On a CPU NumPy's argmax is 20 times as fast as torch's.
            found = torch.from_numpy(own.numpy().argmax(-1)) if own.device.type == "cpu" else own.argmax(-1)
        else:
            own = own.cpu() if own.device.type == "mps" else own  # which has no fp64
            numbers = [torch.rand(1, dtype=torch.float64, generator=rows[place].random) for place in places]
            found = draw(*candidates(own, temperature, top_k, top_p), torch.cat(numbers))
        for place, token in zip(places, found.tolist(), strict=True):
            tokens[place] = token
    return tokens


def candidates(logits: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0) -> tuple[Tensor, Tensor | None]:
    """What the next token is drawn from: (B,V) logits -> (B,K) weights and their (B,K) ids, likeliest first.

    The weights are in proportion to the probabilities, in fp64. Where nothing is cut off, they are (B,V), in the
    vocabulary's order, and the ids None.
    """
    V = logits.shape[-1]
    highest = logits.amax(-1, keepdim=True)  # taken off first, so that no temperature makes an infinity of it
    chances = ((logits - highest) / max(temperature, MIN_TEMPERATURE)).softmax(-1)  # (B,V)
    ids = None
    if 0 < top_k < V:
        chances, ids = chances.topk(top_k)  # (B,K)
    elif top_p < 1:
        for size in (*NUCLEI, V):
            nucleus, ids = chances.topk(min(size, V))  # (B,K)
            if (nucleus.sum(-1) >= top_p).all():
                break
        chances = nucleus
    chances = chances.double()
    if top_p < 1:
        total = chances.sum(-1, keepdim=True) if 0 < top_k < V else 1.0  # after top-k, p is a share of what is left
        before = chances.cumsum(-1) - chances
        chances = chances.masked_fill(before >= top_p * total, 0.0)  # what lies before a token reaches p already
    return chances, ids


def draw(weights: Tensor, ids: Tensor | None, numbers: Tensor) -> Tensor:
    """One id per row, at a (B,) number from 0 to below 1 of the way through its weights: (B,K), (B,K) -> (B,).

    Weights `[0, 1, 0, 3]` and the ids 0 to 3: numbers below 0.25 draw 1, the others 3.
    """
    heights = weights.cumsum(-1)  # (B,K): a token's weight is the height of its step
    marks = numbers.to(weights.device)[:, None] * heights[:, -1:]
    picks = torch.searchsorted(heights, marks, right=True)  # (B,1); on a step's edge the next: none of weight zero
    return (picks if ids is None else ids.gather(-1, picks))[:, 0]
