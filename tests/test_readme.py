"""README.md and the pages beside it, taken at their word: their commands are run, their files and flags are there.

Commands run as they stand, in the order in which they stand, in a folder with a tiny model in GPT-2's place and a few
records for data; STAND_INS says what is put for what. Those marked `# needs ...` are parsed only, by the parsers that
they are for. `make` targets are looked up (the tests are one of them, and test_demo.py looks after the other), and
test_examples.py runs `python examples/...`.
"""

import importlib.util
import itertools
import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import urlopen

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

from minigpt import GPT, GPTConfig, Tokenizer, read_records
from minigpt.config import parse
from minigpt.training.plan import plan

from .hub_server import serve_hub
from .inference.scripted import serve
from .workplace import ROOT, Workplace

PAGES = [ROOT / "README.md", ROOT / "examples" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = PAGES[0].read_text(encoding="utf-8")
CLASSES = {"train.py": "PretrainConfig", "sft.py": "SFTConfig", "chat.py": "ChatConfig"}
CLASSES["selfinstruct.py"] = "SelfInstructConfig"


class Block(NamedTuple):
    """A fenced block of a page."""

    where: str  # FILE:LINE of its first line
    language: str
    text: str


class Command(NamedTuple):
    """A command of a block for the shell, its line breaks and comments taken out."""

    where: str
    words: str
    needs: str  # what its comment says that it needs: "8 GPUs"


def blocks(text: str, name: str = "README.md") -> list[Block]:
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(f"{name}:{text.count(chr(10), 0, m.start()) + 2}", m[1], m[2]) for m in found]


def commands(block: Block) -> list[Command]:
    """A comment counts for its line; on a line of its own it counts down to the next empty one.

    >>> commands(Block("p:1", "sh", "# needs a GPU: fp16\\npython a.py \\\\\\n  --b '#'\\n\\npython c.py  # see d\\n"))
    [Command("p:2", "python a.py   --b '#'", "a GPU"), Command("p:5", "python c.py", "")]
    """
    page, first = block.where.rsplit(":", 1)
    found, above, words, begun = [], "", "", 0
    for number, line in enumerate(block.text.split("\n"), int(first)):
        code, comment = re.fullmatch(r"""((?:[^#'"]|'[^']*'|"[^"]*")*)(#.*)?""", line).groups()
        said = re.match(r"# needs ([^:;,]+)", comment or "")
        if not words:
            begun = number
            if not code.strip():
                above = (said[1] if said else above) if comment else ""
                continue
        words += code.rstrip("\\")
        if not code.endswith("\\"):
            found.append(Command(f"{page}:{begun}", words.strip(), said[1] if said else above))
            words = ""
    return found


BLOCKS = [b for page in PAGES for b in blocks(page.read_text(encoding="utf-8"), str(page.relative_to(ROOT)))]
COMMANDS = [command for block in BLOCKS if block.language == "sh" for command in commands(block)]
# What is run, in the order of the page: commands, and the blocks of Python between them.
RUN: list[Command | Block] = []
for block in BLOCKS:
    RUN += [block] if block.language == "python" else []
    RUN += [c for c in commands(block) if not c.needs and c.words.startswith("python ") and "examples/" not in c.words]


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


LOG = """\
installing
== 1. A corpus
left out
== 2. train.py: a title
An explanation.
$ python train.py
step 0/20  val_loss 8.3
  sample    'left out'
step 10/20  loss 2.4  val_loss 2.5
step 20/20  loss 1.2  val_loss 1.3  9 tok/s
time             7 s

== 4. Before and after
Another.
  One?
    before  x
    after   1  (right)
  Two?
    before  x
    after   2  (right)
  Three?
    before  x
    after   3  (right)
  Four?
    before  x
    after   4  (right)
  Five?
    before  x
    after   6  (wrong)
  Six?
    before  x
    after   7  (wrong)

  exact match on    6 held-out facts:   0.0% before,  66.7% after tuning
  the loss curves: left out

== 6. It writes tasks
A third.
tasks read       9
dropped          2 (22.2%)
  length         2 (22.2%)
  1 of the 7 kept tasks stands in nothing
  Find the capital of China.
    The capital of China is Beijing.  (right)
  the report: left out

== What this model is
Left out.
"""
SHOWN = """\
$ make demo

== 2. train.py: a title
An explanation.
step 0/20  val_loss 8.3
step 20/20  loss 1.2  val_loss 1.3  9 tok/s
time             7 s

== 4. Before and after
Another.
  One?
    before  x
    after   1  (right)
  Two?
    before  x
    after   2  (right)
  Five?
    before  x
    after   6  (wrong)

  exact match on    6 held-out facts:   0.0% before,  66.7% after tuning

== 6. It writes tasks
A third.
tasks read       9
dropped          2 (22.2%)
  1 of the 7 kept tasks stands in nothing
  Find the capital of China.
    The capital of China is Beijing.  (right)
"""


def test_a_log_becomes_the_transcript(tmp_path):
    spec = importlib.util.spec_from_file_location("regenerate", ROOT / "docs" / "regenerate.py")
    regenerate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(regenerate)
    train = tmp_path / "run" / "train"
    train.mkdir(parents=True)
    steps = [{"step": n, "loss": 8 / n, "val_loss": 9 / n, "tokens": 64 * n} for n in (1, 2, 3)]
    (train / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    (tmp_path / "log").write_text(LOG, encoding="utf-8")
    page = tmp_path / "README.md"
    page.write_text(README, encoding="utf-8")  # which so has the markers
    files = {"log": tmp_path / "log", "run": tmp_path / "run", "readme": page, "pictures": tmp_path}
    config = regenerate.RegenerateConfig(**{name: str(path) for name, path in files.items()})
    for _ in range(2):  # the second time there is a transcript already
        regenerate.main(config)
        text = page.read_text(encoding="utf-8")
        assert text.count(f"\n```\n{SHOWN}```\n") == 1
    before, after = README.split(regenerate.BEGIN)[0], README.split(regenerate.END)[1]
    assert (text.startswith(before), text.endswith(after)) == (True, True)
    for name in ("loss.png", "loss-dark.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert (ROOT / "docs" / name).stat().st_size < 100_000
    with pytest.raises(ValueError, match="expected the lines"):
        regenerate.with_transcript("# A page without markers", SHOWN)


# ---- what is run

RUNNER = """
import json, os, runpy, sys, traceback
import torch, minigpt.data.store, minigpt.inference.terminal, minigpt.model.gpt2, minigpt.training.run

for line in sys.stdin:  # each job in a process of its own, that finds all this imported
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        for number, name in enumerate(job["files"]):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), number)
        sys.stdin, sys.stdout, sys.stderr = (open(n, "rw"[n > 0], encoding="utf-8") for n in range(3))
        sys.argv, code = job["argv"], 0
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else bool(end.code)
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    print(child if job["stays"] else os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


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
        (folder / "runner.py").write_text(RUNNER)
        self.runner = subprocess.Popen(
            [sys.executable, "runner.py"],
            cwd=folder,
            env=self.env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.stays: list[int] = []  # processes that are there until the end

    def run(self, argv: list[str], stdin: str = "", stays: bool = False) -> tuple[int, str, str]:
        """The exit code, or the id of a process that stays, with what it printed."""
        names = [self.folder / f"std{number}" for number in range(3)]
        for name, text in zip(names, (stdin, "", "")):
            name.unlink(missing_ok=True)
            name.write_text(text)
        job = {"argv": argv, "files": list(map(str, names)), "stays": stays}
        print(json.dumps(job), file=self.runner.stdin, flush=True)
        found = int(self.runner.stdout.readline())
        self.stays += [found] * stays
        return found, names[1].read_text("utf-8"), names[2].read_text("utf-8")

    def close(self) -> None:
        for process in self.stays:
            os.kill(process, signal.SIGTERM)
        self.runner.stdin.close()
        self.runner.wait(30)
        self.runner.stdout.close()


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
        assert "tasks kept; --max_requests 2 is used up" in err
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


# ---- the public corpora: a record as published, at the address that README.md gives

HUMAN = {"instruction": "Human:你好\nAssistant:你好！\nHuman:几点？\nAssistant:", "input": "", "output": "三点。"}
ALPACA = {"instruction": "Name a bird.", "input": "", "output": "The wren."}
PUBLISHED: dict[str, dict[str, Any]] = {
    "tatsu-lab/alpaca": {**ALPACA, "text": "Below is an instruction ..."},
    "chenhaodev/medmcqa_instruct": ALPACA,
    "medalpaca/medical_meadow_medqa": ALPACA,
    "llamafactory/PubMedQA": ALPACA,
    "BelleGroup/train_0.5M_CN": ALPACA,
    "BelleGroup/train_1M_CN": ALPACA,
    "BelleGroup/multiturn_chat_0.8M": HUMAN,
    "nomic-ai/gpt4all-j-prompt-generations": {"prompt": "Name a bird.", "response": "The wren.", "source": "x"},
    "laion/OIG": {"text": "<human>: Name a bird.\n<bot>: The wren.", "metadata": "{}"},
}
ORIGINALS: list[dict[str, Any]] = [  # MedMCQA, MedQA-USMLE and PubMedQA
    {"question": "?", "opa": "a", "opb": "b", "opc": "c", "opd": "d", "cop": 0, "exp": "e"},
    {"question": "?", "answer": "a", "options": {"A": "a", "B": "b"}, "answer_idx": "A"},
    {"question": "?", "context": {"contexts": ["c"]}, "long_answer": "l", "final_decision": "yes"},
]


def test_every_public_corpus_is_read_at_its_address(hub_server, tmp_path):
    addresses = re.findall(r"`hf://datasets/([^/`]+/[^/`]+)/([^`]+)`", README.partition("| corpus |")[2])
    assert {repo for repo, _ in addresses} == set(PUBLISHED)
    for repo, file in addresses:
        path = hub_server.root / "datasets" / repo / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist([PUBLISHED[repo]]), path)
        else:
            path.write_text(json.dumps(PUBLISHED[repo]) + "\n", encoding="utf-8")
    code = "import sys; from minigpt import read_records\nfor p in sys.argv[1:]: print([*read_records(p)][0].messages)"
    words = [f"hf://datasets/{repo}/{file}" for repo, file in addresses]
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        env={**os.environ, **hub_server.env},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stderr
    bird = [{"role": "user", "content": "Name a bird."}, {"role": "assistant", "content": "The wren."}]
    turns = [("user", "你好"), ("assistant", "你好！"), ("user", "几点？"), ("assistant", "三点。")]
    several = [{"role": role, "content": content} for role, content in turns]
    for (repo, _), line in zip(addresses, done.stdout.splitlines(), strict=True):
        assert line == str(several if "multiturn" in repo else bird)

    hugnlp = tmp_path / "instruction_corpora.json"
    hugnlp.write_text(json.dumps({"text": "[Human]: Name a bird. \n [HugChat]: The wren. \n\n"}) + "\n")
    assert next(read_records(hugnlp)).messages == bird
    for record in ORIGINALS:
        hugnlp.write_text(json.dumps(record))
        with pytest.raises(ValueError, match='a record of no known format, found "question"'):
            list(read_records(hugnlp))
