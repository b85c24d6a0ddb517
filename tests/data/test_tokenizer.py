"""The judges: transformers' and tokenizers' own GPT-2 tokenizer, on real and on freshly trained vocabularies."""

import base64
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
import tiktoken
import tokenizers
from tokenizers import models, pre_tokenizers, trainers
from transformers import AutoTokenizer, GPT2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from minigpt.data import tokenizer as module
from minigpt.data.tokenizer import END_OF_TEXT, Tokenizer

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "Ünïcode", "naïve", "Straße", "façade", "привет", "мир"]
WORDS += ["你好", "世界", "こんにちは", "안녕", "नमस्ते", "שלום", "مرحبا"]
EMOJI = ["😀", "👩‍👩‍👧‍👦", "🏳️‍🌈", "🇩🇪", "👍🏽", "🧑🏿‍🚀", "❤️", "1️⃣", "☃"]
CODE = ["def f(x):\n\treturn x**2\n", "for (;;) { i++; }\r\n", "a->b != NULL && !c", "<a href='#'>", "\\n%5.2f''"]
SUFFIXES = ["s", "t", "re", "ve", "m", "ll", "d", "S", "T", "RE", "VE", "M", "LL", "D", "sh", "x'd"]
SPACES = " \t\n\r\v\f\x85\xa0\u1680\u2003\u2028\u2029\u202f\u205f\u3000"


def fragment(rng: random.Random) -> str:
    """A piece of text of one of the kinds that tokenizers get wrong."""

    def some(items, most: int) -> str:
        return "".join(rng.choices(items, k=rng.randint(1, most)))

    kind = rng.randrange(11)
    if kind == 0:  # any scalar value of any plane
        numbers = [rng.randrange(0x110000 - 0x800) for _ in range(rng.randint(1, 8))]
        return "".join(chr(number + 0x800 * (number >= 0xD800)) for number in numbers)
    if kind == 1:  # the first planes, where most numbers are assigned
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


@pytest.fixture(scope="module")
def texts() -> list[str]:
    rng = random.Random(0)
    return ["".join(fragment(rng) for _ in range(rng.randint(1, 6))) for _ in range(10_000)]


@pytest.fixture(scope="module")
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


def judge_of(folder: Path) -> tokenizers.Tokenizer:
    judge = tokenizers.Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    judge.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return judge


def test_gpt2_is_the_gpt2_of_transformers(gpt2, shared_data, texts):
    vocab, merges = (str(shared_data / "gpt2" / name) for name in ("vocab.json", "merges.txt"))
    judge = GPT2Tokenizer(vocab=vocab, merges=merges)
    assert [gpt2.encode(text) for text in texts] == judge(texts, add_special_tokens=False)["input_ids"]
    assert (gpt2.eot_id, gpt2.vocab_size, gpt2.special_tokens) == (50256, 50257, {END_OF_TEXT: 50256})


def test_worked_examples(gpt2):
    assert gpt2.encode("Hello world") == [15496, 995]
    assert gpt2.decode([15496, 995, gpt2.eot_id]) == "Hello world<|endoftext|>"
    assert len(gpt2.encode(END_OF_TEXT)) == 7
    decoder = gpt2.stream_decoder()
    assert [decoder.feed(id) for id in gpt2.encode("日本")] + [decoder.flush()] == ["", "日", "", "本", ""]


def test_trained_vocabulary_is_that_of_tokenizers(trained, texts):
    expected = [encoding.ids for encoding in judge_of(trained).encode_batch(texts)]
    for source in (trained, trained / "ranks", trained / "ranks" / "any.tiktoken"):
        tokenizer = Tokenizer.from_pretrained(source)
        assert [tokenizer.encode(text) for text in texts] == expected


def test_decode_gives_back_the_text(ours, texts):
    assert [ours.decode(ours.encode(text)) for text in texts] == texts


def test_auto_tokenizer_on_the_export_agrees(ours, auto, texts):
    assert auto(texts, add_special_tokens=True)["input_ids"] == [ours.encode(text) for text in texts]
    assert auto.batch_decode([ours.encode(text) for text in texts]) == texts
    rng = random.Random(1)
    for ids in [rng.choices(range(ours.vocab_size), k=9) for _ in range(1000)]:
        assert auto.decode(ids) == ours.decode(ids)
    assert (auto.bos_token_id, auto.eos_token_id, auto.unk_token_id) == (ours.eot_id,) * 3
    assert (len(auto), auto.model_max_length) == (ours.vocab_size, 1024)
    assert auto.decode(ours.encode("a . b , c n't")) == "a . b , c n't"  # nothing is cleaned up


def test_character_classes_agree_wherever_unicode_is_in_use():
    """tiktoken and tokenizers bring their own tables of Unicode, and a new version of either could part them."""
    in_use = [range(0xD800), range(0xE000, 0x40000), range(0xE0000, 0xE1000)]  # above: private use, or nothing
    scalars = "".join(chr(number) for numbers in in_use for number in numbers)
    for wanted in (r"\p{L}", r"\p{N}", r"\s"):
        byte_ranks = {bytes([byte]): byte for byte in range(256)}
        encoding = tiktoken.Encoding("bytes", pat_str=wanted, mergeable_ranks=byte_ranks, special_tokens={})
        found = bytes(encoding.encode_ordinary(scalars)).decode()
        split = pre_tokenizers.Split(tokenizers.Regex(wanted), behavior="removed", invert=True)
        assert found == "".join(piece for piece, _ in split.pre_tokenize_str(scalars))
        if wanted == r"\s":
            assert found == "".join(re.findall(module._SPACE, scalars))


def test_stream_is_the_whole(ours):
    rng = random.Random(2)
    samples = ["".join(rng.choices([*EMOJI, *WORDS, "漢", "字", "𠀀"], k=rng.randint(1, 8))) for _ in range(1000)]
    for text in samples:
        decoder = ours.stream_decoder()
        parts = [decoder.feed(id) for id in ours.encode(text)]
        assert ("".join(parts), decoder.flush()) == (text, "")
    for ids in [rng.choices(range(ours.vocab_size), k=9) for _ in range(1000)]:
        decoder = ours.stream_decoder()
        assert "".join(map(decoder.feed, ids)) + decoder.flush() == ours.decode(ids)


def test_special_tokens_cannot_be_forged(ours):
    for text in (END_OF_TEXT, f"a{END_OF_TEXT}b", f" {END_OF_TEXT}\n"):
        ids = ours.encode(text)
        assert ours.eot_id not in ids
        assert ours.decode(ids) == text


def test_lone_surrogates_become_replacement_characters(ours):
    assert ours.decode(ours.encode("a\ud800b \udfff")) == "a\ufffdb \ufffd"
    assert ours.encode("\ud83d\ude00") == ours.encode("😀")  # a pair is the character that it stands for


@pytest.mark.parametrize("wrong", [-1, 601, 10**12])
def test_unknown_id_is_named(trained, wrong):
    tokenizer = Tokenizer.from_pretrained(trained)
    for decode in (lambda: tokenizer.decode([1, wrong]), lambda: tokenizer.stream_decoder().feed(wrong)):
        with pytest.raises(ValueError, match=f"the id {wrong} is not in the vocabulary of 601"):
            decode()


@pytest.mark.parametrize("size", [1, 2, 5])
def test_cutting_a_text_changes_no_id(ours, texts, monkeypatch, size):
    whole = [ours.encode(text) for text in texts]
    monkeypatch.setattr(module, "_PIECE", size)
    assert [ours.encode(text) for text in texts] == whole


def test_very_long_texts(trained):
    """tiktoken panics on a million blanks before a word: its regular expression remembers a way back for each."""
    tokenizer = Tokenizer.from_pretrained(trained)
    prose = "".join(f"The {i}th cat's mat -- naïve, isn't it?\r\n\n" for i in range(250_000))
    assert len(prose) > 10_000_000
    assert tokenizer.encode(prose) == tokenizer._bpe.encode_ordinary(prose)

    n, judge = 1_000_000, judge_of(trained)
    for text in ("a" * n, " " * n, " " * n + "a", "a" + "\n" * n + "a"):
        assert tokenizer.encode(text) == judge.encode(text).ids


def test_load_and_save_keep_gpt2s_files_byte_for_byte(gpt2, shared_data, tmp_path):
    gpt2.save_pretrained(tmp_path)
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / name).read_bytes() == (shared_data / "gpt2" / name).read_bytes()


def test_every_way_of_writing_a_vocabulary_reads_the_same(ours, auto, export, tmp_path):
    assert Tokenizer.from_pretrained(export).fingerprint == ours.fingerprint
    shutil.copy(export / "tokenizer.json", tmp_path)  # merges as "a b"
    assert Tokenizer.from_pretrained(tmp_path).fingerprint == ours.fingerprint
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["merges"] = [pair.split(" ") for pair in content["model"]["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert Tokenizer.from_pretrained(tmp_path).fingerprint == ours.fingerprint
    auto.save_pretrained(tmp_path / "by transformers")
    assert Tokenizer.from_pretrained(tmp_path / "by transformers").fingerprint == ours.fingerprint


def test_added_tokens_are_special_wherever_they_stand(trained, tmp_path):
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
    "a list": (write("vocab.json", "[]"), r"vocab\.json: expected a JSON object"),
    "not text": (write("vocab.json", '{"\xff": 1}'), r"vocab\.json: not UTF-8"),
    "an id of text": (lambda folder: edit_vocab(folder, the="7"), r"vocab\.json: the id of 'the' is '7'"),
    "an id twice": (lambda folder: edit_vocab(folder, x=1), r"vocab\.json: .* have the same id, 1 "),
    "no end of text": (
        lambda folder: edit_vocab(folder, **{END_OF_TEXT: None}),
        r'vocab\.json: no end-of-text token \(add "<\|endoftext\|>": 600 to vocab\.json\)',
    ),
    "a byte missing": (lambda folder: edit_vocab(folder, a=None), r"vocab\.json: no token for the byte 0x61"),
    "three parts": (write("merges.txt", "#version: 0.2\nt h e\n"), r"merges\.txt:2: no merge of two tokens"),
    "unknown union": (write("merges.txt", "q q\n"), r"merges\.txt:1: no merge of two tokens"),
    "a blank put first": (write("tokenizer_config.json", '{"add_prefix_space": true}'), r"add_prefix_space is true"),
    "other words": (write("tokenizer.json", '{"pre_tokenizer": {"type": "Split"}}'), r"json: another pre_tokenizer"),
    "two ids": (write("added_tokens.json", '{"<|endoftext|>": 7}'), r"'<\|endoftext\|>' has another id"),
    "two ids, added": (write("tokenizer_config.json", json.dumps(TWICE)), r"'\[A\]' has another id"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_named_in_one_line(trained, tmp_path, name):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    spoil, message = BROKEN[name]
    spoil(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        Tokenizer.from_pretrained(tmp_path)
    assert str(caught.value).startswith(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_byte_order_mark_and_crlf_change_nothing(trained, tmp_path):
    (tmp_path / "vocab.json").write_bytes(b"\xef\xbb\xbf" + (trained / "vocab.json").read_bytes())
    (tmp_path / "merges.txt").write_bytes((trained / "merges.txt").read_bytes().replace(b"\n", b"\r\n"))
    assert Tokenizer.from_pretrained(tmp_path).fingerprint == Tokenizer.from_pretrained(trained).fingerprint


def small_vocabulary(*merged: str) -> dict[str, int]:
    """The 256 bytes, then the tokens given, then the end of text."""
    return {token: id for id, token in enumerate([*bytes_to_unicode().values(), *merged, END_OF_TEXT])}


def test_ids_that_would_merge_otherwise_are_refused(tmp_path):
    """Where `abc` was learned as a + bc, but ids say ab first, tiktoken would find `abc` in places where it is not."""
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
    """Byte-pair encoding of a token by the lower ranks, step by step, until two parts are left."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        unions = [ranks.get(left + right, ranks[token]) for left, right in pairwise(parts)]
        lowest = min(unions)
        if lowest >= ranks[token]:
            return None
        i = unions.index(lowest)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


def test_last_merges_are_those_of_plain_byte_pair_encoding():
    """On small alphabets, where tokens overlap themselves and each other; ids in the order of merging or not."""
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
        if seed % 3 == 0:  # a part is missing, or another order
            merged.remove(rng.choice(merged))
            rng.shuffle(merged)
        ids = rng.sample(range(600), 256 + len(merged)) if seed % 2 else range(256 + len(merged))
        named = [*zip((bytes([byte]) for byte in range(256)), ids), *zip(merged, sorted(ids[256:]))]
        ranks = dict(sorted(named, key=lambda item: item[1]))
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
    b"YQ== 601": r"any\.tiktoken:601: the token b'a' stands here a second time",
    b"YQBhAGEA 5": r"any\.tiktoken: b'.*' and b'a\\x00a\\x00a\\x00' have the same id, 5",
}


@pytest.mark.parametrize("line", RANK_LINES)
def test_broken_rank_files_are_named_in_one_line(trained, tmp_path, line):
    path = tmp_path / "any.tiktoken"
    path.write_bytes((trained / "ranks" / "any.tiktoken").read_bytes() + line + b"\n")
    with pytest.raises(ValueError, match=RANK_LINES[line]):
        Tokenizer.from_pretrained(path)


def test_absent_files(trained, tmp_path):
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
    """What the code prints in a fresh process where every attempt to reach the network raises."""
    block = "import socket\ndef no(*_, **__): raise SystemExit('the network was asked')\n"
    block += "socket.socket.connect = socket.getaddrinfo = socket.create_connection = no\n"
    block += "from minigpt.data.tokenizer import Tokenizer\n"
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TIKTOKEN_", "HUGGINGFACE_"))}
    here = {"HOME": str(home), "HF_HOME": str(home / "hf"), "HF_HUB_OFFLINE": "1"}
    here["PYTHONPATH"] = str(Path(module.__file__).parents[2])
    process = [sys.executable, "-c", block + code]
    done = subprocess.run(process, env=inherited | here | environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


SHOW = "print(t.encode('Hello world'), t.eot_id)"


def test_local_folders_need_no_network(trained, tmp_path):
    ids = Tokenizer.from_pretrained(trained).encode("Hello world")
    code = f"t = Tokenizer.from_pretrained({str(trained)!r}); {SHOW}"
    assert without_network(code, tmp_path, HF_HUB_OFFLINE="0") == f"{ids} 600"


def test_gpt2_by_name_without_any_cache_says_what_to_do(tmp_path):
    code = "try: Tokenizer.gpt2()\nexcept FileNotFoundError as error: print(error)"
    for environment in ({}, {"TIKTOKEN_CACHE_DIR": str(tmp_path)}):
        message = without_network(code, tmp_path, **environment)
        assert re.fullmatch(r"gpt2: .*hub cannot be reached.*give a local folder.*TIKTOKEN_CACHE_DIR.*", message)


def test_gpt2_by_name_from_tiktokens_cache(shared_data, tmp_path):
    cache = shared_data / "tiktoken_cache"
    before = sorted(path.name for path in cache.iterdir())
    printed = without_network(f"t = Tokenizer.gpt2(); {SHOW}", tmp_path, TIKTOKEN_CACHE_DIR=str(cache))
    assert printed == "[15496, 995] 50256"
    assert sorted(path.name for path in cache.iterdir()) == before


def test_hub_cache_that_holds_only_vocabulary_and_merges(trained, tmp_path):
    """Offline nobody can say whether the repository has other files: those that are there must do."""
    repository, commit = tmp_path / "hf" / "hub" / "models--some--model", "0" * 40
    shutil.copytree(trained, repository / "snapshots" / commit, ignore=shutil.ignore_patterns("ranks"))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    ids = Tokenizer.from_pretrained(trained).encode("Hello world")
    assert without_network(f"t = Tokenizer.from_pretrained('some/model'); {SHOW}", tmp_path) == f"{ids} 600"
