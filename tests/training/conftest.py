"""What the tests of DeepSpeed's JSON files share."""

import json
from copy import copy
from functools import cache
from pathlib import Path

import pytest

from minigpt.settings.command_line import parse
from minigpt.settings.groups import TrainConfig
from minigpt.training.engines.deepspeed_config import deepspeed_config


@cache
def parsed(flags):
    return parse(TrainConfig, ["--deepspeed", "x.json", *flags.split()])


@pytest.fixture
def complete(tmp_path, monkeypatch):
    """The complete dictionary for a JSON (a dict, or its text) and a line of flags, and the configuration after."""
    monkeypatch.chdir(tmp_path)

    def run(content, flags="", world_size=1, device="cuda"):
        text = content if isinstance(content, str) else json.dumps(content)
        Path("x.json").write_text(text)
        config = copy(parsed(flags))
        return deepspeed_config(config, 64, world_size, device), config

    return run


@pytest.fixture
def refusal(complete):
    """The one line by which a JSON beside a line of flags is refused."""

    def run(content, flags="", world_size=1):
        with pytest.raises(ValueError) as error:
            complete(content, flags, world_size)
        assert "\n" not in str(error.value)
        return str(error.value)

    return run
