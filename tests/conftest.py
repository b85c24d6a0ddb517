"""What the tests share."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch comes: many threads on tiny tensors only wait
# A shell's background job ignores Ctrl-C, and so would every process that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data (the GPT-2 vocabulary, instruction data) that lies beside a developer's checkout."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent: this test reads real data that is not part of the project")
    return folder


@pytest.fixture
def hub_server(tmp_path: Path) -> Iterator:
    """A Hugging Face hub on the loopback interface; `hub_server.HubServer` says how to fill and ask it."""
    from .hub_server import serve_hub

    with serve_hub(tmp_path / "hub", tmp_path / "hf_home") as server:
        yield server
