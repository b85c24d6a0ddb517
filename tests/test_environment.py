"""What the environment says, as everywhere in the ecosystem, and `--version`.

`HF_HUB_OFFLINE` is looked at in test_files.py, `TIKTOKEN_CACHE_DIR` in data/test_tokenizer.py.
"""

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from minigpt.version import __version__

ROOT = Path(__file__).parents[1]
SCRIPTS = [name for name in ("train.py", "sft.py", "selfinstruct.py", "chat.py") if (ROOT / name).exists()]


def python(*arguments: str, **env: str) -> str:
    """What a process prints, its errors included."""
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    return done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_version(script):
    assert python(str(ROOT / script), "--version") == f"minigpt {__version__}\n"


FIND = "from minigpt.hub import resolve_file; print(resolve_file('owner/model', 'config.json'))"


def test_hf_home_and_hf_token(hub_server, tmp_path):
    """A private model needs the token; what came lies in the cache that other tools share."""
    (hub_server.root / "owner" / "model").mkdir(parents=True)
    (hub_server.root / "owner" / "model" / "config.json").write_text("{}")
    hub_server.token = "hf_secret"
    env = {**hub_server.env, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": ""}
    message = "FileNotFoundError: owner/model: no such folder here, and no such model on the hub (a private one needs"
    for token in ("", "hf_wrong"):
        assert message in python("-c", FIND, **{**env, "HF_TOKEN": token})
    found = Path(python("-c", FIND, **{**env, "HF_TOKEN": "hf_secret"}).strip())
    assert found.is_relative_to(tmp_path / "home" / "hub" / "models--owner--model")
    assert found.read_text() == "{}"


def on_a_terminal(**env: str) -> str:
    """What `--help` writes to a terminal."""
    ours, theirs = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "chat.py"), "--help"],
        env={**environment, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color", **env},
        stdin=subprocess.DEVNULL,
        stdout=theirs,
    )
    os.close(theirs)
    text = b""
    try:
        while part := os.read(ours, 65536):
            text += part
    except OSError:  # Linux tells the end of a terminal so
        pass
    os.close(ours)
    assert process.wait(60) == 0
    return text.decode()


def test_no_color():
    """tyro, which lays out the help, does not look at it (https://no-color.org)."""
    assert "\x1b[" in on_a_terminal()
    assert "\x1b[" in on_a_terminal(NO_COLOR="")  # empty is not set
    assert "--model_name_or_path" in on_a_terminal(NO_COLOR="1")
    assert "\x1b[" not in on_a_terminal(NO_COLOR="1")


def test_cuda_visible_devices():
    """Hidden GPUs are not used, and asked for by name they are missed in one line."""
    code = "from minigpt.distributed import pick_device; print(pick_device({!r}))"
    assert python("-c", code.format(None), CUDA_VISIBLE_DEVICES="") in ("cpu\n", "mps\n")
    message = "ValueError: --device cuda: this PyTorch has no such device here (cuda, cpu or mps)"
    assert python("-c", code.format("cuda"), CUDA_VISIBLE_DEVICES="").endswith(f"{message}\n")


def test_a_smaller_cpu_is_imitated_where_that_is_asked_for():
    """`make test-small-cpus` would try nothing if PyTorch did not heed the variable, or it were misspelt."""
    code = "import torch; print(torch.backends.cpu.get_cpu_capability())"
    assert python("-c", code, ATEN_CPU_CAPABILITY="default") == "DEFAULT\n"
