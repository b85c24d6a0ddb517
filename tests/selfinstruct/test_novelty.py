"""The novelty filter, compared bit for bit with rouge_score."""

import doctest
import random
import string
import subprocess
import sys
from functools import lru_cache

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.scoring import fmeasure
from rouge_score.tokenizers import DefaultTokenizer

from minigpt.selfinstruct import Novelty, NoveltyFilter, novelty
from minigpt.selfinstruct.novelty import advance, rouge_words, unicode_words


class CachedTokenizer:
    """A tokenizer with a cache, because rouge_score tokenizes both texts of every pair again."""

    def __init__(self, tokenize):
        self.tokenize = lru_cache(None)(tokenize)


SCORER = RougeScorer(["rougeL"], tokenizer=CachedTokenizer(DefaultTokenizer().tokenize))


def reference(pool: list[str], text: str, scorer: RougeScorer = SCORER) -> Novelty:
    scores = [scorer.score(text, other)["rougeL"].fmeasure for other in pool]
    neighbours: dict[str, float] = {}
    for index in sorted(range(len(pool)), key=lambda index: -scores[index]):  # stable
        if len(neighbours) < 10:
            neighbours[pool[index]] = scores[index]
    return Novelty(max(scores) < 0.7, max(scores), float(np.mean(scores)), neighbours)


def assert_equal(actual: Novelty, expected: Novelty) -> None:
    assert actual == expected
    assert list(actual.neighbours) == list(expected.neighbours)


EDGE_CASES = [  # no token, or unexpected tokens
    *("", " \n", "?!...", "写一首关于猫的诗。", "the", "THE", "Café, naïve; İstanbul 2nd\tit's e-mail_me", "ß ﬁ ² ½ K"),
]


def instructions(count: int, seed: int) -> list[str]:
    """Short and long, many similar, a few duplicates; a small vocabulary, so that most share tokens."""
    draw = random.Random(seed)
    words = ["".join(draw.choices(string.ascii_lowercase, k=1 + index % 7)) for index in range(80)]
    weights = [1 / (1 + index) for index in range(80)]
    texts = list(EDGE_CASES)
    while len(texts) < count:
        kind = draw.random()
        if kind < 0.6:
            length = 70 if kind < 0.01 else draw.randrange(3, 20)
            texts.append(" ".join(draw.choices(words, weights, k=length)).capitalize() + ".")
        elif kind < 0.97:
            copy = draw.choice(texts).split() or ["so"]
            copy[draw.randrange(len(copy))] = draw.choice(words)
            texts.append(" ".join(copy))
        else:
            texts.append(draw.choice(texts))
    return texts


def test_the_docstring_examples():
    assert doctest.testmod(novelty) == (0, 5)


def test_the_worked_example():
    """The table in the docstring of `advance`: `write about a cat` against `write a poem about a cat`."""
    instruction = ["write", "a", "poem", "about", "a", "cat"]
    state = np.array([2**64 - 1], np.uint64)
    steps = []
    for token in ["write", "about", "a", "cat"]:
        mask = sum(1 << bit for bit, other in enumerate(instruction) if other == token)
        state = advance(state, np.array([mask], np.uint64))
        assert state.item() >> 6 == 2**58 - 1  # bits above the last token stay 1
        steps.append((token, f"{mask:06b}", f"{state.item() & 0b111111:06b}"))
    assert steps == [
        ("write", "000001", "111110"),
        ("about", "001000", "110110"),
        ("a", "010010", "101100"),
        ("cat", "100000", "001100"),
    ]


def test_100_000_pairs():
    """The pool grows by each checked text, as in a run: verdicts, scores, averages and neighbours are equal."""
    texts = instructions(460, seed=0)
    pool = NoveltyFilter()
    accepted = 0
    for index, text in enumerate(texts):
        if index:
            novelty = pool.check(text)
            assert_equal(novelty, reference(texts[:index], text))
            assert pool.highest(text) == novelty.score
            accepted += novelty.accepted
        pool.add(text)
        assert len(pool) == index + 1
    assert sum(range(len(texts))) > 100_000
    assert 100 < accepted < 400
    assert len(set(texts)) < len(texts)


def test_instructions_of_several_uint64_words():
    """The carry passes from word to word, also through words without hits or with hits only."""
    draw = random.Random(1)
    texts = ["the " * 64, "the " * 200, "a " + "the " * 127, "b" + " a" * 130 + " b", "a b " * 96]
    for length in (63, 64, 65, 127, 128, 129, 191, 192, 193, 260):
        for letters in ("ab", "abcdefghij"):
            texts.append(" ".join(draw.choices(letters, k=length)))
    pool = NoveltyFilter()
    for text in texts:
        pool.add(text)
    texts.append("x " * 64 + "y " * 64 + "z " * 64)
    pool.add(texts[-1])
    for text in [
        *texts,
        "a b",
        "b a " * 150,
        "z x",
        "z y x",
        "z z y x x",
    ]:  # the carry passes all words of y, up to z's zero
        assert_equal(pool.check(text), reference(texts, text))


def test_rounding_at_the_threshold():
    """2 * common / (instruction + candidate) is exactly 7/10; in floats it is just below, equal, or just above."""
    seen = set()
    for instruction in range(1, 80):
        for candidate in range(instruction, 80):
            common, remainder = divmod(7 * (instruction + candidate), 20)
            if remainder or common > instruction:
                continue
            shared = [f"s{index}" for index in range(common)]
            pool = NoveltyFilter(threshold=0.7)
            pool.add(" ".join(shared + ["x"] * (instruction - common)))
            novelty = pool.check(" ".join(shared + ["y"] * (candidate - common)))
            expected = fmeasure(common / instruction, common / candidate)
            assert (novelty.score, novelty.accepted) == (expected, expected < 0.7)
            seen.add((novelty.score, novelty.accepted))
    assert {(0.6999999999999998, True), (0.7, False), (0.7000000000000001, False)} <= seen


def test_ties_are_ordered_by_insertion():
    pool = NoveltyFilter()
    texts = [f"sort the list {word}" for word in "zyxwvutsrqpo"]
    for text in [*texts, "sort the list"]:
        pool.add(text)
    assert list(pool.check("sort the list now").neighbours) == ["sort the list", *texts[:9]]


def test_a_duplicate_is_listed_once_and_averaged_twice():
    """A duplicate took two of the ten places but was one key of the dictionary, so only nine neighbours remained."""
    pool = NoveltyFilter()
    for text in ["a b c d"] * 3 + [f"a {letter}" for letter in "efghijklmno"]:
        pool.add(text)
    novelty = pool.check("a b c d")
    assert list(novelty.neighbours) == ["a b c d", *(f"a {letter}" for letter in "efghijklm")]
    assert novelty.average == pytest.approx((3 * 1 + 11 * (2 / 6)) / 14)
    assert len(pool) == 14


def test_an_empty_pool():
    pool = NoveltyFilter()
    assert len(pool) == 0
    assert pool.check("Sort the list.") == Novelty(True, 0.0, 0.0, {})
    assert pool.highest("Sort the list.") == 0.0


def test_texts_without_tokens_score_zero():
    pool = NoveltyFilter()
    pool.add("?!")
    assert pool.check("?!") == Novelty(True, 0.0, 0.0, {"?!": 0.0})
    pool.add("Sort the list.")
    assert pool.check("...") == Novelty(True, 0.0, 0.0, {"?!": 0.0, "Sort the list.": 0.0})
    assert pool.check("sort, the list") == Novelty(False, 1.0, 0.5, {"Sort the list.": 1.0, "?!": 0.0})


# ---- tokens


def test_rouge_words_equal_rouge_score():
    draw = random.Random(2)
    signs = string.printable + "İıſKéßﬁ²诗हि\u00a0\u2028\x1f\x85"
    for _ in range(2000):
        text = "".join(draw.choices(signs, k=20))
        assert rouge_words(text) == DefaultTokenizer().tokenize(text)
        ascii = text.encode("ascii", "replace").decode()
        assert unicode_words(ascii) == rouge_words(ascii)


def test_other_scripts():
    """With rouge_score's tokens, a-z and 0-9, every Chinese instruction is novel."""
    texts = [
        "写一首关于猫的诗。",
        "写一首关于狗的诗。",
        "बिल्ली पर एक कविता लिखो",
        "Écris un poème",
        "고양이에 대한 시를 써라",
    ]
    texts += ["แต่งบทกวีเกี่ยวกับแมว", "猫についての詩を書いてください"]
    pool = NoveltyFilter(tokenizer=unicode_words)
    plain = NoveltyFilter()
    for text in texts:
        pool.add(text)
        plain.add(text)
    scorer = RougeScorer(["rougeL"], tokenizer=CachedTokenizer(unicode_words))
    for text in [*texts, "写一首关于鸟的诗", "ecris un poeme", "E\u0301CRIS UN POE\u0300ME!"]:
        assert_equal(pool.check(text), reference(texts, text, scorer))
    assert not pool.check("写一首关于鸟的诗").accepted
    assert plain.check("写一首关于鸟的诗").accepted
    assert unicode_words("Straße") == unicode_words("STRASSE")
    assert pool.highest("E\u0301CRIS UN POE\u0300ME!") == 1.0  # combining accents, and capitals


# ---- edge cases


@pytest.mark.parametrize("threshold", [0.0, -0.1, 1.1, float("nan")])
def test_invalid_thresholds_are_rejected(threshold):
    with pytest.raises(ValueError, match=r"^threshold must be above 0 and at most 1, got"):
        NoveltyFilter(threshold=threshold)


def test_threshold_1_drops_equal_token_sequences_only():
    pool = NoveltyFilter(threshold=1)
    pool.add("Sort the list.")
    assert not pool.check("sort THE list?").accepted
    assert pool.check("sort the lists").accepted


def test_the_import_loads_no_heavy_packages():
    code = (
        "import sys, minigpt.selfinstruct as s; print('numpy' in sys.modules); s.NoveltyFilter().check('a');"
        "print(*{'torch', 'nltk', 'absl'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]
