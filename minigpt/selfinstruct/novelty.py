"""The novelty filter of Self-Instruct (Wang et al. 2022, https://arxiv.org/abs/2212.10560): is an instruction new?

ROUGE-L (Lin 2004) against everything in the pool, to the last bit what `RougeScorer(["rougeL"])` of rouge_score says.
That package fills a table for each pair; here one pass over the candidate's tokens moves all instructions of the pool
along together, 64 table cells to a machine word, and each token touches only the instructions that hold it.
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
TINY = 2.0**-1022  # a divisor above 0 where nothing is in common
# Scripts that write no blank between words: Thai, Lao, Burmese, Khmer, Japanese and Chinese.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\U00020000-\U0003ffff]"
)


def rouge_words(text: str) -> list[str]:
    """The tokens of rouge_score: runs of a-z and 0-9, in lower case. `"Wer hört zu?"` is `["wer", "h", "rt", "zu"]`."""
    return tokenize(text, None)


def unicode_words(text: str) -> list[str]:
    """Tokens for any script: letters, marks and digits that stand together; for ASCII, those of `rouge_words`.

    Where a script puts no blank between words, each character is a token.

    >>> unicode_words("Wer hört zu?"), unicode_words("हिन्दी में"), unicode_words("写诗 2 首。")
    (['wer', 'hört', 'zu'], ['हिन्दी', 'में'], ['写', '诗', '2', '首'])
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    words = "".join(letter if unicodedata.category(letter)[0] in "LMN" else " " for letter in text)
    return _UNSPACED.sub(r" \g<0> ", words).split()


class Novelty(NamedTuple):
    """What the filter says of a candidate."""

    accepted: bool  # score < threshold
    score: float  # the highest ROUGE-L F-measure with any instruction of the pool; 0.0 where the pool is empty
    average: float  # over the pool
    neighbours: dict[str, float]  # the nearest ten, best first


class NoveltyFilter:
    """A pool of instructions, and how near a candidate comes to them.

    >>> pool = NoveltyFilter(threshold=0.7)
    >>> pool.add("Write a poem about a cat.")
    >>> pool.add("Name three colours.")
    >>> pool.check("Write about a cat!")  # doctest: +NORMALIZE_WHITESPACE
    Novelty(accepted=False, score=0.8, average=0.4,
            neighbours={'Write a poem about a cat.': 0.8, 'Name three colours.': 0.0})

    Four tokens in common, of 4 and of 6: precision 4/6, recall 4/4, F-measure 0.8.

    All numbers are rouge_score's own, rounding included, and the verdict compares them as they are. So of the pairs
    whose F-measure is 7/10 on paper nearly all come out at 0.7 or just above and are dropped at the threshold 0.7; a
    few (21 in common of 23 and 37) come out at 0.6999999999999998 and stay. A text without any token scores 0.
    """

    def __init__(self, threshold: float = 0.7, tokenizer: Callable[[str], Sequence[str]] | None = None):
        """
        Args:
            threshold: a candidate is accepted when its score is strictly below.
            tokenizer: text to tokens. Default: `rouge_words`, which sees no letters but a-z; `unicode_words` is for
                other scripts.
        """
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold must be above 0 and at most 1, got {threshold}")
        self.threshold = threshold
        self.tokenizer = tokenizer or rouge_words
        np.empty(2**21)  # 16 MiB, freed untouched: glibc then keeps what numpy frees, else each check faults it in anew
        self._texts: list[str] = []
        self._different: set[str] = set()
        self._lengths = array("d")  # in tokens; 1 where there is none, as good as any where nothing is in common
        self._starts = array("q")  # the row of each instruction's first word of 64 tokens
        self._rows = 0
        self._postings: dict[str, _Posting] = {}

    def __len__(self) -> int:
        return len(self._texts)

    def add(self, text: str) -> None:
        """Puts an instruction into the pool, whatever is there; added twice, it counts twice in the average."""
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
        self._different.add(text)

    def check(self, text: str) -> Novelty:
        """The verdict, the average and the ten nearest texts.

        Of texts with the same score the one added first comes first; a text that was added twice is one neighbour.
        """
        scores = self._scores(text)
        if not len(scores):
            return Novelty(True, 0.0, 0.0, {})
        highest = float(scores.max())
        return Novelty(highest < self.threshold, highest, float(np.mean(scores)), self._nearest(scores))

    def highest(self, text: str) -> float:
        """The score alone, for where only the verdict is wanted: `check(text).score`."""
        return float(self._scores(text).max(initial=0.0))

    def _scores(self, text: str) -> np.ndarray:
        """(pool,) F-measures, by rouge_score's operations in their order."""
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
        count = min(NEIGHBOURS + len(self._texts) - len(self._different), len(scores))
        nearest = np.flatnonzero(scores >= np.partition(scores, -count)[-count])  # all that tie for the last place too
        nearest = nearest[np.argsort(-scores[nearest], kind="stable")][:count]
        found = {self._texts[place]: score for place, score in zip(nearest.tolist(), scores[nearest].tolist())}
        return dict(islice(found.items(), NEIGHBOURS))


class _Posting:
    """Where a token stands: a row for each word of 64 tokens of each instruction that holds it.

    Bit j of a row's mask says that token j of the word is this one. `later[k]` are the entries that are word k + 1 of
    their instruction: what leaves the word before is carried into them. What is added goes to the ends of the arrays.
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
    """One token of the candidate, in many instructions at once: one row of the table of common subsequences.

    The table's row for an instruction grows by 0 or 1 from token to token, so a bit for each says it all: bit j of
    the state is 0 where the first j + 1 tokens have one more in common with the candidate, so far, than the first j.
    At first nothing is in common, and all bits are 1; in the end the zeros are the length of the common subsequence.
    A token moves the state V on by its mask M (Hyyrö 2004, after Allison and Dix 1986 and Crochemore et al. 2001):

        H = V & M
        V = (V + H) | (V - H)

    The zeros cut the state into blocks. In each the sum carries the lowest hit up to the zero that ends the block, so
    that the zero moves down to the hit. The block on top ends in no zero: there the carry leaves the word, and the hit
    is a new zero. The instruction `write a poem about a cat`, its first token on the right, and the candidate `write
    about a cat`:

        token   mask     V
                         111111
        write   000001   111110
        about   001000   110110
        a       010010   101100   `write a` is in the first two tokens, `write about a` in the first five
        cat     100000   001100   4 in common

    Args:
        state, mask: (words,) uint64, of an instruction of more than 64 tokens one after the other. The bits above its
            last token are 0 in every mask, and so stay 1.
        later: the places of the second, third, ... words of instructions, for the sum to carry into.

    Returns:
        (words,) the new state.
    """
    hits = state & mask
    total = state + hits
    if later:
        overflow = total < state
        for places in later:
            carry = overflow[places - 1]
            total[places] += carry
            overflow[places] |= total[places] < carry
    return total | (state - hits)


def _view(numbers: array) -> np.ndarray:
    """The array that is there, not a copy. It cannot grow while the view lives, so none is kept."""
    return np.frombuffer(numbers, numbers.typecode)
