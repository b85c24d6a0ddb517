"""Trains the tiny vocabulary: byte-level byte-pair encoding with GPT-2's pre-tokenizer.

Sennrich et al. 2016, "Neural Machine Translation of Rare Words with Subword Units"; on bytes as in GPT-2. The result,
`tiny.tiktoken`, is in tiktoken's format: base64 bytes, a space, the rank. The 256 single bytes come first, then the
merges; `<|endoftext|>` is not in the file, its id is the last rank plus one.

    python examples/demo/vocabulary.py     # rebuilds the file, byte for byte
"""

import base64
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path

import regex  # type: ignore[import-untyped]
from facts import Split, corpus_text, instruction_rows, read_facts

from minigpt.data.tokenizer import PATTERN

ASSETS = Path(__file__).parents[2] / "minigpt" / "assets"
VOCAB_SIZE = 4096  # with end-of-text


def train_ranks(text: str, vocab_size: int) -> list[bytes]:
    """The bytes of `vocab_size` tokens in the order of their ranks.

    The most frequent adjacent pair within words becomes the next token; of equally frequent pairs, the one with the
    greatest bytes. Raises ValueError if the text has too few pairs.

    >>> train_ranks("low low lower", 259)[256:]
    [b'ow', b'low', b' low']
    """
    frequencies = Counter(word.encode() for word in regex.findall(PATTERN, text))
    words = [[bytes([byte]) for byte in word] for word in frequencies]
    counts = list(frequencies.values())
    pairs: Counter[tuple[bytes, bytes]] = Counter()
    places = defaultdict(set)  # pair -> words that contain it; an outdated entry is harmless
    for index, word in enumerate(words):
        for pair in pairwise(word):
            pairs[pair] += counts[index]
            places[pair].add(index)
    ranks = [bytes([byte]) for byte in range(256)]
    while len(ranks) < vocab_size:
        if not pairs:
            raise ValueError(f"the text yields only {len(ranks)} of {vocab_size} tokens: give more text")
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        ranks.append(best[0] + best[1])
        for index in places[best]:
            for pair in pairwise(words[index]):
                pairs[pair] -= counts[index]
            words[index] = merge(words[index], best)
            for pair in pairwise(words[index]):
                pairs[pair] += counts[index]
                places[pair].add(index)
        del pairs[best], places[best]
        pairs = +pairs  # drops pairs that are in no word any more
    return ranks


def merge(word: list[bytes], pair: tuple[bytes, bytes]) -> list[bytes]:
    """The word with every occurrence of the pair joined, from the left.

    >>> merge([b"a", b"b", b"a", b"b", b"c"], (b"a", b"b"))
    [b'ab', b'ab', b'c']
    """
    merged: list[bytes] = []
    index = 0
    while index < len(word):
        if (*word[index : index + 2],) == pair:
            merged.append(pair[0] + pair[1])
            index += 2
        else:
            merged.append(word[index])
            index += 1
    return merged


def training_text() -> str:
    """All facts as the demo writes them, independent of the split, and some plain English text."""
    facts = Split(tuned=read_facts(), held_out=[], control=[])
    rows = instruction_rows(facts.tuned, seed=0)
    prompts = [f"### Instruction:\n{r['instruction']}\n\n### Input:\n{r['input']}\n\n### Response:\n" for r in rows]
    english = (ASSETS / "english.txt").read_text(encoding="utf-8")
    return corpus_text(facts, seed=0) + "".join(prompts) + 20 * english


def build() -> bytes:
    """The content of tiny.tiktoken."""
    ranks = train_ranks(training_text(), VOCAB_SIZE - 1)
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(ranks))


if __name__ == "__main__":
    (ASSETS / "tiny.tiktoken").write_bytes(build())
