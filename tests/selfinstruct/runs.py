"""A run with a scripted generator, and what it left."""

import json
from pathlib import Path

from minigpt.selfinstruct.bootstrap import Bootstrap, RunArguments
from minigpt.selfinstruct.run_files import Statistics, open_batch_dir
from minigpt.selfinstruct.tasks import Task

from .writers import VERBS, WORDS, Scripted

TASKS = "machine_generated_instructions.jsonl"
SEEDS = [
    Task(f"{verb} {word} in a few words.", word if place % 2 else "", f"{word} it is", place % 3 == 0)
    for place, (verb, word) in enumerate(zip(VERBS, WORDS, strict=False))
]


def config_of(folder: Path, **settings) -> RunArguments:
    usual = {"batch_dir": str(folder), "num_instructions_to_generate": 100, "request_batch_size": 2}
    return RunArguments(**{**usual, **settings})


def bootstrap(folder: Path, generator=None, seed_tasks=SEEDS, **settings) -> Statistics:
    """A run with a scripted generator, from what the folder holds to its end."""
    config = config_of(folder, **settings)
    with open_batch_dir(folder, config, seed_tasks) as files:
        return Bootstrap(files, config, seed_tasks, generator or Scripted()).run()


def lines(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").split("\n")[:-1]]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a run, byte for byte, but what was cut off and the names of the folder and of the process."""
    found = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix not in (".cut", ".lock")}
    found["config.yaml"] = found["config.yaml"].replace(str(folder).encode(), b"HERE")
    return found


def same(folder: Path, expected: dict[str, bytes]) -> None:
    found = contents(folder)
    assert [name for name in {**found, **expected} if found.get(name) != expected.get(name)] == []
