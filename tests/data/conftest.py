"""Fixtures: difficult texts for tokenizers, and a vocabulary trained on them."""

import base64
import json
import random
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, trainers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from minigpt.data.tokenizer import END_OF_TEXT

from .texts import WORDS, fragment


@pytest.fixture(scope="session")
def texts() -> list[str]:
    rng = random.Random(0)
    return ["".join(fragment(rng) for _ in range(rng.randint(1, 6))) for _ in range(10_000)]


@pytest.fixture(scope="session")
def trained(tmp_path_factory, texts) -> Path:
    """A folder with vocab.json and merges.txt of 600 tokens, trained by tokenizers, and the same as a rank file."""
    folder = tmp_path_factory.mktemp("trained")
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator([*texts[:2000], " ".join(WORDS) * 50], trainer)
    byte_of = {char: byte for byte, char in bytes_to_unicode().items()}
    ranks = sorted((id, base64.b64encode(bytes(byte_of[c] for c in token))) for token, id in bpe.get_vocab().items())
    (folder / "ranks").mkdir()
    (folder / "ranks" / "any.tiktoken").write_bytes(b"".join(b"%s %d\n" % (token, id) for id, token in ranks))
    bpe.model.save(str(folder))
    vocab = json.loads((folder / "vocab.json").read_text()) | {END_OF_TEXT: 600}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    return folder
