"""GPT-2's byte-level byte-pair tokenizer: tiktoken does the work, Hugging Face's files come in and go out.

Text is cut into words by a regular expression, a word is taken as its UTF-8 bytes, and inside a word the pair of
neighbours that was learned first is merged first, until no learned pair is left (Radford et al. 2019, "Language Models
are Unsupervised Multitask Learners", section 2.2; `encoder.py` in github.com/openai/gpt-2). tiktoken keeps no list of
merges: it merges the pair whose result has the lowest id. A vocabulary for which that is not the same is refused.
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
GPT2 = "openai-community/gpt2"  # of the hub, which also answers to gpt2, its name of old

# The words of GPT-2's encoder.py, written without backtracking (`++`), as in tiktoken: a contraction, or letters,
# digits or other signs with at most one blank before them, or white space less the blank that the next word takes.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

# Where PATTERN always ends a word: before white space that follows anything else, and before the last of a run of
# white space. (Python counts the separators U+001C to U+001F as white space; Unicode and PATTERN do not.)
_SPACE, _OTHER = r"[^\S\x1c-\x1f]", r"[\S\x1c-\x1f]"
_WORD_END = re.compile(rf"(?<={_OTHER})(?={_SPACE})|(?<={_SPACE})(?={_SPACE}{_OTHER})")
_PIECE = 1 << 16  # characters; where a million of white space stand before a word, tiktoken panics


class Tokenizer:
    """Text to token ids and back.

    `encode` reads ordinary text: `<|endoftext|>` typed by a user is seven ordinary tokens. Special tokens come only
    from code that names their ids.

    >>> tokenizer = Tokenizer.gpt2()
    >>> tokenizer.encode("Hello world")
    [15496, 995]
    >>> tokenizer.decode([15496, 995, tokenizer.eot_id])
    'Hello world<|endoftext|>'

    Attributes:
        special_tokens: special token -> id; holds at least `<|endoftext|>`.
        eot_id: the id of `<|endoftext|>`.
        vocab_size: the highest id + 1, special tokens included.
    """

    def __init__(self, ranks: dict[bytes, int], special_tokens: dict[str, int], source: str | Path = "tokenizer"):
        """`ranks` maps each byte-pair token to its id, which is also its rank in merging; errors name `source`.

        Raises `ValueError` where a byte is missing, two tokens share an id, a token is not the union of two tokens
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

        Of the files in a folder, `vocab.json` with `merges.txt` goes before `tokenizer.json` before one `*.tiktoken`.
        `openai-community/gpt2`, or `gpt2`, also works without the hub where tiktoken's cache (`TIKTOKEN_CACHE_DIR`)
        holds GPT-2's files.

        Raises `FileNotFoundError` where there are no such files, and `ValueError` where one is broken or describes
        another kind of tokenizer.
        """
        if name_or_path == "tiny":
            return cls.tiny()
        if Path(name_or_path).suffix == ".tiktoken":
            return cls._from_rank_file(Path(name_or_path))
        try:
            files = _find_files(name_or_path, revision)
        except OSError as error:  # no such folder or repository, or a hub out of reach
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
        """The small vocabulary that comes with the package."""
        return cls.from_pretrained(Path(__file__).parents[1] / "assets" / "tiny.tiktoken")

    @classmethod
    def _from_rank_file(cls, path: Path) -> "Tokenizer":
        """tiktoken's format: a line per token, base64 and rank. `<|endoftext|>` takes the id after the last."""
        ranks: dict[bytes, int] = {}
        for number, line in enumerate(path.read_bytes().splitlines(), start=1):
            try:
                encoded, rank = line.split()
                token, id = base64.b64decode(encoded, validate=True), int(rank)
            except ValueError as error:
                raise ValueError(f"{path}:{number}: expected a token in base64, a blank and its rank") from error
            if token in ranks:
                raise ValueError(f"{path}:{number}: the token {token!r} stands here a second time (remove one)")
            ranks[token] = id
        return cls(ranks, {END_OF_TEXT: max(ranks.values(), default=0) + 1}, path)

    @classmethod
    def _from_hub_files(cls, files: dict[str, Path]) -> "Tokenizer":
        """Every token that is neither a byte nor made by a merge is a special token."""
        pipeline, config, added_tokens = (
            read_json(files[name]) if name in files else {}
            for name in ("tokenizer.json", "tokenizer_config.json", "added_tokens.json")
        )
        if "tokenizer.json" in files:
            _check_pipeline(pipeline, files["tokenizer.json"])
        if config.get("add_prefix_space"):
            raise ValueError(f"{files['tokenizer_config.json']}: add_prefix_space is true (only false is supported)")

        # the merges, each with the number of the place where it stands
        if "vocab.json" in files and "merges.txt" in files:
            source, path = files["vocab.json"], files["merges.txt"]
            vocab = read_json(source)
            lines = enumerate(_read_text(path).split("\n"), start=1)
            merges = [(n, line.split(" ")) for n, line in lines if line and not line.startswith("#version")]
            place = f"{path}:"
        else:
            source = files["tokenizer.json"]
            vocab = pipeline["model"]["vocab"]
            pairs = enumerate(pipeline["model"]["merges"])
            merges = [(i, pair.split(" ") if isinstance(pair, str) else pair) for i, pair in pairs]
            place = f"{source}: merge "

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
                    f"{place}{number}: no merge of two tokens into one of {source}: {pair} (fetch both files again)"
                )
            if vocab[token] <= highest:
                raise ValueError(
                    f"{place}{number}: {token} has the id {vocab[token]} after a merge with {highest}, but tiktoken "
                    "needs ids that rise along the merges (number the tokens in the order of their merges)"
                )
            highest = ranks[bytes(map(_BYTE_OF.__getitem__, token))] = vocab[token]
            byte_pairs.add(token)

        named = [(token["content"], token["id"]) for token in pipeline.get("added_tokens", [])]
        named += [(token["content"], int(id)) for id, token in config.get("added_tokens_decoder", {}).items()]
        special_tokens: dict[str, int] = {}
        for token, id in [*vocab.items(), *named, *added_tokens.items()]:
            if vocab.get(token, id) != id or special_tokens.get(token, id) != id:
                raise ValueError(f"{source}: the added token {token!r} has another id elsewhere than {id} (keep one)")
            if token not in byte_pairs:
                special_tokens[token] = id

        tokenizer = cls(ranks, special_tokens, source)
        for (number, (left, right)), by_id in zip(merges, tokenizer._merges, strict=True):
            if len(left) != len(by_id[0]):
                raise ValueError(
                    f"{place}{number}: by ids {left + right} is not made of {left} and {right} (renumber the tokens)"
                )
        return tokenizer

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all that decides ids: equal for the same vocabulary, whatever files it came from."""
        ranks = [(token.hex(), id) for token, id in self._ranks.items()]
        return hashlib.sha256(json.dumps([PATTERN, ranks, sorted(self.special_tokens.items())]).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, taken as ordinary text. A lone surrogate, which UTF-8 cannot hold, becomes U+FFFD."""
        if len(text) <= _PIECE:
            return self._bpe.encode_ordinary(text)
        return [id for piece in _pieces(text) for id in self._bpe.encode_ordinary(piece)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD. Raises `ValueError` for an unknown id."""
        return b"".join(map(self._bytes, ids)).decode(errors="replace")

    def stream_decoder(self) -> "StreamDecoder":
        """Decodes one id at a time, for text that is shown as it comes."""
        return StreamDecoder(self._bytes)

    def _bytes(self, id: int) -> bytes:
        try:
            return self._tokens[id]
        except KeyError:
            raise ValueError(f"the id {id} is not in the vocabulary of {self.vocab_size}") from None

    def save_pretrained(self, folder: str | Path, model_max_length: int = 1024) -> None:
        """Writes the files from which `AutoTokenizer.from_pretrained(folder)` builds the same tokenizer.

        `model_max_length` is the model's context in tokens.
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
    """What each `feed` returns and then `flush`, joined, is `decode` of the whole; no character comes in halves.

    >>> decoder = tokenizer.stream_decoder()
    >>> [decoder.feed(id) for id in tokenizer.encode("日本")] + [decoder.flush()]
    ['', '日', '', '本', '']
    """

    def __init__(self, token_bytes: Callable[[int], bytes]):
        self._token_bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, id: int) -> str:
        """The text that `id` completes: empty while a character's bytes are still to come."""
        return self._utf8.decode(self._token_bytes(id))

    def flush(self) -> str:
        """U+FFFD for a character that was left incomplete, else nothing."""
        return self._utf8.decode(b"", final=True)


def _byte_alphabet() -> list[str]:
    """The visible character by which GPT-2's files write each byte: its own in Latin-1, else the next from U+0100."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in visible else next(others)) for byte in range(256)]


_ALPHABET = _byte_alphabet()
_BYTE_OF = {char: byte for byte, char in enumerate(_ALPHABET)}


def _to_text(token: bytes) -> str:
    return "".join(map(_ALPHABET.__getitem__, token))


def _last_merges(ranks: dict[bytes, int], source: str | Path) -> list[tuple[bytes, bytes]]:
    """For each token of several bytes, in the order of ids, the two whose merge makes it: what byte-pair encoding of
    its bytes by the lower ids leaves. `ranks` is in the order of ids."""
    halves = {bytes([byte]): (b"", b"") for byte in range(256)}
    for token, rank in ranks.items():
        if len(token) == 1:
            continue
        for i in range(1, len(token)):
            left, right = token[:i], token[i:]
            if left in halves and right in halves and _stay_apart(left, right, rank, ranks, halves):
                halves[token] = (left, right)
                break
        else:
            raise ValueError(
                f"{source}: no two tokens of lower ids make {token!r} (number them in the order of merging)"
            )
    return [pair for token, pair in halves.items() if len(token) > 1]


def _stay_apart(
    left: bytes, right: bytes, limit: int, ranks: dict[bytes, int], halves: dict[bytes, tuple[bytes, bytes]]
) -> bool:
    """Whether both are made before a merge of a rank below `limit` crosses the seam between them.

    Merges are undone, the latest first; after each, only the two tokens at the seam could have merged otherwise (after
    github/rust-gems, crates/bpe). Of equal ranks the left one merges first.
    """
    while len(left) > 1 or len(right) > 1:
        if len(right) == 1 or (len(left) > 1 and ranks[left] > ranks[right]):
            limit, left = ranks[left], halves[left][1]
            crossed = ranks.get(left + right, limit) < limit
        else:
            limit, right = ranks[right], halves[right][0]
            crossed = ranks.get(left + right, limit + 1) <= limit
        if crossed:
            return False
    return True


def _pieces(text: str) -> Iterator[str]:
    """Cuts a long text where a word ends in any case, so that the ids of the pieces, joined, are those of the text."""
    start = 0
    while end := _WORD_END.search(text, start + _PIECE):
        yield text[start : end.start()]
        start = end.start()
    yield text[start:]


def _find_files(name_or_path: str | Path, revision: str | None) -> dict[str, Path]:
    """Those of a tokenizer's files that are there; a hub out of reach may have left some of them in its cache."""
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
    """GPT-2's files under the names that tiktoken gives them, the hash of their address; empty where they are not.

    `tiktoken.get_encoding` would read them too, but where one is absent or damaged it downloads without a time-out.
    """
    address = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
    folder = Path(os.environ.get("TIKTOKEN_CACHE_DIR", ""))
    names = {"vocab.json": "encoder.json", "merges.txt": "vocab.bpe"}
    files = {ours: folder / hashlib.sha1((address + name).encode()).hexdigest() for ours, name in names.items()}
    return files if all(path.is_file() for path in files.values()) else {}


def _check_pipeline(pipeline: dict[str, Any], path: Path) -> None:
    """Refuses a tokenizer.json whose ids would not be those of PATTERN and byte pairs."""
    words = {"use_regex": True} | (pipeline.get("pre_tokenizer") or {})
    gpt2_words = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    if not words.items() >= gpt2_words.items() or pipeline.get("normalizer"):
        raise ValueError(f"{path}: another pre_tokenizer or normalizer than GPT-2's (only {gpt2_words} is supported)")
    model = pipeline.get("model") or {}
    if model.get("type", "BPE") != "BPE" or not {"vocab", "merges"} <= model.keys():
        raise ValueError(f"{path}: expected a model of type BPE with vocab and merges")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start})") from error
