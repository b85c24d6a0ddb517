"""Building a token store: whole or not at all, by one of many processes, in bounded memory."""

import fcntl
import json
import os
import platform
import random
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest

from minigpt.data import store as module
from minigpt.data.prompts import get_template
from minigpt.data.store import TokenStore, build_store, build_text_store
from minigpt.data.tokenizer import Tokenizer

TOKENIZER = Tokenizer.tiny()
ROWS = [{"instruction": f"Name {n}.", "input": "", "output": f"It is {n}."} for n in range(30)]


def write(path: Path, rows) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


def build(path: str, cache: Path) -> TokenStore:
    return build_store([path], get_template("io"), TOKENIZER, 64, cache_dir=cache)


def test_a_bad_record_leaves_nothing(tmp_path, cache):
    path = write(tmp_path / "data.jsonl", [*ROWS, {"instruction": "Name it."}])
    with pytest.raises(ValueError, match=r'data\.jsonl:31: "output" is missing'):
        build(path, cache)
    assert list((cache / "stores").iterdir()) == []
    with pytest.raises(ValueError, match=r"data\.jsonl:31: "):
        build_text_store([write(tmp_path / "data.jsonl", [{"text": "a"}] * 30 + ["{"])], TOKENIZER, cache_dir=cache)
    assert list((cache / "stores").iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_a_failed_build_leaves_nothing(error, tmp_path, cache, monkeypatch):
    path, whole = write(tmp_path / "data.jsonl", ROWS), []
    for name in ("extend", "__exit__"):
        with monkeypatch.context() as patched, pytest.raises(BaseException) as caught:
            patched.setattr(module._Writer, name, raises_after(getattr(module._Writer, name), error))
            build(path, cache)
        assert caught.type is (error if isinstance(error, type) else OSError)
        whole.append(list((cache / "stores").iterdir()))
    assert whole == [[], []]
    assert len(build(path, cache)) == 30


def raises_after(method, error):
    """The method, which does its work and then fails."""

    def failing(*args):
        method(*args)
        raise error

    return failing


def test_a_place_that_cannot_be_taken_is_an_error(tmp_path, cache, monkeypatch):
    def rename(self, target):
        raise OSError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="Permission denied"):
        build(write(tmp_path / "data.jsonl", ROWS), cache)
    assert list((cache / "stores").iterdir()) == []


def test_the_slower_of_two_machines_takes_what_the_faster_built(tmp_path, cache, monkeypatch):
    """Some network file systems keep a lock to the machine that took it, so that one on each machine builds."""
    path, fit_example = write(tmp_path / "data.jsonl", ROWS), module.fit_example
    built = []

    def overtaken(*args):
        if not built:
            built.append(None)
            with monkeypatch.context() as patched:
                patched.setattr(platform, "node", lambda: "another-machine")
                built[0] = build(path, cache)
        return fit_example(*args)

    monkeypatch.setattr(module, "_try_lock", lambda path: nullcontext(True))
    monkeypatch.setattr(module, "fit_example", overtaken)
    store = build(path, cache)
    assert store.folder == built[0].folder
    assert store.ids.tolist() == built[0].ids.tolist()
    assert list((cache / "stores").iterdir()) == [store.folder]


# ---- by several processes at once


def test_a_lock_file_is_held_by_one_and_goes_with_it(tmp_path):
    path = tmp_path / ".lock"
    with module._try_lock(path) as first:
        with module._try_lock(path) as second:
            assert (first, second) == (True, False)
        assert path.exists()
    assert not path.exists()


@pytest.mark.parametrize("made_again", [False, True])
def test_a_lock_on_a_file_that_was_removed_is_none(made_again, tmp_path, monkeypatch):
    """Opened, then removed by its holder, then locked: a third process may hold the file that has the name now."""
    path = tmp_path / ".lock"

    def late(file, operation):
        path.unlink()
        if made_again:
            path.touch()
        flock(file, operation)

    flock = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", late)
    with module._try_lock(path) as locked:
        assert not locked
    assert path.exists() == made_again


def test_a_store_that_comes_just_before_the_lock_is_taken(tmp_path, cache, monkeypatch):
    path, try_lock, built = write(tmp_path / "data.jsonl", ROWS), module._try_lock, []

    def late(lock):
        monkeypatch.setattr(module, "_try_lock", try_lock)
        built.append(build(path, cache).folder)
        monkeypatch.setattr(module, "_build", None)
        return try_lock(lock)

    monkeypatch.setattr(module, "_try_lock", late)
    assert [build(path, cache).folder] == built == list((cache / "stores").iterdir())


BUILD = """
import os, sys, time
from pathlib import Path
from minigpt.data import store as module
from minigpt.data.prompts import get_template
from minigpt.data.tokenizer import Tokenizer

path, cache, log = sys.argv[1:4]
module.PATIENCE = 0.1

class Writer(module._Writer):
    def __enter__(self):
        with open(log, "a") as file:
            file.write(f"{os.getpid()}\\n")
        return super().__enter__()

module._Writer = Writer

def build():
    return module.build_store([path], get_template("io"), Tokenizer.tiny(), 64, cache_dir=cache)
"""
HANG = "Writer.add = lambda *args: time.sleep(3600)\nbuild()"
PRINT = "store = build()\nprint(store.folder, len(store))"


def start(code: str, *arguments, rank: int = 0) -> subprocess.Popen:
    root = str(Path(module.__file__).parents[2])
    command = [sys.executable, "-c", BUILD + code, *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": root, "RANK": str(rank)}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> tuple[str, str]:
    try:
        return process.communicate(timeout=60)
    finally:
        process.kill()


def builders(log: Path, count: int = 0) -> list[int]:
    """The processes that have begun to build, in this order; waits until there are as many."""
    deadline = time.monotonic() + 60
    while len(pids := log.read_text().split() if log.exists() else []) < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return [int(pid) for pid in pids]


def test_of_four_processes_one_builds(tmp_path, cache):
    path, log = write(tmp_path / "data.jsonl", ROWS), tmp_path / "log"
    slow = "fit = module.fit_example\nmodule.fit_example = lambda *args: time.sleep(0.02) or fit(*args)\n"
    wait = "while not Path(sys.argv[4]).exists(): time.sleep(0.001)\n"
    processes = [start(slow + wait + PRINT, path, cache, log, tmp_path / "go", rank=1) for _ in range(4)]
    time.sleep(0.5)
    (tmp_path / "go").touch()
    printed = [finish(process)[0] for process in processes]
    [folder] = (cache / "stores").iterdir()
    assert printed == [f"{folder} 30\n"] * 4
    assert len(builders(log)) == 1


AT_ONCE = """
try_lock = module._try_lock

def late(lock):
    module._try_lock = try_lock
    Path(f"{log}.found-{os.getpid()}").touch()
    while not Path(f"{log}.go").exists():
        time.sleep(0.001)
    return try_lock(lock)

module._try_lock = late
"""


def test_of_three_processes_that_find_a_damaged_store_one_replaces_it(tmp_path, cache):
    """All have found it damaged before the first takes the lock, so two take it when nothing is left to do."""
    path, log = write(tmp_path / "data.jsonl", ROWS), tmp_path / "log"
    folder = build(path, cache).folder
    whole = {file.name: file.read_bytes() for file in folder.iterdir()}
    (folder / "ids.bin").write_bytes(bytes(len(whole["ids.bin"])))
    processes = [start(AT_ONCE + PRINT, path, cache, log, rank=rank) for rank in range(3)]
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("log.found-*"))) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    (tmp_path / "log.go").touch()
    outputs, errors = zip(*[finish(process) for process in processes], strict=True)
    assert [output.splitlines()[-1] for output in outputs] == [f"{folder} 30"] * 3  # after a word about a long wait
    assert len(builders(log)) == 1
    assert "".join(errors) == (
        f"{folder}: damaged (ids.bin is not what was written: its sha256 differs): rebuilding it\n"
    )
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == whole
    assert list((cache / "stores").iterdir()) == [folder]


def test_a_killed_builder_is_replaced(tmp_path, cache):
    path, log = write(tmp_path / "data.jsonl", ROWS), tmp_path / "log"
    killed = start(HANG, path, cache, log)
    builders(log, 1)
    waiting = [start(PRINT, path, cache, log, rank=rank) for rank in (0, 1)]
    told = waiting[0].stdout.readline()
    time.sleep(0.5)
    assert [process.poll() for process in waiting] == [None, None]
    assert builders(log) == [killed.pid]
    killed.kill()
    printed = [finish(process)[0] for process in (killed, *waiting)]
    [folder] = (cache / "stores").iterdir()
    assert told == f"Waiting for another process, which is tokenizing the same data into {folder}\n"
    assert printed == ["", f"{folder} 30\n", f"{folder} 30\n"]
    assert len(builders(log)) == 2
    fresh = build(path, tmp_path / "fresh")
    assert folder.name == fresh.folder.name
    for file in fresh.folder.iterdir():
        assert (folder / file.name).read_bytes() == file.read_bytes()


def test_what_a_killed_builder_left_goes_with_the_next_build(tmp_path, cache):
    """Of the same data or of other data; but not what a living one is building."""
    path, log = write(tmp_path / "data.jsonl", ROWS), tmp_path / "log"
    dead, living = [
        start(HANG, write(tmp_path / f"{name}.jsonl", ROWS[n:]), cache, log)
        for n, name in enumerate(["dead", "alive"], 1)
    ]
    builders(log, 2)
    before = set((cache / "stores").iterdir())
    assert len(before) == 4  # a lock and a folder each
    dead.kill()
    finish(dead)
    store = build(path, cache)
    left = set((cache / "stores").iterdir()) - {store.folder}
    assert len(left) == 2 and left < before
    living.kill()
    finish(living)
    assert [len(build(str(tmp_path / name), cache)) for name in ("dead.jsonl", "alive.jsonl")] == [29, 28]
    assert len(list((cache / "stores").iterdir())) == 3


def test_all_processes_fail_at_a_bad_record(tmp_path, cache):
    path, log = write(tmp_path / "data.jsonl", [*ROWS, {"instruction": "Name it."}]), tmp_path / "log"
    processes = [start(PRINT, path, cache, log) for _ in range(3)]
    last_lines = [finish(process)[1].splitlines()[-1] for process in processes]
    assert last_lines == [f'ValueError: {path}:31: "output" is missing, found "instruction"'] * 3
    assert len(builders(log)) == 3
    assert list((cache / "stores").iterdir()) == []


MEASURE = """
def peak():
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) // 1024

Tokenizer.tiny().encode("warm")
before = peak()
store = build()
print(len(store), peak() - before, peak())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
@pytest.mark.parametrize(
    ("megabytes", "growth"),
    [
        (16, 30),
        pytest.param(80, 40, marks=pytest.mark.slow),
        pytest.param(2048, 300, marks=pytest.mark.slow),
    ],
)
def test_memory_is_bounded(megabytes, growth, tmp_path, cache):
    draw, rows = random.Random(0), []
    words = (Path(module.__file__).parents[1] / "assets" / "english.txt").read_text(encoding="utf-8").split()
    for _ in range(1800):
        some = [" ".join(draw.choices(words, k=draw.randint(1, most))) for most in (40, 120)]
        rows.append({"instruction": some[0], "output": some[1]})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    copies = (megabytes << 20) // len(lines)
    with open(tmp_path / "data.jsonl", "w") as file:
        for _ in range(copies):
            file.write(lines)
    process = start(MEASURE, tmp_path / "data.jsonl", cache, tmp_path / "log")
    length, grown, peak = map(int, process.communicate(timeout=3000)[0].split())
    assert length == 1800 * copies
    assert grown < growth
    assert peak < 1024
