"""The tiny vocabulary: trained as its module says, and what lies in the repository is what the module builds."""

import base64
from itertools import pairwise

import pytest
import vocabulary
from facts import read_facts
from vocabulary import ASSETS, VOCAB_SIZE, merge, train_ranks

from minigpt.data.tokenizer import Tokenizer


def test_the_file_is_rebuilt_byte_for_byte():
    assert vocabulary.build() == (ASSETS / "tiny.tiktoken").read_bytes()


def test_worked_examples():
    assert train_ranks("low low lower", 259)[256:] == [b"ow", b"low", b" low"]
    assert merge([b"a", b"b", b"a", b"b", b"c"], (b"a", b"b")) == [b"ab", b"ab", b"c"]


def test_merges_equal_those_of_a_naive_count():
    """Counts anew before every merge, over the whole text."""
    text = "banana bandana, an ananas and 12 12 1212\n\n\nbanana's  band"
    words = [[bytes([b]) for b in word.encode()] for word in vocabulary.regex.findall(vocabulary.PATTERN, text)]
    expected = []
    for _ in range(12):
        pairs = [pair for word in words for pair in pairwise(word)]
        best = max(set(pairs), key=lambda pair: (pairs.count(pair), pair))
        expected.append(best[0] + best[1])
        words = [merge(word, best) for word in words]
    assert train_ranks(text, 268)[256:] == expected


def test_too_little_text_is_said():
    with pytest.raises(ValueError, match="yields only 258 of 300 tokens"):
        train_ranks("abc", 300)


def test_the_file_is_a_rank_file_of_4096_with_end_of_text():
    lines = (ASSETS / "tiny.tiktoken").read_bytes().splitlines()
    assert [int(line.split()[1]) for line in lines] == list(range(VOCAB_SIZE - 1))
    assert [base64.b64decode(line.split()[0]) for line in lines[:256]] == [bytes([b]) for b in range(256)]
    tokenizer = Tokenizer.tiny()
    assert (tokenizer.vocab_size, tokenizer.eot_id) == (4096, 4095)


def test_keys_are_single_words_to_the_model():
    """A key that is one token is copied in one step: the skill that the demonstration rests on."""
    tokenizer = Tokenizer.tiny()
    split_keys = [
        fact.key
        for fact in read_facts()
        if fact.kind.tested and len(tokenizer.encode(f" {fact.key}")) > len(fact.key.split())
    ]
    assert split_keys == []
    prompt = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    assert len(tokenizer.encode(prompt)) == 18
