"""Runs with a scripted generator, and readers of their files."""

import json
from pathlib import Path

from minigpt.selfinstruct.bootstrap import Bootstrap, RunArguments
from minigpt.selfinstruct.run_files import Statistics, open_batch_dir
from minigpt.selfinstruct.tasks import Task

from .fake_generators import VERBS, WORDS, Scripted

TASKS = "machine_generated_instructions.jsonl"
SEEDS = [
    Task(f"{verb} {word} in a few words.", word if index % 2 else "", f"{word} it is", index % 3 == 0)
    for index, (verb, word) in enumerate(zip(VERBS, WORDS, strict=False))
]


def config_of(folder: Path, **settings) -> RunArguments:
    defaults = {"batch_dir": str(folder), "num_instructions_to_generate": 100, "request_batch_size": 2}
    return RunArguments(**{**defaults, **settings})


def bootstrap(folder: Path, generator=None, seed_tasks=SEEDS, **settings) -> Statistics:
    """Runs, or resumes, a bootstrap with a scripted generator until it ends."""
    config = config_of(folder, **settings)
    with open_batch_dir(folder, config, seed_tasks) as files:
        return Bootstrap(files, config, seed_tasks, generator or Scripted()).run()


def read_lines(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").split("\n")[:-1]]


def read_files(folder: Path) -> dict[str, bytes]:
    """Name -> bytes of a run's files, without *.cut and .lock, and with the folder's name replaced."""
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix not in (".cut", ".lock")}
    files["config.yaml"] = files["config.yaml"].replace(str(folder).encode(), b"HERE")
    return files


def assert_same_files(folder: Path, expected: dict[str, bytes]) -> None:
    files = read_files(folder)
    assert [name for name in {**files, **expected} if files.get(name) != expected.get(name)] == []
