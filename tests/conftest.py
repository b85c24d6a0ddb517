"""What the tests share."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from minigpt.hardware import set_thread_waiting

# Before torch is imported: many threads on tiny tensors only wait for one another, and should not spin while they do.
os.environ.setdefault("OMP_NUM_THREADS", "1")
set_thread_waiting()
# A shell's background job ignores Ctrl-C, and so would every process that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """A folder with real data that is not part of the project: gpt2/ (the vocabulary), instruction data, seed tasks."""
    name = os.environ.get("MINIGPT_TEST_DATA")
    if not name:
        pytest.skip("MINIGPT_TEST_DATA names no folder: this test reads real data that is not part of the project")
    folder = Path(name).resolve()
    assert folder.is_dir(), f"MINIGPT_TEST_DATA={name} is no folder"
    return folder


@pytest.fixture
def hub_server(tmp_path: Path) -> Iterator:
    """A Hugging Face hub on the loopback interface; `hub_server.HubServer` says how to fill and ask it."""
    from .hub_server import serve_hub

    with serve_hub(tmp_path / "hub", tmp_path / "hf_home") as server:
        yield server
