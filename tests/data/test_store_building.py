"""Building a token store: atomically, by one of several processes, in bounded memory."""

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


def test_a_bad_record_leaves_no_files(tmp_path, cache):
    path = write(tmp_path / "data.jsonl", [*ROWS, {"instruction": "Name it."}])
    with pytest.raises(ValueError, match=r'data\.jsonl:31: "output" is missing'):
        build(path, cache)
    assert list((cache / "stores").iterdir()) == []
    with pytest.raises(ValueError, match=r"data\.jsonl:31: "):
        build_text_store([write(tmp_path / "data.jsonl", [{"text": "a"}] * 30 + ["{"])], TOKENIZER, cache_dir=cache)
    assert list((cache / "stores").iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_a_failed_build_leaves_no_files(error, tmp_path, cache, monkeypatch):
    path, leftovers = write(tmp_path / "data.jsonl", ROWS), []
    for name in ("extend", "__exit__"):
        with monkeypatch.context() as patched, pytest.raises(BaseException) as caught:
            patched.setattr(module._Writer, name, raises_after(getattr(module._Writer, name), error))
            build(path, cache)
        assert caught.type is (error if isinstance(error, type) else OSError)
        leftovers.append(list((cache / "stores").iterdir()))
    assert leftovers == [[], []]
    assert len(build(path, cache)) == 30


def raises_after(method, error):
    """The method, raising `error` after its work."""

    def failing(*args):
        method(*args)
        raise error

    return failing


def test_a_failed_rename_is_an_error(tmp_path, cache, monkeypatch):
    def rename(self, target):
        raise OSError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="Permission denied"):
        build(write(tmp_path / "data.jsonl", ROWS), cache)
    assert list((cache / "stores").iterdir()) == []


def test_two_machines_may_build_and_the_slower_uses_the_store_of_the_faster(tmp_path, cache, monkeypatch):
    """On some network file systems locks are local to a machine, so one process on each machine builds."""
    path, fit_example = write(tmp_path / "data.jsonl", ROWS), module.fit_example
    built = []

    def build_elsewhere_first(*args):
        if not built:
            built.append(None)
            with monkeypatch.context() as patched:
                patched.setattr(platform, "node", lambda: "another-machine")
                built[0] = build(path, cache)
        return fit_example(*args)

    monkeypatch.setattr(module, "_try_lock", lambda path: nullcontext(True))
    monkeypatch.setattr(module, "fit_example", build_elsewhere_first)
    store = build(path, cache)
    assert store.folder == built[0].folder
    assert store.ids.tolist() == built[0].ids.tolist()
    assert list((cache / "stores").iterdir()) == [store.folder]


# ---- several processes


def test_a_lock_is_exclusive_and_its_file_is_removed(tmp_path):
    path = tmp_path / ".lock"
    with module._try_lock(path) as first:
        with module._try_lock(path) as second:
            assert (first, second) == (True, False)
        assert path.exists()
    assert not path.exists()


@pytest.mark.parametrize("recreated", [False, True])
def test_a_lock_on_a_removed_file_does_not_count(recreated, tmp_path, monkeypatch):
    """Race: opened here, removed by its holder, then locked here. A third process may hold a new file of that name."""
    path = tmp_path / ".lock"

    def late(file, operation):
        path.unlink()
        if recreated:
            path.touch()
        flock(file, operation)

    flock = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", late)
    with module._try_lock(path) as locked:
        assert not locked
    assert path.exists() == recreated


def test_a_store_built_just_before_the_lock_is_taken_is_used(tmp_path, cache, monkeypatch):
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
module.WAIT_NOTICE_SECONDS = 0.1

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
    """Ids of the processes that have started a build, in order; waits until there are at least `count`."""
    deadline = time.monotonic() + 60
    while len(pids := log.read_text().split() if log.exists() else []) < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return [int(pid) for pid in pids]


def test_one_of_four_processes_builds(tmp_path, cache):
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
    Path(f"{log}.ready-{os.getpid()}").touch()
    while not Path(f"{log}.go").exists():
        time.sleep(0.001)
    return try_lock(lock)

module._try_lock = late
"""


def test_one_of_three_processes_rebuilds_a_damaged_store(tmp_path, cache):
    """All three detect the damage before the first takes the lock, so two take it when the store is already rebuilt."""
    path, log = write(tmp_path / "data.jsonl", ROWS), tmp_path / "log"
    folder = build(path, cache).folder
    intact = {file.name: file.read_bytes() for file in folder.iterdir()}
    (folder / "ids.bin").write_bytes(bytes(len(intact["ids.bin"])))
    processes = [start(AT_ONCE + PRINT, path, cache, log, rank=rank) for rank in range(3)]
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("log.ready-*"))) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    (tmp_path / "log.go").touch()
    outputs, errors = zip(*[finish(process) for process in processes], strict=True)
    assert [output.splitlines()[-1] for output in outputs] == [
        f"{folder} 30"
    ] * 3  # a notice about waiting may come before
    assert len(builders(log)) == 1
    assert "".join(errors) == (f"{folder}: damaged (ids.bin has a wrong sha256): rebuilding it\n")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == intact
    assert list((cache / "stores").iterdir()) == [folder]


def test_a_waiting_process_takes_over_from_a_killed_builder(tmp_path, cache):
    path, log = write(tmp_path / "data.jsonl", ROWS), tmp_path / "log"
    killed = start(HANG, path, cache, log)
    builders(log, 1)
    waiting = [start(PRINT, path, cache, log, rank=rank) for rank in (0, 1)]
    notice = waiting[0].stdout.readline()
    time.sleep(0.5)
    assert [process.poll() for process in waiting] == [None, None]
    assert builders(log) == [killed.pid]
    killed.kill()
    printed = [finish(process)[0] for process in (killed, *waiting)]
    [folder] = (cache / "stores").iterdir()
    assert notice == f"Waiting for another process, which is tokenizing the same data into {folder}\n"
    assert printed == ["", f"{folder} 30\n", f"{folder} 30\n"]
    assert len(builders(log)) == 2
    fresh = build(path, tmp_path / "fresh")
    assert folder.name == fresh.folder.name
    for file in fresh.folder.iterdir():
        assert (folder / file.name).read_bytes() == file.read_bytes()


def test_the_next_build_removes_the_leftovers_of_killed_builders(tmp_path, cache):
    """Of any data, but not the files of a builder that is still running."""
    path, log = write(tmp_path / "data.jsonl", ROWS), tmp_path / "log"
    dead, living = [
        start(HANG, write(tmp_path / f"{name}.jsonl", ROWS[n:]), cache, log)
        for n, name in enumerate(["dead", "alive"], 1)
    ]
    builders(log, 2)
    before = set((cache / "stores").iterdir())
    assert len(before) == 4  # each has a lock and a folder
    dead.kill()
    finish(dead)
    store = build(path, cache)
    remaining = set((cache / "stores").iterdir()) - {store.folder}
    assert len(remaining) == 2 and remaining < before
    living.kill()
    finish(living)
    assert [len(build(str(tmp_path / name), cache)) for name in ("dead.jsonl", "alive.jsonl")] == [29, 28]
    assert len(list((cache / "stores").iterdir())) == 3


def test_a_bad_record_is_an_error_in_every_process(tmp_path, cache):
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


@pytest.mark.skipif(sys.platform != "linux", reason="reads peak memory from /proc")
@pytest.mark.parametrize(
    ("megabytes", "growth"),
    [
        (16, 30),
        pytest.param(80, 40, marks=pytest.mark.slow),
        pytest.param(2048, 300, marks=pytest.mark.slow),
    ],
)
def test_memory_is_bounded(megabytes, growth, tmp_path, cache):
    rng, rows = random.Random(0), []
    words = (Path(module.__file__).parents[1] / "assets" / "english.txt").read_text(encoding="utf-8").split()
    for _ in range(1800):
        some = [" ".join(rng.choices(words, k=rng.randint(1, most))) for most in (40, 120)]
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
