"""Building a token store: whole or not at all, by several at once, in bounded memory."""

import json
import os
import random
import signal
import subprocess
import sys
import time
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


def test_the_slower_of_two_builders_takes_what_the_faster_built(tmp_path, cache, monkeypatch):
    path, fit_example = write(tmp_path / "data.jsonl", ROWS), module.fit_example
    built = []

    def overtaken(*args):
        if not built:
            built.append(None)
            built[0] = build(path, cache)
        return fit_example(*args)

    monkeypatch.setattr(module, "fit_example", overtaken)
    store = build(path, cache)
    assert store.folder == built[0].folder
    assert store.ids.tolist() == built[0].ids.tolist()
    assert list((cache / "stores").iterdir()) == [store.folder]


BUILD = """
import os, signal, sys, time
from pathlib import Path
from minigpt.data import store as module
from minigpt.data.prompts import get_template
from minigpt.data.tokenizer import Tokenizer

def build():
    path, cache = sys.argv[1:3]
    return module.build_store([path], get_template("io"), Tokenizer.tiny(), 64, cache_dir=cache)
"""


def start(code: str, *arguments) -> subprocess.Popen:
    root = str(Path(module.__file__).parents[2])
    command = [sys.executable, "-c", BUILD + code, *map(str, arguments)]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": root}, stdout=subprocess.PIPE, text=True)


def test_a_killed_builder_leaves_no_store(tmp_path, cache):
    path = write(tmp_path / "data.jsonl", ROWS)
    killed = start("module._Writer.add = lambda *args: os.kill(os.getpid(), signal.SIGKILL)\nbuild()", path, cache)
    killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL
    left = list((cache / "stores").iterdir())
    assert [folder.name.startswith(".") for folder in left] == [True]
    store = build(path, cache)
    assert store.folder not in left
    assert len(store) == 30


def test_two_processes_build_at_once(tmp_path, cache):
    path = write(tmp_path / "data.jsonl", ROWS)
    wait = "while not Path(sys.argv[3]).exists(): time.sleep(0.001)\nstore = build()\nprint(store.folder, len(store))"
    both = [start(wait, path, cache, tmp_path / "go") for _ in range(2)]
    time.sleep(0.5)
    (tmp_path / "go").touch()
    printed = [process.communicate(timeout=60)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    [folder] = (cache / "stores").iterdir()
    assert printed == [f"{folder} 30\n"] * 2


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
    process = start(MEASURE, tmp_path / "data.jsonl", cache)
    length, grown, peak = map(int, process.communicate(timeout=3000)[0].split())
    assert length == 1800 * copies
    assert grown < growth
    assert peak < 1024
