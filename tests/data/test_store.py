"""The token store: contents, cache key, raw text, blocks and splits."""

import json
import random
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from minigpt.data import store as module
from minigpt.data.encode import Example, encode_example
from minigpt.data.prompts import get_template
from minigpt.data.read.records import read_records
from minigpt.data.store import Subset, TokenBlocks, build_store, build_text_store, split
from minigpt.data.tokenizer import Tokenizer

TOKENIZER = Tokenizer.tiny()
EOT = TOKENIZER.eot_id
RANKS = TOKENIZER._ranks
OTHER = Tokenizer({**RANKS, b"a": RANKS[b"b"], b"b": RANKS[b"a"]}, {"<|endoftext|>": EOT})  # the same vocabulary size
IO = get_template("io")
ROWS = [{"instruction": f"Name {n}.", "input": "", "output": f"It is {n}."} for n in range(30)]


def write(path: Path, rows) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


def build(path, cache, template=IO, tokenizer=TOKENIZER, max_seq_length=64, train_on_prompt=False, **options):
    paths = [path] if isinstance(path, str) else path
    return build_store(paths, template, tokenizer, max_seq_length, train_on_prompt, cache_dir=cache, **options)


def plain(examples) -> list[tuple[list[int], list[bool]]]:
    return [(np.asarray(e.ids).tolist(), np.asarray(e.supervised).tolist()) for e in examples]


# ---- contents


def test_examples_equal_those_of_encode_example(tmp_path, cache):
    rows = [
        *ROWS,
        {"messages": [message for n in range(9) for message in turn(n)]},
        {"text": "Once upon a time. " * 30},
        {"text": ""},
        {"instruction": "x " * 100, "output": "y"},
    ]
    path = write(tmp_path / "data.jsonl", rows)
    conversations = list(read_records(path))
    for train_on_prompt in (False, True):
        encoded = [encode_example(c, IO, TOKENIZER, 64, train_on_prompt) for c in conversations]
        examples = [example for example in encoded if example is not None]
        store = build(path, cache, train_on_prompt=train_on_prompt)
        assert len(store) == len(examples) == len(rows) - 1
        assert plain(store) == plain(examples)
        assert store.lengths.tolist() == [len(example) for example in examples]
        first_answers = [example.supervised.index(True) for example in examples]
        if not train_on_prompt:
            assert store.prompt_lengths.tolist() == first_answers  # 0 for plain text
        assert isinstance(store.ids, np.memmap)
        assert store.ids.dtype == np.uint16
        assert isinstance(store[0].ids, np.memmap)
        assert plain([store[-1], store[np.int64(2)]]) == plain([examples[-1], examples[2]])
        for index in (len(store), -len(store) - 1):
            with pytest.raises(IndexError):
                store[index]


def turn(n: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"Question {n}?"}, {"role": "assistant", "content": f"Answer {n}."}]


def test_a_large_vocabulary_is_stored_as_uint32(tmp_path, cache):
    wide = Tokenizer(RANKS, {"<|endoftext|>": 70_000})
    path = write(tmp_path / "data.jsonl", ROWS)
    store = build(path, cache, tokenizer=wide)
    assert store.ids.dtype == np.uint32
    assert plain(store) == plain(encode_example(conversation, IO, wide, 64) for conversation in read_records(path))
    assert store[0].ids[-1] == 70_000


def test_statistics(tmp_path, cache):
    """Texts of 1 to 39 tokens plus end-of-text; a short and a long prompt; a long and an empty text; two bad lines."""
    assert len(TOKENIZER.encode(" the" * 99)) == 99
    rows = [{"text": " the" * n} for n in random.Random(0).sample(range(1, 40), 39)]
    rows += [{"instruction": "Name it.", "output": " the"}, {"instruction": " the" * 99, "output": " the"}]
    path = write(tmp_path / "data.jsonl", [*rows, {"text": " the" * 99}, {"text": ""}, "{", "[]"])
    prompt_and_answer = len(TOKENIZER.encode("### Instruction:\nName it.\n\n### Output:\n")) + 2
    assert prompt_and_answer < 20
    stats = build(path, cache, skip_bad_records=2).stats
    assert vars(stats) == {
        "examples": 42,
        "tokens": sum(range(2, 41)) + prompt_and_answer + 2 * 65,
        "supervised_tokens": sum(range(2, 41)) + 2 + 2 + 65,
        "length_p50": 21,  # between the 21st and 22nd of 42 lengths, 21 and 22
        "length_p95": 40,  # the 40th of 42
        "length_max": 65,
        "dropped": 1,
        "cut": 2,
        "bad_records": 2,
    }
    assert str(stats) == (
        f"42 examples, {949 + prompt_and_answer} tokens (888 supervised), lengths p50 21 p95 40 max 65; "
        "1 dropped, 2 cut, 2 bad records"
    )
    assert build(path, cache, skip_bad_records=2).stats == stats  # cache hit: read from meta.json


def test_no_supervised_token_at_all_is_an_error(tmp_path, cache):
    path = write(tmp_path / "data.jsonl", [{"text": ""}, {"text": ""}])
    with pytest.raises(ValueError) as caught:
        build(path, cache)
    assert str(caught.value) == (
        f"{path}: none of the 2 records has a supervised token within --max_seq_length 64; "
        "raise it, or look at them with --inspect 3"
    )
    assert list((cache / "stores").iterdir()) == []


def test_nothing_but_bad_records_is_an_error(tmp_path, cache):
    """Regression: raw text raised an IndexError, and conversations said "none of the 0 records ..."."""
    path = write(tmp_path / "data.jsonl", [{"a": 1}, "[]"])
    for build_function in (build, text_store):
        with pytest.raises(ValueError) as caught:
            build_function(path, cache, skip_bad_records=2)
        assert str(caught.value).startswith(f"{path}: nothing but bad records (2), the first {path}:1: ")
    assert list((cache / "stores").iterdir()) == []


def text_store(path, cache, **options):
    return build_text_store([path], TOKENIZER, cache_dir=cache, **options)


# ---- cache hits and misses: the key must contain everything that the ids depend on


@pytest.fixture
def builds(monkeypatch) -> list:
    """Grows by one for each build."""
    calls, writer = [], module._Writer
    monkeypatch.setattr(module, "_Writer", lambda *args: calls.append(args) or writer(*args))
    return calls


def test_cache_hit_after_the_file_is_moved(tmp_path, cache, builds):
    path = write(tmp_path / "data.jsonl", ROWS)
    first = build(path, cache)
    files = {file: file.stat().st_mtime_ns for file in first.folder.iterdir()}
    (tmp_path / "moved").mkdir()
    moved = str(Path(path).rename(tmp_path / "moved" / "renamed.jsonl"))
    again = build(moved, cache)
    assert again.folder == first.folder
    assert {file: file.stat().st_mtime_ns for file in again.folder.iterdir()} == files
    assert (plain(again), again.stats) == (plain(first), first.stats)
    assert len(builds) == 1


CHANGES = {
    "one byte": {"rows": [*ROWS[:-1], {**ROWS[-1], "output": "It is 28."}]},
    "an empty line": {"rows": [*ROWS, ""]},
    "order of the records": {"rows": ROWS[::-1]},
    "template name": {"template": replace(IO, name="other")},
    "separator": {"template": replace(IO, separator="\n")},
    "trigger word": {"template": get_template("io", output="Answer")},
    "stop string": {"template": replace(IO, stop=())},
    "tokenizer": {"tokenizer": OTHER},
    "max_seq_length": {"max_seq_length": 65},
    "train_on_prompt": {"train_on_prompt": True},
    "skip_bad_records": {"skip_bad_records": 1},
}


@pytest.mark.parametrize("name", CHANGES)
def test_cache_miss_if_anything_changes(name, tmp_path, cache, builds):
    change = dict(CHANGES[name])
    path = write(tmp_path / "data.jsonl", ROWS)
    first = build(path, cache)
    write(tmp_path / "data.jsonl", change.pop("rows", ROWS))
    second = build(path, cache, **change)
    assert second.folder != first.folder
    assert len(builds) == 2
    assert plain(second) == plain(build(path, tmp_path / "fresh", **change))


def test_cache_miss_if_the_same_bytes_are_split_into_other_files(tmp_path, cache):
    whole = write(tmp_path / "whole.jsonl", ROWS)
    parts = [write(tmp_path / "a.jsonl", ROWS[:9]), write(tmp_path / "b.jsonl", ROWS[9:])]
    folders = {build(paths, cache).folder for paths in (whole, parts, parts[::-1], [*parts, parts[0]])}
    assert len(folders) == 4


def test_cache_miss_if_a_jsonl_is_renamed_to_txt(tmp_path, cache):
    """Regression: the key contained the bytes only, so a .jsonl copied to .txt hit the store of its records."""
    rows = [{"text": "A bad king."}, {"text": "A bad queen."}]
    stores = [
        build_text_store([write(tmp_path / name, rows)], TOKENIZER, cache_dir=cache)
        for name in ("data.jsonl", "data.txt")
    ]
    assert [len(store) for store in stores] == [2, 1]


def test_raw_text_is_refused_as_instruction_data(tmp_path, cache):
    """Regression: sft.py silently trained on a single truncated block of a .txt."""
    (tmp_path / "corpus.txt").write_text("Once upon a time.")
    with pytest.raises(ValueError, match=r"corpus.txt: raw text, expected conversations; train.py and --replay_data"):
        build(str(tmp_path / "corpus.txt"), cache)


def test_an_unwritable_cache_is_an_error_that_names_the_flag(tmp_path):
    (tmp_path / "file").touch()
    path = write(tmp_path / "data.jsonl", ROWS)
    with pytest.raises(OSError, match=r"file/stores: cannot be written to \(Not a directory\); --cache_dir chooses"):
        build(path, tmp_path / "file")


def test_cache_miss_for_another_version(tmp_path, cache, monkeypatch):
    path = write(tmp_path / "data.jsonl", ROWS)
    first = build(path, cache).folder
    for name in ("KEY_VERSION", "FORMAT"):
        with monkeypatch.context() as patched:
            patched.setattr(module, name, "other")
            assert build(path, cache).folder != first


def test_cache_folder(tmp_path, monkeypatch):
    path = write(tmp_path / "data.jsonl", ROWS)
    monkeypatch.delenv("MINIGPT_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert build(path, None).folder.parent == tmp_path / "home" / ".cache" / "minigpt" / "stores"
    monkeypatch.setenv("MINIGPT_CACHE", str(tmp_path / "named"))
    assert build(path, None).folder.parent == tmp_path / "named" / "stores"
    assert build(path, tmp_path / "given").folder.parent == tmp_path / "given" / "stores"


# ---- raw text


def test_text_store(tmp_path, cache):
    (tmp_path / "a.txt").write_text("One king.\n")
    (tmp_path / "b.txt").write_text("Two <|endoftext|> kings.")
    rows = [{"text": "Three kings."}, {"text": ""}, {"texts": "no text"}, {"text": "Human: a HugChat: b"}]
    write(tmp_path / "c.jsonl", rows)
    paths = [str(tmp_path / name) for name in ("b.txt", "a.txt", "c.jsonl")]
    store = build_text_store(paths, TOKENIZER, skip_bad_records=1, cache_dir=cache)
    texts = ["Two <|endoftext|> kings.", "One king.\n", "Three kings.", "", "Human: a HugChat: b"]
    documents = [[*TOKENIZER.encode(text), EOT] for text in texts]
    assert plain(store) == [(ids, [True] * len(ids)) for ids in documents]
    assert store.ids.tolist() == [id for ids in documents for id in ids]
    assert store.prompt_lengths.tolist() == [0] * 5
    stats = vars(store.stats)
    assert {name: stats[name] for name in ("examples", "tokens", "supervised_tokens", "dropped", "bad_records")} == {
        "examples": 5,
        "tokens": len(store.ids),
        "supervised_tokens": len(store.ids),
        "dropped": 0,
        "bad_records": 1,
    }


def test_reading_in_chunks_does_not_change_the_ids(tmp_path, cache, monkeypatch):
    text = "The king's 12 cats -- naïve, 日本 😀?\n\n  And  on. " * 200
    (tmp_path / "a.txt").write_text(text)
    monkeypatch.setattr("minigpt.data.read.streams._CHUNK", 100)
    store = build_text_store([str(tmp_path / "a.txt")], TOKENIZER, cache_dir=cache)
    assert store.ids.tolist() == [*TOKENIZER.encode(text), EOT]


def test_cache_key_of_raw_text(tmp_path, cache, builds):
    path = tmp_path / "a.txt"
    for text in ("A bad king.", "A bad queen."):
        path.write_text(text)
        for tokenizer in (TOKENIZER, OTHER, TOKENIZER):
            store = build_text_store([str(path)], tokenizer, cache_dir=cache)
            assert store.ids.tolist() == [*TOKENIZER.encode(text), EOT]
    assert len(builds) == 4
    build_text_store([str(path)], TOKENIZER, skip_bad_records=1, cache_dir=cache)
    assert len(builds) == 5


# ---- blocks and splits


def stream_of(length: int) -> SimpleNamespace:
    """A fake store in which each token is its own index."""
    return SimpleNamespace(fingerprint="", ids=np.arange(length, dtype=np.uint16))


def naive_blocks(ids: list[int], block_size: int, stride: int) -> list[list[int]]:
    blocks, start = [], 0
    while start < len(ids) - 1:
        blocks.append(ids[start : start + block_size + 1])
        if start + block_size >= len(ids) - 1:
            break
        start += stride
    return blocks


@pytest.mark.parametrize("length", [0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13, 17, 100])
def test_blocks(length):
    for block_size in (1, 2, 4, 5, 12):
        for stride in range(1, block_size + 1):
            blocks = TokenBlocks(stream_of(length), block_size, stride)
            expected = naive_blocks(list(range(length)), block_size, stride)
            assert plain(blocks) == [(ids, [True] * len(ids)) for ids in expected]
            assert len(blocks) == len(expected)
            assert blocks.lengths.tolist() == [len(ids) for ids in expected]
            targets = Counter(id for ids in expected for id in ids[1:])
            assert set(targets) == set(range(1, length))  # every token but the first is predicted
            if stride == block_size:
                assert set(targets.values()) <= {1}
        assert plain(TokenBlocks(stream_of(length), block_size)) == plain(
            TokenBlocks(stream_of(length), block_size, block_size)
        )


def test_neighbouring_blocks_share_a_token_and_the_last_is_shorter():
    blocks = TokenBlocks(stream_of(10), 4)
    assert plain(blocks) == [([0, 1, 2, 3, 4], [True] * 5), ([4, 5, 6, 7, 8], [True] * 5), ([8, 9], [True] * 2)]
    assert all(before.ids[-1] == after.ids[0] for before, after in pairwise(blocks))
    overlapping = TokenBlocks(stream_of(10), 4, stride=2)
    expected = [[0, 1, 2, 3, 4], [2, 3, 4, 5, 6], [4, 5, 6, 7, 8], [6, 7, 8, 9]]
    assert [block.ids.tolist() for block in overlapping] == expected


def test_blocks_of_a_part_of_the_store():
    store = stream_of(20)
    assert [block.ids.tolist() for block in TokenBlocks(store, 4, start=14)] == [[14, 15, 16, 17, 18], [18, 19]]
    assert [block.ids.tolist() for block in TokenBlocks(store, 4, stop=6)] == [[0, 1, 2, 3, 4], [4, 5]]
    assert [block.ids.tolist() for block in TokenBlocks(store, 4, start=3, stop=8)] == [[3, 4, 5, 6, 7]]
    assert len(TokenBlocks(store, 4, start=20)) == len(TokenBlocks(store, 4, start=19)) == 0
    with pytest.raises(IndexError):
        TokenBlocks(store, 4)[5]


@pytest.mark.parametrize("stride", [0, -1, 5])
def test_an_invalid_stride_is_an_error(stride):
    with pytest.raises(ValueError, match=f"^--stride {stride} must be from 1 to --block_size 4"):
        TokenBlocks(stream_of(9), 4, stride)


def fake_store(size: int) -> list[Example]:
    class Store(list):
        lengths, prompt_lengths, fingerprint = np.arange(size) + 2, np.arange(size) * 3, "store"

    return Store(Example([n, n + 1], [True, True]) for n in range(size))


@pytest.mark.parametrize(
    ("size", "validation_split", "count"),
    [(100, 0.05, 5), (100, 0.1, 10), (10, 0.05, 1), (2, 0.05, 1), (2, 0.99, 1), (3, 0.99, 2), (1, 0.5, 0), (10, 0, 0)],
)
def test_split(size, validation_split, count):
    data = fake_store(size)
    train, validation = split(data, validation_split, seed=1)
    assert (len(train), len(validation)) == (size - count, count)
    assert sorted([*train.indices, *validation.indices]) == list(range(size))
    for part in (train, validation):
        assert plain(part) == plain(data[index] for index in part.indices)
        assert part.lengths.tolist() == [index + 2 for index in part.indices]
        assert part.prompt_lengths.tolist() == [index * 3 for index in part.indices]
    again = split(data, validation_split, seed=1)
    assert [part.indices.tolist() for part in again] == [train.indices.tolist(), validation.indices.tolist()]


def test_the_split_depends_on_the_seed():
    held_out = [split(fake_store(1000), 0.05, seed)[1].indices.tolist() for seed in range(4)]
    assert all(len(set(a) & set(b)) < 15 for a, b in pairwise(held_out))
    assert min(map(min, held_out)) < 100 and max(map(max, held_out)) > 900  # spread over all examples


def test_a_split_store(tmp_path, cache):
    store = build(write(tmp_path / "data.jsonl", ROWS), cache)
    train, validation = split(store, 0.2, 0)
    assert isinstance(train, Subset)
    assert sorted(plain([*train, *validation])) == sorted(plain(store))
