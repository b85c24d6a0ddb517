"""What curation reads and writes: any format comes in, records go out as they were."""

import errno
import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from minigpt.selfinstruct.curation.curate import read_entries
from minigpt.selfinstruct.curation.lint import lint
from minigpt.selfinstruct.curation.semantic import unique

from .curated import letters, lines, task, write


def test_a_full_disk_leaves_the_old_results(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", [task("One."), task("One."), task("Two.")])
    lint(str(path))
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    write_bytes = Path.write_bytes

    def full(self, text, **_):
        write_bytes(self, text.encode()[:10])
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match=rf"^{tmp_path}: cannot be written to \(No space left on device\); --output_dir"):
        lint(str(path), threshold=0.1)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_half_of_a_surrogate_pair_in_an_extra_key_stays(tmp_path):
    """Cut in the middle of an emoji: JSON holds it as \\ud83d, UTF-8 cannot, and the whole run was lost to it."""
    path = write(tmp_path / "a.jsonl", [task("Smile. ☺", note="cut \ud83d here")])
    assert lint(str(path)).kept == 1
    assert lines(tmp_path / "a.lint.jsonl") == lines(path)


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


def test_any_format_comes_through_as_it_was(tmp_path):
    """Records of several conversations (seed tasks) must not shift those behind them."""
    records = [record for record, _ in RECORDS.values()] * 2
    path = write(tmp_path / "mixed.jsonl", records)
    entries, base = read_entries(path)
    assert base == tmp_path / "mixed"
    assert [entry[2:] for entry in entries] == [said for _, said in RECORDS.values()] * 2
    assert [entry.source for entry in entries] == [f"{path}:{line + 1}" for line in range(len(records))]
    unique(str(path), lambda texts: np.eye(len(texts), dtype=np.float32))
    assert lines(tmp_path / "mixed.unique.jsonl") == records


def test_a_dataset_on_one_line_and_a_packed_array(tmp_path):
    pairs = [{"input": "Hi.", "output": "Hello."}, {"input": "Bye.", "output": "So long."}]
    path = tmp_path / "lmflow.json"
    path.write_text(json.dumps({"type": "text2text", "instances": pairs}))
    assert [entry.record for entry in read_entries(path)[0]] == pairs
    packed = tmp_path / "alpaca.v1.json.gz"
    packed.write_bytes(gzip.compress(json.dumps(pairs, indent=1).encode("utf-8-sig")))
    entries, base = read_entries(packed, str(tmp_path / "out"))
    assert [entry.record for entry in entries] == pairs
    assert base == tmp_path / "out" / "alpaca.v1.json.gz"


def test_results_of_files_that_differ_in_their_ending_lie_apart(tmp_path, capsys):
    """Those of a.json and of a.jsonl had one name, and the later ones took the place of the earlier."""
    names = ["a.jsonl", "a.json", "a.jsonl.gz", "a.json.gz"]
    text = json.dumps(task("Say hi."))
    for name in names:
        (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
        lint(str(tmp_path / name))
    results = {path.name for path in tmp_path.iterdir()} - set(names)
    assert len(results) == 2 * len(names)
    assert results >= {"a.lint.jsonl", "a.json.lint.jsonl"}


def test_records_on_one_line_can_be_told_apart(tmp_path, capsys):
    """An array on one line: each of its records came from FILE:1."""
    path = tmp_path / "a.json"
    path.write_text(json.dumps([task("Say hi."), task("Say hi."), task("Go.", "")]) + "\n")
    lint(str(path))
    dropped = lines(tmp_path / "a.json.lint.dropped.jsonl")
    assert [row["source"] for row in dropped] == [f"{path}:1, record 2", f"{path}:1, record 3"]
    assert dropped[0]["nearest_source"] == f"{path}:1"
    assert f"1  {path}:1, record 2\n" in capsys.readouterr().out


def test_what_cannot_be_curated_is_refused_in_one_line(tmp_path):
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
    (tmp_path / "b.jsonl").touch()  # by a run that kept nothing: to delete it would have ended that run
    with pytest.raises(
        ValueError, match=r"b.jsonl: no task in it \(a run that has kept none leaves this\); --data names"
    ):
        lint(str(tmp_path / "b.jsonl"))
    with pytest.raises(ValueError, match=rf"^{tmp_path}: 2 files; curation takes one at a time$"):
        lint(str(tmp_path))
    for threshold in (0, 1.5):
        with pytest.raises(ValueError, match=rf"^threshold must be above 0 and at most 1, got {threshold}$"):
            unique(str(tmp_path / "b.jsonl"), letters, threshold=threshold)
        with pytest.raises(ValueError, match=rf"^threshold must be above 0 and at most 1, got {threshold}$"):
            lint(str(write(tmp_path / "c.jsonl", [task("Hi.")])), threshold=threshold)


def test_a_file_of_the_hub_needs_a_place_for_the_results():
    """Beside it would be in the hub's cache. Refused before anything is fetched."""
    with pytest.raises(ValueError, match=r"^hf://datasets/owner/tasks/a.jsonl: lies on the hub; --output_dir says"):
        lint("hf://datasets/owner/tasks/a.jsonl")
