"""Files of folders and of the hub, and files that are written whole."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from minigpt.files import read_json, resolve_file, whole_file

ROOT = Path(__file__).parents[1]

# ---- folders


def test_a_file_of_a_folder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "folder.json").mkdir()
    assert resolve_file(tmp_path, "config.json") == tmp_path / "config.json"
    assert resolve_file(str(tmp_path), "config.json", revision="main") == tmp_path / "config.json"
    assert resolve_file(tmp_path, "absent.json") is None
    assert resolve_file(tmp_path, "folder.json") is None


@pytest.mark.parametrize("name", ["./no/such", "/no/such/folder", "../x", "~/model", "runs/sft/export"])
def test_a_path_that_is_no_hub_id_asks_no_hub(name):
    with pytest.raises(FileNotFoundError) as caught:
        resolve_file(name, "config.json")
    assert str(caught.value) == f"{name}: no such folder (and not a hub id, which reads OWNER/NAME)"


# ---- the hub

FIND = """
import sys
from minigpt.files import resolve_file
for name in sys.argv[1:]:
    repo, _, rest = name.partition(":")
    file, _, revision = rest.partition("@")
    try:
        found = resolve_file(repo, file, revision or None)
        print(found and found.read_text())
    except FileNotFoundError as error:
        print(error)
"""


def ask(env, *names, **more):
    """What a fresh process finds: huggingface_hub reads its settings when it is imported."""
    done = subprocess.run(
        [sys.executable, "-c", FIND, *names],
        cwd=ROOT,
        env={**os.environ, **env, **more},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


@pytest.fixture
def hub(hub_server):
    for name, text in {
        "owner/model/config.json": "main",
        "owner/model@refs%2Fpr%2F1/config.json": "pr",
        "owner/model@refs%2Fpr%2F1/model.safetensors": "weights",
    }.items():
        (hub_server.root / name).parent.mkdir(parents=True, exist_ok=True)
        (hub_server.root / name).write_text(text)
    return hub_server


def test_a_file_of_a_repository(hub):
    assert ask(
        hub.env,
        *("owner/model:config.json", "owner/model:config.json@refs/pr/1", "owner/model:model.safetensors"),
        *("owner/model:model.safetensors@refs/pr/1", "owner/model:config.json@v9", "owner/none:config.json"),
        "not an id:config.json",
    ) == [
        *("main", "pr", "None", "weights"),
        "owner/model: no such folder here, and no such model on the hub at revision v9 (a private one needs HF_TOKEN)",
        "owner/none: no such folder here, and no such model on the hub (a private one needs HF_TOKEN)",
        "not an id: no such folder here, and no such model on the hub (a private one needs HF_TOKEN)",
    ]


@pytest.mark.parametrize("how", ["HF_HUB_OFFLINE", "nobody answers"])
def test_offline_the_cache_answers(hub, how):
    """A model that others downloaded (a cluster's login node, transformers) is used without its optional files."""
    assert ask(hub.env, "owner/model:config.json") == ["main"]
    hub.requests.clear()
    env = {"HF_HUB_OFFLINE": "1"} if how == "HF_HUB_OFFLINE" else {"HF_ENDPOINT": "http://127.0.0.1:1"}
    cannot = "the hub cannot be reached for config.json (give a local folder, or download once with a network)"
    assert ask(
        {**hub.env, **env},
        *("owner/model:config.json", "owner/model:prompt_template.json"),
        *("owner/none:config.json", "owner/model:config.json@refs/pr/1"),
    ) == [
        *("main", "None"),
        f"owner/none: no such folder here, and {cannot}",
        f"owner/model: no such folder here, and {cannot}",
    ]
    assert hub.requests == []


# ---- JSON


def test_a_json_object(tmp_path):
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
def test_what_is_no_json_object_is_named(tmp_path, content, message):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        read_json(path)
    assert str(caught.value) == f"{path}{message}"


# ---- writing


def test_a_file_appears_whole(tmp_path):
    path = tmp_path / "new" / "a.txt"
    with whole_file(path) as temporary:
        assert temporary.parent == path.parent
        temporary.write_text("half")
        assert not path.exists()
        temporary.write_text("whole")
    assert path.read_text() == "whole"
    assert os.listdir(path.parent) == ["a.txt"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), whole_file(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_who_has_the_old_file_open_keeps_it(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with path.open() as reader:
        with whole_file(path) as temporary:
            temporary.write_text("new")
        assert (reader.read(), path.read_text()) == ("old", "new")


def test_the_file_has_the_rights_that_any_new_file_gets(tmp_path):
    """A temporary file is its owner's alone; a model that others cannot read is found out late."""
    before = os.umask(0o027)
    try:
        with whole_file(tmp_path / "a.txt") as temporary:
            temporary.write_text("text")
        assert os.umask(0o027) == 0o027  # as it was
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o640
