"""The files of a bootstrap run, complete up to the last round that was committed.

machine_generated_instructions.jsonl   a line per kept task; sft.py --data reads it
requests.jsonl                         a line per request: its shots, what came back, what became of each task
statistics.json                        the counts; written last, it is what commits a round
config.yaml, seed_tasks.jsonl          the settings and the seed pool that the run was begun with
arrived.jsonl                          completions of a server, of a round that is under way
*.jsonl.cut                            what a killed round left behind the end of a file
.lock                                  held by the operating system while the run lives

The first two are only appended to. What stands in them past the numbers in statistics.json is of a round that was
killed while it was written, and the next start moves it into a file beside, NAME.cut, for it may be somebody's all the
same. Lines that no interrupted round can have written are refused, not cut.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from minigpt.distributed import print0
from minigpt.files import lock_folder, whole_file, writing_to
from minigpt.selfinstruct.filters import NAMES
from minigpt.selfinstruct.generators import Completion
from minigpt.selfinstruct.tasks import Task
from minigpt.settings.command_line import parse, save_yaml

TASKS, REQUESTS, STATISTICS = "machine_generated_instructions.jsonl", "requests.jsonl", "statistics.json"
CONFIG, SEED_TASKS, ARRIVED = "config.yaml", "seed_tasks.jsonl", "arrived.jsonl"
OR_ELSE = "or give another --batch_dir"
# What may change while a run goes on: how far, where, and with how much patience; of the seed tasks the content counts.
FREE = {
    *("batch_dir", "num_instructions_to_generate", "max_requests", "max_stall", "seed_tasks_path", "device"),
    *("api_base", "api_timeout", "api_retries"),
    *("curate", "data", "eval_data", "embedding_model", "curate_threshold", "output_dir"),  # of another command
}


@dataclass
class Statistics:
    """What came of all requests so far."""

    requests: int = 0
    completions: int = 0
    tasks: int = 0
    kept: int = 0
    rejected: dict[str, int] = field(default_factory=lambda: dict.fromkeys(NAMES, 0))
    """Tasks by the first filter that dropped them."""
    ended: str | None = None
    """What ended the run: target, max_requests or max_stall."""

    @classmethod
    def read(cls, path: Path) -> "Statistics":
        """Those in a statistics.json; a ValueError where it holds something else."""
        try:
            found = json.loads(path.read_bytes())
            found["rejected"] = {**dict.fromkeys(NAMES, 0), **found["rejected"]}  # a filter may be younger than the run
            statistics = cls(**{own.name: found[own.name] for own in fields(cls)})
            counts = [statistics.requests, statistics.completions, statistics.tasks, statistics.kept]
            sound = (
                all(type(count) is int and count >= 0 for count in (*counts, *statistics.rejected.values()))
                and statistics.rejected.keys() == set(NAMES)
                and statistics.ended in (None, "target", "max_requests", "max_stall")
            )
        except (ValueError, KeyError, TypeError, AttributeError):
            sound = False
        if not sound:
            raise ValueError(
                f"{path}: damaged, for it does not hold the counts of a run (put back what was there, {OR_ELSE})"
            )
        return statistics

    @property
    def acceptance_rate(self) -> float:
        return self.kept / self.tasks if self.tasks else 0.0


class BatchDir:
    """A folder that this process alone writes to, see `open_batch_dir`."""

    def __init__(self, folder: Path, config: Any, seed_tasks: Sequence[Task]):
        """Begins a run, or goes on with the one that is there.

        Raises:
            ValueError: it was begun with other settings or seed tasks, or its files are damaged or were added to.
            FileNotFoundError: one of its files is gone.
            FileExistsError: the folder holds something else.
        """
        self.folder = folder
        self.statistics = Statistics()
        seeds = "".join(_seed_line(task) for task in seed_tasks)
        if (folder / STATISTICS).exists():
            self.statistics = Statistics.read(folder / STATISTICS)
        else:
            _check_empty(folder)
        for name in (STATISTICS, SEED_TASKS, CONFIG, "report.html"):  # half-written by `whole_file`, and killed
            for half_written in folder.glob(f".{name}.{'[0-9a-f]' * 32}"):
                half_written.unlink()
        begun = self.statistics.requests > 0 or (folder / ARRIVED).exists()
        if begun:
            _check_there(folder)
            _check_same(folder, config, seeds)
        else:
            self.commit([], [])  # first of all: a folder with this file is ours
            with whole_file(folder / SEED_TASKS) as path:
                path.write_text(seeds, encoding="utf-8")
        done = self.statistics
        unfinished = range(done.requests, (done.requests // config.round_size + 1) * config.round_size)
        self.kept = _read_tasks(folder / TASKS, _committed(folder / TASKS, done.kept, unfinished))
        """The lines of machine_generated_instructions.jsonl."""
        for _ in _committed(folder / REQUESTS, done.requests, unfinished):
            pass
        self.arrived = self._read_arrived()
        """Completions of the round under way, by the seed that they were asked with."""
        save_yaml(config, folder / CONFIG)

    def commit(self, tasks: Sequence[dict[str, Any]], requests: Sequence[dict[str, Any]]) -> None:
        """Appends lines to both files, and makes them count by writing `self.statistics`."""
        _append(self.folder / TASKS, tasks)
        _append(self.folder / REQUESTS, requests)
        values = {**asdict(self.statistics), "acceptance_rate": self.statistics.acceptance_rate}
        with whole_file(self.folder / STATISTICS) as path, path.open("w", encoding="utf-8") as file:
            file.write(json.dumps(values, indent=2) + "\n")
            _to_disk(file)

    def keep(self, seed: int, completions: list[Completion]) -> None:
        """Keeps what a server answered, so that it need not be asked again."""
        self.arrived[seed] = completions
        _append(self.folder / ARRIVED, [{"seed": seed, "completions": as_json(completions)}])

    def forget_arrived(self) -> None:
        """The round is committed, and its completions with it."""
        self.arrived.clear()
        (self.folder / ARRIVED).unlink(missing_ok=True)

    def _read_arrived(self) -> dict[int, list[Completion]]:
        path = self.folder / ARRIVED
        if not path.exists():
            return {}
        whole = path.read_bytes().rpartition(b"\n")[0]
        os.truncate(path, len(whole) + 1 if whole else 0)
        arrived = {}
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                found = json.loads(line)
                arrived[found["seed"]] = [Completion(**values) for values in found["completions"]]
            except (ValueError, KeyError, TypeError):
                raise ValueError(
                    f"{path}:{number}: damaged (delete the file, and its requests are asked anew)"
                ) from None
        return arrived


@contextmanager
def open_batch_dir(folder: Path, config: Any, seed_tasks: Sequence[Task]) -> Iterator[BatchDir]:
    """Claims the folder for this process. Errors: those of `BatchDir`, and FileExistsError where a run is in it."""
    with writing_to(folder, "--batch_dir"):
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / ".lock", "a+", encoding="utf-8") as lock:
            lock_folder(folder, lock, "give another --batch_dir")
            yield BatchDir(folder, config, seed_tasks)


def as_json(completions: Sequence[Completion]) -> list[dict[str, Any]]:
    return [completion._asdict() for completion in completions]


def _check_empty(folder: Path) -> None:
    """Refuses a folder whose files are another run's."""
    for name in (CONFIG, TASKS, REQUESTS, SEED_TASKS, "report.html"):
        path = folder / name
        if path.exists() and path.stat().st_size:
            raise FileExistsError(
                f"{path}: is there, but no {STATISTICS}, so it is no run of ours, or not all of one "
                f"(put that file back, {OR_ELSE})"
            )


def _check_there(folder: Path) -> None:
    for name in (TASKS, REQUESTS, CONFIG, SEED_TASKS):
        if not (folder / name).exists():
            raise FileNotFoundError(
                f"{folder / name}: is gone, and a run that was begun needs it (put it back, {OR_ELSE})"
            )


def _check_same(folder: Path, config: Any, seeds: str) -> None:
    """Refuses to go on with what would not have come to the same."""
    earlier = parse(type(config), ["--config", str(folder / CONFIG)])
    changed = [
        f"--{name} {getattr(earlier, name)} (now {getattr(config, name)})"
        for name in (field.name for field in fields(config))
        if name not in FREE and getattr(earlier, name) != getattr(config, name)
    ]
    if changed:
        raise ValueError(f"{folder}: was begun with {', '.join(changed)}; give that, or another --batch_dir")
    if (folder / SEED_TASKS).read_text(encoding="utf-8") != seeds:
        raise ValueError(
            f"{folder}: was begun with other seed tasks; --seed_tasks_path {folder / SEED_TASKS} goes on with them, "
            "or give another --batch_dir"
        )


def _seed_line(task: Task) -> str:
    instances = [{"input": task.input, "output": task.output}]
    values = {"instruction": task.instruction, "instances": instances, "is_classification": task.is_classification}
    return json.dumps(values, ensure_ascii=False) + "\n"


def _append(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    with path.open("a", encoding="utf-8", newline="") as file:
        file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        _to_disk(file)


def _to_disk(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _committed(path: Path, count: int, unfinished: range) -> Iterator[bytes]:
    """The first lines of a file. The rest, of a round that was killed, is moved into NAME.cut.

    Args:
        unfinished: the requests of that round.

    Raises ValueError where lines are missing, or the rest cannot be of such a round.
    """
    with path.open("r+b") as file:
        for number in range(count):
            line = file.readline()
            if not line.endswith(b"\n"):
                raise ValueError(
                    f"{path}: holds {number} whole lines, but {STATISTICS} speaks of {count} "
                    f"(put the others back, {OR_ELSE})"
                )
            yield line
        end = file.tell()
        rest = file.readlines()
        for number, line in enumerate(rest, count + 1):
            if not _is_uncommitted(line, unfinished):
                raise ValueError(
                    f"{path}:{number}: a line too many, for {STATISTICS} speaks of {count}, and it is of no round that "
                    "was cut short (move what was added into another file; sft.py --data takes several)"
                )
        if text := b"".join(rest).rstrip(b"\n"):
            cut = path.with_name(f"{path.name}.cut")
            with cut.open("ab") as aside:
                aside.write(text + b"\n")
                _to_disk(aside)
            print0(f"{path}: what a round that was cut short left after line {count} is moved into {cut.name}")
        file.truncate(end)


def _is_uncommitted(line: bytes, unfinished: range) -> bool:
    """Whether a line, or its half where a kill cut it, can be of a request that will be made once more."""
    try:
        return json.loads(line)["request_idx"] in unfinished
    except (KeyError, TypeError):
        return False
    except ValueError:
        return not line.strip() or (line.startswith(b"{") and not line.endswith(b"\n"))


def _read_tasks(path: Path, lines: Iterable[bytes]) -> list[dict[str, Any]]:
    found = []
    for number, line in enumerate(lines, 1):
        try:
            task = json.loads(line)
            ours = all(isinstance(task[name], str) for name in ("instruction", "input", "output"))
            ours = ours and isinstance(task["request_idx"], int)
        except (ValueError, KeyError, TypeError):
            ours = False
        if not ours:
            raise ValueError(
                f"{path}:{number}: no task that this run wrote (put back what was there; your own go elsewhere)"
            )
        found.append(task)
    return found
