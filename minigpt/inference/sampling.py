"""Sampling: the settings of one prompt, and the choice of the next token from the logits.

The settings are applied in the order of Hugging Face's processors: repetition penalty, minimum length, temperature,
top-k, top-p.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from minigpt.data.tokenizer import Tokenizer

MIN_TEMPERATURE = 1e-30  # smaller temperatures are clamped to this (fp32 underflow)
NUCLEUS_SIZES = (128, 2048)  # top-p tries these top-k sizes first: they nearly always reach p; a full sort is slow
SEQUENCE_STRIDE = 0x9E3779B97F4A7C15  # between the seeds of a prompt's sequences: far from the seeds of other prompts


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How one prompt is continued. Raises `ValueError` that names the setting if a value is out of its range."""

    max_new_tokens: int
    """The maximum number of new tokens; a row also ends at the end of the model's context."""
    temperature: float = 0.0
    """0 takes the likeliest token (greedy); above, logits are divided by it and a token is sampled."""
    top_k: int = 0
    """Sample from the k likeliest tokens; 0 is all."""
    top_p: float = 1.0
    """Nucleus sampling: from the fewest likeliest tokens whose probabilities reach p (Holtzman et al. 2020,
    arXiv:1904.09751); 1.0 is all."""
    repetition_penalty: float = 1.0
    """Above 1, tokens of the prompt and of the answer so far become less likely (Keskar et al. 2019,
    arXiv:1909.05858): their logits are divided by it if positive, else multiplied."""
    min_new_tokens: int = 0
    """`eos_id` is not generated, and stop strings are ignored, before this many new tokens."""
    eos_id: int | None = None
    """The row ends after this token; None: no early end."""
    stop: Sequence[str] = ()
    """The row ends as soon as its decoded text contains one of these; they need not match token boundaries."""
    seed: int | None = None
    """Of the row's own random generator; None draws a new seed."""

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            raise ValueError(f"stop must be a list of strings, got the string {self.stop!r}")
        object.__setattr__(self, "stop", tuple(self.stop))
        for name, allowed, valid in (
            ("max_new_tokens", "at least 0", self.max_new_tokens >= 0),
            ("temperature", "at least 0", 0 <= self.temperature < float("inf")),
            ("top_k", "at least 0", self.top_k >= 0),
            ("top_p", "above 0 and at most 1", 0 < self.top_p <= 1),
            ("repetition_penalty", "above 0", 0 < self.repetition_penalty < float("inf")),
            ("min_new_tokens", "at least 0", self.min_new_tokens >= 0),
            ("eos_id", "at least 0", self.eos_id is None or self.eos_id >= 0),
            ("stop", "non-empty strings", all(self.stop)),
            ("seed", "at least 0 and below 2^63", self.seed is None or 0 <= self.seed < 2**63),
        ):
            if not valid:
                raise ValueError(f"{name} must be {allowed}, got {getattr(self, name)}")


def sequence_seed(seed: int | None, index: int) -> int | None:
    """The seed of a prompt's n-th sequence; the first has the prompt's own seed."""
    return seed if seed is None or index == 0 else (seed + index * SEQUENCE_STRIDE) % 2**63


class Row:
    """A sequence that is being generated."""

    def __init__(self, prompt: Sequence[int], sampling: Sampling, max_new_tokens: int, tokenizer: Tokenizer | None):
        """`tokenizer` is needed only for stop strings."""
        self.sampling = sampling
        self.ids = list(prompt)
        self.prompt_length = len(prompt)
        self.max_new_tokens = max_new_tokens
        self._decoder = tokenizer.stream_decoder() if sampling.stop and tokenizer else None
        self._tail = ""  # the end of the text, in which a stop string may have begun

    @cached_property
    def generator(self) -> torch.Generator:
        """The row's own random generator, created at its first draw: thousands of rows may be waiting."""
        generator = torch.Generator()
        if self.sampling.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.sampling.seed)
        return generator

    @property
    def new(self) -> int:
        """The number of new tokens."""
        return len(self.ids) - self.prompt_length

    def append(self, token: int) -> str | None:
        """Appends a token, and returns why the row ends with it: "stop", "length", or None if it does not."""
        self.ids.append(token)
        stopped = self._completes_stop(token) or token == self.sampling.eos_id
        if stopped and self.new >= self.sampling.min_new_tokens:
            return "stop"
        return "length" if self.new == self.max_new_tokens else None

    def _completes_stop(self, token: int) -> bool:
        if self._decoder is None:
            return False
        stop = self.sampling.stop
        text = self._tail + self._decoder.feed(token)
        complete = any(word in text for word in stop)  # one before min_new_tokens is dropped, so it cannot count later
        self._tail = "" if complete else text[max(0, len(text) - max(map(len, stop)) + 1) :]
        return complete


def apply_penalties(scores: Tensor, ids: Sequence[int], new: int, sampling: Sampling) -> None:
    """Applies repetition penalty and minimum length to one row's (V,) logits or log-probabilities, in place.

    `ids` are the prompt and the answer so far; its last `new` ids are the answer.
    """
    penalty = sampling.repetition_penalty
    if penalty != 1:
        seen = torch.tensor(ids, device=scores.device)
        values = scores[seen]
        scores[seen] = torch.where(values > 0, values / penalty, values * penalty)  # a repeated id is penalised once
    if sampling.eos_id is not None and new < sampling.min_new_tokens:
        scores[sampling.eos_id] = float("-inf")


def next_tokens(logits: Tensor, rows: Sequence[Row]) -> list[int]:
    """One token per row, by its own settings and from its own generator: (B,V) logits -> B ids."""
    logits = logits.float()
    groups: dict[tuple[float, int, float], list[int]] = {}  # rows with equal settings are sampled together
    for index, row in enumerate(rows):
        apply_penalties(logits[index], row.ids, row.new, row.sampling)
        groups.setdefault((row.sampling.temperature, row.sampling.top_k, row.sampling.top_p), []).append(index)
    tokens = [0] * len(rows)
    for (temperature, top_k, top_p), indices in groups.items():
        group = logits if len(indices) == len(rows) else logits[indices]
        if temperature == 0:
            # On a CPU NumPy's argmax is 20 times as fast as torch's.
            ids = torch.from_numpy(group.numpy().argmax(-1)) if group.device.type == "cpu" else group.argmax(-1)
        else:
            group = group.cpu() if group.device.type == "mps" else group  # MPS has no fp64
            uniforms = [torch.rand(1, dtype=torch.float64, generator=rows[index].generator) for index in indices]
            ids = draw(*candidates(group, temperature, top_k, top_p), torch.cat(uniforms))
        for index, token in zip(indices, ids.tolist(), strict=True):
            tokens[index] = token
    return tokens


def candidates(logits: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0) -> tuple[Tensor, Tensor | None]:
    """Candidates after temperature, top-k and top-p: (B,V) logits -> (B,K) weights and (B,K) ids, likeliest first.

    The weights are fp64 and proportional to the probabilities. Without top-k and top-p the weights are (B,V) in the
    order of the vocabulary, and the ids are None.
    """
    V = logits.shape[-1]
    highest = logits.amax(-1, keepdim=True)  # subtracted first, so that a small temperature cannot overflow
    probs = ((logits - highest) / max(temperature, MIN_TEMPERATURE)).softmax(-1)  # (B,V)
    ids = None
    if 0 < top_k < V:
        probs, ids = probs.topk(top_k)  # (B,K)
    elif top_p < 1:
        for size in (*NUCLEUS_SIZES, V):
            nucleus, ids = probs.topk(min(size, V))  # (B,K)
            if (nucleus.sum(-1) >= top_p).all():
                break
        probs = nucleus
    probs = probs.double()
    if top_p < 1:
        total = probs.sum(-1, keepdim=True) if 0 < top_k < V else 1.0  # after top-k, p is a share of what remains
        before = probs.cumsum(-1) - probs
        probs = probs.masked_fill(before >= top_p * total, 0.0)  # the likelier tokens already reach p
    return probs, ids


def draw(weights: Tensor, ids: Tensor | None, uniforms: Tensor) -> Tensor:
    """Samples one id per row by inverting the cumulative sum: (B,K) weights, (B,K) ids, (B,) in [0, 1) -> (B,) ids.

    Weights `[0, 1, 0, 3]` and ids 0 to 3: a uniform below 0.25 draws 1, any other 3.
    """
    cumulative = weights.cumsum(-1)  # (B,K)
    targets = uniforms.to(weights.device)[:, None] * cumulative[:, -1:]
    picks = torch.searchsorted(cumulative, targets, right=True)  # (B,1); right=True never picks a weight of zero
    return (picks if ids is None else ids.gather(-1, picks))[:, 0]
