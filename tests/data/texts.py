"""Random texts that are difficult for tokenizers."""

import random

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "Ünïcode", "naïve", "Straße", "façade", "привет", "мир"]
WORDS += ["你好", "世界", "こんにちは", "안녕", "नमस्ते", "שלום", "مرحبا"]
EMOJI = ["😀", "👩‍👩‍👧‍👦", "🏳️‍🌈", "🇩🇪", "👍🏽", "🧑🏿‍🚀", "❤️", "1️⃣", "☃"]
CODE = ["def f(x):\n\treturn x**2\n", "for (;;) { i++; }\r\n", "a->b != NULL && !c", "<a href='#'>", "\\n%5.2f''"]
SUFFIXES = ["s", "t", "re", "ve", "m", "ll", "d", "S", "T", "RE", "VE", "M", "LL", "D", "sh", "x'd"]
SPACES = " \t\n\r\v\f\x85\xa0\u1680\u2003\u2028\u2029\u202f\u205f\u3000"


def fragment(rng: random.Random) -> str:
    """A random piece of text of one of 11 difficult kinds."""

    def some(items, longest: int) -> str:
        return "".join(rng.choices(items, k=rng.randint(1, longest)))

    kind = rng.randrange(11)
    if kind == 0:  # any scalar value of any plane
        numbers = [rng.randrange(0x110000 - 0x800) for _ in range(rng.randint(1, 8))]
        return "".join(chr(number + 0x800 * (number >= 0xD800)) for number in numbers)
    if kind == 1:  # the first planes, in which most code points are assigned
        return "".join(chr(rng.choice((0, 0, 0x10000, 0x20000)) + rng.randrange(0xD800)) for _ in range(8))
    return [
        some(SPACES, 6),
        some(" ", 9) + rng.choice(("", "x", "\n")),
        rng.choice(("\r\n", "\n\n", " \r\n ", "\n ")),
        rng.choice(CODE),
        some(EMOJI, 4),
        some("0123456789²½Ⅷ٣五", 7),
        some("'\u2019", 2) + rng.choice(SUFFIXES),
        some("\0\1\x07\x1b\x1c\x1d\x1e\x1f\x7f\x9f\u200b\u200d\u0301\ufeff\ufffd", 5),
        rng.choice(("", " ", "  ")) + rng.choice(WORDS),
    ][kind - 2]
