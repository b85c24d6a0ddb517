"""Instruction files to curate, and vectors whose cosine a test can foresee."""

import json

import numpy as np


def letters(texts) -> np.ndarray:
    """How often each letter stands in a text, as a unit vector: near where the letters are the same."""
    counts = np.array([[text.lower().count(chr(97 + i)) for i in range(26)] for text in texts], np.float32)
    counts = counts.reshape(-1, 26)
    return counts / np.linalg.norm(counts, axis=1, keepdims=True)


def task(instruction: str, output: str = "So.", **more) -> dict:
    return {"instruction": instruction, "input": "", "output": output, **more}


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
