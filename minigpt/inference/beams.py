"""Beam search: the likeliest continuations that a bounded search finds.

The rules are those of Hugging Face's `generate` with `early_stopping=False`: a finished beam's score is its
log-probability over its length to the power of the length penalty, and the search ends when the best running beam,
at its present length, would not displace the worst of the finished ones.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from minigpt.data.tokenizer import Tokenizer
from minigpt.inference.decoder import pad_right, positions_of
from minigpt.inference.sampling import Sampling, apply_penalties
from minigpt.model.base import CausalLM
from minigpt.model.cache import KVCache

OUT = -1e9  # the score of a beam that must not win


class _Search:
    """The beams of one prompt."""

    def __init__(
        self,
        prompt: Sequence[int],
        room: int,
        sampling: Sampling,
        num_beams: int,
        length_penalty: float,
        tokenizer: Tokenizer | None,
    ):
        self.prompt_length, self.room, self.sampling = len(prompt), room, sampling
        self.length_penalty, self.tokenizer = length_penalty, tokenizer
        self.beams = [list(prompt)] * num_beams
        self.scores = torch.tensor([0.0] + [OUT] * (num_beams - 1))  # alike as yet: only the first one's may count
        self.finished: list[tuple[float, list[int]]] = []  # score and new ids, best first, one per beam at most
        self.done = False

    def advance(self, logits: Tensor) -> list[int]:
        """Takes the beams' (num_beams,V) logits one token on; says which old beam each new one continues."""
        num_beams, V = logits.shape
        new = len(self.beams[0]) - self.prompt_length + 1  # tokens of each beam after this step
        chances = logits.float().log_softmax(-1)
        for row, ids in zip(chances, self.beams, strict=True):
            apply_penalties(row, ids, new - 1, self.sampling)
        # Twice as many as needed: should every beam end here, as many are left to go on.
        top, places = (chances + self.scores.to(chances.device)[:, None]).flatten().topk(2 * num_beams)
        top = top.cpu()
        over = (top / new**self.length_penalty).tolist()
        going, ended = [], []  # (rank, source)
        beams = []
        for rank, place in enumerate(places.tolist()):
            source, token = divmod(place, V)
            beams.append([*self.beams[source], token])
            if self._ends(beams[rank]):
                ended.append((rank, source))
                if rank < num_beams:
                    self.finished.append((over[rank], beams[rank][self.prompt_length :]))
            else:
                going.append((rank, source))
        self.finished = sorted(self.finished, key=lambda entry: -entry[0])[:num_beams]
        kept = [*going, *ended][:num_beams]
        self.beams = [beams[rank] for rank, _ in kept]
        self.scores = top[[rank for rank, _ in kept]]
        self.scores[len(going) :] += OUT
        best = (self.scores[0] / new**self.length_penalty).item()
        worst = self.finished[-1][0] if len(self.finished) == num_beams else OUT
        self.done = new == self.room or best <= worst
        return [source for _, source in kept]

    def _ends(self, ids: list[int]) -> bool:
        new = ids[self.prompt_length :]
        if len(new) == self.room:
            return True
        if len(new) < self.sampling.min_new_tokens:
            return False
        if new[-1] == self.sampling.eos_id:
            return True
        if not self.sampling.stop:
            return False
        assert self.tokenizer  # check_sampling asks for it
        # What ended before min_new_tokens came too early, and counts no more.
        before, text = self.tokenizer.decode(new[:-1]), self.tokenizer.decode(new)
        return any(text.count(stop) > before.count(stop) for stop in self.sampling.stop)


def search(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    num_beams: int,
    length_penalty: float,
    num_return_sequences: int,
    tokenizer: Tokenizer | None = None,
) -> list[list[int]]:
    """The best beams of each prompt, `num_return_sequences` of them, best first; prompts advance side by side.

    To be called where no gradients are taken.
    """
    device, context = model.device, model.config.context
    searches = [
        _Search(p, min(sampling.max_new_tokens, context - len(p)), sampling, num_beams, length_penalty, tokenizer)
        for p in prompts
    ]
    slots = max(one.prompt_length + one.room for one in searches)
    cache = KVCache.for_model(model, len(prompts) * num_beams, slots)

    # ---- read each prompt once, then give its keys and values to all of its beams
    idx, last = pad_right(prompts, device)
    known = tokenizer.vocab_size if tokenizer else None  # as in decoder.py
    logits = model(idx, cache=cache.rows(0, len(prompts)), last_only=last)[:, 0, :known]  # (B,V)
    if logits.isnan().any():
        raise ValueError("the model's logits are not numbers: its weights are broken")
    logits = logits.repeat_interleave(num_beams, 0)  # (B,V) -> (B*num_beams,V)
    cache.copy_rows([row // num_beams for row in range(len(logits))], list(range(len(logits))), 0, int(last.max()) + 1)

    # ---- then one token a round
    going = searches
    while True:
        sources = []
        for place, one in enumerate(going):
            chosen = one.advance(logits[place * num_beams : (place + 1) * num_beams])
            if not one.done:
                sources += [place * num_beams + beam for beam in chosen]
        stay = [one for one in going if not one.done]
        if not stay:
            return [ids for one in searches for _, ids in one.finished[:num_return_sequences]]
        # The beams of a prompt share its slots; only where a search left, rows move as a whole.
        start = min(one.prompt_length for one in stay) if len(stay) == len(going) else 0
        moved = [(source, target) for target, source in enumerate(sources) if source != target]
        if moved:
            cache.copy_rows(
                [s for s, _ in moved], [t for _, t in moved], start, max(len(one.beams[0]) for one in going)
            )
        going = stay
        idx = torch.tensor([[ids[-1]] for one in going for ids in one.beams], device=device)  # (B*num_beams,1)
        positions = positions_of([len(ids) - 1 for one in going for ids in one.beams], device)
        logits = model(idx, positions=positions, cache=cache.rows(0, len(idx)), last_only=True)[:, 0, :known]
