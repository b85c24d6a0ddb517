"""The novelty filter of Self-Instruct (Wang et al. 2022, https://arxiv.org/abs/2212.10560).

Scores a candidate by ROUGE-L (Lin 2004) against every instruction in the pool, bit-equal to rouge_score's
`RougeScorer(["rougeL"])`. That package fills one table of longest common subsequences (LCS) per pair. Here one pass
over the candidate's tokens updates the tables of the whole pool, bit-parallel (64 table cells per uint64), and an
inverted index limits each token's update to the instructions that contain it.
"""

import re
import unicodedata
from array import array
from collections.abc import Callable, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
from rouge_score.tokenize import tokenize

NEIGHBOURS = 10
ONES = 2**64 - 1
TINY = 2.0**-1022  # smallest normal float64: avoids 0/0 if no token is in common
# Scripts without spaces between words: Thai, Lao, Burmese, Khmer, Japanese and Chinese.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\U00020000-\U0003ffff]"
)


def rouge_words(text: str) -> list[str]:
    """rouge_score's tokens: runs of a-z and 0-9, lowercased. `"Wer hört zu?"` is `["wer", "h", "rt", "zu"]`."""
    return tokenize(text, None)


def unicode_words(text: str) -> list[str]:
    """Tokens for any script: runs of letters, marks and digits; on ASCII equal to `rouge_words`.

    In scripts without spaces between words each character is a token.

    >>> unicode_words("Wer hört zu?"), unicode_words("हिन्दी में"), unicode_words("写诗 2 首。")
    (['wer', 'hört', 'zu'], ['हिन्दी', 'में'], ['写', '诗', '2', '首'])
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    words = "".join(letter if unicodedata.category(letter)[0] in "LMN" else " " for letter in text)
    return _UNSPACED.sub(r" \g<0> ", words).split()


class Novelty(NamedTuple):
    """The filter's result for one candidate."""

    accepted: bool  # score < threshold
    score: float  # highest ROUGE-L F-measure with any instruction in the pool; 0.0 if the pool is empty
    average: float  # mean F-measure over the pool
    neighbours: dict[str, float]  # text -> F-measure of the nearest ten, best first


class NoveltyFilter:
    """A pool of instructions that candidates are compared with.

    >>> pool = NoveltyFilter(threshold=0.7)
    >>> pool.add("Write a poem about a cat.")
    >>> pool.add("Name three colours.")
    >>> pool.check("Write about a cat!")  # doctest: +NORMALIZE_WHITESPACE
    Novelty(accepted=False, score=0.8, average=0.4,
            neighbours={'Write a poem about a cat.': 0.8, 'Name three colours.': 0.0})

    Four tokens in common, of 4 and of 6: precision 4/6, recall 4/4, F-measure 0.8.

    All scores equal rouge_score's, rounding included, and are compared with the threshold unrounded. So most pairs
    whose exact F-measure is 7/10 compute to 0.7 or just above and are dropped at the threshold 0.7; a few (21 tokens in
    common, of 23 and 37) compute to 0.6999999999999998 and are accepted. A text without tokens scores 0.
    """

    def __init__(self, threshold: float = 0.7, tokenizer: Callable[[str], Sequence[str]] | None = None):
        """
        Args:
            threshold: a candidate is accepted if its score is strictly below.
            tokenizer: text to tokens. Default: `rouge_words`, which ignores all letters but a-z; use
                `unicode_words` for other scripts.
        """
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold must be above 0 and at most 1, got {threshold}")
        self.threshold = threshold
        self.tokenizer = tokenizer or rouge_words
        np.empty(2**21)  # 16 MiB freed at once: raises glibc's mmap threshold, or every check page-faults its arrays
        self._texts: list[str] = []
        self._unique_texts: set[str] = set()
        self._lengths = array("d")  # in tokens; 1 for an empty text, to avoid 0/0 (its score is 0 anyway)
        self._starts = array("q")  # row of each instruction's first uint64 word (64 tokens)
        self._rows = 0
        self._postings: dict[str, _Posting] = {}

    def __len__(self) -> int:
        return len(self._texts)

    def add(self, text: str) -> None:
        """Adds an instruction, duplicates included: a text added twice counts twice in the average."""
        tokens = self.tokenizer(text)
        words = max(1, -(-len(tokens) // 64))
        masks: dict[str, int] = {}
        for bit, token in enumerate(tokens):
            masks[token] = masks.get(token, 0) | 1 << bit
        for token, mask in masks.items():
            self._postings.setdefault(token, _Posting()).add(self._rows, words, mask)
        self._starts.append(self._rows)
        self._rows += words
        self._lengths.append(max(len(tokens), 1))
        self._texts.append(text)
        self._unique_texts.add(text)

    def check(self, text: str) -> Novelty:
        """Returns the verdict, the average and the ten nearest texts.

        Ties are ordered by when the text was added; a text added twice is listed once.
        """
        scores = self._scores(text)
        if not len(scores):
            return Novelty(True, 0.0, 0.0, {})
        highest = float(scores.max())
        return Novelty(highest < self.threshold, highest, float(np.mean(scores)), self._nearest(scores))

    def highest(self, text: str) -> float:
        """`check(text).score` without the neighbours, which is cheaper."""
        return float(self._scores(text).max(initial=0.0))

    def _scores(self, text: str) -> np.ndarray:
        """(pool,) F-measures, computed with rouge_score's operations in the same order, so that rounding is equal."""
        if not self._texts:
            return np.zeros(0)
        tokens = self.tokenizer(text)
        states = np.full(self._rows, ONES, np.uint64)
        for token in tokens:
            if posting := self._postings.get(token):
                rows = _view(posting.rows)
                states[rows] = advance(states[rows], _view(posting.masks), [_view(later) for later in posting.later])
        common = np.add.reduceat(64 - np.bitwise_count(states), _view(self._starts), dtype=np.float64)
        precision = common / _view(self._lengths)
        recall = common / max(len(tokens), 1)
        return 2 * precision * recall / np.maximum(precision + recall, TINY)

    def _nearest(self, scores: np.ndarray) -> dict[str, float]:
        count = min(NEIGHBOURS + len(self._texts) - len(self._unique_texts), len(scores))
        nearest = np.flatnonzero(scores >= np.partition(scores, -count)[-count])  # includes ties for the last place
        nearest = nearest[np.argsort(-scores[nearest], kind="stable")][:count]
        neighbours = {self._texts[index]: score for index, score in zip(nearest.tolist(), scores[nearest].tolist())}
        return dict(islice(neighbours.items(), NEIGHBOURS))


class _Posting:
    """A token's entry in the inverted index: the rows (words of 64 tokens) of the instructions that contain it.

    Bit j of a row's mask is set if token j of the word is this token. `later[k]` are the indices of the entries that
    are word k + 1 of their instruction: the carry out of word k is added to them. All arrays are only appended to.
    """

    def __init__(self) -> None:
        self.rows, self.masks = array("q"), array("Q")
        self.later: list[array] = []

    def add(self, start: int, words: int, mask: int) -> None:
        while len(self.later) < words - 1:
            self.later.append(array("q"))
        for word in range(words):
            if word:
                self.later[word - 1].append(len(self.rows))
            self.rows.append(start + word)
            self.masks.append(mask >> 64 * word & ONES)


def advance(state: np.ndarray, mask: np.ndarray, later: Sequence[np.ndarray] = ()) -> np.ndarray:
    """Updates the LCS tables of many instructions by one token of the candidate.

    A row of the table grows by 0 or 1 from one instruction token to the next, so one bit per token encodes it: bit j of
    the state is 0 if the LCS with the instruction's first j + 1 tokens is one longer than with its first j. All bits
    start as 1 (nothing in common); the number of zeros at the end is the LCS length. A token with mask M updates the
    state V to (Hyyrö 2004, after Allison and Dix 1986 and Crochemore et al. 2001):

        H = V & M
        V = (V + H) | (V - H)

    The zeros split the state into blocks. In each block the sum carries the lowest hit up to the zero that ends the
    block, which moves that zero down to the hit. The top block has no zero at its end: its carry leaves the word, and
    the hit becomes a new zero. Example: the instruction `write a poem about a cat` (first token rightmost) and the
    candidate `write about a cat`:

        token   mask     V
                         111111
        write   000001   111110
        about   001000   110110
        a       010010   101100   LCS `write a` with the first two tokens, `write about a` with the first five
        cat     100000   001100   4 in common

    Args:
        state, mask: (words,) uint64; an instruction of more than 64 tokens takes several consecutive words. Bits above
            its last token are 0 in every mask, and so stay 1 in the state.
        later: later[k] are the indices of the words that are word k + 1 of their instruction; word k carries into them.

    Returns:
        (words,) uint64, the new state.
    """
    hits = state & mask
    total = state + hits
    if later:
        overflow = total < state
        for indices in later:
            carry = overflow[indices - 1]
            total[indices] += carry
            overflow[indices] |= total[indices] < carry
    return total | (state - hits)


def _view(numbers: array) -> np.ndarray:
    """A numpy view without a copy. An array with a live view cannot grow, so callers must not store the view."""
    return np.frombuffer(numbers, numbers.typecode)
