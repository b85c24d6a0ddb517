"""Vocabulary files: special tokens, errors for broken files, and offline use."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from minigpt.data import tokenizer as module
from minigpt.data.tokenizer import END_OF_TEXT, Tokenizer


def test_added_tokens_of_any_file_are_special(trained, tmp_path):
    plain = Tokenizer.from_pretrained(trained)
    shutil.copy(trained / "merges.txt", tmp_path)
    vocab = json.loads((trained / "vocab.json").read_text())
    (tmp_path / "vocab.json").write_text(json.dumps(vocab | {"[PAD]": 601}))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"[A]": 602, "the": vocab["the"]}))
    (tmp_path / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"604": {"content": "[B]"}}}')
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.special_tokens == {END_OF_TEXT: 600, "[PAD]": 601, "[A]": 602, "[B]": 604}
    assert (tokenizer.vocab_size, tokenizer.eot_id) == (605, 600)
    assert tokenizer.encode("[PAD] the") == plain.encode("[PAD] the")
    assert tokenizer.decode([601, 604]) == "[PAD][B]"
    assert tokenizer.fingerprint != plain.fingerprint
    with pytest.raises(ValueError, match="id 603 is not"):  # a gap between the ids
        tokenizer.decode([603])

    tokenizer.save_pretrained(tmp_path / "export")
    assert Tokenizer.from_pretrained(tmp_path / "export").fingerprint == tokenizer.fingerprint
    auto = AutoTokenizer.from_pretrained(tmp_path / "export")
    assert auto("a[PAD]b [B]")["input_ids"] == [*plain.encode("a"), 601, *plain.encode("b "), 604]
    assert (auto.decode([601, 604]), auto.decode([601], skip_special_tokens=True)) == ("[PAD][B]", "")


def edit_vocab(folder: Path, **changes: int | str | None) -> None:
    vocab = json.loads((folder / "vocab.json").read_text()) | changes
    (folder / "vocab.json").write_text(json.dumps({token: id for token, id in vocab.items() if id is not None}))


def write(name: str, content: str):
    return lambda folder: (folder / name).write_bytes(content.encode("latin-1"))


TWICE = {"added_tokens_decoder": {"700": {"content": "[A]"}, "701": {"content": "[A]"}}}
BROKEN = {
    "broken JSON": (write("vocab.json", '{"a": 1,\n"b" 2}'), r"vocab\.json:2: not JSON"),
    "not an object": (write("vocab.json", "[]"), r"vocab\.json: expected a JSON object"),
    "not UTF-8": (write("vocab.json", '{"\xff": 1}'), r"vocab\.json: not UTF-8"),
    "an id that is a string": (lambda folder: edit_vocab(folder, the="7"), r"vocab\.json: the id of 'the' is '7'"),
    "duplicate id": (lambda folder: edit_vocab(folder, x=1), r"vocab\.json: .* have the same id, 1 "),
    "no end-of-text": (
        lambda folder: edit_vocab(folder, **{END_OF_TEXT: None}),
        r'vocab\.json: no end-of-text token \(add "<\|endoftext\|>": 600 to vocab\.json\)',
    ),
    "missing byte": (lambda folder: edit_vocab(folder, a=None), r"vocab\.json: no token for the byte 0x61"),
    "merge of three": (write("merges.txt", "#version: 0.2\nt h e\n"), r"merges\.txt:2: not a merge of two tokens"),
    "merge into an unknown token": (write("merges.txt", "q q\n"), r"merges\.txt:1: not a merge of two tokens"),
    "add_prefix_space": (write("tokenizer_config.json", '{"add_prefix_space": true}'), r"add_prefix_space is true"),
    "another pre_tokenizer": (
        write("tokenizer.json", '{"pre_tokenizer": {"type": "Split"}}'),
        r"json: the pre_tokenizer or",
    ),
    "special token with two ids": (
        write("added_tokens.json", '{"<|endoftext|>": 7}'),
        r"'<\|endoftext\|>' has an id other",
    ),
    "added token with two ids": (write("tokenizer_config.json", json.dumps(TWICE)), r"'\[A\]' has an id other"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_one_line_errors_with_the_path(trained, tmp_path, name):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    damage, message = BROKEN[name]
    damage(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        Tokenizer.from_pretrained(tmp_path)
    assert str(caught.value).startswith(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_byte_order_mark_and_crlf_are_ignored(trained, tmp_path):
    (tmp_path / "vocab.json").write_bytes(b"\xef\xbb\xbf" + (trained / "vocab.json").read_bytes())
    (tmp_path / "merges.txt").write_bytes((trained / "merges.txt").read_bytes().replace(b"\n", b"\r\n"))
    assert Tokenizer.from_pretrained(tmp_path).fingerprint == Tokenizer.from_pretrained(trained).fingerprint


def small_vocabulary(*merged: str) -> dict[str, int]:
    """The 256 bytes, the given tokens, then end-of-text."""
    return {token: id for id, token in enumerate([*bytes_to_unicode().values(), *merged, END_OF_TEXT])}


def test_ids_that_give_other_merges_are_refused(tmp_path):
    """If `abc` was learned as a + bc, but by ids ab is merged first, tiktoken would encode other tokens."""
    (tmp_path / "vocab.json").write_text(json.dumps(small_vocabulary("ab", "bc", "abc")))
    (tmp_path / "merges.txt").write_text("b c\na b\nab c\n")
    with pytest.raises(ValueError, match=r"merges\.txt:2: ab has the id 256 after a merge with 257"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "merges.txt").write_text("a b\nb c\na bc\n")
    with pytest.raises(ValueError, match=r"merges\.txt:3: by ids abc is not made of a and bc"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "merges.txt").write_text("a b\nb c\nab c\n")
    assert Tokenizer.from_pretrained(tmp_path).encode("abcab") == [258, 256]

    ranks = {bytes([byte]): byte for byte in range(256)} | {b"abc": 256, b"ab": 257, b"bc": 258}
    with pytest.raises(ValueError, match=r"no two tokens of lower ids make b'abc'"):
        Tokenizer(ranks, {END_OF_TEXT: 259})


def naive_last_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes] | None:
    """Reference: BPE of a token with the lower ranks, step by step, until two parts are left."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        unions = [ranks.get(left + right, ranks[token]) for left, right in pairwise(parts)]
        lowest = min(unions)
        if lowest >= ranks[token]:
            return None
        i = unions.index(lowest)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


def test_last_merges_match_the_reference():
    """On small alphabets, so that tokens overlap themselves and each other; ids in merge order or not."""
    refused, seeds = 0, 1500
    for seed in range(seeds):
        rng = random.Random(seed)
        parts = [b"a", b"b", b"c"][: rng.choice((1, 2, 2, 3))]
        merged: list[bytes] = []
        for _ in range(rng.randint(1, 14)):
            token = rng.choice(parts) + rng.choice(parts)
            if token not in parts and len(token) < 12:
                parts.append(token)
                merged.append(token)
        if seed % 3 == 0:  # remove a merge, and shuffle the others
            merged.remove(rng.choice(merged))
            rng.shuffle(merged)
        ids = rng.sample(range(600), 256 + len(merged)) if seed % 2 else range(256 + len(merged))
        pairs = [*zip((bytes([byte]) for byte in range(256)), ids), *zip(merged, sorted(ids[256:]))]
        ranks = dict(sorted(pairs, key=lambda item: item[1]))
        expected = [naive_last_merge(token, ranks) for token in ranks if len(token) > 1]
        if None in expected:
            refused += 1
            with pytest.raises(ValueError, match="x: no two tokens of lower ids make"):
                module._last_merges(ranks, "x")
        else:
            assert module._last_merges(ranks, "x") == expected
    assert seeds / 4 < refused < seeds * 3 / 4


RANK_LINES = {
    b"YQ==": r"any\.tiktoken:601: expected a token in base64",
    b"YWFhYWFhYQ== x": r"any\.tiktoken:601: expected a token in base64",
    b"YQ== 601": r"any\.tiktoken:601: duplicate token b'a'",
    b"YQBhAGEA 5": r"any\.tiktoken: b'.*' and b'a\\x00a\\x00a\\x00' have the same id, 5",
}


@pytest.mark.parametrize("line", RANK_LINES)
def test_broken_rank_files_name_the_line(trained, tmp_path, line):
    path = tmp_path / "any.tiktoken"
    path.write_bytes((trained / "ranks" / "any.tiktoken").read_bytes() + line + b"\n")
    with pytest.raises(ValueError, match=RANK_LINES[line]):
        Tokenizer.from_pretrained(path)


def test_missing_files(trained, tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.tiktoken").write_text("")
    with pytest.raises(FileNotFoundError, match=r"2 \.tiktoken files, and neither"):
        Tokenizer.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"0 \.tiktoken files, and neither"):
        Tokenizer.from_pretrained(trained.parent)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        Tokenizer.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.tiktoken"):
        Tokenizer.from_pretrained(tmp_path / "nowhere.tiktoken")


def without_network(code: str, home: Path, **environment: str) -> str:
    """The output of the code in a new process in which any network access exits with an error."""
    block = "import socket\ndef no(*_, **__): raise SystemExit('network access')\n"
    block += "socket.socket.connect = socket.getaddrinfo = socket.create_connection = no\n"
    block += "from minigpt.data.tokenizer import Tokenizer\n"
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TIKTOKEN_", "HUGGINGFACE_"))}
    settings = {"HOME": str(home), "HF_HOME": str(home / "hf"), "HF_HUB_OFFLINE": "1"}
    settings["PYTHONPATH"] = str(Path(module.__file__).parents[2])
    process = [sys.executable, "-c", block + code]
    done = subprocess.run(process, env=inherited | settings | environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


SHOW = "print(t.encode('Hello world'), t.eot_id)"


def test_local_folders_need_no_network(trained, tmp_path):
    ids = Tokenizer.from_pretrained(trained).encode("Hello world")
    code = f"t = Tokenizer.from_pretrained({str(trained)!r}); {SHOW}"
    assert without_network(code, tmp_path, HF_HUB_OFFLINE="0") == f"{ids} 600"


def test_gpt2_offline_without_a_cache_is_an_error_with_advice(tmp_path):
    code = "try: Tokenizer.gpt2()\nexcept FileNotFoundError as error: print(error)"
    for environment in ({}, {"TIKTOKEN_CACHE_DIR": str(tmp_path)}):
        message = without_network(code, tmp_path, **environment)
        assert re.fullmatch(
            r"openai-community/gpt2: .*hub cannot be reached.*give a local folder.*TIKTOKEN_CACHE_DIR.*", message
        )


@pytest.mark.parametrize("make", ["gpt2()", "from_pretrained('openai-community/gpt2')", "from_pretrained('gpt2')"])
def test_gpt2_offline_from_tiktokens_cache(shared_data, tmp_path, make):
    cache = shared_data / "tiktoken_cache"
    before = sorted(path.name for path in cache.iterdir())
    printed = without_network(f"t = Tokenizer.{make}; {SHOW}", tmp_path, TIKTOKEN_CACHE_DIR=str(cache))
    assert printed == "[15496, 995] 50256"
    assert sorted(path.name for path in cache.iterdir()) == before


def test_hub_cache_with_only_vocabulary_and_merges(trained, tmp_path):
    """Offline it is unknown whether the repository has other files, so those in the cache are used."""
    repository, commit = tmp_path / "hf" / "hub" / "models--some--model", "0" * 40
    shutil.copytree(trained, repository / "snapshots" / commit, ignore=shutil.ignore_patterns("ranks"))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    ids = Tokenizer.from_pretrained(trained).encode("Hello world")
    assert without_network(f"t = Tokenizer.from_pretrained('some/model'); {SHOW}", tmp_path) == f"{ids} 600"
