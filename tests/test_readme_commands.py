"""The commands of README.md and the pages beside it, run.

They run as they stand, in the order in which they stand, in a folder with a tiny model in GPT-2's place and a few
records for data; STAND_INS says what is put for what. Those marked `# needs ...` are parsed only (test_readme.py), by
the parsers that they are for. `make` targets are looked up (the tests are one of them, and test_demo.py looks after the
other), and test_examples.py runs `python examples/...`.
"""

import os
import random
import re
import shlex
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import pytest
import torch

from minigpt import GPT, GPTConfig, Tokenizer

from .hub_server import serve_hub
from .readme import CLASSES, README, RUN, Block, Command
from .scripted_endpoint import serve
from .workplace import ROOT, Workplace


class Place(Workplace):
    """A folder in which the commands of README.md find what they name."""

    def __init__(self, folder: Path, **env: str):
        super().__init__(folder)
        self.env = self.environment(**env)
        for name in (*CLASSES, "configs"):
            (folder / name).symlink_to(ROOT / name)
        rows = (folder / "train.json").read_text()
        for name in ("instruction-data.json", "test.json", "data.json"):
            (folder / name).write_text(rows)
        (folder / "questions.txt").write_text("Who wrote Emma?\nSay it twice.\n")
        self.stays: list[int] = []  # processes that are there until the end

    def run(self, argv: list[str], stdin: str = "", stays: bool = False) -> tuple[int, str, str]:
        """The exit code, or the id of a process that stays, with what it printed."""
        done = self.runner.run(argv, self.env, stdin, stays)
        self.stays += [done[0]] * stays
        return done

    def close(self) -> None:
        for process in self.stays:
            os.kill(process, signal.SIGTERM)


def says(number: int, body: dict) -> dict:
    """The server's part: tasks of words in no order, and a judge's mark."""
    if "messages" in body:
        return {"choices": [{"message": {"role": "assistant", "content": "70"}}]}
    words = random.Random(number).sample([f"{a}{b}" for a in ("sun", "sea", "ice") for b in "abcdefghijk"], 8)
    task = f" Name {' '.join(words)}.\n9. Input:\n<noinput>\n9. Output:\nIt is {words[0]}.\n###"
    return {"choices": [{"index": 0, "text": task, "finish_reason": "stop"}]}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


PORT = str(free_port())


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Iterator[Place]:
    """With a hub of its own, where GPT-2 is a tiny model of random weights and a long context."""
    hub_folder, home = tmp_path_factory.mktemp("hub"), tmp_path_factory.mktemp("home")
    with serve_hub(hub_folder, home) as hub:
        place = Place(tmp_path_factory.mktemp("readme"), **hub.env)
        torch.manual_seed(0)
        eot = Tokenizer.tiny().eot_id
        shape = GPTConfig(4096, n_positions=1024, n_embd=16, n_layer=1, n_head=1, bos_token_id=eot, eos_token_id=eot)
        for name in ("gpt2", "gpt2-xl"):
            GPT(shape).save_pretrained(hub_folder / "openai-community" / name)
            Tokenizer.tiny().save_pretrained(hub_folder / "openai-community" / name, 1024)
        shutil.copytree(hub_folder / "openai-community" / "gpt2", place.folder / "FOLDER")
        try:
            yield place
        finally:
            place.close()


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with serve(says) as scripted:
        yield scripted.url


STAND_INS = [  # a part of a command, what is put in its place or added, and the exit code
    (r"--config_name gpt2 .*", r"\g<0> --plan 1", 0),  # 124 million parameters on one core
    (r"--api_base \S+ .*", r"\g<0> --num_instructions_to_generate 3", 0),
    (r"openai-community/gpt2-xl --num_instr.*", r"\g<0> --max_requests 2 --max_length 16", 1),  # which writes no list
]


@pytest.mark.parametrize("what", RUN, ids=lambda what: what.where)
def test_every_command_runs(place, server, what):
    if isinstance(what, Block):
        (place.folder / "block.py").write_text(what.text.replace(":8000/", f":{PORT}/"))
        code, out, err = place.run(["block.py"])
        assert (code, bool(out.strip())) == (0, True), err
        return
    words, expected = what.words, 0
    for part, instead, code in STAND_INS:
        words, count = re.subn(part, instead, words)
        expected = max(expected, code * count)
    words = re.sub(r"(?<=api_base )\S+", server, words)
    serves = "--serve" in words
    words = re.sub(r"(?<=--port )8000", PORT, words)
    redirected = re.fullmatch(r"(.*?) < (\S+) > (\S+)", words)
    if redirected:
        words, stdin = redirected[1], (place.folder / redirected[2]).read_text()
    else:
        stdin = "Who wrote Emma?\n\n" if "chat.py" in words else ""
    code, out, err = place.run(shlex.split(words)[1:], stdin, stays=serves)
    if serves:
        until_it_answers(f"http://127.0.0.1:{PORT}/health", place.folder / "std2")
        return
    assert code == expected, err
    assert out
    if expected:
        assert "tasks kept; --max_requests 2 is reached" in err
    if redirected:
        assert len(out.splitlines()) >= len(stdin.splitlines())
    asked = place.folder / "network.log"
    assert not asked.exists(), asked.read_text()


def until_it_answers(url: str, log: Path) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            with urlopen(url) as answer:
                assert answer.status == 200
                return
        except OSError:
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)


def test_what_the_commands_left(place):
    """What README.md says is in the folders is there, and the long run's line, given again, goes on."""
    for run, table in (("runs/mine", "| in `runs/mine/` |"), ("runs/asked", "| in `--batch_dir` |")):
        rows = README.partition(table)[2].partition("\n\n")[0].splitlines()[2:]
        named = [name for row in rows for name in re.findall(r"`([\w.-]+/?)`", row.split("|")[1])]
        missing = {name for name in named if not (place.folder / run / name).exists()}
        assert len(named) >= 6
        assert missing <= {"export-best/", "checkpoints/", "arrived.jsonl"}
    long = next(what.words for what in RUN if isinstance(what, Command) and "--resume auto" in what.words)
    code, out, err = place.run(shlex.split(long)[1:])
    assert code == 0, err
    assert "after step" in out
