"""The token store: a tokenized dataset on disk, built once and memory-mapped.

It is built in one pass with bounded memory, so a corpus may be larger than RAM. The folder is named by a cache key, a
hash of everything that determines the ids (bytes of the files, template, tokenizer, lengths), so a stale store is never
read. If several processes need the same store (ranks or other runs), one builds it and the others wait for its lock.

    ids.bin             uint16, or uint32 for a vocabulary of more than 65,536: the ids of all examples, concatenated
    supervised.bin      bool: one per id, whether it is supervised
    offsets.bin         int64: start of each example in ids.bin, and the end of the last one
    prompt_lengths.bin  int64: number of prompt ids of each example
    meta.json           the statistics; size and sha256 of each file above, and sha256 of meta.json itself

A store is built in a temporary folder, synced to disk, then renamed; opening verifies it, and a damaged one is rebuilt.
"""

import errno
import fcntl
import hashlib
import json
import os
import platform
import shutil
import sys
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from minigpt.data.encode import Example, Ids, Mask, fit_example
from minigpt.data.prompts import Template
from minigpt.data.read.records import read_records, read_texts
from minigpt.data.read.streams import find_data_files, is_raw_text
from minigpt.data.tokenizer import Tokenizer
from minigpt.distributed import print0, progress_bar
from minigpt.files import remove, to_disk, writing_to

KEY_VERSION = "0.1.0"  # of the tokenization, part of the key: a change rebuilds all stores
FORMAT = 1  # of the files above, part of the key: a change rebuilds all stores, and older checkpoints cannot resume
WAIT_NOTICE_SECONDS = 5.0  # after this long, print that another process is building the store
REPAIRABLE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO, errno.ESTALE}  # errors that a rebuild repairs


@dataclass(frozen=True)
class StoreStats:
    """Statistics of a store, counted when it is built."""

    examples: int
    tokens: int
    supervised_tokens: int
    length_p50: int
    length_p95: int
    length_max: int
    dropped: int
    """Conversations without a supervised token, from the start or after truncation."""
    cut: int
    """Truncated conversations: turns, the left of the prompt or the right of the answer were cut off."""
    bad_records: int

    def __str__(self) -> str:
        return (
            f"{self.examples:,} examples, {self.tokens:,} tokens ({self.supervised_tokens:,} supervised), "
            f"lengths p50 {self.length_p50:,} p95 {self.length_p95:,} max {self.length_max:,}; "
            f"{self.dropped:,} dropped, {self.cut:,} cut, {self.bad_records:,} bad records"
        )


class DamagedStoreError(ValueError):
    """A store's files differ from what was written; the message names the file and the damage."""


class TokenStore(Sequence[Example]):
    """Memory-mapped examples: reading one loads only its pages.

    Opening reads all files and compares their sha256, in every process: nothing cheaper detects a file of the right
    size filled with zeros. It takes two fifths of the time of `_key`, which hashes the source files in every process:
    they are larger (about 4 bytes per token; a store has 3), and their hash is slower.

    Raises:
        DamagedStoreError: a file is missing, unreadable or has the wrong sha256; or the store was built by a version
            that wrote no sha256.
    """

    def __init__(self, folder: Path):
        meta = _read_meta(folder)
        self.folder = folder
        try:
            self.stats = StoreStats(**meta["stats"])
            self.ids = _map(folder / "ids.bin", np.dtype(meta["dtype"]), meta)
            self.supervised = _map(folder / "supervised.bin", np.dtype(bool), meta)
            self.offsets = _map(folder / "offsets.bin", np.dtype(np.int64), meta)
            self.prompt_lengths = _map(folder / "prompt_lengths.bin", np.dtype(np.int64), meta)
        except (KeyError, TypeError) as error:
            raise DamagedStoreError("meta.json has other keys, as written by another version") from error
        self.lengths = np.diff(self.offsets)
        self.fingerprint = folder.name

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: Any) -> Any:
        index = range(len(self))[index]  # raises IndexError if out of range
        span = slice(self.offsets[index], self.offsets[index + 1])
        return Example(self.ids[span], self.supervised[span])


class TokenBlocks(Sequence[Example]):
    """Blocks of `block_size` positions over the tokens `start:stop` of a store; one starts every `stride` tokens.

    A block has `block_size` + 1 tokens, because the shift consumes one. So with `stride` = `block_size` neighbouring
    blocks share a token, and every token but the first is predicted once. The last block may be shorter.
    """

    def __init__(
        self, store: TokenStore, block_size: int, stride: int | None = None, start: int = 0, stop: int | None = None
    ):
        self.ids = store.ids[start:stop]
        self.block_size = block_size
        self.stride = block_size if stride is None else stride
        if not 1 <= self.stride <= block_size:
            raise ValueError(f"--stride {stride} must be from 1 to --block_size {block_size}, or tokens are skipped")
        self.starts = np.arange(0, max(0, len(self.ids) - 1), self.stride)
        if len(self.starts) > 1:  # drop blocks after the first that reaches the end: they would only repeat it
            self.starts = self.starts[: 1 + int(np.argmax(self.starts + block_size >= len(self.ids) - 1))]
        self.lengths = np.minimum(self.starts + block_size + 1, len(self.ids)) - self.starts
        self.fingerprint = f"{store.fingerprint} {start} {stop} {block_size} {self.stride}"

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: Any) -> Any:
        ids = self.ids[self.starts[index] : self.starts[index] + self.block_size + 1]
        return Example(ids, np.ones(len(ids), dtype=bool))


class Subset(Sequence[Example]):
    """Selected examples of a store."""

    def __init__(self, data: TokenStore, indices: np.ndarray):
        self.data = data
        self.indices = indices
        self.lengths = data.lengths[indices]
        self.prompt_lengths = data.prompt_lengths[indices]
        self.fingerprint = f"{data.fingerprint} {hashlib.sha256(indices.tobytes()).hexdigest()}"

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: Any) -> Any:
        return self.data[self.indices[index]]


def split(data: TokenStore, validation_split: float, seed: int) -> tuple[Subset, Subset]:
    """A random split into training and validation examples; if there are two or more, neither is empty."""
    order = np.random.default_rng(seed).permutation(len(data))
    count = min(max(1, round(len(data) * validation_split)), len(data) - 1) if validation_split > 0 else 0
    return Subset(data, np.sort(order[count:])), Subset(data, np.sort(order[:count]))


def build_store(
    paths: Sequence[str],
    template: Template,
    tokenizer: Tokenizer,
    max_seq_length: int,
    train_on_prompt: bool = False,
    *,
    skip_bad_records: int = 0,
    cache_dir: str | Path | None = None,
) -> TokenStore:
    """The store of a set of conversations: a cache hit opens it, a cache miss builds it, a damaged one is rebuilt.

    Args:
        paths: anything that `read_records` accepts.
        template, tokenizer, max_seq_length, train_on_prompt: as for `encode_example`.
        skip_bad_records: number of bad records to skip; one more is an error.
        cache_dir: cache folder; None is `$MINIGPT_CACHE`, or `~/.cache/minigpt` if that is not set.

    Raises:
        ValueError: a bad record, with file and line; or no record has a supervised token.
        OSError: the store cannot be written, or a damaged one cannot be replaced.
    """
    files = find_data_files(paths)
    if texts := [str(path) for path in files if is_raw_text(path)]:
        raise ValueError(f"{texts[0]}: raw text, expected conversations; train.py and --replay_data read raw text")
    key = _key(files, asdict(template), tokenizer.fingerprint, max_seq_length, train_on_prompt, skip_bad_records)

    def fill(writer: "_Writer") -> None:
        bad: list[str] = []
        for record in read_records(
            files, skip_bad_records=skip_bad_records, bad_records=bad, on_bytes=writer.bar.update
        ):
            fitted = fit_example(record.messages, template, tokenizer, max_seq_length, train_on_prompt)
            writer.cut += bool(fitted.cut_left or fitted.cut_right)
            if fitted.example is None:
                writer.dropped += 1
            else:
                writer.add(fitted.example.ids, fitted.example.supervised, fitted.prompt_length)
        if writer.dropped and not writer.lengths:
            raise ValueError(
                f"{', '.join(map(str, paths))}: none of the {writer.dropped} records has a supervised token within "
                f"--max_seq_length {max_seq_length}; raise it, or look at them with --inspect 3"
            )
        writer.end(paths, bad)

    return _open(key, tokenizer, files, fill, cache_dir)


def build_text_store(
    paths: Sequence[str], tokenizer: Tokenizer, *, skip_bad_records: int = 0, cache_dir: str | Path | None = None
) -> TokenStore:
    """The store of raw text: every document verbatim, each followed by an end-of-text token.

    A document is encoded in chunks, cut at positions that no token spans, so it may be larger than memory.

    Raises:
        ValueError: a bad record, with file and line; or there are no good records.
        OSError: the store cannot be written, or a damaged one cannot be replaced.
    """
    files = find_data_files(paths)
    key = _key(files, "text", tokenizer.fingerprint, skip_bad_records)

    def fill(writer: "_Writer") -> None:
        bad: list[str] = []
        for document in read_texts(
            files, skip_bad_records=skip_bad_records, bad_records=bad, on_bytes=writer.bar.update
        ):
            for piece in document:
                writer.extend(tokenizer.encode(piece))
            writer.add([tokenizer.eot_id], [True])
        writer.end(paths, bad)

    return _open(key, tokenizer, files, fill, cache_dir)


def _read_meta(folder: Path) -> dict[str, Any]:
    """Reads meta.json and checks its sha256."""
    try:
        with _unreadable_is_damaged("meta.json"):
            meta = json.loads((folder / "meta.json").read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DamagedStoreError("meta.json is not JSON") from error
    if not isinstance(meta, dict) or "sha256" not in meta:
        raise DamagedStoreError("meta.json has no sha256, as written by an earlier version")
    if meta.pop("sha256") != _sha256_of_meta(meta):
        raise DamagedStoreError("meta.json has a wrong sha256")
    return meta


def _sha256_of_meta(meta: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _map(path: Path, dtype: np.dtype, meta: dict[str, Any]) -> np.ndarray:
    """Memory-maps a file after checking its size and sha256.

    The file is opened once, so that the mapped bytes are the verified ones even if another process replaces the store
    in between.
    """
    expected = meta["files"][path.name]
    with _unreadable_is_damaged(path.name), open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size != expected["bytes"]:
            raise DamagedStoreError(f"{path.name} has {size:,} bytes instead of {expected['bytes']:,}")
        if hashlib.file_digest(file, "sha256").hexdigest() != expected["sha256"]:
            raise DamagedStoreError(f"{path.name} has a wrong sha256")
        return np.memmap(file, dtype, "r") if size else np.empty(0, dtype)


@contextmanager
def _unreadable_is_damaged(name: str) -> Iterator[None]:
    """Turns the OSError of a missing or unreadable file into `DamagedStoreError`; others, as of permissions, pass."""
    try:
        yield
    except OSError as error:
        if error.errno not in REPAIRABLE:
            raise
        raise DamagedStoreError(f"{name} cannot be read: {error.strerror}") from error


def _key(files: Iterable[Path], *settings: Any) -> str:
    """The cache key: a hash of the files' bytes and of everything else that the ids depend on."""
    digest = hashlib.blake2b(json.dumps([KEY_VERSION, FORMAT, *settings], sort_keys=True).encode(), digest_size=16)
    for path in files:
        digest.update(b"text" if is_raw_text(path) else b"json")  # the same bytes are parsed differently in a .txt
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "blake2b").digest())
    return digest.hexdigest()


def _open(
    key: str,
    tokenizer: Tokenizer,
    files: Sequence[Path],
    fill: Callable[["_Writer"], None],
    cache_dir: str | Path | None,
) -> TokenStore:
    """Opens the store of this key; if it is missing or damaged, one process builds it and the others wait.

    The builder holds an OS lock, which is released when its process ends: if it is killed, a waiting process takes
    over. The others poll the lock, not a collective, which could time out.
    """
    root = Path(cache_dir or os.environ.get("MINIGPT_CACHE") or Path.home() / ".cache" / "minigpt") / "stores"
    folder = root / key
    built = notified = False
    while True:
        stamp, damage = _stamp(folder), ""
        if stamp:
            try:
                return TokenStore(folder)
            except DamagedStoreError as error:
                damage = str(error)
        if damage and built:
            raise OSError(
                f"{folder}: damaged as soon as it was built ({damage}), so the disk may be failing; "
                "--cache_dir chooses another place"
            )
        started, locked = time.monotonic(), False
        while not locked and _stamp(folder) == stamp:  # if it changes, another process built it: open it again
            try:
                with writing_to(root, "--cache_dir"):
                    root.mkdir(parents=True, exist_ok=True)
                    with _try_lock(root / f".{key}.lock") as locked:
                        if (
                            locked and _stamp(folder) == stamp
                        ):  # check again: it may have changed before the lock was taken
                            if damage:  # not print0: any rank may hold the lock
                                print(f"{folder}: damaged ({damage}): rebuilding it", file=sys.stderr, flush=True)
                            _build(folder, tokenizer, files, fill)
                            built = True
            except OSError as error:
                if not damage:
                    raise
                raise OSError(f"{folder}: damaged ({damage}), and cannot be rebuilt: {error}") from error
            if not locked:
                waited = time.monotonic() - started
                if waited > WAIT_NOTICE_SECONDS and not notified:
                    print0(f"Waiting for another process, which is tokenizing the same data into {folder}")
                    notified = True
                time.sleep(min(1.0, 0.05 + waited))  # poll often at first: a small corpus takes less than a second


def _stamp(folder: Path) -> tuple[int, int] | None:
    """Inode and mtime of the folder, or None: they change if a store is created, removed or replaced.

    So a waiting process need not hash a damaged store again at every poll.
    """
    try:
        status = folder.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_ino, status.st_mtime_ns


@contextmanager
def _try_lock(path: Path) -> Iterator[bool]:
    """Locks a file, and removes it afterwards; yields False if another process holds the lock."""
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = os.path.samestat(os.fstat(file.fileno()), path.stat())
        except (BlockingIOError, FileNotFoundError):
            locked = False
        try:
            yield locked  # False too if the last holder removed the file after `open`: that lock would protect nothing
        finally:
            if locked:
                path.unlink(missing_ok=True)


def _build(folder: Path, tokenizer: Tokenizer, files: Sequence[Path], fill: Callable[["_Writer"], None]) -> None:
    """Fills a temporary folder, syncs it to disk, and renames it to `folder`. The caller holds the lock.

    A damaged store is removed first: the disk may not have space for two, and if it cannot be removed, the error comes
    before the work.
    """
    # named by machine: on a network file system with machine-local locks, two machines may build at once
    ending = f".{platform.node()}.building"
    temporary = folder.with_name(f".{folder.name}{ending}")
    for leftover in folder.parent.glob(f".*{ending}"):  # of builders that were killed
        with _try_lock(leftover.with_name(leftover.name.removesuffix(ending) + ".lock")) as abandoned:
            if abandoned or leftover == temporary:
                shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir()  # before removing the damaged store, or it may reuse that inode, and `_stamp` would not change
    try:
        _remove_damaged(folder, folder.with_name(f".{folder.name}.damaged{ending}"))
        with _Writer(temporary, tokenizer, sum(path.stat().st_size for path in files)) as writer:
            fill(writer)
        for path in [*temporary.iterdir(), temporary]:
            to_disk(path)
        try:
            temporary.rename(folder)
        except OSError:  # another machine built the same store first
            if not folder.is_dir():
                raise
        to_disk(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _remove_damaged(folder: Path, aside: Path) -> None:
    """Removes the folder, if it exists. A process that has its files mapped keeps them until it ends."""
    try:
        folder.rename(aside)  # atomic; and a network file system refuses to remove a folder with open files
    except FileNotFoundError:  # it does not exist, or another machine removed it
        return
    except OSError as error:
        if error.errno != errno.EXDEV:  # overlayfs raises it for every folder of a container image
            raise
        remove(folder)
    with suppress(OSError):  # leftovers are removed by the next build
        remove(aside)


class _HashedFile:
    """A new file, with size and sha256 of the bytes written; a failing disk may return other bytes when read."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.bytes = 0
        self.digest = hashlib.sha256()

    def write(self, values: np.ndarray) -> None:
        content = values.tobytes()
        self.file.write(content)
        self.digest.update(content)
        self.bytes += len(content)


class _Writer:
    """Appends examples to the files of a new store."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, total_bytes: int):
        self.folder = folder
        self.dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
        self.bar = progress_bar(total_bytes, "B", "tokenizing", unit_scale=True)
        self.lengths, self.prompt_lengths = array("q"), array("q")  # 8 bytes per example; a list takes 40
        self.current_length = 0  # ids of the current, unfinished example
        self.tokens = self.supervised_tokens = self.dropped = self.cut = self.bad_records = 0

    def __enter__(self) -> "_Writer":
        self.opened = ExitStack()
        self.files: dict[str, _HashedFile] = {}
        self.ids, self.supervised = self._new("ids.bin"), self._new("supervised.bin")
        return self

    def _new(self, name: str) -> "_HashedFile":
        file = open(self.folder / name, "wb")  # noqa: SIM115
        self.files[name] = _HashedFile(self.opened.enter_context(file))
        return self.files[name]

    def extend(self, ids: Ids, supervised: Mask | None = None) -> None:
        """Appends ids to the current example; without a mask all are supervised."""
        mask = np.ones(len(ids), dtype=bool) if supervised is None else np.asarray(supervised, dtype=bool)
        self.ids.write(np.asarray(ids, dtype=self.dtype))
        self.supervised.write(mask)
        self.current_length += len(ids)
        self.tokens += len(ids)
        self.supervised_tokens += int(mask.sum())

    def add(self, ids: Ids, supervised: Mask, prompt_length: int = 0) -> None:
        """Appends ids and finishes the current example."""
        self.extend(ids, supervised)
        self.lengths.append(self.current_length)
        self.prompt_lengths.append(prompt_length)
        self.current_length = 0

    def end(self, paths: Sequence[str], bad_records: Sequence[str]) -> None:
        """Records the number of bad records. Raises `ValueError`, naming the first, if there were no good ones."""
        self.bad_records = len(bad_records)
        if not self.lengths:
            bad = f" but bad records ({len(bad_records)}), the first {bad_records[0]}" if bad_records else ""
            raise ValueError(f"{', '.join(map(str, paths))}: nothing{bad}")

    def __exit__(self, error_type: type[BaseException] | None, *_: Any) -> None:
        self.bar.close()
        with self.opened:
            if error_type is None:
                self._finish()

    def _finish(self) -> None:
        """Writes the files that need all lengths: offsets, prompt lengths and meta.json."""
        lengths = np.array(self.lengths, dtype=np.int64)
        self._new("offsets.bin").write(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
        self._new("prompt_lengths.bin").write(np.array(self.prompt_lengths, dtype=np.int64))
        p50, p95, longest = np.percentile(lengths, [50, 95, 100], method="nearest")
        stats = StoreStats(
            examples=len(lengths),
            tokens=self.tokens,
            supervised_tokens=self.supervised_tokens,
            length_p50=int(p50),
            length_p95=int(p95),
            length_max=int(longest),
            dropped=self.dropped,
            cut=self.cut,
            bad_records=self.bad_records,
        )
        files = {name: {"bytes": file.bytes, "sha256": file.digest.hexdigest()} for name, file in self.files.items()}
        meta = {"dtype": str(self.dtype), "stats": asdict(stats), "files": files}
        content = json.dumps({**meta, "sha256": _sha256_of_meta(meta)}, indent=2)
        (self.folder / "meta.json").write_text(content, encoding="utf-8")
