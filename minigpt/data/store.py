"""The token store: a corpus as ids on disk, built once, memory-mapped.

It is built in one pass with bounded memory, so a corpus may be larger than RAM. Its folder is named by a hash of
what it was built from (the files' bytes, the template, the tokenizer, the lengths), so a stale one is never read.
Of all processes that want it, the ranks of one run or several runs, one builds it and the others wait at a lock file.

    ids.bin             uint16, or uint32 for a vocabulary of more than 65,536: every example's ids, end to end
    supervised.bin      bool: whether an id is learned, one for each
    offsets.bin         int64: where in ids.bin each example begins, and the last one ends
    prompt_lengths.bin  int64: how many ids of each example are prompt
    meta.json           the statistics; size and sha256 of each file above, and of meta.json itself

A store is written to the disk before it gets its name, and checked whenever it is opened; a damaged one is rebuilt.
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

KEY_VERSION = "0.1.0"  # of the tokenization; a change makes new stores
FORMAT = 1  # of the files above; a change makes new stores, whose runs do not resume from checkpoints made before
PATIENCE = 5.0  # seconds to wait for another process before a line says so
LOST = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO, errno.ESTALE}  # errors that building the store repairs


@dataclass(frozen=True)
class StoreStats:
    """What building a store came to."""

    examples: int
    tokens: int
    supervised_tokens: int
    length_p50: int
    length_p95: int
    length_max: int
    dropped: int
    """Conversations with no supervised token left, or nothing supervised from the start."""
    cut: int
    """Conversations that lost turns, the left of the prompt or the right of the answer."""
    bad_records: int

    def __str__(self) -> str:
        return (
            f"{self.examples:,} examples, {self.tokens:,} tokens ({self.supervised_tokens:,} supervised), "
            f"lengths p50 {self.length_p50:,} p95 {self.length_p95:,} max {self.length_max:,}; "
            f"{self.dropped:,} dropped, {self.cut:,} cut, {self.bad_records:,} bad records"
        )


class DamagedStoreError(ValueError):
    """A store's files are not what was written; the message names the file and what is wrong with it."""


class TokenStore(Sequence[Example]):
    """Examples on disk. Reading one touches its pages and no more.

    Opening reads all files once and compares their sums, in every process: nothing cheaper finds a file of the right
    size whose ids are all zero. It takes two fifths of the time of `_key`, which hashes the source in every process:
    the source is larger (about 4 bytes a token; a store has 3), and its hash is slower.

    Raises:
        DamagedStoreError: a file is missing, cannot be read or is not what was written; or the store was built by a
            version that kept no sums.
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
            raise DamagedStoreError("meta.json has another form, as written by another version") from error
        self.lengths = np.diff(self.offsets)
        self.fingerprint = folder.name

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: Any) -> Any:
        index = range(len(self))[index]  # refuses what lies outside
        span = slice(self.offsets[index], self.offsets[index + 1])
        return Example(self.ids[span], self.supervised[span])


class TokenBlocks(Sequence[Example]):
    """A stretch of a store's tokens as blocks of `block_size` positions, every `stride` tokens one.

    A block has one token more than positions, because the shift eats one, so neighbours share a token at
    `stride` = `block_size` and nothing goes unlearnt. The last block is as long as what is left.
    """

    def __init__(
        self, store: TokenStore, block_size: int, stride: int | None = None, start: int = 0, stop: int | None = None
    ):
        self.ids = store.ids[start:stop]
        self.block_size = block_size
        self.stride = block_size if stride is None else stride
        if not 1 <= self.stride <= block_size:
            raise ValueError(
                f"--stride {stride} must lie between 1 and --block_size {block_size}, or tokens are skipped"
            )
        self.starts = np.arange(0, max(0, len(self.ids) - 1), self.stride)
        if len(self.starts) > 1:  # blocks behind the first that reaches the end would only repeat it
            self.starts = self.starts[: 1 + int(np.argmax(self.starts + block_size >= len(self.ids) - 1))]
        self.lengths = np.minimum(self.starts + block_size + 1, len(self.ids)) - self.starts
        self.fingerprint = f"{store.fingerprint} {start} {stop} {block_size} {self.stride}"

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: Any) -> Any:
        ids = self.ids[self.starts[index] : self.starts[index] + self.block_size + 1]
        return Example(ids, np.ones(len(ids), dtype=bool))


class Subset(Sequence[Example]):
    """Some of a store's examples."""

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
    """Training and validation examples, drawn at random; at least one of each where there are two."""
    order = np.random.default_rng(seed).permutation(len(data))
    held_out = min(max(1, round(len(data) * validation_split)), len(data) - 1) if validation_split > 0 else 0
    return Subset(data, np.sort(order[held_out:])), Subset(data, np.sort(order[:held_out]))


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
    """The store of a set of conversations: found where it was built before, else built; rebuilt if damaged.

    Args:
        paths: whatever `read_records` reads.
        template, tokenizer, max_seq_length, train_on_prompt: as for `encode_example`.
        skip_bad_records: how many bad records to pass over before giving up.
        cache_dir: where stores are kept; None is `~/.cache/minigpt`, or what `MINIGPT_CACHE` names.

    Raises:
        ValueError: a bad record, named with its file and line; or no record has anything to learn.
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
    """The store of raw text: every document verbatim, an end-of-text token after each.

    A document is encoded in pieces that are cut where the tokenizer always cuts, so a file of any size will do.

    Raises:
        ValueError: a bad record, named with its file and line; or there is no other.
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
    """What meta.json holds, if it is what was written."""
    try:
        with _lost_is_damaged("meta.json"):
            meta = json.loads((folder / "meta.json").read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DamagedStoreError("meta.json is not JSON") from error
    if not isinstance(meta, dict) or "sha256" not in meta:
        raise DamagedStoreError("meta.json has no sums, as written by an earlier version")
    if meta.pop("sha256") != _sum_of_meta(meta):
        raise DamagedStoreError("meta.json is not what was written: its sha256 differs")
    return meta


def _sum_of_meta(meta: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _map(path: Path, dtype: np.dtype, meta: dict[str, Any]) -> np.ndarray:
    """A file's numbers, mapped into memory, if it is what was written.

    It is opened once, so that the bytes that are mapped are those that were summed, even if another process replaces
    the store in between.
    """
    written = meta["files"][path.name]
    with _lost_is_damaged(path.name), open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size != written["bytes"]:
            raise DamagedStoreError(f"{path.name} has {size:,} bytes instead of {written['bytes']:,}")
        if hashlib.file_digest(file, "sha256").hexdigest() != written["sha256"]:
            raise DamagedStoreError(f"{path.name} is not what was written: its sha256 differs")
        return np.memmap(file, dtype, "r") if size else np.empty(0, dtype)


@contextmanager
def _lost_is_damaged(name: str) -> Iterator[None]:
    """Turns the error of a missing or unreadable file into `DamagedStoreError`; not one of permissions, say."""
    try:
        yield
    except OSError as error:
        if error.errno not in LOST:
            raise
        raise DamagedStoreError(f"{name} cannot be read: {error.strerror}") from error


def _key(files: Iterable[Path], *settings: Any) -> str:
    """A hash of the files' bytes and of everything else that the ids depend on."""
    digest = hashlib.blake2b(json.dumps([KEY_VERSION, FORMAT, *settings], sort_keys=True).encode(), digest_size=16)
    for path in files:
        digest.update(b"text" if is_raw_text(path) else b"json")  # the same bytes are read otherwise under .txt
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
    """The store of this key; if there is none, or it is damaged, one process builds it and the others wait.

    The builder holds a lock of the operating system, which is freed when its process ends: if it is killed, one of
    those that wait takes its place. They wait in no collective call, which could time out.
    """
    root = Path(cache_dir or os.environ.get("MINIGPT_CACHE") or Path.home() / ".cache" / "minigpt") / "stores"
    folder = root / key
    built = told = False
    while True:
        seen, damage = _stamp(folder), ""
        if seen:
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
        while not locked and _stamp(folder) == seen:  # if it changed, another process did that: open it again
            try:
                with writing_to(root, "--cache_dir"):
                    root.mkdir(parents=True, exist_ok=True)
                    with _try_lock(root / f".{key}.lock") as locked:
                        if locked and _stamp(folder) == seen:  # it may have changed since the look above
                            if damage:  # not `say`: the process that holds the lock may be any rank
                                print(f"{folder}: damaged ({damage}): rebuilding it", file=sys.stderr, flush=True)
                            _build(folder, tokenizer, files, fill)
                            built = True
            except OSError as error:
                if not damage:
                    raise
                raise OSError(f"{folder}: damaged ({damage}), and cannot be rebuilt: {error}") from error
            if not locked:
                waited = time.monotonic() - started
                if waited > PATIENCE and not told:
                    print0(f"Waiting for another process, which is tokenizing the same data into {folder}")
                    told = True
                time.sleep(min(1.0, 0.05 + waited))  # soon at first: a small corpus takes no second


def _stamp(folder: Path) -> tuple[int, int] | None:
    """Inode and time of the folder, which change if a store appears, vanishes or is replaced.

    So a waiting process need not sum a damaged store again every second.
    """
    try:
        status = folder.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_ino, status.st_mtime_ns


@contextmanager
def _try_lock(path: Path) -> Iterator[bool]:
    """Holds a lock file, and removes it at the end; False where another process holds it."""
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = os.path.samestat(os.fstat(file.fileno()), path.stat())
        except (BlockingIOError, FileNotFoundError):
            locked = False
        try:
            yield locked  # a file that its last holder removed, after it was opened here, locks nothing: False too
        finally:
            if locked:
                path.unlink(missing_ok=True)


def _build(folder: Path, tokenizer: Tokenizer, files: Sequence[Path], fill: Callable[["_Writer"], None]) -> None:
    """Fills a temporary folder, waits until it is on the disk, and renames it to `folder`. The caller holds the lock.

    A damaged store is removed first: there may be no space for two, and if it cannot be removed, that is found before
    the work.
    """
    # by machine: where a network file system keeps locks to each machine, two may build the same at once
    ending = f".{platform.node()}.building"
    temporary = folder.with_name(f".{folder.name}{ending}")
    for left in folder.parent.glob(f".*{ending}"):  # by builders that were killed
        with _try_lock(left.with_name(left.name.removesuffix(ending) + ".lock")) as dead:
            if dead or left == temporary:
                shutil.rmtree(left, ignore_errors=True)
    temporary.mkdir()  # before the removal, or it could get the inode by which `_stamp` tells them apart
    try:
        _remove_damaged(folder, folder.with_name(f".{folder.name}.damaged{ending}"))
        with _Writer(temporary, tokenizer, sum(path.stat().st_size for path in files)) as writer:
            fill(writer)
        for path in [*temporary.iterdir(), temporary]:
            to_disk(path)
        try:
            temporary.rename(folder)
        except OSError:  # another machine was faster, and built the same
            if not folder.is_dir():
                raise
        to_disk(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _remove_damaged(folder: Path, aside: Path) -> None:
    """Removes the folder, if there is one. A process that has its files mapped keeps them until it ends."""
    try:
        folder.rename(aside)  # atomic; and on a network file system a folder with files in use cannot be removed
    except FileNotFoundError:  # there is none; or another machine removed it
        return
    except OSError as error:
        if error.errno != errno.EXDEV:  # which overlayfs says of every folder of a container's image
            raise
        remove(folder)
    with suppress(OSError):  # the next build tries again
        remove(aside)


class _SummedFile:
    """A new file, and the size and sum of the bytes written, which a failing disk may not give back."""

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
    """Appends examples to a store's files."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, total_bytes: int):
        self.folder = folder
        self.dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
        self.bar = progress_bar(total_bytes, "B", "tokenizing", unit_scale=True)
        self.lengths, self.prompt_lengths = array("q"), array("q")  # 8 bytes an example; a list takes 40
        self.begun = 0  # ids of the example that is being written
        self.tokens = self.supervised_tokens = self.dropped = self.cut = self.bad_records = 0

    def __enter__(self) -> "_Writer":
        self.opened = ExitStack()
        self.files: dict[str, _SummedFile] = {}
        self.ids, self.supervised = self._new("ids.bin"), self._new("supervised.bin")
        return self

    def _new(self, name: str) -> "_SummedFile":
        file = open(self.folder / name, "wb")  # noqa: SIM115
        self.files[name] = _SummedFile(self.opened.enter_context(file))
        return self.files[name]

    def extend(self, ids: Ids, supervised: Mask | None = None) -> None:
        """Adds to the example that is being written."""
        mask = np.ones(len(ids), dtype=bool) if supervised is None else np.asarray(supervised, dtype=bool)
        self.ids.write(np.asarray(ids, dtype=self.dtype))
        self.supervised.write(mask)
        self.begun += len(ids)
        self.tokens += len(ids)
        self.supervised_tokens += int(mask.sum())

    def add(self, ids: Ids, supervised: Mask, prompt_length: int = 0) -> None:
        """Adds, and ends the example."""
        self.extend(ids, supervised)
        self.lengths.append(self.begun)
        self.prompt_lengths.append(prompt_length)
        self.begun = 0

    def end(self, paths: Sequence[str], bad_records: Sequence[str]) -> None:
        """Counts the bad records; a `ValueError` that names the first one where there was nothing else."""
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
        """Writes what is known at the end only."""
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
        content = json.dumps({**meta, "sha256": _sum_of_meta(meta)}, indent=2)
        (self.folder / "meta.json").write_text(content, encoding="utf-8")
