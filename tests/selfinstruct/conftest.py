"""What the tests of self-instruct share."""

from pathlib import Path

import pytest

from .runs import bootstrap


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> Path:
    """A run that nobody disturbed; look, and leave it as it is."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    bootstrap(folder)
    return folder
