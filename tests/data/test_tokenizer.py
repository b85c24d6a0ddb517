"""Ids compared with the GPT-2 tokenizers of transformers and tokenizers, on real and on newly trained vocabularies.

Reading vocabulary files is tested in test_tokenizer_files.py.
"""

import json
import random
import re
import shutil
from pathlib import Path

import pytest
import tiktoken
import tokenizers
from tokenizers import models, pre_tokenizers
from transformers import AutoTokenizer, GPT2Tokenizer

from minigpt.data import tokenizer as module
from minigpt.data.tokenizer import END_OF_TEXT, Tokenizer

from .texts import EMOJI, WORDS


@pytest.fixture(scope="module")
def gpt2(shared_data) -> Tokenizer:
    return Tokenizer.from_pretrained(shared_data / "gpt2")


@pytest.fixture(scope="module", params=["gpt2", "trained", "tiny"])
def ours(request) -> Tokenizer:
    if request.param == "trained":
        return Tokenizer.from_pretrained(request.getfixturevalue("trained"))
    return Tokenizer.from_pretrained("tiny") if request.param == "tiny" else request.getfixturevalue("gpt2")


@pytest.fixture(scope="module")
def export(ours, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    ours.save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    return folder


@pytest.fixture(scope="module")
def auto(export):
    return AutoTokenizer.from_pretrained(export)


def reference_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    reference = tokenizers.Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    reference.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return reference


def test_gpt2_ids_equal_those_of_transformers(gpt2, shared_data, texts):
    vocab, merges = (str(shared_data / "gpt2" / name) for name in ("vocab.json", "merges.txt"))
    reference = GPT2Tokenizer(vocab=vocab, merges=merges)
    assert [gpt2.encode(text) for text in texts] == reference(texts, add_special_tokens=False)["input_ids"]
    assert (gpt2.eot_id, gpt2.vocab_size, gpt2.special_tokens) == (50256, 50257, {END_OF_TEXT: 50256})


def test_worked_examples(gpt2):
    assert gpt2.encode("Hello world") == [15496, 995]
    assert gpt2.decode([15496, 995, gpt2.eot_id]) == "Hello world<|endoftext|>"
    assert len(gpt2.encode(END_OF_TEXT)) == 7
    decoder = gpt2.stream_decoder()
    assert [decoder.feed(id) for id in gpt2.encode("日本")] + [decoder.flush()] == ["", "日", "", "本", ""]


def test_ids_of_a_trained_vocabulary_equal_those_of_tokenizers(trained, texts):
    expected = [encoding.ids for encoding in reference_tokenizer(trained).encode_batch(texts)]
    for source in (trained, trained / "ranks", trained / "ranks" / "any.tiktoken"):
        tokenizer = Tokenizer.from_pretrained(source)
        assert [tokenizer.encode(text) for text in texts] == expected


def test_decode_inverts_encode(ours, texts):
    assert [ours.decode(ours.encode(text)) for text in texts] == texts


def test_auto_tokenizer_of_the_export_gives_the_same_ids(ours, auto, texts):
    assert auto(texts, add_special_tokens=True)["input_ids"] == [ours.encode(text) for text in texts]
    assert auto.batch_decode([ours.encode(text) for text in texts]) == texts
    rng = random.Random(1)
    for ids in [rng.choices(range(ours.vocab_size), k=9) for _ in range(1000)]:
        assert auto.decode(ids) == ours.decode(ids)
    assert (auto.bos_token_id, auto.eos_token_id, auto.unk_token_id) == (ours.eot_id,) * 3
    assert (len(auto), auto.model_max_length) == (ours.vocab_size, 1024)
    assert auto.decode(ours.encode("a . b , c n't")) == "a . b , c n't"  # no clean_up_tokenization_spaces


def test_character_classes_of_tiktoken_and_tokenizers_are_equal():
    """Both have their own Unicode tables, so a new version of either could differ."""
    ranges = [range(0xD800), range(0xE000, 0x40000), range(0xE0000, 0xE1000)]  # the rest is private use or unassigned
    scalars = "".join(chr(number) for numbers in ranges for number in numbers)
    for pattern in (r"\p{L}", r"\p{N}", r"\s"):
        byte_ranks = {bytes([byte]): byte for byte in range(256)}
        encoding = tiktoken.Encoding("bytes", pat_str=pattern, mergeable_ranks=byte_ranks, special_tokens={})
        matches = bytes(encoding.encode_ordinary(scalars)).decode()
        split = pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="removed", invert=True)
        assert matches == "".join(piece for piece, _ in split.pre_tokenize_str(scalars))
        if pattern == r"\s":
            assert matches == "".join(re.findall(module._SPACE, scalars))


def test_streaming_equals_decode(ours):
    rng = random.Random(2)
    samples = ["".join(rng.choices([*EMOJI, *WORDS, "漢", "字", "𠀀"], k=rng.randint(1, 8))) for _ in range(1000)]
    for text in samples:
        decoder = ours.stream_decoder()
        parts = [decoder.feed(id) for id in ours.encode(text)]
        assert ("".join(parts), decoder.flush()) == (text, "")
    for ids in [rng.choices(range(ours.vocab_size), k=9) for _ in range(1000)]:
        decoder = ours.stream_decoder()
        assert "".join(map(decoder.feed, ids)) + decoder.flush() == ours.decode(ids)


def test_typed_special_tokens_are_ordinary_text(ours):
    for text in (END_OF_TEXT, f"a{END_OF_TEXT}b", f" {END_OF_TEXT}\n"):
        ids = ours.encode(text)
        assert ours.eot_id not in ids
        assert ours.decode(ids) == text


def test_lone_surrogates_become_replacement_characters(ours):
    assert ours.decode(ours.encode("a\ud800b \udfff")) == "a\ufffdb \ufffd"
    assert ours.encode("\ud83d\ude00") == ours.encode("😀")  # a surrogate pair encodes its character


@pytest.mark.parametrize("unknown_id", [-1, 601, 10**12])
def test_an_unknown_id_is_an_error(trained, unknown_id):
    tokenizer = Tokenizer.from_pretrained(trained)
    for decode in (lambda: tokenizer.decode([1, unknown_id]), lambda: tokenizer.stream_decoder().feed(unknown_id)):
        with pytest.raises(ValueError, match=f"the id {unknown_id} is not in the vocabulary of 601"):
            decode()


@pytest.mark.parametrize("size", [1, 2, 5])
def test_splitting_a_long_text_does_not_change_the_ids(ours, texts, monkeypatch, size):
    expected = [ours.encode(text) for text in texts]
    monkeypatch.setattr(module, "_PIECE", size)
    assert [ours.encode(text) for text in texts] == expected


def test_very_long_texts(trained):
    """tiktoken panics on a million spaces before a word, because its regular expression stores a backtrack for each."""
    tokenizer = Tokenizer.from_pretrained(trained)
    prose = "".join(f"The {i}th cat's mat -- naïve, isn't it?\r\n\n" for i in range(250_000))
    assert len(prose) > 10_000_000
    assert tokenizer.encode(prose) == tokenizer._bpe.encode_ordinary(prose)

    n, reference = 1_000_000, reference_tokenizer(trained)
    for text in ("a" * n, " " * n, " " * n + "a", "a" + "\n" * n + "a"):
        assert tokenizer.encode(text) == reference.encode(text).ids


def test_load_and_save_reproduce_gpt2s_files_exactly(gpt2, shared_data, tmp_path):
    gpt2.save_pretrained(tmp_path)
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / name).read_bytes() == (shared_data / "gpt2" / name).read_bytes()


def test_every_file_layout_gives_the_same_tokenizer(ours, auto, export, tmp_path):
    assert Tokenizer.from_pretrained(export).fingerprint == ours.fingerprint
    shutil.copy(export / "tokenizer.json", tmp_path)  # merges as "a b"
    assert Tokenizer.from_pretrained(tmp_path).fingerprint == ours.fingerprint
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["merges"] = [pair.split(" ") for pair in content["model"]["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert Tokenizer.from_pretrained(tmp_path).fingerprint == ours.fingerprint
    auto.save_pretrained(tmp_path / "by transformers")
    assert Tokenizer.from_pretrained(tmp_path / "by transformers").fingerprint == ours.fingerprint
