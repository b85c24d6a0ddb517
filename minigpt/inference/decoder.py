"""Rows that come and go while the batch stays full (continuous batching, Yu et al. 2022, "Orca").

Every row has its own positions, settings and stream of draws, so it gets the same tokens as alone, whoever its
neighbours are. Rows under way lie side by side at the front of the cache: when one is done, the last one moves into
its place, and whoever waits joins behind.

    decoder = Decoder(model, max_rows=8)
    key = decoder.add(prompt_ids, Sampling(max_new_tokens=100, eos_id=tokenizer.eot_id))
    while len(decoder):
        for key, token, reason in decoder.step():
            ...
"""

from collections import deque
from collections.abc import Sequence
from itertools import count

import torch
from torch import Tensor

from minigpt.data.tokenizer import Tokenizer
from minigpt.inference.sampling import Row, Sampling, next_tokens
from minigpt.model.base import CausalLM
from minigpt.model.cache import KVCache

PREFILL_TOKENS = 4096  # read at once, padding included: bounds the memory that prompts take on their way through


class Decoder:
    """Continues prompts, one token for every row a step.

    Args:
        model: on any device, in eval mode.
        max_rows: rows that run together; further ones wait.
        max_length: longest prompt and answer together; None is the model's context. The cache is made for it.
        tokenizer: needed for stop strings. With it, no id comes that it does not know.
    """

    def __init__(
        self, model: CausalLM, *, max_rows: int, max_length: int | None = None, tokenizer: Tokenizer | None = None
    ):
        if max_rows < 1:
            raise ValueError(f"max_rows must be at least 1, got {max_rows}")
        self.model, self.max_rows, self.tokenizer = model, max_rows, tokenizer
        self.max_length = min(max_length or model.config.context, model.config.context)
        self._known = tokenizer.vocab_size if tokenizer else None  # an embedding may be padded to more
        self.device = model.device
        self.cache = KVCache.for_model(model, max_rows, self.max_length)
        self._keys = count()
        self._waiting: deque[tuple[int, Row]] = deque()
        self._running: list[tuple[int, Row]] = []  # in the order of the cache's rows

    def __len__(self) -> int:
        """Rows under way or waiting."""
        return len(self._running) + len(self._waiting)

    def add(self, prompt_ids: Sequence[int], sampling: Sampling) -> int:
        """A new row, which joins with the next step if there is a place. Returns the key of its tokens.

        Raises:
            ValueError: an empty prompt or one that leaves no room, nothing to generate, stop strings without a
                tokenizer, or an eos beyond the vocabulary.
        """
        check_prompt(prompt_ids, self.max_length, "the prompt")
        if sampling.max_new_tokens == 0:
            raise ValueError("max_new_tokens must be at least 1, got 0")
        check_sampling(sampling, self.model, self.tokenizer)
        room = min(sampling.max_new_tokens, self.max_length - len(prompt_ids))
        key = next(self._keys)
        self._waiting.append((key, Row(prompt_ids, sampling, room, self.tokenizer)))
        return key

    def remove(self, key: int) -> None:
        """Ends a row before its time. One that is done already is passed over."""
        self._waiting = deque(entry for entry in self._waiting if entry[0] != key)
        for place, (own, _) in enumerate(self._running):
            if own == key:
                self._leave(place)
                return

    def step(self) -> list[tuple[int, int, str | None]]:
        """One token for every row: (key, token, reason). Reasons, OpenAI's words: None goes on; "stop" ends with
        end-of-text or a stop string, "length" with the room."""
        with without_gradients(self.model):
            logits = [self._next_logits()] if self._running else []  # of (B,V)
            while self._waiting and len(self._running) < self.max_rows:
                logits.append(self._read_prompts())
            if not logits:
                return []
            joined = logits[0] if len(logits) == 1 else torch.cat(logits)
            tokens = next_tokens(joined[:, : self._known], [row for _, row in self._running])
        found = [(key, token, row.append(token)) for (key, row), token in zip(self._running, tokens, strict=True)]
        for place in reversed(range(len(found))):  # from behind: what moves forward has been looked at
            if found[place][2] is not None:
                self._leave(place)
        return found

    def _next_logits(self) -> Tensor:
        """Feeds each row's last token: (B,V)."""
        rows = [row for _, row in self._running]
        idx = torch.tensor([[row.ids[-1]] for row in rows], device=self.device)  # (B,1)
        positions = positions_of([len(row.ids) - 1 for row in rows], self.device)
        return self.model(idx, positions=positions, cache=self.cache.rows(0, len(rows)), last_only=True)[:, 0]

    def _read_prompts(self) -> Tensor:
        """Reads the prompts of as many waiting rows as fit, and lets them join: (B,V)."""
        rows: list[Row] = []
        start, longest = len(self._running), 0
        while self._waiting and len(self._running) < self.max_rows:
            longest = max(longest, len(self._waiting[0][1].ids))
            if rows and longest * (len(rows) + 1) > PREFILL_TOKENS:
                break
            self._running.append(self._waiting.popleft())
            rows.append(self._running[-1][1])
        idx, last = pad_right([row.ids for row in rows], self.device)
        logits = self.model(idx, cache=self.cache.rows(start, len(self._running)), last_only=last)[:, 0]
        if logits.isnan().any():
            raise ValueError("the model's logits are not numbers: its weights are broken")
        return logits

    def _leave(self, place: int) -> None:
        last = self._running.pop()
        if place < len(self._running):
            self.cache.copy_rows([len(self._running)], [place], 0, len(last[1].ids))
            self._running[place] = last


def without_gradients(model: CausalLM) -> torch.no_grad | torch.inference_mode:
    """The context to answer in: inference_mode, the faster one, where no weight learns. Where one does, it would leave
    weights under ZeRO-3 that backward cannot use."""
    learns = any(parameter.requires_grad for parameter in model.parameters())
    return torch.no_grad() if learns else torch.inference_mode()


def positions_of(places: Sequence[int], device: torch.device) -> Tensor:
    """Each row's one position, (B,1); or (1,) where they are alike: rows of one length need no mask."""
    alike = all(place == places[0] for place in places)
    return torch.tensor(places[:1] if alike else [[place] for place in places], device=device)


def check_prompt(prompt: Sequence[int], max_length: int, name: str) -> None:
    """Refuses a prompt that is empty or leaves no room for a token."""
    if not 0 < len(prompt) < max_length:
        raise ValueError(f"{name} has {len(prompt)} tokens; between 1 and {max_length - 1} fit")


def check_sampling(sampling: Sampling, model: CausalLM, tokenizer: Tokenizer | None) -> None:
    """Refuses settings that do not go with the model, or lack the tokenizer."""
    if sampling.stop and tokenizer is None:
        raise ValueError("stop strings need a tokenizer, which knows where tokens end")
    if sampling.eos_id is not None and sampling.eos_id >= model.config.vocab_size:
        raise ValueError(f"eos_id {sampling.eos_id} is not in the model's vocabulary of {model.config.vocab_size}")


def pad_right(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompts side by side: (B,T) ids, and the (B,) place of each one's last.

    Padded on the right, because then every token has the position that it has alone, and causal attention keeps
    the padding out. `[[5, 6, 7], [8]]` -> `[[5, 6, 7], [8, 0, 0]]` and `[2, 0]`.
    """
    longest = max(map(len, prompts))
    idx = torch.tensor([list(prompt) + [0] * (longest - len(prompt)) for prompt in prompts], device=device)
    return idx, torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)
