"""Instruction files for the tests, and embeddings with a predictable cosine."""

import json

import numpy as np


def embed_letters(texts) -> np.ndarray:
    """Letter counts as unit vectors: texts with the same letters have cosine 1."""
    counts = np.array([[text.lower().count(chr(97 + i)) for i in range(26)] for text in texts], np.float32)
    counts = counts.reshape(-1, 26)
    return counts / np.linalg.norm(counts, axis=1, keepdims=True)


def task(instruction: str, output: str = "So.", **more) -> dict:
    return {"instruction": instruction, "input": "", "output": output, **more}


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read_lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
