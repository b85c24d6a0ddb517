"""Reading JSON, and atomic writes."""

import os
import stat

import pytest

from minigpt.files import read_json, whole_file

# ---- JSON


def test_read_json(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": [1]}\r\n')
    assert read_json(path) == {"a": [1]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1,\n"b" 2}', ":2: not JSON: Expecting ':' delimiter (correct it, or fetch it again)"),
        (b"", ":1: not JSON: Expecting value (correct it, or fetch it again)"),
        (b'{"\xff": 1}', ": not UTF-8 text (byte 2), so not JSON"),
        (b"[1]", ": expected a JSON object"),
    ],
)
def test_read_json_errors_name_the_file_and_line(tmp_path, content, message):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        read_json(path)
    assert str(caught.value) == f"{path}{message}"


# ---- atomic writes


def test_whole_file_appears_only_when_complete(tmp_path):
    path = tmp_path / "new" / "a.txt"
    with whole_file(path) as temporary:
        assert temporary.parent == path.parent
        temporary.write_text("partial")
        assert not path.exists()
        temporary.write_text("complete")
    assert path.read_text() == "complete"
    assert os.listdir(path.parent) == ["a.txt"]


def test_an_interrupted_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), whole_file(path) as temporary:
        temporary.write_text("partial")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_an_open_reader_keeps_the_old_content(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with path.open() as reader:
        with whole_file(path) as temporary:
            temporary.write_text("new")
        assert (reader.read(), path.read_text()) == ("old", "new")


def test_whole_file_respects_the_umask(tmp_path):
    """tempfile creates files with mode 0600: other users could not read an exported model."""
    before = os.umask(0o027)
    try:
        with whole_file(tmp_path / "a.txt") as temporary:
            temporary.write_text("text")
        assert os.umask(0o027) == 0o027  # not changed
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o640
