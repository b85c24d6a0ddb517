"""A run with a scripted generator, and what it left."""

import json
from dataclasses import dataclass
from pathlib import Path

from minigpt.selfinstruct.batch_dir import Statistics, open_batch_dir
from minigpt.selfinstruct.bootstrap import Bootstrap, BootstrapArguments, TaskArguments, list_of_tasks
from minigpt.selfinstruct.filters import Filters
from minigpt.selfinstruct.generators import GeneratorArguments
from minigpt.selfinstruct.novelty import NoveltyFilter
from minigpt.selfinstruct.request import TaskFormat
from minigpt.selfinstruct.tasks import Task

from .writers import VERBS, WORDS, Scripted

TASKS = "machine_generated_instructions.jsonl"
SEEDS = [
    Task(f"{verb} {word} in a few words.", word if place % 2 else "", f"{word} it is", place % 3 == 0)
    for place, (verb, word) in enumerate(zip(VERBS, WORDS, strict=False))
]


@dataclass
class Config(BootstrapArguments, TaskArguments, GeneratorArguments):
    """The settings that matter here."""

    def __post_init__(self) -> None:
        for part in (BootstrapArguments, TaskArguments, GeneratorArguments):
            part.__post_init__(self)


def config_of(folder: Path, **settings) -> Config:
    usual = {"batch_dir": str(folder), "num_instructions_to_generate": 100, "request_batch_size": 2}
    return Config(**{**usual, **settings})


def bootstrap(folder: Path, generator=None, seed_tasks=SEEDS, **settings) -> Statistics:
    """A run with a scripted generator, from what the folder holds to its end."""
    config = config_of(folder, **settings)
    arguments = {name: getattr(config, name) for name in GeneratorArguments.__dataclass_fields__}
    task_format = TaskFormat(config.format)
    how = list_of_tasks(GeneratorArguments(**arguments), config, task_format)
    with open_batch_dir(folder, config, seed_tasks) as files:
        run = Bootstrap(
            files,
            config,
            seed_tasks,
            task_format,
            Filters(config.banned_words, config.keep_programming, config.language),
            NoveltyFilter(config.threshold),
            generator or Scripted(),
            how,
            config.label_first,
        )
        return run.run()


def lines(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").split("\n")[:-1]]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a run, byte for byte, but the names of the folder and of the process in them."""
    found = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}
    found["config.yaml"] = found["config.yaml"].replace(str(folder).encode(), b"HERE")
    return found


def same(folder: Path, expected: dict[str, bytes]) -> None:
    found = contents(folder)
    assert [name for name in {**found, **expected} if found.get(name) != expected.get(name)] == []
