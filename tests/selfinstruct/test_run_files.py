"""Runs that are stopped, killed, continued and refused: nothing is lost, and nothing comes out otherwise."""

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

from minigpt.selfinstruct import run_files as batch_dir
from minigpt.selfinstruct.bootstrap import RunArguments
from minigpt.selfinstruct.endpoint import ApiGenerator, EndpointArguments
from minigpt.selfinstruct.run_files import BatchDir, open_batch_dir
from minigpt.selfinstruct.tasks import read_seed_tasks
from minigpt.settings.command_line import parse

from .endpoint import MODEL, serving
from .runs import SEEDS, TASKS, bootstrap, config_of, contents, lines, same
from .writers import Scripted

# ---- stopped and continued


def test_a_run_in_steps_equals_one_in_one_go(tmp_path, whole):
    """Ended by its target, by its requests, within rounds and between them, and continued each time."""
    for settings in (
        {"num_instructions_to_generate": 3},
        {"max_requests": 5},
        {"max_requests": 8},
        {"max_requests": 9},
    ):
        bootstrap(tmp_path / "run", **settings)
    asked = Scripted()
    bootstrap(tmp_path / "run", asked)
    same(tmp_path / "run", contents(whole))
    assert len(asked.asked) <= 40  # nothing anew
    once = len(asked.asked)
    bootstrap(tmp_path / "run", asked)  # it has ended
    same(tmp_path / "run", contents(whole))
    assert len(asked.asked) == once


@pytest.fixture(autouse=True, scope="module")
def a_lock_of_ones_own():
    """tqdm's lock is shared with forked processes: one that is killed with it in hand never gives it back."""
    tqdm.set_lock(threading.RLock())


def killed(folder: Path, prepare, **settings) -> None:
    """A run in a process of its own, which `prepare` sees to it is killed."""

    def child() -> None:
        prepare()
        bootstrap(folder, **settings)
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


def die(*_) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def half_of_a_file(name):
    """Killed while it appends to a file, in the second round: part of what it appends is there."""

    def prepare() -> None:
        real = batch_dir._append

        def append(path, lines):
            if path.name == name and (path.exists() and path.stat().st_size) and lines:
                text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
                with path.open("a", encoding="utf-8") as file:
                    file.write(text[: 2 * len(text) // 3])
                die()
            real(path, lines)

        batch_dir._append = append

    return prepare


def after(owner, name, count):
    """Killed when it has called this so many times."""

    def prepare() -> None:
        real, calls = getattr(owner, name), []

        def call(*arguments):
            found = real(*arguments)
            calls.append(1)
            return die() if len(calls) == count else found

        setattr(owner, name, call)

    return prepare


PLACES = {
    "half of the tasks": half_of_a_file(TASKS),
    "half of the requests": half_of_a_file("requests.jsonl"),
    "nothing written yet": after(batch_dir, "save_yaml", 1),
    "the first file": after(batch_dir, "_append", 1),
    "tasks and no requests": after(batch_dir, "_append", 5),
    "requests and no statistics": after(batch_dir, "_append", 6),
    "a round": after(BatchDir, "commit", 2),
    "two rounds": after(BatchDir, "commit", 3),
    "completions and no verdicts": after(Scripted, "complete", 2),
}


@pytest.mark.parametrize("place", PLACES)
def test_killed_anywhere_and_run_again(tmp_path, whole, place):
    killed(tmp_path / "run", PLACES[place])
    bootstrap(tmp_path / "run")
    same(tmp_path / "run", contents(whole))


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 12))])
def test_killed_again_and_again_at_random_moments(tmp_path, whole, seed):
    """Twenty times, from the outside."""
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
    same(tmp_path / "run", contents(whole))


# ---- refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": 1}, "was begun with --seed 42 (now 1); give that, or another --batch_dir"),
        (
            {"temperature": 0.5, "format": "io"},
            "was begun with --temperature 1.0 (now 0.5), --format iio (now io); give",
        ),
        ({"seed_tasks": SEEDS[1:]}, "was begun with other seed tasks; --seed_tasks_path "),
    ],
)
def test_another_run_does_not_go_on_in_its_place(whole, settings, message):
    before = contents(whole)
    with pytest.raises(ValueError) as error:
        bootstrap(whole, **settings)
    assert str(error.value).startswith(f"{whole}: {message}")
    same(whole, before)


def test_the_seed_tasks_are_kept_and_can_be_read_again(whole):
    assert read_seed_tasks(whole / "seed_tasks.jsonl") == SEEDS


def test_the_configuration_is_kept(whole):
    assert parse(RunArguments, ["--config", str(whole / "config.yaml")]) == config_of(whole)


def test_one_run_at_a_time(tmp_path, whole):
    with open_batch_dir(tmp_path, config_of(tmp_path), SEEDS), pytest.raises(FileExistsError) as error:
        bootstrap(tmp_path)
    assert f"another run, process {os.getpid()} on " in str(error.value)
    bootstrap(tmp_path)
    same(tmp_path, contents(whole))


def test_a_folder_of_something_else(tmp_path):
    (tmp_path / "config.yaml").write_text("learning_rate: 1\n")
    with pytest.raises(FileExistsError, match=r"config.yaml: is there, but no statistics.json"):
        bootstrap(tmp_path)
    assert (tmp_path / "config.yaml").read_text() == "learning_rate: 1\n"


def test_lines_that_somebody_took_out(tmp_path):
    bootstrap(tmp_path, num_instructions_to_generate=5)
    kept = (tmp_path / TASKS).read_bytes().splitlines(keepends=True)
    (tmp_path / TASKS).write_bytes(b"".join(kept[1:]))
    with pytest.raises(ValueError, match=rf"{TASKS}: holds {len(kept) - 1} whole lines, but statistics.json speaks of"):
        bootstrap(tmp_path)
    (tmp_path / TASKS).write_bytes(b"{\n" + b"".join(kept[1:]))
    with pytest.raises(ValueError, match=rf"{TASKS}:1: no task that this run wrote \(put back what was there;"):
        bootstrap(tmp_path)


MINE = '{"instruction": "Name my cat.", "input": "", "output": "Mia."}\n'


@pytest.mark.parametrize(
    ("edit", "line"),
    [
        (lambda text: text + MINE, 1),
        (lambda text: text + MINE.rstrip(), 1),  # an editor need not end the last line
        (lambda text: text + '{"instruction": "Cut o' + MINE, 1),  # behind what a killed run left
        (lambda text: text + "\n# my notes", 2),
        (lambda text: text + '{"request_idx": "x"}\n', 1),
        (lambda text: text.partition("\n")[0] + "\n" + text, 1),  # then the last that the run wrote is one too many
        (lambda text: text + '{"request_idx": 999}\n', 1),  # the end of a longer run, which was taken for ours
    ],
)
def test_what_somebody_added_is_not_cut_off(tmp_path, edit, line):
    """A task that was added by hand was taken for the rest of a killed round, and was gone without a word."""
    found = bootstrap(tmp_path, num_instructions_to_generate=5)
    tasks = tmp_path / TASKS
    tasks.write_text(edit(tasks.read_text()))
    before = contents(tmp_path)
    for _ in range(2):
        with pytest.raises(ValueError) as error:
            bootstrap(tmp_path)
        assert str(error.value) == (
            f"{tasks}:{found.kept + line}: a line too many, for statistics.json speaks of {found.kept}, and it is of "
            "no round that was cut short (move what was added into another file; sft.py --data takes several)"
        )
        same(tmp_path, before)


@pytest.mark.parametrize("name", [TASKS, "requests.jsonl"])
def test_what_is_cut_off_lies_beside(tmp_path, whole, name, capsys):
    """A last line by hand, with a brace missing and no line end, looks as half of ours does: it was gone for good."""
    bootstrap(tmp_path, num_instructions_to_generate=5)
    path, aside = tmp_path / name, tmp_path / f"{name}.cut"
    committed = len(path.read_bytes().splitlines())
    end = 8  # of the first round, which the target has ended early
    ours = "".join(json.dumps({"request_idx": idx}) + "\n" for idx in (end - 2, end - 1))
    half, mine = '{"instruction": "Name ', '{"instruction": "Name my cat.", "output": "Mia."'
    for added in (ours + half, "\n", mine):
        with path.open("a") as file:
            file.write(added)
        bootstrap(tmp_path, num_instructions_to_generate=5)
    assert aside.read_text() == f"{ours}{half}\n{mine}\n"
    said = f"{path}: what a round that was cut short left after line {committed} is moved into {name}.cut"
    assert capsys.readouterr().out.splitlines().count(said) == 2
    with path.open("a") as file:
        file.write(json.dumps({"request_idx": end}) + "\n")
    with pytest.raises(ValueError, match=rf"{name}:{committed + 1}: a line too many"):
        bootstrap(tmp_path)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    bootstrap(tmp_path)
    same(tmp_path, contents(whole))


def test_tasks_added_before_the_first_round_stay(tmp_path):
    with open_batch_dir(tmp_path, config_of(tmp_path), SEEDS):
        pass
    (tmp_path / TASKS).write_text(MINE)
    with pytest.raises(ValueError, match=rf"{TASKS}:1: a line too many"):
        bootstrap(tmp_path)
    assert (tmp_path / TASKS).read_text() == MINE


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
def test_damaged_statistics_are_one_line(tmp_path, damage):
    """A missing key was a bare KeyError, a wrong type a TypeError in the middle of the run."""
    bootstrap(tmp_path, num_instructions_to_generate=5)
    statistics = tmp_path / "statistics.json"
    damaged = damage(statistics.read_text())
    assert damaged != statistics.read_text()
    statistics.write_text(damaged)
    with pytest.raises(ValueError) as error:
        bootstrap(tmp_path)
    assert str(error.value) == (
        f"{statistics}: damaged, for it does not hold the counts of a run "
        "(put back what was there, or give another --batch_dir)"
    )


def test_a_filter_that_is_younger_than_the_run(tmp_path, whole):
    """A run from before the newest filter counted as damaged: its statistics did not speak of it."""
    bootstrap(tmp_path, num_instructions_to_generate=5)
    statistics = tmp_path / "statistics.json"
    found = json.loads(statistics.read_text())
    assert found["rejected"].pop("punctuation") == 0
    statistics.write_text(json.dumps(found))
    bootstrap(tmp_path)
    same(tmp_path, contents(whole))


@pytest.mark.parametrize("name", [TASKS, "requests.jsonl", "config.yaml", "seed_tasks.jsonl"])
def test_a_file_that_is_gone(tmp_path, name):
    """The error named the file, and not what to do."""
    bootstrap(tmp_path, num_instructions_to_generate=5)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError) as error:
        bootstrap(tmp_path)
    assert str(error.value) == (
        f"{tmp_path / name}: is gone, and a run that was begun needs it (put it back, or give another --batch_dir)"
    )
    assert not (tmp_path / name).exists()


def test_the_statistics_are_gone(tmp_path):
    bootstrap(tmp_path, num_instructions_to_generate=5)
    (tmp_path / "statistics.json").unlink()
    with pytest.raises(FileExistsError, match=r"but no statistics.json, .* \(put that file back, or give another --ba"):
        bootstrap(tmp_path)


# ---- a server


def ask(server, folder, **settings):
    endpoint = EndpointArguments(server.url, MODEL, api_retries=0)
    return bootstrap(folder, ApiGenerator(endpoint), **settings)


def test_what_a_server_answered_is_never_asked_again(tmp_path):
    """It fails at every fifth request, and each time the run ends; what had arrived by then is used."""
    arrived = tmp_path / "run" / "arrived.jsonl"
    with serving(lambda number, body: 500 if number % 5 == 4 else None) as server:
        for _ in range(100):
            try:
                found = ask(server, tmp_path / "run")
                break
            except OSError:
                assert not arrived.exists() or len(arrived.read_bytes().splitlines()) <= 8
        paid = server.answered
    assert len(paid) == len(set(paid))  # nothing twice
    assert len(server.bodies) > len(paid) + 2
    used = [request["seed"] % 2**31 for request in lines(tmp_path / "run", "requests.jsonl")]
    assert found.requests == len(used)
    assert set(used) <= set(paid)
    # nothing lost: what lies past the target waits for a larger one
    waiting = {line["seed"] % 2**31 for line in lines(tmp_path / "run", "arrived.jsonl")}
    assert set(paid) == set(used) | waiting
    with serving() as server:
        ask(server, tmp_path / "run", num_instructions_to_generate=120)
        assert not {body["seed"] for body in server.bodies} & set(paid)
        ask(server, tmp_path / "whole", num_instructions_to_generate=120)
    for name in (TASKS, "requests.jsonl", "statistics.json"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_half_a_line_of_what_arrived(tmp_path):
    """Killed while it wrote a completion down: that one is asked for again, and no other."""
    with serving(lambda number, body: 500 if number >= 5 else None) as server, pytest.raises(OSError):
        ask(server, tmp_path)
    arrived = tmp_path / "arrived.jsonl"
    *whole_lines, last = arrived.read_bytes().splitlines(keepends=True)
    arrived.write_bytes(b"".join(whole_lines) + last[:-7])
    with serving() as server:
        ask(server, tmp_path)
    again = {body["seed"] for body in server.bodies}
    assert json.loads(last)["seed"] % 2**31 in again
    assert not {json.loads(line)["seed"] % 2**31 for line in whole_lines} & again


def test_damage_in_what_arrived_is_one_line(tmp_path):
    with serving(lambda number, body: 500 if number >= 5 else None) as server, pytest.raises(OSError):
        ask(server, tmp_path)
    arrived = tmp_path / "arrived.jsonl"
    arrived.write_text('{"seed": 3}\n' + arrived.read_text())
    with pytest.raises(
        ValueError, match=r"arrived.jsonl:1: damaged \(delete the file, and its requests are asked anew"
    ):
        bootstrap(tmp_path)
