"""Shared fixtures of the self-instruct tests."""

from pathlib import Path

import pytest

from .runs import bootstrap


@pytest.fixture(scope="session")
def uninterrupted_run(tmp_path_factory) -> Path:
    """The folder of an uninterrupted run; read-only for tests."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    bootstrap(folder)
    return folder
