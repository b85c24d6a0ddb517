"""Beam search: keeps the `num_beams` likeliest continuations of each prompt at every step.

Same rules as Hugging Face's `generate` with `early_stopping=False`: the score of a finished beam is its log-probability
divided by length**length_penalty. The search ends when the best running beam, scored at its present length, would not
displace the worst finished beam.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from minigpt.data.tokenizer import Tokenizer
from minigpt.inference.decoder import pad_right, positions_of
from minigpt.inference.sampling import Sampling, apply_penalties
from minigpt.model.base import CausalLM
from minigpt.model.cache import KVCache

OUT = -1e9  # added to the score of a beam that must not win


class _Search:
    """The beams of one prompt."""

    def __init__(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        sampling: Sampling,
        num_beams: int,
        length_penalty: float,
        tokenizer: Tokenizer | None,
    ):
        self.prompt_length, self.max_new_tokens, self.sampling = len(prompt), max_new_tokens, sampling
        self.length_penalty, self.tokenizer = length_penalty, tokenizer
        self.beams = [list(prompt)] * num_beams
        self.scores = torch.tensor([0.0] + [OUT] * (num_beams - 1))  # all beams are equal at first: only one may count
        self.finished: list[tuple[float, list[int]]] = []  # (score, new ids), best first, at most num_beams
        self.done = False

    def advance(self, logits: Tensor) -> list[int]:
        """One step from the beams' (num_beams,V) logits: returns, for each new beam, the index of its parent beam."""
        num_beams, V = logits.shape
        new = len(self.beams[0]) - self.prompt_length + 1  # new tokens of each beam after this step
        log_probs = logits.float().log_softmax(-1)
        for row, ids in zip(log_probs, self.beams, strict=True):
            apply_penalties(row, ids, new - 1, self.sampling)
        # 2 * num_beams candidates: even if num_beams of them end here, as many are left to continue.
        top, flat_indices = (log_probs + self.scores.to(log_probs.device)[:, None]).flatten().topk(2 * num_beams)
        top = top.cpu()
        final_scores = (top / new**self.length_penalty).tolist()
        running, ended = [], []  # (rank, parent)
        candidates = []
        for rank, flat_index in enumerate(flat_indices.tolist()):
            parent, token = divmod(flat_index, V)
            candidates.append([*self.beams[parent], token])
            if self._ends(candidates[rank]):
                ended.append((rank, parent))
                if rank < num_beams:
                    self.finished.append((final_scores[rank], candidates[rank][self.prompt_length :]))
            else:
                running.append((rank, parent))
        self.finished = sorted(self.finished, key=lambda entry: -entry[0])[:num_beams]
        next_beams = [*running, *ended][:num_beams]  # ended ones only fill up, scored OUT
        self.beams = [candidates[rank] for rank, _ in next_beams]
        self.scores = top[[rank for rank, _ in next_beams]]
        self.scores[len(running) :] += OUT
        best = (self.scores[0] / new**self.length_penalty).item()
        worst = self.finished[-1][0] if len(self.finished) == num_beams else OUT
        self.done = new == self.max_new_tokens or best <= worst
        return [parent for _, parent in next_beams]

    def _ends(self, ids: list[int]) -> bool:
        new = ids[self.prompt_length :]
        if len(new) == self.max_new_tokens:
            return True
        if len(new) < self.sampling.min_new_tokens:
            return False
        if new[-1] == self.sampling.eos_id:
            return True
        if not self.sampling.stop:
            return False
        assert self.tokenizer  # check_sampling requires it
        # Only a stop string that this token completes counts: an earlier one came before min_new_tokens.
        before, text = self.tokenizer.decode(new[:-1]), self.tokenizer.decode(new)
        return any(text.count(stop) > before.count(stop) for stop in self.sampling.stop)


def beam_search(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    num_beams: int,
    length_penalty: float,
    num_return_sequences: int,
    tokenizer: Tokenizer | None = None,
) -> list[list[int]]:
    """The `num_return_sequences` best beams of each prompt, best first. The prompts are decoded in one batch.

    Call it under `torch.no_grad()` or `inference_mode()`.
    """
    device, context = model.device, model.config.context
    searches = [
        _Search(p, min(sampling.max_new_tokens, context - len(p)), sampling, num_beams, length_penalty, tokenizer)
        for p in prompts
    ]
    slots = max(search.prompt_length + search.max_new_tokens for search in searches)
    cache = KVCache.for_model(model, len(prompts) * num_beams, slots)

    # ---- prefill each prompt once, then copy its keys and values to all of its beams
    idx, last = pad_right(prompts, device)
    vocab_size = tokenizer.vocab_size if tokenizer else None  # the embedding may be padded to more, see decoder.py
    logits = model(idx, cache=cache.rows(0, len(prompts)), last_only=last)[:, 0, :vocab_size]  # (B,V)
    if logits.isnan().any():
        raise ValueError("the model's logits contain NaN: its weights are broken")
    logits = logits.repeat_interleave(num_beams, 0)  # (B,V) -> (B*num_beams,V)
    cache.copy_rows([row // num_beams for row in range(len(logits))], list(range(len(logits))), 0, int(last.max()) + 1)

    # ---- then one token per step
    running = searches
    while True:
        sources = []  # for each cache row of the next step, the row that it continues
        for index, search in enumerate(running):
            parents = search.advance(logits[index * num_beams : (index + 1) * num_beams])
            if not search.done:
                sources += [index * num_beams + parent for parent in parents]
        remaining = [search for search in running if not search.done]
        if not remaining:
            return [ids for search in searches for _, ids in search.finished[:num_return_sequences]]
        # The beams of a prompt hold the same prompt slots, so copy only the slots after it; but if a search has ended,
        # rows move to another prompt's place and are copied whole.
        start = min(search.prompt_length for search in remaining) if len(remaining) == len(running) else 0
        moves = [(source, target) for target, source in enumerate(sources) if source != target]
        if moves:
            cache.copy_rows([s for s, _ in moves], [t for _, t in moves], start, max(len(s.beams[0]) for s in running))
        running = remaining
        idx = torch.tensor([[ids[-1]] for search in running for ids in search.beams], device=device)  # (B*num_beams,1)
        positions = positions_of([len(ids) - 1 for search in running for ids in search.beams], device)
        logits = model(idx, positions=positions, cache=cache.rows(0, len(idx)), last_only=True)[:, 0, :vocab_size]
