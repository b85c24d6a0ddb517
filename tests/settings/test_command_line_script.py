"""A script as a user runs it: its `--help`, its errors, its exit codes."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from minigpt.settings.command_line import parse, run
from minigpt.settings.groups import PromptArguments, TrainConfig

ROOT = Path(__file__).parents[2]


@dataclass
class Config(TrainConfig, PromptArguments):
    """A script's configuration."""

    data: list[str] = field(default_factory=list)
    """Files."""


SCRIPT = '''
import sys
from dataclasses import dataclass, field
from typing import Literal
from minigpt.settings.command_line import run

@dataclass
class Base:
    """What others share."""

    rate: float = 1e-4
    """Speed of
    learning."""
    name: str | None = None

@dataclass
class ToyConfig(Base):
    """Show what a script is like.

    python toy.py --data a.txt
    """

    data: list[str] = field(default_factory=list)
    """Files."""
    fast: bool = True
    """Be quick."""
    rate: float = 2e-4
    shape: Literal["round", "square"] = "round"
    """Look."""

def main(config):
    assert "torch" not in sys.modules
    if config.name:
        exec(config.name)
    print(config.data)

if __name__ == "__main__":
    run(main, ToyConfig)
'''

HELP = """\
usage: toy.py [-h] [OPTIONS]

Show what a script is like.

python toy.py --data a.txt

╭─ options ────────────────────────────────────────────────────────────────────╮
│ -h, --help              show this help message and exit                      │
│ --config FILE           YAML file of settings, such as a run's config.yaml;  │
│                         flags override it.                                   │
│ --debug                 Show the traceback of an error.                      │
│ --version               Show the version and exit.                           │
╰──────────────────────────────────────────────────────────────────────────────╯
╭─ toy options ────────────────────────────────────────────────────────────────╮
│ --data STR ...          Files. (default: unset)                              │
│ --fast, --no_fast       Be quick. (default: on)                              │
│ --shape {round,square}  Look. (default: round)                               │
╰──────────────────────────────────────────────────────────────────────────────╯
╭─ base options ───────────────────────────────────────────────────────────────╮
│ What others share.                                                           │
│ ──────────────────────────────────────────────────────────────────────────── │
│ --rate FLOAT            Speed of learning. (default: 0.0002)                 │
│ --name STR              (default: unset)                                     │
╰──────────────────────────────────────────────────────────────────────────────╯
"""

ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COLUMNS", "FORCE_COLOR"))},
    **{"NO_COLOR": "1", "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"},
}


@pytest.fixture
def toy(tmp_path):
    (tmp_path / "toy.py").write_text(SCRIPT)

    def run_toy(*argv: str, shell: str = "") -> subprocess.CompletedProcess:
        command = f'"{sys.executable}" toy.py "$@" {shell}'
        return subprocess.run(
            ["bash", "-c", command, "toy", *argv], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True
        )

    return run_toy


def test_help(toy):
    start = time.perf_counter()
    done = toy("--help")
    assert (done.returncode, done.stdout, done.stderr) == (0, HELP, "")
    assert time.perf_counter() - start < 2


def test_help_of_the_shared_fields(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as exit:
        parse(Config, ["--help"])
    assert exit.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    text = " ".join(" ".join(line.strip("│ ") for line in lines).split())
    for name in (known.name for known in dataclasses.fields(Config)):
        assert text.count(f" --{name} ") + text.count(f" --{name}, ") == 1
    assert text.count("(default: ") == len(dataclasses.fields(Config))
    assert text.count("Peak learning rate of AdamW, reached after the warmup. (default: 5e-05)") == 1
    assert "required" not in text and "local_rank" not in text and "None" not in text


def fails(error):
    def main(config):
        raise error

    return main


@pytest.mark.parametrize(
    ("argv", "main", "code", "stderr"),
    [
        (["--sed", "3"], print, 2, "error: unknown flag --sed (did you mean --seed?)\n"),
        (["--config", "no.yaml"], print, 2, "error: no.yaml: No such file or directory\n"),
        (["--config", "/"], print, 2, "error: /: Is a directory\n"),
        ([], fails(ValueError("a.txt:3:\n  not so")), 1, "error: a.txt:3: not so\n"),
        ([], lambda config: Path("/no/such").read_text(), 1, "error: /no/such: No such file or directory\n"),
        ([], fails(FileNotFoundError("m: no such folder")), 1, "error: m: no such folder\n"),
        ([], fails(KeyError("key")), 1, "error: KeyError: 'key' (--debug shows the traceback)\n"),
        ([], fails(AssertionError()), 1, "error: AssertionError: no message (--debug shows the traceback)\n"),
        ([], fails(ValueError()), 1, "error: ValueError: no message (--debug shows the traceback)\n"),
        ([], lambda config: signal.raise_signal(signal.SIGINT), 130, "\ninterrupted\n"),
        ([], lambda config: sys.exit(7), 7, ""),
    ],
)
def test_errors_of_a_script_are_one_line(argv, main, code, stderr, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["script.py", *argv])
    with pytest.raises(SystemExit) as exit:
        run(main, Config)
    assert (exit.value.code, *capsys.readouterr()) == (code, "", stderr)


def test_run_hands_the_configuration_to_main(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script.py", "--seed", "3"])
    given = []
    run(given.append, Config)
    assert given == [Config(seed=3)]


@pytest.mark.parametrize(("argv", "last"), [(["--name", "{}['key']"], "KeyError: 'key'"), (["--rte"], "ValueError: ")])
def test_debug_shows_the_traceback(toy, argv, last):
    done = toy(*argv, "--debug")
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback (most recent call last):\n")
    assert done.stderr.splitlines()[-1].startswith(last)


@pytest.mark.parametrize("argv", [["--help"], ["--data", "a"], ["--name", "print('x\\n' * 100_000)"]])
def test_a_closed_pipe_is_quiet(toy, argv):
    done = toy(*argv, shell="| true; exit ${PIPESTATUS[0]}")
    assert done.stderr == ""
    assert done.returncode in (0, 1)  # 0 where all was written before the pipe closed


@pytest.mark.parametrize(("ends", "code"), [("", 0), ("raise ValueError('no')", 1), ("sys.exit(75)", 75)])
def test_a_rank_that_is_done_cannot_be_aborted_by_the_interpreters_end(tmp_path, ends, code):
    """One ZeRO-3 run in fifty ended with SIGABRT when all was done: a thread of gloo woke up after Python had gone."""
    script = tmp_path / "rank.py"
    script.write_text(
        "import atexit, os, sys\nfrom dataclasses import dataclass\nfrom minigpt.settings.command_line import run\n"
        "@dataclass\nclass Config:\n    'A rank.'\n"
        f"def main(config):\n    print('done')\n    atexit.register(os.abort)\n    {ends or 'pass'}\n"
        "run(main, Config)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT), "RANK": "0", "WORLD_SIZE": "2"}
    done = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (code, "done\n")
