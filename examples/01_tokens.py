"""Tokenization: text becomes bytes, then byte-pair merges; typed text never becomes a special token.

Opens minigpt/data/tokenizer.py. The method: Sennrich et al. 2016, on bytes as in GPT-2 (Radford et al. 2019).

    python examples/01_tokens.py
"""

from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

from minigpt import Tokenizer

tokenizer = Tokenizer.tiny()  # bundled with the package; GPT-2's has 50,257 tokens and works the same
WORD = " instruction"  # with its space: GPT-2's pre-tokenizer keeps the preceding space with a word
TYPED = "<|endoftext|>"

# The first 256 tokens are the bytes, so there are no unknown tokens: unmerged text is encoded byte by byte.
print("1. Every text is UTF-8 bytes, and every byte is a token")
for text in ("hi", "é", "日本", "🙂"):
    print(f"   bytes {text.encode().hex(' '):18} ids {tokenizer.encode(text)!s:31} {text}")

# The rest are merges, learned by counting: the most frequent pair in the training corpus became token 256, and so on.
# merges.txt lists them in that order. (It writes a space as Ġ.)
with TemporaryDirectory() as folder:
    tokenizer.save_pretrained(folder)
    lines = (Path(folder) / "merges.txt").read_text(encoding="utf-8").split("\n")
merges = [tuple(line.split(" ")) for line in lines[1:] if line]  # the first line is the version
special = len(tokenizer.special_tokens)
print(f"\n2. {tokenizer.vocab_size:,} ids = 256 bytes + {len(merges):,} merges + {special} special")
for number in (0, 1, 2, 3, len(merges) - 1):
    left, right = merges[number]
    print(f"   merge {number:5,} makes id {256 + number:5,}: {left} + {right}")

# To encode a word, repeatedly merge the adjacent pair that was learned first, until no learned pair is left.
print(f"\n3. {WORD!r}, merged by hand")
rank = {pair: number for number, pair in enumerate(merges)}
pieces = list(WORD.replace(" ", "Ġ"))
print(f"   tokens  merge\n   {len(pieces):6}         {' '.join(pieces)}")
while known := [pair for pair in pairwise(pieces) if pair in rank]:
    first = min(known, key=lambda pair: rank[pair])
    at = list(pairwise(pieces)).index(first)
    pieces[at : at + 2] = ["".join(first)]
    print(f"   {len(pieces):6}  {rank[first]:5,}  {' '.join(pieces)}")
id_of = {left + right: 256 + number for number, (left, right) in enumerate(merges)}
by_hand = [id_of[piece] for piece in pieces]
print(f"   by hand {by_hand}, the tokenizer {tokenizer.encode(WORD)}")

# A special token has an id but no text: encode never returns that id, so code must insert it.
print(f"\n4. <|endoftext|> is id {tokenizer.eot_id}; as typed text it is encoded like any other text")
ids = tokenizer.encode(TYPED)
print(f"   {TYPED!r} -> {[tokenizer.decode([id]) for id in ids]}")

assert by_hand == tokenizer.encode(WORD)
assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in (WORD, TYPED, "日本", "🙂", "\0 \r\n"))
assert tokenizer.eot_id not in ids
print("\n=> To encode, apply the merges in the order in which they were learned.")
