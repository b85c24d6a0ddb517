"""Finding and opening data files of every encoding and compression; errors name the file."""

import gzip
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from minigpt.data.read import streams
from minigpt.data.read.records import read_records
from minigpt.data.read.streams import find_data_files, read_text, read_values

ROOT = Path(__file__).parents[3]
ROWS = [{"text": "naïve café"}, {"text": "中文 \U0001f600\r\n"}]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# ---- finding files


def test_files_folders_and_globs_in_the_order_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [
        "d/b.json",
        "d/a/z.jsonl",
        "d/a/y.txt.gz",
        "d/c.parquet",
        "d/README.md",
        "d/.git/x.json",
        "e/2.txt",
        "e/1.txt",
    ]
    for name in names:
        write(tmp_path / name, "x")
    files = find_data_files(["e/*.txt", "d", Path("d/README.md"), "e/2.txt"])
    assert [str(path) for path in files] == [
        *("e/1.txt", "e/2.txt"),
        *("d/a/y.txt.gz", "d/a/z.jsonl", "d/b.json", "d/c.parquet"),
        *("d/README.md", "e/2.txt"),
    ]
    assert find_data_files("**/y.*") == [Path("d/a/y.txt.gz")]
    assert find_data_files(Path("e")) == [Path("e/1.txt"), Path("e/2.txt")]


def test_an_existing_file_takes_precedence_over_a_glob(tmp_path):
    path = write(tmp_path / "data[1].json", "[]")
    assert find_data_files(path) == [path]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing.csv", "no such file or folder"),
        ("instruction_data.json", "no such file or folder (did you mean {folder}/instruction-data.json?)"),
        ("no/folder.json", "no such file or folder"),
        ("*.csv", "no file matches this pattern"),
        ("folder.json", "a folder without data files (expected .json .jsonl .txt .parquet, or with .gz)"),
    ],
)
def test_a_path_without_files_is_an_error_before_anything_is_read(tmp_path, name, message):
    good = write(tmp_path / "instruction-data.json", "[]")
    write(tmp_path / "folder.json" / "README.md", "x")
    with pytest.raises(FileNotFoundError) as error:
        read_records([good, tmp_path / name])
    assert str(error.value) == f"{tmp_path / name}: {message.format(folder=tmp_path)}"


# ---- opening files


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("gzipped", [False, True], ids=["plain", "gzip"])
def test_encodings_and_line_ends_read_the_same(tmp_path, encoding, end, gzipped):
    mark = "\ufeff" if encoding in ("utf-16-le", "utf-16-be") else ""
    compress = gzip.compress if gzipped else bytes
    lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    for text in (
        end.join(lines),
        end.join([*lines, "", " ", ""]),
        f"[{end}{f',{end}'.join(lines)}{end}]{end}",
        json.dumps({"type": "text_only", "instances": ROWS}, indent=1).replace("\n", end),
    ):
        path = write(tmp_path / "data.json", compress((mark + text).encode(encoding)))
        assert [value for _, value in read_values(path)] == ROWS
    path = write(tmp_path / "data.txt", compress(f"{mark}One.{end}{end}中文{end}".encode(encoding)))
    assert "".join(read_text(path)) == "One.\n\n中文\n"


@pytest.mark.parametrize("name", ["lines.json", "lines.json.gz", "lines"])
def test_the_format_is_detected_from_the_content_not_the_name(tmp_path, name):
    path = write(tmp_path / name, '{"text": "a"}\n{"text": "b"}')
    assert list(read_values(path)) == [(1, {"text": "a"}), (2, {"text": "b"})]
    path = write(tmp_path / f"array_of_{name}l", gzip.compress(b'[{"text": "a"},\n{"text": "b"}]'))
    assert list(read_values(path)) == [(1, {"text": "a"}), (2, {"text": "b"})]


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="the extra parquet is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"messages": [{"role": "user", "content": str(i)}], "system": None} for i in range(2500)]
    path = tmp_path / "data.bin"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    reported: list[int] = []
    assert list(read_values(path, reported.append)) == list(enumerate(rows, 1))
    assert sum(reported) == path.stat().st_size

    write(path, b"PAR1 and then nothing")
    with pytest.raises(ValueError) as error:
        list(read_values(path))
    assert str(error.value).startswith(f"{path}: a damaged parquet file (")
    assert str(error.value).endswith("): fetch it again")
    assert "\n" not in str(error.value)


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    path = write(tmp_path / "data.parquet", b"PAR1")
    with pytest.raises(ValueError) as error:
        list(read_values(path))
    assert str(error.value) == f"{path}: parquet needs pyarrow: pip install -c constraints.txt -e '.[parquet]'"


GZIP = gzip.compress(bytes(random.Random(0).choices(b"abcdef \n", k=4000)))
UTF_16 = '{"text": "a"}\n{"text": "b"}\n'.encode("utf-16")
BINARY = (
    ": a binary file (it contains NUL bytes), expected JSON, JSON lines, text or parquet "
    "(UTF-16 needs its byte-order mark)"
)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.jsonl", b"", ": no record in it: delete the file, or fetch it again"),
        ("data.jsonl", b"\xef\xbb\xbf\r\n\r\n", ": no record in it: delete the file, or fetch it again"),
        ("data.json", b"[]", ": no record in it: delete the file, or fetch it again"),
        (
            "data.json",
            b'{"type": "text_only", "instances": []}',
            ": no record in it: delete the file, or fetch it again",
        ),
        ("data.txt", b"", ": no text in it: delete the file, or fetch it again"),
        ("data.json", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", BINARY),
        ("data.txt", b"\x7fELF\x02\x01\x01\0", BINARY),
        ("data.jsonl", '{"text": "a"}'.encode("utf-16-le"), BINARY),
        (
            "data.jsonl",
            b"\x89\xfe\xfd PNG",
            ":1: not JSON: it begins with b'\\x89\\xfe\\xfd PNG', expected { or [ (raw text is read from .txt files)",
        ),
        (
            "data.jsonl",
            b'{"text": "a"}\n{"text": "caf\xe9"}\n',
            ':2: "text" contains the byte 0xE9, which is not UTF-8: save the file as UTF-8',
        ),
        (
            "data.json",
            b'[\n{"text": "caf\xe9"}\n]',
            ':2: "text" contains the byte 0xE9, which is not UTF-8: save the file as UTF-8',
        ),
        (
            "data.txt",
            b"one\n\ncaf\xe9\n",
            ":3: the text contains the byte 0xE9, which is not UTF-8: save the file as UTF-8",
        ),
        (
            "data.jsonl",
            b'{"text": "a"}\n{"text": "\xe4\xb8',
            ":2: the last line is truncated (column 12): the file was not written completely; "
            "delete the line, or write the file again",
        ),
        (
            "data.json",
            b'[\n{"text": "a"},\n{"text": "\xe4\xb8',
            ":3: the file is truncated inside the value that starts at line 3: write or fetch it again",
        ),
        ("data.jsonl", UTF_16[:-1], ": damaged UTF-16-LE (truncated data): save it as UTF-8"),
        (
            "data.txt",
            GZIP[:-20],
            ": a damaged gzip file (Compressed file ended before the end-of-stream marker was reached): "
            "fetch it again, or compress it again",
        ),
    ],
)
def test_broken_files(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError) as error:
        list(read_records(path))
    assert str(error.value) == f"{path}{message}"


def test_a_corrupt_gzip_file(tmp_path):
    path = write(tmp_path / "data.jsonl", GZIP[:10] + b"\xff" * 20)
    with pytest.raises(
        ValueError, match=rf"^{path}: a damaged gzip file \(.*\): fetch it again, or compress it again$"
    ):
        list(read_records(path))


@pytest.mark.parametrize("chunk", [1, 2, 5, 50])
def test_text_chunks_are_cut_between_tokens(tmp_path, monkeypatch, chunk):
    """GPT-2's pre-tokenizer finds the same words in the chunks as in the whole text."""
    regex = pytest.importorskip("regex")
    words = regex.compile(r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    rng = random.Random(chunk)
    text = "".join(
        rng.choices(["a", "don't", " ", "  ", "\n", "\n\n", "\t", "42", "!?", "中文", "\u2003", "\x1f"], k=500)
    )
    path = write(tmp_path / "data.txt", text)
    monkeypatch.setattr(streams, "_CHUNK", chunk)
    chunks = list(read_text(path))
    assert "".join(chunks) == text
    assert len(chunks) > 10
    assert [word for part in chunks for word in words.findall(part)] == words.findall(text)


@pytest.mark.parametrize("name", ["data.txt", "data.jsonl", "data.json", "data.jsonl.gz"])
def test_progress_is_reported_in_bytes_on_disk(tmp_path, name):
    content = b"".join(b'{"text": "%d"}\n' % i for i in range(100_000))
    content = b"[" + content.replace(b"\n", b",\n")[:-2] + b"]" if name == "data.json" else content
    path = write(tmp_path / name, gzip.compress(content) if name.endswith(".gz") else content)
    reported: list[int] = []
    assert sum(1 for _ in (read_text if name == "data.txt" else read_values)(path, reported.append)) > 0
    assert sum(reported) == path.stat().st_size
    assert min(reported) > 0


MEASURE = """
import re, sys
from minigpt.data.read.records import read_records

def peak():  # KiB; not ru_maxrss, which starts at the parent's peak
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])

before = peak()
count = sum(1 for _ in read_records(sys.argv[1]))
print(count, peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("layout", ["array", "dataset on one line"])
def test_an_array_of_60_mb_is_streamed(tmp_path, layout):
    record = json.dumps({"input": "q" * 1000, "output": "a" * 1000}).encode()
    count = 60_000_000 // len(record)
    path = tmp_path / "data.json"
    with path.open("wb") as file:
        file.write(b"[" if layout == "array" else b'{"type": "text2text", "instances": [')
        separator = b",\n" if layout == "array" else b", "
        for _ in range(count - 1):
            file.write(record + separator)
        file.write(record + (b"]" if layout == "array" else b"]}"))
    measured = subprocess.run(
        [sys.executable, "-c", MEASURE, path], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    records, growth = map(int, measured.stdout.split())
    assert records == count
    assert growth < 30 * 1024  # KiB; about 7 MiB


# ---- the hub

READ = """
import sys
from minigpt.data.read.records import read_records
for name in sys.argv[1:]:
    try:
        print([conversation.messages[0]["content"] for conversation in read_records(name)])
    except (OSError, ValueError) as error:
        print(type(error).__name__, error)
"""


def read_from_hub(hub, *names, **env):
    """The lines that a new process prints: huggingface_hub reads its environment variables at import."""
    done = subprocess.run(
        [sys.executable, "-c", READ, *names],
        cwd=ROOT,
        env={**os.environ, **hub.env, **env},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_hub_datasets(hub_server):
    datasets = hub_server.root / "datasets" / "owner"
    write(datasets / "name" / "train.jsonl", '{"text": "main"}\n')
    write(datasets / "name" / "data" / "sub.json", '[{"text": "sub"}]')
    write(datasets / "name@v1.0" / "train.jsonl", '{"text": "v1.0"}\n')
    write(datasets / "name@refs%2Fpr%2F1" / "train.jsonl", '{"text": "pr"}\n')
    names = [
        "hf://datasets/owner/name/train.jsonl",
        "hf://datasets/owner/name/data/sub.json",
        "hf://datasets/owner/name@v1.0/train.jsonl",
        "hf://datasets/owner/name@refs/pr/1/train.jsonl",
        "hf://datasets/owner/name@refs%2Fpr%2F1/train.jsonl",
    ]
    assert read_from_hub(hub_server, *names) == ["['main']", "['sub']", "['v1.0']", "['pr']", "['pr']"]
    assert hub_server.requests[:2] == [
        "HEAD /datasets/owner/name/resolve/main/train.jsonl",
        "GET /datasets/owner/name/resolve/main/train.jsonl",
    ]

    hub_server.requests.clear()
    assert read_from_hub(hub_server, *names, HF_HUB_OFFLINE="1") == [
        "['main']",
        "['sub']",
        "['v1.0']",
        "['pr']",
        "['pr']",
    ]
    assert hub_server.requests == []


def test_missing_hub_datasets(hub_server):
    write(hub_server.root / "datasets" / "owner" / "name" / "train.jsonl", '{"text": "main"}\n')
    write(hub_server.root / "owner" / "model" / "train.jsonl", '{"text": "a model, not a dataset"}\n')
    expected = "expected hf://datasets/OWNER/NAME/FILE, or hf://datasets/OWNER/NAME@REVISION/FILE"
    messages = {
        "hf://datasets/owner/name/no.jsonl": "the dataset owner/name has no such file at main",
        "hf://datasets/owner/name": expected,
        "hf://owner/model/train.jsonl": expected,
    }
    assert read_from_hub(hub_server, *messages) == [
        f"FileNotFoundError {n}: {message}" for n, message in messages.items()
    ]
    for name, beginning in {
        "hf://datasets/owner/model/train.jsonl": "owner/model: ",
        "hf://datasets/owner/name@v9/train.jsonl": "owner/name: ",
    }.items():
        (line,) = read_from_hub(hub_server, name)  # the rest of the message comes from minigpt.hub
        assert line.startswith(f"FileNotFoundError {beginning}")
