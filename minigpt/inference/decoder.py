"""Continuous batching: a sequence that ends is replaced by a waiting one at the next step (Yu et al. 2022, "Orca").

Every row has its own positions, sampling settings and random generator, so its tokens do not depend on the rest of the
batch. Running rows occupy cache rows 0 to n-1: when a row ends, the last row is copied into its cache row, and new
rows are appended after the last.

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

PREFILL_TOKENS = 4096  # the most tokens of one prefill forward, padding included: bounds the memory of activations


class Decoder:
    """Generates for many prompts at once, one token per row and step.

    Args:
        model: on any device, in eval mode.
        max_rows: rows in the batch; further ones wait in a queue.
        max_length: the most tokens of prompt and answer together, and the size of the KV cache; None is the model's
            context.
        tokenizer: needed for stop strings. With it, ids outside its vocabulary are never generated.
    """

    def __init__(
        self, model: CausalLM, *, max_rows: int, max_length: int | None = None, tokenizer: Tokenizer | None = None
    ):
        if max_rows < 1:
            raise ValueError(f"max_rows must be at least 1, got {max_rows}")
        self.model, self.max_rows, self.tokenizer = model, max_rows, tokenizer
        self.max_length = min(max_length or model.config.context, model.config.context)
        self._vocab_size = tokenizer.vocab_size if tokenizer else None  # the embedding may be padded to more
        self.device = model.device
        self.cache = KVCache.for_model(model, max_rows, self.max_length)
        self._keys = count()
        self._waiting: deque[tuple[int, Row]] = deque()
        self._running: list[tuple[int, Row]] = []  # the index is the cache row

    def __len__(self) -> int:
        """The number of running and waiting rows."""
        return len(self._running) + len(self._waiting)

    def add(self, prompt_ids: Sequence[int], sampling: Sampling) -> int:
        """Queues a row, which joins the batch at the next step if there is a free cache row. Returns its key.

        Raises:
            ValueError: the prompt is empty or fills max_length, max_new_tokens is 0, stop strings without a
                tokenizer, or an eos_id outside the vocabulary.
        """
        check_prompt(prompt_ids, self.max_length, "the prompt")
        if sampling.max_new_tokens == 0:
            raise ValueError("max_new_tokens must be at least 1, got 0")
        check_sampling(sampling, self.model, self.tokenizer)
        max_new_tokens = min(sampling.max_new_tokens, self.max_length - len(prompt_ids))
        key = next(self._keys)
        self._waiting.append((key, Row(prompt_ids, sampling, max_new_tokens, self.tokenizer)))
        return key

    def remove(self, key: int) -> None:
        """Removes a running or waiting row. A key that is not there any more is ignored."""
        self._waiting = deque(entry for entry in self._waiting if entry[0] != key)
        for index, (running_key, _) in enumerate(self._running):
            if running_key == key:
                self._free(index)
                return

    def step(self) -> list[tuple[int, int, str | None]]:
        """One token for every row: (key, token, reason). The reason is OpenAI's finish_reason: None while the row
        continues, "stop" after end-of-text or a stop string, "length" after the last token that is allowed."""
        with without_gradients(self.model):
            logits = [self._decode()] if self._running else []  # of (B,V)
            while self._waiting and len(self._running) < self.max_rows:
                logits.append(self._prefill())
            if not logits:
                return []
            all_logits = logits[0] if len(logits) == 1 else torch.cat(logits)
            tokens = next_tokens(all_logits[:, : self._vocab_size], [row for _, row in self._running])
        results = [(key, token, row.append(token)) for (key, row), token in zip(self._running, tokens, strict=True)]
        for index in reversed(range(len(results))):  # backwards: the last row, which fills the gap, was checked before
            if results[index][2] is not None:
                self._free(index)
        return results

    def _decode(self) -> Tensor:
        """Feeds each running row's last token: (B,V) logits."""
        rows = [row for _, row in self._running]
        idx = torch.tensor([[row.ids[-1]] for row in rows], device=self.device)  # (B,1)
        positions = positions_of([len(row.ids) - 1 for row in rows], self.device)
        return self.model(idx, positions=positions, cache=self.cache.rows(0, len(rows)), last_only=True)[:, 0]

    def _prefill(self) -> Tensor:
        """Feeds the prompts of as many waiting rows as fit, and moves them into the batch: (B,V) logits."""
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
            raise ValueError("the model's logits contain NaN: its weights are broken")
        return logits

    def _free(self, index: int) -> None:
        """Frees a cache row by copying the last running row into it."""
        last = self._running.pop()
        if index < len(self._running):
            self.cache.copy_rows([len(self._running)], [index], 0, len(last[1].ids))
            self._running[index] = last


def without_gradients(model: CausalLM) -> torch.no_grad | torch.inference_mode:
    """The context to generate in: `inference_mode`, which is faster, unless a parameter requires gradients. Then
    `no_grad`, because ZeRO-3 weights that are gathered in inference mode cannot be used by backward."""
    trains = any(parameter.requires_grad for parameter in model.parameters())
    return torch.no_grad() if trains else torch.inference_mode()


def positions_of(positions: Sequence[int], device: torch.device) -> Tensor:
    """The position of each row's one token as (B,1), or as (1,) if all are equal: then attention needs no mask."""
    equal = all(position == positions[0] for position in positions)
    return torch.tensor(positions[:1] if equal else [[position] for position in positions], device=device)


def check_prompt(prompt: Sequence[int], max_length: int, name: str) -> None:
    """Raises `ValueError` if a prompt is empty or leaves no space for a new token."""
    if not 0 < len(prompt) < max_length:
        raise ValueError(f"{name} has {len(prompt)} tokens; between 1 and {max_length - 1} fit")


def check_sampling(sampling: Sampling, model: CausalLM, tokenizer: Tokenizer | None) -> None:
    """Raises `ValueError` if the settings do not match the model, or need a tokenizer that is missing."""
    if sampling.stop and tokenizer is None:
        raise ValueError("stop strings need a tokenizer, to decode the tokens")
    if sampling.eos_id is not None and sampling.eos_id >= model.config.vocab_size:
        raise ValueError(f"eos_id {sampling.eos_id} is not in the model's vocabulary of {model.config.vocab_size}")


def pad_right(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """A padded batch: (B,T) ids, and the (B,) index of each prompt's last token.

    Padded on the right, so that every token has the same position as in a batch of one, and the causal mask hides the
    padding. `[[5, 6, 7], [8]]` -> `[[5, 6, 7], [8, 0, 0]]` and `[2, 0]`.
    """
    longest = max(map(len, prompts))
    idx = torch.tensor([list(prompt) + [0] * (longest - len(prompt)) for prompt in prompts], device=device)
    return idx, torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)
