"""Text from a model, one token at a time.

Prompts of any lengths share a batch: they are padded on the left with position -1, so every row has its own
positions and the same numbers come out as alone (learned positions that count the padding are transformers issue
3021). Rows that are done leave the batch.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from minigpt.data.tokenizer import Tokenizer
from minigpt.model.cache import KVCache
from minigpt.model.gpt2 import GPT


def generate(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    eos_id: int | None = None,
    stop: Sequence[str] = (),
    tokenizer: Tokenizer | None = None,
    seed: int | Sequence[int] | None = None,
) -> list[list[int]]:
    """Continues every prompt.

    Args:
        model: on any device, in eval mode.
        prompts: ids, at least one each.
        max_new_tokens: the most that a row gets; a row also ends where the model's context does.
        temperature: 0 takes the likeliest token; above, logits are divided by it and a token is drawn.
        top_k: draw from the k likeliest; 0 is all.
        top_p: draw from the fewest likeliest tokens whose probabilities reach p (Holtzman et al. 2020,
            arXiv:1904.09751); 1.0 is all.
        eos_id: a row ends with it; None never ends early.
        stop: a row ends once its text holds one of these, wherever tokens begin and end; the caller trims the text.
        tokenizer: needed for `stop`.
        seed: one for all rows, or one per prompt. Each row draws from a stream of its own, so what it gets does not
            depend on its neighbours.

    Returns:
        The new ids of each row, the eos included where it came.

    Raises:
        ValueError: an empty prompt, one that fills the context, or an argument out of its range.
    """
    new: list[list[int]] = [[] for _ in prompts]
    for row, token in _rounds(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        eos_id=eos_id,
        stop=stop,
        tokenizer=tokenizer,
        seed=seed,
    ):
        new[row].append(token)
    return new


def stream(model: GPT, prompt: Sequence[int], **settings) -> Iterator[int]:
    """Continues one prompt and yields each id as it comes. The settings are `generate`'s."""
    return (token for _, token in _rounds(model, [prompt], **settings))


@torch.inference_mode()
def _rounds(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    eos_id: int | None = None,
    stop: Sequence[str] = (),
    tokenizer: Tokenizer | None = None,
    seed: int | Sequence[int] | None = None,
) -> Iterator[tuple[int, int]]:
    """Yields (row, id): one token for each row that is not done, then the next for each."""
    context = model.config.n_positions
    device = model.wte.weight.device
    _check(prompts, context, max_new_tokens, temperature, top_k, top_p, stop, tokenizer)
    if not prompts or max_new_tokens == 0:
        return
    seeds = (
        seed if isinstance(seed, Sequence) else [None if seed is None else seed + row for row in range(len(prompts))]
    )
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts")
    random = [_random_stream(own) for own in seeds]
    watches = [_StopWatch(stop, tokenizer) for _ in prompts]

    # ---- read the prompts
    longest = max(map(len, prompts))
    idx = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)  # (B,T)
    positions = None  # (T,), unless rows differ
    if any(len(p) < longest for p in prompts):
        starts = torch.tensor([len(p) - longest for p in prompts], device=device)  # (B,)
        positions = (torch.arange(longest, device=device) + starts[:, None]).clamp(min=-1)  # (B,T), padding -1
    slots = min(context, longest + max_new_tokens)
    cache = KVCache(model.config, len(prompts), slots, device=device, dtype=model.wte.weight.dtype)
    logits = model(idx, positions=positions, cache=cache, last_only=True)[:, -1]  # (B,1,V) -> (B,V)
    if logits.isnan().any():
        raise ValueError("the model's logits are not numbers: its weights are broken")
    rows = list(range(len(prompts)))  # which prompt each row of the batch belongs to
    room = [min(max_new_tokens, context - len(p)) for p in prompts]

    # ---- then one token a round
    while True:
        if temperature == 0:
            tokens = logits.argmax(-1).tolist()
        else:
            chances = next_token_probabilities(logits.float(), temperature, top_k, top_p).cpu()
            tokens = [int(torch.multinomial(c, 1, generator=random[r])) for c, r in zip(chances, rows, strict=True)]
        staying = []
        for place, (row, token) in enumerate(zip(rows, tokens, strict=True)):
            yield row, token
            room[row] -= 1
            if token != eos_id and room[row] > 0 and not watches[row].sees(token):
                staying.append(place)
        if not staying:
            return
        if len(staying) < len(rows):
            cache.select(torch.tensor(staying, device=device))
            rows, tokens = [rows[place] for place in staying], [tokens[place] for place in staying]
            positions = positions[staying] if positions is not None else None
        if positions is not None:
            positions = positions[:, -1:] + 1  # (B,1)
        idx = torch.tensor(tokens, device=device)[:, None]  # (B,1)
        logits = model(idx, positions=positions, cache=cache, last_only=True)[:, -1]


def next_token_probabilities(logits: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """What the next token is drawn from: (B,V) logits -> (B,V) probabilities."""
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        threshold = logits.topk(top_k).values[:, -1:]  # (B,1)
        logits = logits.masked_fill(logits < threshold, float("-inf"))
    if top_p < 1.0:
        ordered, order = logits.sort(descending=True)
        chances = ordered.softmax(-1)
        outside = chances.cumsum(-1) - chances >= top_p  # what lies before a token reaches p already
        logits = logits.masked_fill(outside.scatter(-1, order, outside), float("-inf"))
    return logits.softmax(-1)


class _StopWatch:
    """Whether one row's text holds a stop string by now."""

    def __init__(self, stop: Sequence[str], tokenizer: Tokenizer | None):
        self.stop = stop
        self.decoder = tokenizer.stream_decoder() if stop and tokenizer else None
        self.longest = max(map(len, stop), default=0)
        self.tail = ""

    def sees(self, token: int) -> bool:
        if self.decoder is None:
            return False
        text = self.tail + self.decoder.feed(token)
        self.tail = text[-self.longest :]
        return any(stop in text for stop in self.stop)


def _random_stream(seed: int | None) -> torch.Generator:
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


def _check(prompts, context, max_new_tokens, temperature, top_k, top_p, stop, tokenizer) -> None:
    for index, prompt in enumerate(prompts):
        if not 0 < len(prompt) < context:
            raise ValueError(f"prompt {index} has {len(prompt)} tokens; between 1 and {context - 1} fit")
    for name, value, wanted, holds in (
        ("max_new_tokens", max_new_tokens, "at least 0", max_new_tokens >= 0),
        ("temperature", temperature, "at least 0", temperature >= 0),
        ("top_k", top_k, "at least 0", top_k >= 0),
        ("top_p", top_p, "above 0 and at most 1", 0 < top_p <= 1),
    ):
        if not holds:
            raise ValueError(f"{name} must be {wanted}, got {value}")
    if stop and tokenizer is None:
        raise ValueError("stop strings need a tokenizer, which knows where tokens end")
