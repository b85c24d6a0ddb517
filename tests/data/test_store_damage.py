"""A damaged token store: found at opening, whatever the damage is, and rebuilt; and what keeps one from coming."""

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
from minigpt.data.store import DamagedStoreError, TokenStore, _sum_of_meta, build_store, build_text_store
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
    """Grows by one whenever a store is filled."""
    found, writer = [], module._Writer
    monkeypatch.setattr(module, "_Writer", lambda *args: found.append(args) or writer(*args))
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def flip(file: Path, place: int) -> None:
    """One bit of one byte."""
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def in_the_middle(file: Path) -> None:
    place = file.stat().st_size // 2
    flip(file, next(n for n in range(place, place + 100) if not file.read_bytes()[n : n + 1].isspace()))


def folder_instead(file: Path) -> None:
    file.unlink()
    file.mkdir()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "removed": Path.unlink,
    "emptied": lambda file: os.truncate(file, 0),
    "halved": lambda file: os.truncate(file, file.stat().st_size // 16 * 8),  # whole numbers stay
    "a byte short": lambda file: os.truncate(file, file.stat().st_size - 1),
    "extended": lambda file: file.write_bytes(file.read_bytes() + bytes(8)),
    "zeroed": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "the first bit": lambda file: flip(file, 0),
    "a bit in the middle": in_the_middle,
    "the last bit": lambda file: flip(file, -1),
    "a folder": folder_instead,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_found_and_the_store_built_anew(name, damage, path, cache, builds, capfd):
    store = build(path, cache)
    folder, whole = store.folder, contents(store.folder)
    del store
    DAMAGES[damage](folder / name)
    with pytest.raises(DamagedStoreError, match=f"^{name} (is not|has [0-9no]+|cannot be read)"):
        TokenStore(folder)
    again = build(path, cache)
    assert again.folder == folder
    assert contents(folder) == whole
    assert sum(len(example) for example in again) == again.stats.tokens
    assert capfd.readouterr().err.startswith(f"{folder}: damaged ({name} ")
    assert len(builds) == 2
    assert list((cache / "stores").iterdir()) == [folder]
    build(path, cache)
    assert len(builds) == 2
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("sound", [False, True])
@pytest.mark.parametrize("key", ["dtype", "stats", "files", "sha256"])
def test_a_meta_json_that_lacks_a_key_is_damaged(key, sound, path, cache, builds):
    """Also one whose sum is right: another version wrote it."""
    folder = build(path, cache).folder
    meta = json.loads((folder / "meta.json").read_text())
    del meta[key]
    if sound and "sha256" in meta:
        del meta["sha256"]
        meta["sha256"] = _sum_of_meta(meta)
    (folder / "meta.json").write_text(json.dumps(meta))
    assert len(build(path, cache)) == 30
    assert len(builds) == 2


def test_files_of_another_store_are_damage(path, cache, builds, tmp_path):
    """Of the same sizes, and sound in themselves."""
    store = build(path, cache)
    ids = store.ids.tolist()
    (tmp_path / "other.jsonl").write_text(Path(path).read_text().replace("Name", "Tell"))
    other = build(str(tmp_path / "other.jsonl"), cache)
    assert (other.offsets.tolist(), other.stats) == (store.offsets.tolist(), store.stats)
    shutil.copy(other.folder / "ids.bin", store.folder)
    assert build(path, cache).ids.tolist() == ids
    assert len(builds) == 3


def test_a_file_in_place_of_a_store(path, cache):
    folder = build(path, cache).folder
    shutil.rmtree(folder)
    folder.touch()
    assert len(build(path, cache)) == 30
    assert list((cache / "stores").iterdir()) == [folder]


def test_the_line_names_the_folder_and_the_damage(path, cache, capfd, monkeypatch):
    """On every rank: any one may be the first to find it."""
    monkeypatch.setenv("RANK", "3")
    folder = build(path, cache).folder
    size = (folder / "offsets.bin").stat().st_size
    os.truncate(folder / "offsets.bin", 8)
    build(path, cache)
    flip(folder / "ids.bin", 9)
    build(path, cache)
    assert capfd.readouterr().err.splitlines() == [
        f"{folder}: damaged (offsets.bin has 8 bytes instead of {size}): rebuilding it",
        f"{folder}: damaged (ids.bin is not what was written: its sha256 differs): rebuilding it",
    ]


def test_a_sector_that_cannot_be_read_is_damage_and_a_missing_right_is_not(path, cache, builds, monkeypatch):
    folder, digest = build(path, cache).folder, hashlib.file_digest

    def fails_once(number):
        def file_digest(file, name):
            if Path(file.name).name == "ids.bin":
                monkeypatch.setattr(hashlib, "file_digest", digest)
                raise OSError(number, os.strerror(number))
            return digest(file, name)

        monkeypatch.setattr(hashlib, "file_digest", file_digest)

    fails_once(errno.EACCES)
    with pytest.raises(PermissionError):
        build(path, cache)
    assert len(builds) == 1
    fails_once(errno.EIO)
    assert build(path, cache).folder == folder
    assert len(builds) == 2


def test_what_is_damaged_as_soon_as_it_is_built_ends_in_an_error(path, cache, builds, monkeypatch):
    """A disk that gives back other bytes than it was given: without an end, it would be filled for ever."""
    build_whole = module._build

    def build_badly(folder, *args):
        assert not builds, "built again"
        build_whole(folder, *args)
        flip(folder / "ids.bin", 0)

    monkeypatch.setattr(module, "_build", build_badly)
    with pytest.raises(OSError) as caught:
        build(path, cache)
    [folder] = (cache / "stores").iterdir()
    assert str(caught.value) == (
        f"{folder}: damaged as soon as it was built (ids.bin is not what was written: its sha256 differs), "
        "so the disk may be failing; --cache_dir chooses another place"
    )
    assert len(builds) == 1


@pytest.mark.parametrize("place", ["the lock", "the folder"])
def test_a_damaged_store_that_cannot_be_replaced_is_one_error(place, path, cache, builds, monkeypatch):
    """It is found before the work."""
    folder = build(path, cache).folder
    flip(folder / "ids.bin", 0)
    damaged = contents(folder)

    def refuse(self, *_):
        raise OSError(errno.EROFS, "Read-only file system", str(self))

    if place == "the lock":
        monkeypatch.setattr(module, "_try_lock", refuse)
    else:
        monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError) as caught:
        build(path, cache)
    assert str(caught.value) == (
        f"{folder}: damaged (ids.bin is not what was written: its sha256 differs), and cannot be rebuilt: "
        f"{folder.parent}: cannot be written to (Read-only file system); --cache_dir chooses another place"
    )
    assert len(builds) == 1
    assert contents(folder) == damaged


def test_a_damaged_store_in_a_containers_image_is_replaced(path, cache, monkeypatch):
    """Overlayfs refuses to rename a folder of the image."""
    folder, rename = build(path, cache).folder, Path.rename
    flip(folder / "ids.bin", 0)

    def refuse(self, target):
        if self == folder:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    assert len(build(path, cache)) == 30
    assert list((cache / "stores").iterdir()) == [folder]


def test_who_has_the_old_files_mapped_keeps_them(path, cache):
    store = build(path, cache)
    ids = store.ids.tolist()
    os.truncate(store.folder / "supervised.bin", 0)
    again = build(path, cache)
    (again.folder / "ids.bin").write_bytes(bytes(2 * len(ids)))
    assert store.ids.tolist() == ids
    assert not again.ids.any()


def test_those_that_wait_sum_a_damaged_store_once_and_take_its_successor_when_it_comes(
    path, cache, builds, tmp_path, monkeypatch
):
    """Summing a large one takes minutes. Its successor may be another machine's, whatever becomes of the lock here."""
    folder = build(path, cache).folder
    shutil.copytree(folder, tmp_path / "whole")
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
        while not opened:  # on a busy machine a thread may start late
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(1)  # it looks again after 0.05 s, 0.1 s, ...
        assert len(opened) == 1
        folder.rename(tmp_path / "damaged")
        (tmp_path / "whole").rename(folder)
        waiting.join(30)
        assert len(stores) == 1
    assert len(builds) == 1


# ---- on the disk before it has its name


def test_all_of_it_is_on_the_disk_before_it_gets_its_name(path, cache, monkeypatch):
    """Else a power cut may leave a folder of the right name with empty files."""
    events, fsync, rename = [], os.fsync, Path.rename

    def recorded_fsync(descriptor):
        status = os.fstat(descriptor)
        events.append((status.st_ino, status.st_size))
        fsync(descriptor)

    def recorded_rename(self, target):
        try:
            return rename(self, target)
        finally:
            if self.exists() or Path(target).exists():  # and not a damaged one that was never there
                events.append("renamed")

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(Path, "rename", recorded_rename)
    folder = build(path, cache).folder
    before, after = events[: events.index("renamed")], events[events.index("renamed") + 1 :]
    sizes = dict(before)
    assert sorted(file.name for file in folder.iterdir()) == sorted(FILES)
    assert all(sizes[file.stat().st_ino] == file.stat().st_size for file in folder.iterdir())  # all that is in it
    assert folder.stat().st_ino in sizes
    assert [inode for inode, _ in after] == [folder.parent.stat().st_ino]


# ---- stores that the version before wrote


def test_the_names_of_stores_are_those_of_the_version_before(tmp_path, monkeypatch):
    """A checkpoint holds them: under another name its run would not resume."""
    monkeypatch.setattr(module, "__version__", "1")
    (tmp_path / "a.txt").write_text("Once upon a time.\n")
    (tmp_path / "b.jsonl").write_text('{"text": "Once upon a time."}\n')
    files = [tmp_path / "a.txt", tmp_path / "b.jsonl"]
    assert module._key(files, "text", "tokenizer", 0) == "f71052540a56031d13d65b063ac8eba5"


def test_a_store_without_sums_is_built_anew_under_its_name(tmp_path, cache, builds, capfd):
    (tmp_path / "corpus.txt").write_text("Once upon a time. " * 40)

    def text_store():
        return build_text_store([str(tmp_path / "corpus.txt")], TOKENIZER, cache_dir=cache)

    store = text_store()
    ids, fingerprint, whole = store.ids.tolist(), store.fingerprint, contents(store.folder)
    meta = json.loads(whole["meta.json"])
    old = {"dtype": meta["dtype"], "stats": meta["stats"]}
    (store.folder / "meta.json").write_text(json.dumps(old, indent=2))
    again = text_store()
    assert (again.ids.tolist(), again.fingerprint) == (ids, fingerprint)
    assert contents(store.folder) == whole
    assert np.array_equal(again.supervised, np.ones(len(ids), dtype=bool))
    assert len(builds) == 2
    assert capfd.readouterr().err == (
        f"{store.folder}: damaged (meta.json has no sums, as written by an earlier version): rebuilding it\n"
    )
