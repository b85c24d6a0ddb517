"""Resuming interrupted and killed runs gives the same files as an uninterrupted run; damaged runs are rejected."""

import json
import multiprocessing
import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest
from tqdm import tqdm

from minigpt.selfinstruct import run_files
from minigpt.selfinstruct.bootstrap import RunArguments
from minigpt.selfinstruct.endpoint import ApiGenerator, EndpointArguments
from minigpt.selfinstruct.run_files import BatchDir, open_batch_dir
from minigpt.selfinstruct.tasks import read_seed_tasks
from minigpt.settings.command_line import parse

from .endpoint import MODEL, serving
from .fake_generators import Scripted
from .runs import SEEDS, TASKS, assert_same_files, bootstrap, config_of, read_files, read_lines

# ---- interrupted and resumed


def test_a_run_in_steps_equals_an_uninterrupted_run(tmp_path, uninterrupted_run):
    """Ended by the target and by max_requests, within a round and between rounds, and resumed each time."""
    for settings in (
        {"num_instructions_to_generate": 3},
        {"max_requests": 5},
        {"max_requests": 8},
        {"max_requests": 9},
    ):
        bootstrap(tmp_path / "run", **settings)
    generator = Scripted()
    bootstrap(tmp_path / "run", generator)
    assert_same_files(tmp_path / "run", read_files(uninterrupted_run))
    assert len(generator.prompts) <= 40  # no request is repeated
    count = len(generator.prompts)
    bootstrap(tmp_path / "run", generator)  # has already ended
    assert_same_files(tmp_path / "run", read_files(uninterrupted_run))
    assert len(generator.prompts) == count


@pytest.fixture(autouse=True, scope="module")
def thread_only_tqdm_lock():
    """tqdm's default lock is shared with forked processes, and a process killed while holding it never releases it."""
    tqdm.set_lock(threading.RLock())


def run_until_killed(folder: Path, prepare, **settings) -> None:
    """Runs in a subprocess that `prepare` makes kill itself."""

    def child() -> None:
        prepare()
        bootstrap(folder, **settings)
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


def kill_self(*_) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def during_append(name):
    """Kills during the second round's append to a file, after 2/3 of it is written."""

    def prepare() -> None:
        real = run_files._append

        def append(path, lines):
            if path.name == name and (path.exists() and path.stat().st_size) and lines:
                text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
                with path.open("a", encoding="utf-8") as file:
                    file.write(text[: 2 * len(text) // 3])
                kill_self()
            real(path, lines)

        run_files._append = append

    return prepare


def after(owner, name, count):
    """Kills after the given number of calls of `owner.name`."""

    def prepare() -> None:
        real, calls = getattr(owner, name), []

        def call(*arguments):
            result = real(*arguments)
            calls.append(1)
            return kill_self() if len(calls) == count else result

        setattr(owner, name, call)

    return prepare


KILL_POINTS = {
    "during the append of tasks": during_append(TASKS),
    "during the append of requests": during_append("requests.jsonl"),
    "before any result is written": after(run_files, "save_yaml", 1),
    "after the first append": after(run_files, "_append", 1),
    "tasks without requests": after(run_files, "_append", 5),
    "requests without statistics": after(run_files, "_append", 6),
    "after one round": after(BatchDir, "commit", 2),
    "after two rounds": after(BatchDir, "commit", 3),
    "completions without verdicts": after(Scripted, "complete", 2),
}


@pytest.mark.parametrize("kill_point", KILL_POINTS)
def test_resume_after_a_kill(tmp_path, uninterrupted_run, kill_point):
    run_until_killed(tmp_path / "run", KILL_POINTS[kill_point])
    bootstrap(tmp_path / "run")
    assert_same_files(tmp_path / "run", read_files(uninterrupted_run))


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 12))])
def test_resume_after_twenty_kills_at_random_times(tmp_path, uninterrupted_run, seed):
    rng, exits = random.Random(seed), []
    for _ in range(20):
        process = multiprocessing.get_context("fork").Process(target=bootstrap, args=(tmp_path / "run",))
        process.start()
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        process.join()
        exits.append(process.exitcode)
    assert exits.count(-signal.SIGKILL) > 10
    bootstrap(tmp_path / "run")
    assert_same_files(tmp_path / "run", read_files(uninterrupted_run))


# ---- rejected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": 1}, "started with --seed 42 (now 1); use the same, or give another --batch_dir"),
        (
            {"temperature": 0.5, "format": "io"},
            "started with --temperature 1.0 (now 0.5), --format iio (now io); use the same",
        ),
        ({"seed_tasks": SEEDS[1:]}, "started with other seed tasks; use --seed_tasks_path "),
    ],
)
def test_a_run_with_other_settings_is_rejected(uninterrupted_run, settings, message):
    before = read_files(uninterrupted_run)
    with pytest.raises(ValueError) as error:
        bootstrap(uninterrupted_run, **settings)
    assert str(error.value).startswith(f"{uninterrupted_run}: {message}")
    assert_same_files(uninterrupted_run, before)


def test_the_saved_seed_tasks_equal_the_originals(uninterrupted_run):
    assert read_seed_tasks(uninterrupted_run / "seed_tasks.jsonl") == SEEDS


def test_the_saved_config_equals_the_original(uninterrupted_run):
    assert parse(RunArguments, ["--config", str(uninterrupted_run / "config.yaml")]) == config_of(uninterrupted_run)


def test_a_locked_folder_is_rejected(tmp_path, uninterrupted_run):
    with open_batch_dir(tmp_path, config_of(tmp_path), SEEDS), pytest.raises(FileExistsError) as error:
        bootstrap(tmp_path)
    assert f"another run, process {os.getpid()} on " in str(error.value)
    bootstrap(tmp_path)
    assert_same_files(tmp_path, read_files(uninterrupted_run))


def test_a_folder_with_other_files_is_rejected(tmp_path):
    (tmp_path / "config.yaml").write_text("learning_rate: 1\n")
    with pytest.raises(FileExistsError, match=r"config.yaml: exists without statistics.json"):
        bootstrap(tmp_path)
    assert (tmp_path / "config.yaml").read_text() == "learning_rate: 1\n"


def test_missing_and_damaged_lines_are_rejected(tmp_path):
    bootstrap(tmp_path, num_instructions_to_generate=5)
    kept = (tmp_path / TASKS).read_bytes().splitlines(keepends=True)
    (tmp_path / TASKS).write_bytes(b"".join(kept[1:]))
    with pytest.raises(ValueError, match=rf"{TASKS}: {len(kept) - 1} complete lines, but {len(kept)} according to"):
        bootstrap(tmp_path)
    (tmp_path / TASKS).write_bytes(b"{\n" + b"".join(kept[1:]))
    with pytest.raises(ValueError, match=rf"{TASKS}:1: not a task written by this run \(restore the line;"):
        bootstrap(tmp_path)


USER_TASK = '{"instruction": "Name my cat.", "input": "", "output": "Mia."}\n'


@pytest.mark.parametrize(
    ("edit", "line"),
    [
        (lambda text: text + USER_TASK, 1),
        (lambda text: text + USER_TASK.rstrip(), 1),  # without a line feed, as some editors save
        (lambda text: text + '{"instruction": "Cut o' + USER_TASK, 1),  # after an incomplete line of a killed run
        (lambda text: text + "\n# my notes", 2),
        (lambda text: text + '{"request_idx": "x"}\n', 1),
        (lambda text: text.partition("\n")[0] + "\n" + text, 1),  # a duplicated line shifts the last one
        (lambda text: text + '{"request_idx": 999}\n', 1),  # a request index beyond the unfinished round
    ],
)
def test_added_lines_are_an_error_and_are_kept(tmp_path, edit, line):
    """A task added by hand was mistaken for the rest of a killed round and silently deleted."""
    statistics = bootstrap(tmp_path, num_instructions_to_generate=5)
    tasks = tmp_path / TASKS
    tasks.write_text(edit(tasks.read_text()))
    before = read_files(tmp_path)
    for _ in range(2):
        with pytest.raises(ValueError) as error:
            bootstrap(tmp_path)
        assert str(error.value) == (
            f"{tasks}:{statistics.kept + line}: extra line: {statistics.kept} according to statistics.json, and this "
            "is not from an interrupted round (move added lines to another file; sft.py --data takes several)"
        )
        assert_same_files(tmp_path, before)


@pytest.mark.parametrize("name", [TASKS, "requests.jsonl"])
def test_uncommitted_lines_are_moved_to_a_cut_file(tmp_path, uninterrupted_run, name, capsys):
    """A user's last line without brace and line feed looks like an incomplete line of a run, and was deleted."""
    bootstrap(tmp_path, num_instructions_to_generate=5)
    path, cut_file = tmp_path / name, tmp_path / f"{name}.cut"
    committed = len(path.read_bytes().splitlines())
    end = 8  # of the first round, which the target ended early
    uncommitted = "".join(json.dumps({"request_idx": idx}) + "\n" for idx in (end - 2, end - 1))
    incomplete, user_line = '{"instruction": "Name ', '{"instruction": "Name my cat.", "output": "Mia."'
    for added in (uncommitted + incomplete, "\n", user_line):
        with path.open("a") as file:
            file.write(added)
        bootstrap(tmp_path, num_instructions_to_generate=5)
    assert cut_file.read_text() == f"{uncommitted}{incomplete}\n{user_line}\n"
    message = f"{path}: lines of an interrupted round after line {committed} are moved to {name}.cut"
    assert capsys.readouterr().out.splitlines().count(message) == 2
    with path.open("a") as file:
        file.write(json.dumps({"request_idx": end}) + "\n")
    with pytest.raises(ValueError, match=rf"{name}:{committed + 1}: extra line"):
        bootstrap(tmp_path)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    bootstrap(tmp_path)
    assert_same_files(tmp_path, read_files(uninterrupted_run))


def test_lines_added_before_the_first_round_are_kept(tmp_path):
    with open_batch_dir(tmp_path, config_of(tmp_path), SEEDS):
        pass
    (tmp_path / TASKS).write_text(USER_TASK)
    with pytest.raises(ValueError, match=rf"{TASKS}:1: extra line"):
        bootstrap(tmp_path)
    assert (tmp_path / TASKS).read_text() == USER_TASK


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[:40],
        lambda text: "[]",
        lambda text: text.replace('"kept"', '"keep"'),
        lambda text: text.replace('"requests": ', '"requests": -'),
        lambda text: text.replace('"length": ', '"length": "many", "l": '),
        lambda text: text.replace('"novelty"', '"nouvelle"'),
        lambda text: text.replace('"ended": "target"', '"ended": ["target"]'),
        lambda text: text.replace('"rejected": {', '"rejected": 3, "r": {'),
    ],
)
def test_damaged_statistics_are_a_one_line_error(tmp_path, damage):
    """A missing key raised a bare KeyError, a wrong type a TypeError during the run."""
    bootstrap(tmp_path, num_instructions_to_generate=5)
    statistics = tmp_path / "statistics.json"
    damaged = damage(statistics.read_text())
    assert damaged != statistics.read_text()
    statistics.write_text(damaged)
    with pytest.raises(ValueError) as error:
        bootstrap(tmp_path)
    assert str(error.value) == (
        f"{statistics}: damaged: the counts of a run are missing or invalid "
        "(restore the file, or give another --batch_dir)"
    )


def test_a_run_from_before_a_filter_was_added_is_resumed(tmp_path, uninterrupted_run):
    """statistics.json without a count for the newest filter was reported as damaged."""
    bootstrap(tmp_path, num_instructions_to_generate=5)
    statistics = tmp_path / "statistics.json"
    values = json.loads(statistics.read_text())
    assert values["rejected"].pop("punctuation") == 0
    statistics.write_text(json.dumps(values))
    bootstrap(tmp_path)
    assert_same_files(tmp_path, read_files(uninterrupted_run))


@pytest.mark.parametrize("name", [TASKS, "requests.jsonl", "config.yaml", "seed_tasks.jsonl"])
def test_a_missing_file_is_an_error(tmp_path, name):
    """The error named the file, but no fix."""
    bootstrap(tmp_path, num_instructions_to_generate=5)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError) as error:
        bootstrap(tmp_path)
    assert str(error.value) == (
        f"{tmp_path / name}: missing, and needed to resume the run (restore it, or give another --batch_dir)"
    )
    assert not (tmp_path / name).exists()


def test_missing_statistics_are_an_error(tmp_path):
    bootstrap(tmp_path, num_instructions_to_generate=5)
    (tmp_path / "statistics.json").unlink()
    with pytest.raises(
        FileExistsError, match=r"exists without statistics.json, .* \(restore statistics.json, or give another --ba"
    ):
        bootstrap(tmp_path)


# ---- a server


def bootstrap_by_server(server, folder, **settings):
    endpoint = EndpointArguments(server.url, MODEL, api_retries=0)
    return bootstrap(folder, ApiGenerator(endpoint), **settings)


def test_received_completions_are_never_requested_again(tmp_path):
    """Every fifth request fails and ends the run; the completions received before it are reused on resume."""
    arrived = tmp_path / "run" / "arrived.jsonl"
    with serving(lambda number, body: 500 if number % 5 == 4 else None) as server:
        for _ in range(100):
            try:
                statistics = bootstrap_by_server(server, tmp_path / "run")
                break
            except OSError:
                assert not arrived.exists() or len(arrived.read_bytes().splitlines()) <= 8
        completed = server.answered
    assert len(completed) == len(set(completed))  # none twice
    assert len(server.bodies) > len(completed) + 2
    used = [request["seed"] % 2**31 for request in read_lines(tmp_path / "run", "requests.jsonl")]
    assert statistics.requests == len(used)
    assert set(used) <= set(completed)
    # completions past the target stay in the cache, for a larger target
    unused = {line["seed"] % 2**31 for line in read_lines(tmp_path / "run", "arrived.jsonl")}
    assert set(completed) == set(used) | unused
    with serving() as server:
        bootstrap_by_server(server, tmp_path / "run", num_instructions_to_generate=120)
        assert not {body["seed"] for body in server.bodies} & set(completed)
        bootstrap_by_server(server, tmp_path / "uninterrupted", num_instructions_to_generate=120)
    for name in (TASKS, "requests.jsonl", "statistics.json"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "uninterrupted" / name).read_bytes()


def test_an_incomplete_cached_completion_is_requested_again(tmp_path):
    """Killed while writing a completion to arrived.jsonl: only that one is requested again."""
    with serving(lambda number, body: 500 if number >= 5 else None) as server, pytest.raises(OSError):
        bootstrap_by_server(server, tmp_path)
    arrived = tmp_path / "arrived.jsonl"
    *complete_lines, last = arrived.read_bytes().splitlines(keepends=True)
    arrived.write_bytes(b"".join(complete_lines) + last[:-7])
    with serving() as server:
        bootstrap_by_server(server, tmp_path)
    requested = {body["seed"] for body in server.bodies}
    assert json.loads(last)["seed"] % 2**31 in requested
    assert not {json.loads(line)["seed"] % 2**31 for line in complete_lines} & requested


def test_a_damaged_completion_cache_is_a_one_line_error(tmp_path):
    with serving(lambda number, body: 500 if number >= 5 else None) as server, pytest.raises(OSError):
        bootstrap_by_server(server, tmp_path)
    arrived = tmp_path / "arrived.jsonl"
    arrived.write_text('{"seed": 3}\n' + arrived.read_text())
    with pytest.raises(ValueError, match=r"arrived.jsonl:1: damaged \(delete the file: its requests are sent again"):
        bootstrap(tmp_path)
