"""A damaged token store is detected when it is opened, and rebuilt; and a build is synced to disk before its rename."""

import errno
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from minigpt.data import store as module
from minigpt.data.prompts import get_template
from minigpt.data.store import DamagedStoreError, TokenStore, _sha256_of_meta, build_store, build_text_store
from minigpt.data.tokenizer import Tokenizer

TOKENIZER = Tokenizer.tiny()
FILES = ("ids.bin", "supervised.bin", "offsets.bin", "prompt_lengths.bin", "meta.json")


@pytest.fixture
def path(tmp_path) -> str:
    rows = [{"instruction": f"Name {n}.", "input": "", "output": f"It is {n}."} for n in range(30)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "data.jsonl")


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


def build(path: str, cache: Path) -> TokenStore:
    return build_store([path], get_template("io"), TOKENIZER, 64, cache_dir=cache)


@pytest.fixture
def builds(monkeypatch) -> list:
    """Grows by one for each build."""
    calls, writer = [], module._Writer
    monkeypatch.setattr(module, "_Writer", lambda *args: calls.append(args) or writer(*args))
    return calls


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def flip(file: Path, index: int) -> None:
    """Flips one bit of the byte at this index."""
    content = bytearray(file.read_bytes())
    content[index] ^= 1
    file.write_bytes(content)


def in_the_middle(file: Path) -> None:
    middle = file.stat().st_size // 2
    flip(file, next(n for n in range(middle, middle + 100) if not file.read_bytes()[n : n + 1].isspace()))


def folder_instead(file: Path) -> None:
    file.unlink()
    file.mkdir()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "removed": Path.unlink,
    "emptied": lambda file: os.truncate(file, 0),
    "halved": lambda file: os.truncate(file, file.stat().st_size // 16 * 8),  # a multiple of 8 bytes
    "a byte short": lambda file: os.truncate(file, file.stat().st_size - 1),
    "extended": lambda file: file.write_bytes(file.read_bytes() + bytes(8)),
    "zeroed": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "the first bit": lambda file: flip(file, 0),
    "a bit in the middle": in_the_middle,
    "the last bit": lambda file: flip(file, -1),
    "replaced by a folder": folder_instead,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_any_damage_is_detected_and_the_store_rebuilt(name, damage, path, cache, builds, capfd):
    store = build(path, cache)
    folder, intact = store.folder, contents(store.folder)
    del store
    DAMAGES[damage](folder / name)
    with pytest.raises(
        DamagedStoreError, match=f"^{name} (is not JSON|has [0-9]|has no|has a wrong sha256|cannot be read)"
    ):
        TokenStore(folder)
    again = build(path, cache)
    assert again.folder == folder
    assert contents(folder) == intact
    assert sum(len(example) for example in again) == again.stats.tokens
    assert capfd.readouterr().err.startswith(f"{folder}: damaged ({name} ")
    assert len(builds) == 2
    assert list((cache / "stores").iterdir()) == [folder]
    build(path, cache)
    assert len(builds) == 2
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("valid_sha256", [False, True])
@pytest.mark.parametrize("key", ["dtype", "stats", "files", "sha256"])
def test_meta_json_without_a_key_is_damaged(key, valid_sha256, path, cache, builds):
    """Also with a correct sha256: another version wrote it."""
    folder = build(path, cache).folder
    meta = json.loads((folder / "meta.json").read_text())
    del meta[key]
    if valid_sha256 and "sha256" in meta:
        del meta["sha256"]
        meta["sha256"] = _sha256_of_meta(meta)
    (folder / "meta.json").write_text(json.dumps(meta))
    assert len(build(path, cache)) == 30
    assert len(builds) == 2


def test_a_file_of_another_store_is_damage(path, cache, builds, tmp_path):
    """Even if it has the same size and is intact itself."""
    store = build(path, cache)
    ids = store.ids.tolist()
    (tmp_path / "other.jsonl").write_text(Path(path).read_text().replace("Name", "Tell"))
    other = build(str(tmp_path / "other.jsonl"), cache)
    assert (other.offsets.tolist(), other.stats) == (store.offsets.tolist(), store.stats)
    shutil.copy(other.folder / "ids.bin", store.folder)
    assert build(path, cache).ids.tolist() == ids
    assert len(builds) == 3


def test_a_file_in_place_of_the_store_folder_is_replaced(path, cache):
    folder = build(path, cache).folder
    shutil.rmtree(folder)
    folder.touch()
    assert len(build(path, cache)) == 30
    assert list((cache / "stores").iterdir()) == [folder]


def test_the_message_names_the_folder_and_the_damage(path, cache, capfd, monkeypatch):
    """Printed on any rank, because any may be the one that rebuilds."""
    monkeypatch.setenv("RANK", "3")
    folder = build(path, cache).folder
    size = (folder / "offsets.bin").stat().st_size
    os.truncate(folder / "offsets.bin", 8)
    build(path, cache)
    flip(folder / "ids.bin", 9)
    build(path, cache)
    assert capfd.readouterr().err.splitlines() == [
        f"{folder}: damaged (offsets.bin has 8 bytes instead of {size}): rebuilding it",
        f"{folder}: damaged (ids.bin has a wrong sha256): rebuilding it",
    ]


def test_an_io_error_is_damage_and_a_permission_error_is_not(path, cache, builds, monkeypatch):
    folder, digest = build(path, cache).folder, hashlib.file_digest

    def fail_once(number):
        def file_digest(file, name):
            if Path(file.name).name == "ids.bin":
                monkeypatch.setattr(hashlib, "file_digest", digest)
                raise OSError(number, os.strerror(number))
            return digest(file, name)

        monkeypatch.setattr(hashlib, "file_digest", file_digest)

    fail_once(errno.EACCES)
    with pytest.raises(PermissionError):
        build(path, cache)
    assert len(builds) == 1
    fail_once(errno.EIO)
    assert build(path, cache).folder == folder
    assert len(builds) == 2


def test_damage_right_after_a_build_is_an_error(path, cache, builds, monkeypatch):
    """A failing disk returns other bytes than were written: without this check the store is rebuilt forever."""
    build_correctly = module._build

    def build_and_damage(folder, *args):
        assert not builds, "built again"
        build_correctly(folder, *args)
        flip(folder / "ids.bin", 0)

    monkeypatch.setattr(module, "_build", build_and_damage)
    with pytest.raises(OSError) as caught:
        build(path, cache)
    [folder] = (cache / "stores").iterdir()
    assert str(caught.value) == (
        f"{folder}: damaged as soon as it was built (ids.bin has a wrong sha256), "
        "so the disk may be failing; --cache_dir chooses another place"
    )
    assert len(builds) == 1


@pytest.mark.parametrize("failing", ["lock", "rename"])
def test_a_damaged_store_that_cannot_be_rebuilt_is_one_error(failing, path, cache, builds, monkeypatch):
    """The error comes before the work."""
    folder = build(path, cache).folder
    flip(folder / "ids.bin", 0)
    damaged = contents(folder)

    def refuse(self, *_):
        raise OSError(errno.EROFS, "Read-only file system", str(self))

    if failing == "lock":
        monkeypatch.setattr(module, "_try_lock", refuse)
    else:
        monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError) as caught:
        build(path, cache)
    assert str(caught.value) == (
        f"{folder}: damaged (ids.bin has a wrong sha256), and cannot be rebuilt: "
        f"{folder.parent}: cannot be written to (Read-only file system); --cache_dir chooses another place"
    )
    assert len(builds) == 1
    assert contents(folder) == damaged


def test_a_damaged_store_in_a_container_image_is_replaced(path, cache, monkeypatch):
    """overlayfs refuses to rename a folder of the image (EXDEV)."""
    folder, rename = build(path, cache).folder, Path.rename
    flip(folder / "ids.bin", 0)

    def refuse(self, target):
        if self == folder:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    assert len(build(path, cache)) == 30
    assert list((cache / "stores").iterdir()) == [folder]


def test_a_mapped_store_stays_valid_when_it_is_replaced(path, cache):
    store = build(path, cache)
    ids = store.ids.tolist()
    os.truncate(store.folder / "supervised.bin", 0)
    again = build(path, cache)
    (again.folder / "ids.bin").write_bytes(bytes(2 * len(ids)))
    assert store.ids.tolist() == ids
    assert not again.ids.any()


def test_a_waiting_process_hashes_a_damaged_store_once_and_opens_its_replacement(
    path, cache, builds, tmp_path, monkeypatch
):
    """Hashing a large store takes minutes. Another machine may replace it while the lock here is still held."""
    folder = build(path, cache).folder
    shutil.copytree(folder, tmp_path / "intact")
    flip(folder / "ids.bin", 0)
    opened, stores = [], []

    class Counted(TokenStore):
        def __init__(self, folder):
            opened.append(folder)
            super().__init__(folder)

    monkeypatch.setattr(module, "TokenStore", Counted)
    with module._try_lock(folder.with_name(f".{folder.name}.lock")):
        waiting = threading.Thread(target=lambda: stores.append(build(path, cache)), daemon=True)
        waiting.start()
        deadline = time.monotonic() + 60
        while not opened:  # a thread may start late on a busy machine
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(1)  # enough for several polls (0.05 s, 0.1 s, ...)
        assert len(opened) == 1
        folder.rename(tmp_path / "damaged")
        (tmp_path / "intact").rename(folder)
        waiting.join(30)
        assert len(stores) == 1
    assert len(builds) == 1


# ---- synced before the rename


def test_all_files_are_synced_before_the_folder_is_renamed(path, cache, monkeypatch):
    """Otherwise a power cut may leave a folder with the final name and empty files."""
    events, fsync, rename = [], os.fsync, Path.rename

    def recorded_fsync(descriptor):
        status = os.fstat(descriptor)
        events.append((status.st_ino, status.st_size))
        fsync(descriptor)

    def recorded_rename(self, target):
        try:
            return rename(self, target)
        finally:
            if self.exists() or Path(target).exists():  # not the attempt to move a damaged store that does not exist
                events.append("renamed")

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(Path, "rename", recorded_rename)
    folder = build(path, cache).folder
    before, after = events[: events.index("renamed")], events[events.index("renamed") + 1 :]
    sizes = dict(before)
    assert sorted(file.name for file in folder.iterdir()) == sorted(FILES)
    assert all(
        sizes[file.stat().st_ino] == file.stat().st_size for file in folder.iterdir()
    )  # synced with their full size
    assert folder.stat().st_ino in sizes
    assert [inode for inode, _ in after] == [folder.parent.stat().st_ino]


# ---- stores of earlier versions


def test_the_cache_key_has_not_changed(tmp_path, monkeypatch):
    """Checkpoints contain the key: with another one their runs would not resume."""
    monkeypatch.setattr(module, "KEY_VERSION", "1")
    (tmp_path / "a.txt").write_text("Once upon a time.\n")
    (tmp_path / "b.jsonl").write_text('{"text": "Once upon a time."}\n')
    files = [tmp_path / "a.txt", tmp_path / "b.jsonl"]
    assert module._key(files, "text", "tokenizer", 0) == "f71052540a56031d13d65b063ac8eba5"


def test_a_store_without_sha256_is_rebuilt_under_the_same_key(tmp_path, cache, builds, capfd):
    (tmp_path / "corpus.txt").write_text("Once upon a time. " * 40)

    def text_store():
        return build_text_store([str(tmp_path / "corpus.txt")], TOKENIZER, cache_dir=cache)

    store = text_store()
    ids, fingerprint, intact = store.ids.tolist(), store.fingerprint, contents(store.folder)
    meta = json.loads(intact["meta.json"])
    old = {"dtype": meta["dtype"], "stats": meta["stats"]}
    (store.folder / "meta.json").write_text(json.dumps(old, indent=2))
    again = text_store()
    assert (again.ids.tolist(), again.fingerprint) == (ids, fingerprint)
    assert contents(store.folder) == intact
    assert np.array_equal(again.supervised, np.ones(len(ids), dtype=bool))
    assert len(builds) == 2
    assert capfd.readouterr().err == (
        f"{store.folder}: damaged (meta.json has no sha256, as written by an earlier version): rebuilding it\n"
    )
