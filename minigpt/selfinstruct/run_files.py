"""The files of a bootstrap run, committed round by round.

machine_generated_instructions.jsonl   one line per kept task; sft.py --data reads it
requests.jsonl                         one line per request: shots, completions, the verdict on each task
statistics.json                        the counts; written last, which commits the round
config.yaml, seed_tasks.jsonl          the settings and the seed pool that the run was started with
arrived.jsonl                          completions received from a server in the unfinished round
*.jsonl.cut                            uncommitted lines of a killed round
.lock                                  OS file lock, held while the run is active

The first two are append-only. Lines beyond the counts in statistics.json belong to a round that was killed while
writing; the next start moves them to NAME.cut instead of deleting them, because a user may have added them. Lines that
no interrupted round can have written are an error.
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
OR_OTHER_FOLDER = "or give another --batch_dir"
# May change on resume: target, budgets, paths, device and server. Seed tasks are compared by content, not by path.
RESUMABLE_SETTINGS = {
    *("batch_dir", "num_instructions_to_generate", "max_requests", "max_stall", "seed_tasks_path", "device"),
    *("api_base", "api_timeout", "api_retries"),
    *("curate", "data", "eval_data", "embedding_model", "curate_threshold", "output_dir"),  # only used with --curate
}


@dataclass
class Statistics:
    """Counts over all requests so far."""

    requests: int = 0
    completions: int = 0
    tasks: int = 0
    kept: int = 0
    rejected: dict[str, int] = field(default_factory=lambda: dict.fromkeys(NAMES, 0))
    """Number of tasks by the first filter that dropped them."""
    ended: str | None = None
    """Why the run ended: target, max_requests or max_stall. None: not yet."""

    @classmethod
    def read(cls, path: Path) -> "Statistics":
        """Reads statistics.json; raises ValueError if it is damaged."""
        try:
            values = json.loads(path.read_bytes())
            # A run from before a filter was added has no count for it.
            values["rejected"] = {**dict.fromkeys(NAMES, 0), **values["rejected"]}
            statistics = cls(**{column.name: values[column.name] for column in fields(cls)})
            counts = [statistics.requests, statistics.completions, statistics.tasks, statistics.kept]
            valid = (
                all(type(count) is int and count >= 0 for count in (*counts, *statistics.rejected.values()))
                and statistics.rejected.keys() == set(NAMES)
                and statistics.ended in (None, "target", "max_requests", "max_stall")
            )
        except (ValueError, KeyError, TypeError, AttributeError):
            valid = False
        if not valid:
            raise ValueError(
                f"{path}: damaged: the counts of a run are missing or invalid (restore the file, {OR_OTHER_FOLDER})"
            )
        return statistics

    @property
    def acceptance_rate(self) -> float:
        return self.kept / self.tasks if self.tasks else 0.0


class BatchDir:
    """The folder of a run; create it by `open_batch_dir`, which locks it for this process."""

    def __init__(self, folder: Path, config: Any, seed_tasks: Sequence[Task]):
        """Starts a run, or resumes the one in the folder.

        Raises:
            ValueError: the run was started with other settings or seed tasks, or its files are damaged or have extra
                lines.
            FileNotFoundError: one of its files is missing.
            FileExistsError: the folder contains other files of these names.
        """
        self.folder = folder
        self.statistics = Statistics()
        seeds = "".join(_seed_line(task) for task in seed_tasks)
        if (folder / STATISTICS).exists():
            self.statistics = Statistics.read(folder / STATISTICS)
        else:
            _check_empty(folder)
        for name in (STATISTICS, SEED_TASKS, CONFIG, "report.html"):  # temporary files of `whole_file`, left by a kill
            for temporary in folder.glob(f".{name}.{'[0-9a-f]' * 32}"):
                temporary.unlink()
        is_resume = self.statistics.requests > 0 or (folder / ARRIVED).exists()
        if is_resume:
            _check_files_exist(folder)
            _check_same_run(folder, config, seeds)
        else:
            self.commit([], [])  # writes statistics.json first: it marks the folder as a run
            with whole_file(folder / SEED_TASKS) as path:
                path.write_text(seeds, encoding="utf-8")
        committed = self.statistics
        round_end = (committed.requests // config.round_size + 1) * config.round_size
        unfinished = range(committed.requests, round_end)
        self.kept = _read_tasks(folder / TASKS, _committed_lines(folder / TASKS, committed.kept, unfinished))
        """The lines of machine_generated_instructions.jsonl."""
        for _ in _committed_lines(folder / REQUESTS, committed.requests, unfinished):
            pass
        self.cached_completions = self._read_completion_cache()
        """Seed of a request -> its completions; of the unfinished round only."""
        save_yaml(config, folder / CONFIG)

    def commit(self, tasks: Sequence[dict[str, Any]], requests: Sequence[dict[str, Any]]) -> None:
        """Appends lines to both files, then commits them by writing `self.statistics`."""
        _append(self.folder / TASKS, tasks)
        _append(self.folder / REQUESTS, requests)
        values = {**asdict(self.statistics), "acceptance_rate": self.statistics.acceptance_rate}
        with whole_file(self.folder / STATISTICS) as path, path.open("w", encoding="utf-8") as file:
            file.write(json.dumps(values, indent=2) + "\n")
            _flush_to_disk(file)

    def cache_completions(self, seed: int, completions: list[Completion]) -> None:
        """Saves a server's completions, so that a resumed run does not request them again."""
        self.cached_completions[seed] = completions
        _append(self.folder / ARRIVED, [{"seed": seed, "completions": as_json(completions)}])

    def clear_completion_cache(self) -> None:
        """To be called once the round is committed: its completions are in requests.jsonl."""
        self.cached_completions.clear()
        (self.folder / ARRIVED).unlink(missing_ok=True)

    def _read_completion_cache(self) -> dict[int, list[Completion]]:
        path = self.folder / ARRIVED
        if not path.exists():
            return {}
        complete_lines = path.read_bytes().rpartition(b"\n")[0]
        os.truncate(path, len(complete_lines) + 1 if complete_lines else 0)
        cache = {}
        for number, line in enumerate(complete_lines.splitlines(), 1):
            try:
                entry = json.loads(line)
                cache[entry["seed"]] = [Completion(**values) for values in entry["completions"]]
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{path}:{number}: damaged (delete the file: its requests are sent again)") from None
        return cache


@contextmanager
def open_batch_dir(folder: Path, config: Any, seed_tasks: Sequence[Task]) -> Iterator[BatchDir]:
    """Locks the folder for this process. Raises like `BatchDir`, and FileExistsError if another run holds the lock."""
    with writing_to(folder, "--batch_dir"):
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / ".lock", "a+", encoding="utf-8") as lock:
            lock_folder(folder, lock, "give another --batch_dir")
            yield BatchDir(folder, config, seed_tasks)


def as_json(completions: Sequence[Completion]) -> list[dict[str, Any]]:
    return [completion._asdict() for completion in completions]


def _check_empty(folder: Path) -> None:
    """Raises FileExistsError if files that the run would overwrite exist without statistics.json."""
    for name in (CONFIG, TASKS, REQUESTS, SEED_TASKS, "report.html"):
        path = folder / name
        if path.exists() and path.stat().st_size:
            raise FileExistsError(
                f"{path}: exists without {STATISTICS}, so it is not from a run, or the run is incomplete "
                f"(restore {STATISTICS}, {OR_OTHER_FOLDER})"
            )


def _check_files_exist(folder: Path) -> None:
    for name in (TASKS, REQUESTS, CONFIG, SEED_TASKS):
        if not (folder / name).exists():
            raise FileNotFoundError(
                f"{folder / name}: missing, and needed to resume the run (restore it, {OR_OTHER_FOLDER})"
            )


def _check_same_run(folder: Path, config: Any, seeds: str) -> None:
    """Raises ValueError if settings or seed tasks that affect the result differ from the start of the run."""
    earlier = parse(type(config), ["--config", str(folder / CONFIG)])
    changed = [
        f"--{name} {getattr(earlier, name)} (now {getattr(config, name)})"
        for name in (field.name for field in fields(config))
        if name not in RESUMABLE_SETTINGS and getattr(earlier, name) != getattr(config, name)
    ]
    if changed:
        raise ValueError(f"{folder}: started with {', '.join(changed)}; use the same, {OR_OTHER_FOLDER}")
    if (folder / SEED_TASKS).read_text(encoding="utf-8") != seeds:
        raise ValueError(
            f"{folder}: started with other seed tasks; use --seed_tasks_path {folder / SEED_TASKS} to resume, "
            f"{OR_OTHER_FOLDER}"
        )


def _seed_line(task: Task) -> str:
    instances = [{"input": task.input, "output": task.output}]
    values = {"instruction": task.instruction, "instances": instances, "is_classification": task.is_classification}
    return json.dumps(values, ensure_ascii=False) + "\n"


def _append(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    with path.open("a", encoding="utf-8", newline="") as file:
        file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        _flush_to_disk(file)


def _flush_to_disk(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _committed_lines(path: Path, count: int, unfinished: range) -> Iterator[bytes]:
    """Yields the first `count` lines, then truncates the file; the rest, of a killed round, is moved to NAME.cut.

    Args:
        unfinished: indices of the requests of the killed round.

    Raises:
        ValueError: lines are missing, or the rest cannot be from that round.
    """
    with path.open("r+b") as file:
        for number in range(count):
            line = file.readline()
            if not line.endswith(b"\n"):
                raise ValueError(
                    f"{path}: {number} complete lines, but {count} according to {STATISTICS} "
                    f"(restore the others, {OR_OTHER_FOLDER})"
                )
            yield line
        end = file.tell()
        rest = file.readlines()
        for number, line in enumerate(rest, count + 1):
            if not _is_uncommitted(line, unfinished):
                raise ValueError(
                    f"{path}:{number}: extra line: {count} according to {STATISTICS}, and this is not from an "
                    "interrupted round (move added lines to another file; sft.py --data takes several)"
                )
        if text := b"".join(rest).rstrip(b"\n"):
            cut_path = path.with_name(f"{path.name}.cut")
            with cut_path.open("ab") as cut_file:
                cut_file.write(text + b"\n")
                _flush_to_disk(cut_file)
            print0(f"{path}: lines of an interrupted round after line {count} are moved to {cut_path.name}")
        file.truncate(end)


def _is_uncommitted(line: bytes, unfinished: range) -> bool:
    """Whether a line, or the part of it written before a kill, can be from a request that will be repeated."""
    try:
        return json.loads(line)["request_idx"] in unfinished
    except (KeyError, TypeError):
        return False
    except ValueError:
        return not line.strip() or (line.startswith(b"{") and not line.endswith(b"\n"))


def _read_tasks(path: Path, lines: Iterable[bytes]) -> list[dict[str, Any]]:
    tasks = []
    for number, line in enumerate(lines, 1):
        try:
            task = json.loads(line)
            valid = all(isinstance(task[name], str) for name in ("instruction", "input", "output"))
            valid = valid and isinstance(task["request_idx"], int)
        except (ValueError, KeyError, TypeError):
            valid = False
        if not valid:
            raise ValueError(
                f"{path}:{number}: not a task written by this run (restore the line; keep your own in another file)"
            )
        tasks.append(task)
    return tasks
