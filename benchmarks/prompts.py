"""The prompts of generate.py's measurements, the same for every side."""

import random


def random_prompts(rows: int, length: int) -> list[list[int]]:
    """That many rows of GPT-2's ids."""
    generator = random.Random(0)
    return [[generator.randrange(50257) for _ in range(length)] for _ in range(rows)]
