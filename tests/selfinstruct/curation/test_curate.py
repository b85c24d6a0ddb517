"""Reading and writing of curation: all input formats, and unchanged records in the output."""

import errno
import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from minigpt.selfinstruct.curation.curate import read_entries
from minigpt.selfinstruct.curation.lint import lint
from minigpt.selfinstruct.curation.semantic import unique

from .instruction_files import embed_letters, read_lines, task, write


def test_a_full_disk_keeps_the_old_results(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", [task("One."), task("One."), task("Two.")])
    lint(str(path))
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    write_bytes = Path.write_bytes

    def write_to_full_disk(self, text, **_):
        write_bytes(self, text.encode()[:10])
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_text", write_to_full_disk)
    with pytest.raises(OSError, match=rf"^{tmp_path}: cannot be written to \(No space left on device\); --output_dir"):
        lint(str(path), threshold=0.1)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_lone_surrogate_in_an_extra_key_is_kept(tmp_path):
    """A text truncated within an emoji: JSON can escape \\ud83d, UTF-8 cannot encode it, and the whole run failed."""
    path = write(tmp_path / "a.jsonl", [task("Smile. ☺", note="cut \ud83d here")])
    assert lint(str(path)).kept == 1
    assert read_lines(tmp_path / "a.lint.jsonl") == read_lines(path)


RECORDS = {
    "alpaca": (task("Name it.", "Paris.", input="France"), ("Name it.", "France", ("Paris.",))),
    "no input": (task("Name it.", "Paris.", input="<noinput>"), ("Name it.", "", ("Paris.",))),
    "pair": ({"prompt": "Hi.", "completion": "Hello.", "id": 7}, ("Hi.", "", ("Hello.",))),
    "chat": (
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Name it.", "input": "France"},
                {"role": "assistant", "content": "Paris."},
                {"role": "user", "content": "And of Spain?"},
                {"role": "assistant", "content": "Madrid."},
            ],
            "instances": "of something else",
        },
        ("Name it.\nAnd of Spain?", "France", ("Paris.", "Madrid.")),
    ),
    "seed task": (
        {
            "id": "seed_1",
            "instruction": "Name it.",
            "instances": [{"input": "France", "output": "Paris."}, {"input": "Spain", "output": "Madrid."}],
        },
        ("Name it.", "France\nSpain", ("Paris.", "Madrid.")),
    ),
    "turns in a text": ({"text": "Human: Hi.\nHugChat: Hello."}, ("Hi.", "", ("Hello.",))),
}


def test_records_of_all_formats_are_written_unchanged(tmp_path):
    """Records with several conversations (seed tasks) must not shift the following records."""
    records = [record for record, _ in RECORDS.values()] * 2
    path = write(tmp_path / "mixed.jsonl", records)
    entries, base = read_entries(path)
    assert base == tmp_path / "mixed"
    assert [entry[2:] for entry in entries] == [texts for _, texts in RECORDS.values()] * 2
    assert [entry.source for entry in entries] == [f"{path}:{line + 1}" for line in range(len(records))]
    unique(str(path), lambda texts: np.eye(len(texts), dtype=np.float32))
    assert read_lines(tmp_path / "mixed.unique.jsonl") == records


def test_a_dataset_on_one_line_and_a_gzipped_array(tmp_path):
    pairs = [{"input": "Hi.", "output": "Hello."}, {"input": "Bye.", "output": "So long."}]
    path = tmp_path / "lmflow.json"
    path.write_text(json.dumps({"type": "text2text", "instances": pairs}))
    assert [entry.record for entry in read_entries(path)[0]] == pairs
    gzipped = tmp_path / "alpaca.v1.json.gz"
    gzipped.write_bytes(gzip.compress(json.dumps(pairs, indent=1).encode("utf-8-sig")))
    entries, base = read_entries(gzipped, str(tmp_path / "out"))
    assert [entry.record for entry in entries] == pairs
    assert base == tmp_path / "out" / "alpaca.v1.json.gz"


def test_files_that_differ_in_extension_have_different_result_names(tmp_path, capsys):
    """The results of a.json and a.jsonl had the same name, so the later overwrote the earlier."""
    names = ["a.jsonl", "a.json", "a.jsonl.gz", "a.json.gz"]
    text = json.dumps(task("Say hi."))
    for name in names:
        (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
        lint(str(tmp_path / name))
    results = {path.name for path in tmp_path.iterdir()} - set(names)
    assert len(results) == 2 * len(names)
    assert results >= {"a.lint.jsonl", "a.json.lint.jsonl"}


def test_sources_of_records_on_one_line_are_distinct(tmp_path, capsys):
    """All records of an array on one line had the source FILE:1."""
    path = tmp_path / "a.json"
    path.write_text(json.dumps([task("Say hi."), task("Say hi."), task("Go.", "")]) + "\n")
    lint(str(path))
    dropped = read_lines(tmp_path / "a.json.lint.dropped.jsonl")
    assert [row["source"] for row in dropped] == [f"{path}:1, record 2", f"{path}:1, record 3"]
    assert dropped[0]["nearest_source"] == f"{path}:1"
    assert f"1  {path}:1, record 2\n" in capsys.readouterr().out


def test_invalid_input_is_a_one_line_error(tmp_path):
    path = write(tmp_path / "a.jsonl", [task("Hi."), {"text": "Once upon a time."}])
    with pytest.raises(ValueError, match=rf"^{path}:2: plain text, expected a question and its answer$"):
        lint(str(path))
    path = tmp_path / "a.json"  # an array on one line
    path.write_text(json.dumps([task("Hi."), {"text": "Once upon a time."}]))
    with pytest.raises(ValueError, match=rf"^{path}:1, record 2: plain text, expected a question and its answer$"):
        lint(str(path))
    path.unlink()
    (tmp_path / "b.jsonl").write_text('{"instruction": "Hi."}\n')
    with pytest.raises(ValueError, match=r'b.jsonl:1: "output" is missing'):
        lint(str(tmp_path / "b.jsonl"))
    (tmp_path / "b.jsonl").unlink()
    (
        tmp_path / "b.jsonl"
    ).touch()  # left by a run that kept nothing; the message must not suggest deleting it, which would break that run
    with pytest.raises(
        ValueError, match=r"b.jsonl: contains no tasks \(a run that kept none leaves an empty file\); use --data"
    ):
        lint(str(tmp_path / "b.jsonl"))
    with pytest.raises(ValueError, match=rf"^{tmp_path}: 2 files; curation takes one at a time$"):
        lint(str(tmp_path))
    for threshold in (0, 1.5):
        with pytest.raises(ValueError, match=rf"^threshold must be above 0 and at most 1, got {threshold}$"):
            unique(str(tmp_path / "b.jsonl"), embed_letters, threshold=threshold)
        with pytest.raises(ValueError, match=rf"^threshold must be above 0 and at most 1, got {threshold}$"):
            lint(str(write(tmp_path / "c.jsonl", [task("Hi.")])), threshold=threshold)


def test_a_file_on_the_hub_needs_output_dir():
    """The default, the file's folder, would be in the hub cache. Rejected before any download."""
    with pytest.raises(ValueError, match=r"^hf://datasets/owner/tasks/a.jsonl: is on the hub; set --output_dir"):
        lint("hf://datasets/owner/tasks/a.jsonl")
