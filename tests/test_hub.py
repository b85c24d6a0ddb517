"""A name -> local files: from a folder, or from a hub repository and its cache."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from minigpt.hub import resolve_file

ROOT = Path(__file__).parents[1]

# ---- folders


def test_resolve_file_in_a_local_folder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "folder.json").mkdir()
    assert resolve_file(tmp_path, "config.json") == tmp_path / "config.json"
    assert resolve_file(str(tmp_path), "config.json", revision="main") == tmp_path / "config.json"
    assert resolve_file(tmp_path, "absent.json") is None
    assert resolve_file(tmp_path, "folder.json") is None


@pytest.mark.parametrize("name", ["./no/such", "/no/such/folder", "../no-such", "~/model", "runs/sft/export"])
def test_a_missing_path_is_not_looked_up_on_the_hub(name):
    with pytest.raises(FileNotFoundError) as caught:
        resolve_file(name, "config.json")
    assert str(caught.value) == f"{name}: no such folder (and not a hub id of the form OWNER/NAME)"


# ---- the hub

RESOLVE = """
import sys
from minigpt.hub import resolve_file
for name in sys.argv[1:]:
    repo, _, rest = name.partition(":")
    file, _, revision = rest.partition("@")
    try:
        path = resolve_file(repo, file, revision or None)
        print(path and path.read_text())
    except FileNotFoundError as error:
        print(error)
"""


def resolve(env, *names):
    """The lines that a new process prints: huggingface_hub reads its environment variables at import."""
    done = subprocess.run(
        [sys.executable, "-c", RESOLVE, *names],
        cwd=ROOT,
        env={**os.environ, **env},
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


def test_resolve_file_in_a_hub_repository(hub):
    assert resolve(
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


@pytest.mark.parametrize("how", ["HF_HUB_OFFLINE", "connection refused"])
def test_offline_files_come_from_the_cache(hub, how):
    """A cached model loads without the optional files that another tool, such as transformers, did not download."""
    assert resolve(hub.env, "owner/model:config.json") == ["main"]
    hub.requests.clear()
    env = {"HF_HUB_OFFLINE": "1"} if how == "HF_HUB_OFFLINE" else {"HF_ENDPOINT": "http://127.0.0.1:1"}
    unreachable = "the hub cannot be reached for config.json (give a local folder, or download once with a network)"
    assert resolve(
        {**hub.env, **env},
        *("owner/model:config.json", "owner/model:prompt_template.json"),
        *("owner/none:config.json", "owner/model:config.json@refs/pr/1"),
    ) == [
        *("main", "None"),
        f"owner/none: no such folder here, and {unreachable}",
        f"owner/model: no such folder here, and {unreachable}",
    ]
    assert hub.requests == []
