"""GPT-2's byte-level BPE tokenizer: tiktoken encodes; vocabularies are read and written as Hugging Face's files.

A regular expression splits the text into words, each word is encoded as UTF-8 bytes, and within a word the adjacent
pair that was learned first is merged first, until no learned pair is left (Radford et al. 2019, "Language Models are
Unsupervised Multitask Learners", section 2.2; `encoder.py` in github.com/openai/gpt-2). tiktoken has no list of merges:
it merges the pair whose result has the lowest id. A vocabulary for which this gives other merges is refused.
"""

import base64
import codecs
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import tiktoken

from minigpt.files import read_json, whole_file
from minigpt.hub import resolve_file

END_OF_TEXT = "<|endoftext|>"
GPT2 = "openai-community/gpt2"  # hub id; the hub still accepts its former name, gpt2

# The word pattern of GPT-2's encoder.py, with possessive quantifiers (`++`) against backtracking, as in tiktoken. A
# word is a contraction; or letters, digits or other characters with at most one space before them; or white space,
# without the space that belongs to the next word.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

# Positions at which PATTERN always ends a word: between another character and white space, and before the last
# character of a run of white space. (Python counts U+001C to U+001F as white space; Unicode and PATTERN do not.)
_SPACE, _OTHER = r"[^\S\x1c-\x1f]", r"[\S\x1c-\x1f]"
_WORD_END = re.compile(rf"(?<={_OTHER})(?={_SPACE})|(?<={_SPACE})(?={_SPACE}{_OTHER})")
_PIECE = 1 << 16  # longer texts are split: tiktoken panics on a million white-space characters before a word


class Tokenizer:
    """Encodes text as token ids, and decodes ids to text.

    `encode` never produces special tokens: `<|endoftext|>` typed by a user becomes seven ordinary tokens. Code adds
    special tokens by their ids.

    >>> tokenizer = Tokenizer.gpt2()
    >>> tokenizer.encode("Hello world")
    [15496, 995]
    >>> tokenizer.decode([15496, 995, tokenizer.eot_id])
    'Hello world<|endoftext|>'

    Attributes:
        special_tokens: special token -> id; contains at least `<|endoftext|>`.
        eot_id: the id of `<|endoftext|>`.
        vocab_size: the highest id + 1, special tokens included.
    """

    def __init__(self, ranks: dict[bytes, int], special_tokens: dict[str, int], source: str | Path = "tokenizer"):
        """`ranks` maps each BPE token to its id, which is also its merge rank; error messages begin with `source`.

        Raises `ValueError` if a byte has no token, two tokens share an id, a token cannot be merged from two tokens
        with lower ids, or there is no `<|endoftext|>`.
        """
        for byte in range(256):
            if bytes([byte]) not in ranks:
                raise ValueError(f"{source}: no token for the byte 0x{byte:02x} (a byte-level vocabulary has all 256)")
        self._tokens: dict[int, bytes] = {}
        for token, id in [*ranks.items(), *((name.encode(), id) for name, id in special_tokens.items())]:
            if id in self._tokens:
                raise ValueError(f"{source}: {self._tokens[id]!r} and {token!r} have the same id, {id} (renumber one)")
            self._tokens[id] = token
        self.vocab_size = max(self._tokens) + 1
        if END_OF_TEXT not in special_tokens:
            raise ValueError(f'{source}: no end-of-text token (add "{END_OF_TEXT}": {self.vocab_size} to vocab.json)')
        self.special_tokens = dict(special_tokens)
        self.eot_id = special_tokens[END_OF_TEXT]
        self._ranks = dict(sorted(ranks.items(), key=lambda item: item[1]))
        self._merges = _last_merges(self._ranks, source)
        self._bpe = tiktoken.Encoding("minigpt", pat_str=PATTERN, mergeable_ranks=self._ranks, special_tokens={})

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, revision: str | None = None) -> "Tokenizer":
        """Reads a local folder, a repository of the Hugging Face hub, a `.tiktoken` file, or `tiny`.

        In a folder, `vocab.json` with `merges.txt` takes precedence over `tokenizer.json`, and that over a single
        `*.tiktoken`. `openai-community/gpt2`, or `gpt2`, also works offline if tiktoken's cache (`TIKTOKEN_CACHE_DIR`)
        contains GPT-2's files.

        Raises `FileNotFoundError` if there are no such files, and `ValueError` if one is broken or describes another
        kind of tokenizer.
        """
        if name_or_path == "tiny":
            return cls.tiny()
        if Path(name_or_path).suffix == ".tiktoken":
            return cls._from_rank_file(Path(name_or_path))
        try:
            files = _find_files(name_or_path, revision)
        except OSError as error:  # no such folder or repository, or the hub is unreachable
            if name_or_path not in (GPT2, "gpt2"):
                raise
            files = _gpt2_in_tiktoken_cache()
            if not files:
                raise FileNotFoundError(f"{error}; nor is GPT-2's tokenizer in TIKTOKEN_CACHE_DIR") from error
        if "tokenizer.json" in files or {"vocab.json", "merges.txt"} <= files.keys():
            return cls._from_hub_files(files)
        rank_files = sorted(Path(name_or_path).glob("*.tiktoken"))
        if len(rank_files) != 1:
            raise FileNotFoundError(
                f"{name_or_path}: {len(rank_files)} .tiktoken files, and neither vocab.json with merges.txt nor "
                "tokenizer.json (give a folder that holds them, or the path of one .tiktoken file)"
            )
        return cls._from_rank_file(rank_files[0])

    @classmethod
    def gpt2(cls) -> "Tokenizer":
        """GPT-2's own vocabulary of 50,257 tokens."""
        return cls.from_pretrained(GPT2)

    @classmethod
    def tiny(cls) -> "Tokenizer":
        """The small vocabulary that is bundled with the package."""
        return cls.from_pretrained(Path(__file__).parents[1] / "assets" / "tiny.tiktoken")

    @classmethod
    def _from_rank_file(cls, path: Path) -> "Tokenizer":
        """tiktoken's format: one token per line, in base64, and its rank. `<|endoftext|>` gets the next free id."""
        ranks: dict[bytes, int] = {}
        for number, line in enumerate(path.read_bytes().splitlines(), start=1):
            try:
                encoded, rank = line.split()
                token, id = base64.b64decode(encoded, validate=True), int(rank)
            except ValueError as error:
                raise ValueError(f"{path}:{number}: expected a token in base64, a space and its rank") from error
            if token in ranks:
                raise ValueError(f"{path}:{number}: duplicate token {token!r} (remove one)")
            ranks[token] = id
        return cls(ranks, {END_OF_TEXT: max(ranks.values(), default=0) + 1}, path)

    @classmethod
    def _from_hub_files(cls, files: dict[str, Path]) -> "Tokenizer":
        """Reads Hugging Face's files. A token that is neither a byte nor the result of a merge is a special token."""
        pipeline, config, added_tokens = (
            read_json(files[name]) if name in files else {}
            for name in ("tokenizer.json", "tokenizer_config.json", "added_tokens.json")
        )
        if "tokenizer.json" in files:
            _check_pipeline(pipeline, files["tokenizer.json"])
        if config.get("add_prefix_space"):
            raise ValueError(f"{files['tokenizer_config.json']}: add_prefix_space is true (only false is supported)")

        # ---- the merges as (line or index in the file, pair)
        if "vocab.json" in files and "merges.txt" in files:
            source, path = files["vocab.json"], files["merges.txt"]
            vocab = read_json(source)
            lines = enumerate(_read_text(path).split("\n"), start=1)
            merges = [(n, line.split(" ")) for n, line in lines if line and not line.startswith("#version")]
            location = f"{path}:"
        else:
            source = files["tokenizer.json"]
            vocab = pipeline["model"]["vocab"]
            pairs = enumerate(pipeline["model"]["merges"])
            merges = [(i, pair.split(" ") if isinstance(pair, str) else pair) for i, pair in pairs]
            location = f"{source}: merge "

        for token, id in vocab.items():
            if type(id) is not int or id < 0:
                raise ValueError(f"{source}: the id of {token!r} is {id!r} (expected a whole number from 0)")
        byte_pairs = _BYTE_OF.keys() & vocab.keys()
        ranks = {bytes([_BYTE_OF[char]]): vocab[char] for char in byte_pairs}
        highest = -1
        for number, pair in merges:
            token = "".join(pair)
            if len(pair) != 2 or token not in vocab or not _BYTE_OF.keys() >= set(token):
                raise ValueError(
                    f"{location}{number}: not a merge of two tokens into one of {source}: {pair} (fetch both again)"
                )
            if vocab[token] <= highest:
                raise ValueError(
                    f"{location}{number}: {token} has the id {vocab[token]} after a merge with {highest}, but tiktoken "
                    "needs ascending ids in the order of merges (number the tokens in the order of their merges)"
                )
            highest = ranks[bytes(map(_BYTE_OF.__getitem__, token))] = vocab[token]
            byte_pairs.add(token)

        added = [(token["content"], token["id"]) for token in pipeline.get("added_tokens", [])]
        added += [(token["content"], int(id)) for id, token in config.get("added_tokens_decoder", {}).items()]
        special_tokens: dict[str, int] = {}
        for token, id in [*vocab.items(), *added, *added_tokens.items()]:
            if vocab.get(token, id) != id or special_tokens.get(token, id) != id:
                raise ValueError(f"{source}: the added token {token!r} has an id other than {id} elsewhere (keep one)")
            if token not in byte_pairs:
                special_tokens[token] = id

        tokenizer = cls(ranks, special_tokens, source)
        for (number, (left, right)), by_id in zip(merges, tokenizer._merges, strict=True):
            if len(left) != len(by_id[0]):
                raise ValueError(
                    f"{location}{number}: by ids {left + right} is not made of {left} and {right} (renumber the tokens)"
                )
        return tokenizer

    @cached_property
    def fingerprint(self) -> str:
        """A hash of everything that determines ids: equal for the same vocabulary, whatever files it was read from."""
        ranks = [(token.hex(), id) for token, id in self._ranks.items()]
        return hashlib.sha256(json.dumps([PATTERN, ranks, sorted(self.special_tokens.items())]).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without special tokens. A lone surrogate, which UTF-8 cannot encode, becomes U+FFFD."""
        if len(text) <= _PIECE:
            return self._bpe.encode_ordinary(text)
        return [id for piece in _pieces(text) for id in self._bpe.encode_ordinary(piece)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; invalid UTF-8 becomes U+FFFD. Raises `ValueError` for an unknown id."""
        return b"".join(map(self._bytes, ids)).decode(errors="replace")

    def stream_decoder(self) -> "StreamDecoder":
        """A decoder for streaming: one id at a time."""
        return StreamDecoder(self._bytes)

    def _bytes(self, id: int) -> bytes:
        try:
            return self._tokens[id]
        except KeyError:
            raise ValueError(f"the id {id} is not in the vocabulary of {self.vocab_size}") from None

    def save_pretrained(self, folder: str | Path, model_max_length: int = 1024) -> None:
        """Writes Hugging Face's files: `AutoTokenizer.from_pretrained(folder)` gives the same tokenizer.

        `model_max_length` is the model's context length in tokens.
        """
        vocab = {_to_text(token): id for token, id in self._ranks.items()} | self.special_tokens
        vocab = dict(sorted(vocab.items(), key=lambda item: item[1]))
        merges = [f"{_to_text(left)} {_to_text(right)}" for left, right in self._merges]
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        added = {id: {"content": token, **flags} for token, id in vocab.items() if token in self.special_tokens}
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        pipeline = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": id, **token} for id, token in added.items()],
            "normalizer": None,
            "pre_tokenizer": byte_level,
            "post_processor": None,
            "decoder": byte_level,
            "model": {"type": "BPE", "unk_token": None, "fuse_unk": False, "vocab": vocab, "merges": merges},
        }
        config = {
            "tokenizer_class": "GPT2Tokenizer",
            **dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT),
            "add_bos_token": False,
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "errors": "replace",
            "model_max_length": model_max_length,
            "added_tokens_decoder": added,
        }
        contents = {
            "vocab.json": json.dumps(vocab),
            "merges.txt": "\n".join(["#version: 0.2", *merges, ""]),
            "tokenizer.json": json.dumps(pipeline, ensure_ascii=False, indent=2),
            "tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=2),
        }
        for name, content in contents.items():
            with whole_file(Path(folder) / name) as path:
                path.write_text(content, encoding="utf-8")


class StreamDecoder:
    """Incremental decoding, by whole characters: all `feed` results and `flush`, joined, equal `decode` of all ids.

    >>> decoder = tokenizer.stream_decoder()
    >>> [decoder.feed(id) for id in tokenizer.encode("日本")] + [decoder.flush()]
    ['', '日', '', '本', '']
    """

    def __init__(self, token_bytes: Callable[[int], bytes]):
        self._token_bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, id: int) -> str:
        """The text that `id` completes; empty while bytes of a character are missing."""
        return self._utf8.decode(self._token_bytes(id))

    def flush(self) -> str:
        """U+FFFD if the last character is incomplete, else an empty string."""
        return self._utf8.decode(b"", final=True)


def _byte_alphabet() -> list[str]:
    """The printable character for each byte in GPT-2's files: its Latin-1 character, or else the next from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


_ALPHABET = _byte_alphabet()
_BYTE_OF = {char: byte for byte, char in enumerate(_ALPHABET)}


def _to_text(token: bytes) -> str:
    return "".join(map(_ALPHABET.__getitem__, token))


def _last_merges(ranks: dict[bytes, int], source: str | Path) -> list[tuple[bytes, bytes]]:
    """The last merge of each multi-byte token, sorted by id: the two tokens that BPE with the lower ids leaves of its
    bytes. `ranks` must be sorted by id."""
    halves = {bytes([byte]): (b"", b"") for byte in range(256)}
    for token, rank in ranks.items():
        if len(token) == 1:
            continue
        for i in range(1, len(token)):
            left, right = token[:i], token[i:]
            if left in halves and right in halves and _are_both_merged(left, right, rank, ranks, halves):
                halves[token] = (left, right)
                break
        else:
            raise ValueError(
                f"{source}: no two tokens of lower ids make {token!r} (number them in the order of merging)"
            )
    return [pair for token, pair in halves.items() if len(token) > 1]


def _are_both_merged(
    left: bytes, right: bytes, limit: int, ranks: dict[bytes, int], halves: dict[bytes, tuple[bytes, bytes]]
) -> bool:
    """Whether BPE builds `left` and `right` without first doing a merge of a rank below `limit` across their boundary.

    Undoes the merges, last one first. After each, only the two tokens at the boundary could have been merged instead
    (the algorithm of github/rust-gems, crates/bpe). Of equal ranks the left pair is merged first.
    """
    while len(left) > 1 or len(right) > 1:
        if len(right) == 1 or (len(left) > 1 and ranks[left] > ranks[right]):
            limit, left = ranks[left], halves[left][1]
            crosses = ranks.get(left + right, limit) < limit
        else:
            limit, right = ranks[right], halves[right][0]
            crosses = ranks.get(left + right, limit + 1) <= limit
        if crosses:
            return False
    return True


def _pieces(text: str) -> Iterator[str]:
    """Splits a long text where PATTERN always ends a word, so that the pieces can be encoded separately."""
    start = 0
    while end := _WORD_END.search(text, start + _PIECE):
        yield text[start : end.start()]
        start = end.start()
    yield text[start:]


def _find_files(name_or_path: str | Path, revision: str | None) -> dict[str, Path]:
    """The existing files of a tokenizer, by name. Offline, the hub's cache may contain only some of them."""
    files: dict[str, Path] = {}
    for name in ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "added_tokens.json"):
        try:
            path = resolve_file(name_or_path, name, revision)
        except FileNotFoundError:
            if name != "tokenizer.json" and not files:
                raise
        else:
            if path:
                files[name] = path
    return files


def _gpt2_in_tiktoken_cache() -> dict[str, Path]:
    """GPT-2's files in tiktoken's cache, which names them by the SHA-1 of their URL; empty if one is missing.

    `tiktoken.get_encoding` is not used, because it downloads a missing or damaged file without a timeout.
    """
    base_url = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
    folder = Path(os.environ.get("TIKTOKEN_CACHE_DIR", ""))
    names = {"vocab.json": "encoder.json", "merges.txt": "vocab.bpe"}
    files = {
        hub_name: folder / hashlib.sha1((base_url + name).encode()).hexdigest() for hub_name, name in names.items()
    }
    return files if all(path.is_file() for path in files.values()) else {}


def _check_pipeline(pipeline: dict[str, Any], path: Path) -> None:
    """Raises `ValueError` for a tokenizer.json that is not byte-level BPE with PATTERN."""
    pre_tokenizer = {"use_regex": True} | (pipeline.get("pre_tokenizer") or {})
    gpt2_pre_tokenizer = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    if not pre_tokenizer.items() >= gpt2_pre_tokenizer.items() or pipeline.get("normalizer"):
        raise ValueError(
            f"{path}: the pre_tokenizer or normalizer is not GPT-2's (only {gpt2_pre_tokenizer} is supported)"
        )
    model = pipeline.get("model") or {}
    if model.get("type", "BPE") != "BPE" or not {"vocab", "merges"} <= model.keys():
        raise ValueError(f"{path}: expected a model of type BPE with vocab and merges")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start})") from error
