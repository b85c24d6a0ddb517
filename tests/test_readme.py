"""README.md and the pages beside it, taken at their word: their commands parse, their files and flags are there.

test_readme_commands.py runs their commands, and test_regenerate.py looks after the transcript.
"""

import importlib.util
import itertools
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minigpt import GPTConfig
from minigpt.settings.command_line import parse
from minigpt.training.plan import plan

from .readme import BLOCKS, CLASSES, COMMANDS, PAGES, README, RUN, Block, Command, commands
from .workplace import ROOT


def test_commands_are_found():
    text = "# needs a GPU: fp16\npython a.py \\\n  --b '#'\n\npython c.py  # see d\n"
    assert commands(Block("p:1", "sh", text)) == [
        Command("p:2", "python a.py   --b '#'", "a GPU"),
        Command("p:5", "python c.py", ""),
    ]
    assert {"sh", "python", "console"} <= {block.language for block in BLOCKS}
    assert len(RUN) > 15


# ---- what is parsed


def config_class(script: str) -> Any:
    return getattr(importlib.import_module(script.removesuffix(".py")), CLASSES[script])


@pytest.fixture
def _beside_the_scripts(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.mark.usefixtures("_beside_the_scripts")
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.where)
def test_every_command_parses(command):
    """By the script's own parser, which knows its flags and their values; the launchers' flags by theirs."""
    for words in map(shlex.split, re.split(r" && | [<>] \S+", command.words)):
        program = words.pop(0) if words else ""
        if program == "make":
            targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
            assert words[0] in targets.split()
        elif program == "pip":
            assert command.needs == "the network"
            assert words[:4] == ["install", "-c", "constraints.txt", "-e"]
        elif program == "torchrun":
            from torch.distributed.run import get_args_parser

            launched = get_args_parser().parse_args(words)
            assert command.needs
            parse(config_class(launched.training_script), launched.training_script_args)
        elif program == "deepspeed":
            own, script = words[: words.index("sft.py")], words[words.index("sft.py") :]
            assert command.needs
            runner = Path(importlib.util.find_spec("deepspeed").origin).parent / "launcher" / "runner.py"
            assert all(f'"{flag}"' in runner.read_text() for flag in own if flag.startswith("--"))
            parse(config_class(script[0]), script[1:])
        elif program == "sbatch":
            assert command.needs == "Slurm"
            assert "sft.py" in Path(words[0]).read_text()
            parse(config_class("sft.py"), words[1:])
        elif program == "python" and words[0] in CLASSES:
            parse(config_class(words[0]), words[1:])
        elif program == "python":
            assert (ROOT / words[0]).is_file()
        else:
            assert program in ("mkdir", "")


@pytest.mark.usefixtures("_beside_the_scripts")
def test_every_flag_is_one():
    """In backticks, wherever on the pages; but for the flags of other programs."""
    known = {"help", "config", "debug", "version", "logdir", *itertools.chain(*map(flags, CLASSES))}
    for page in PAGES:
        text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        for code in re.findall(r"`[^`\n]+`", text):
            benchmark = ROOT / "benchmarks" / code.strip("`").split()[0]
            theirs = set(re.findall(r'"--(\w+)"', benchmark.read_text())) if benchmark.is_file() else set()
            for flag in re.findall(r"(?<![\w-])--(\w+)", code):
                assert flag in known | theirs, f"{page.name}: --{flag}"


def flags(script: str) -> set[str]:
    return set(config_class(script).__dataclass_fields__)


def test_every_file_and_every_heading_is_there():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        links = re.findall(r"\]\(([^)\s]+)\)|(?:src|srcset)=\"([^\"]+)\"", text)
        for link in (first or second for first, second in links):
            path, _, heading = link.partition("#")
            if not path.startswith("https://"):
                target = (page.parent / path) if path else page
                assert target.exists(), f"{page.name}: {link}"
                headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE) if heading else []
                assert not heading or heading in [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings]
        for path in re.findall(r"`((?:minigpt|configs|docs|examples|benchmarks|tests)/[\w/.]*\w)`", text):
            assert (ROOT / path).exists(), f"{page.name}: {path}"


def test_the_extras_are_there():
    """They are those of the folder: what an index has under our name need not be ours."""
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    for extra in re.findall(r"\.\[([\w,]+)\]", README):
        assert all(f'"{name}": [' in setup for name in extra.split(","))
    assert "minigpt[" not in README


# ---- what is shown


@pytest.mark.usefixtures("_beside_the_scripts")
def test_the_plan_is_what_plan_prints():
    """Of the run that README.md says: 1,000,000 examples of 512 tokens, less those held out."""
    shown = next(block.text for block in BLOCKS if block.language == "console" and "--plan" in block.text)
    command, _, table = shown.partition("\n")
    words = shlex.split(command.removeprefix("$ python sft.py"))
    config = parse(config_class("sft.py"), words)
    examples = 1_000_000 - round(1_000_000 * config.validation_split)
    lengths = np.full(examples, config.max_seq_length + 1)  # the shift eats one
    printed = plan(config, GPTConfig.preset("gpt2-xl"), lengths).table()
    assert printed.startswith(table.rstrip("\n"))


def test_the_benchmarks_are_those_of_the_log():
    """The figures of a row stand in one chapter of it."""
    log = re.split(r"^## ", (ROOT / "benchmarks" / "LOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    table = README.partition("\n## Benchmarks\n")[2].partition("\n## ")[0]
    rows = [row for line in table.splitlines() if (row := re.findall(r"(?<=\| )[\d,.-]+(?= \|)", line))]
    assert len(rows) >= 5
    for row in rows:
        patterns = [rf"(?<![\d.,]){re.escape(figure)}(?![\d]|[.,]\d)" for figure in row]
        assert any(all(re.search(pattern, chapter) for pattern in patterns) for chapter in log), row
