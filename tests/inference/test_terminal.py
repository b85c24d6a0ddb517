"""chat.py in a pseudo-terminal, as a person uses it, and as a filter, as a script does."""

import codecs
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import torch

from minigpt.data.prompts import get_template
from minigpt.data.records import read_records
from minigpt.data.tokenizer import Tokenizer
from minigpt.inference.chat import Chat
from minigpt.inference.terminal import COMMANDS, SamplingArguments
from minigpt.model.gpt2 import GPT, GPTConfig

ROOT = Path(__file__).parents[2]
PROMISED = [
    *("/help", "/clear", "/system", "/undo", "/retry", "/edit", "/save", "/load", "/params", "/stats", "/exit"),
    *("<clear>", "<model_name_or_path=NAME>"),
]
CONTROL_CODE = re.compile(r"\x1b\[[?0-9;]*[A-Za-z]|\x1b[=>]|\a")
COMMANDS_OF_THE_ISSUE = [
    "/help",
    "/clear",
    "/system",
    "/undo",
    "/retry",
    "/edit",
    "/save",
    "/load",
    "/params",
    "/stats",
    "/exit",
]


class Pty:
    """chat.py with a terminal of its own, which is as wide as to wrap no line."""

    def __init__(self, folder: Path, *arguments: object, **environment: str):
        command = [sys.executable, str(ROOT / "chat.py"), *map(str, arguments)]
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.chdir(folder)
            os.execve(sys.executable, command, environment_of(folder) | environment)
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 4000, 0, 0))
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.text = ""  # what was read and not yet returned

    def until(self, pattern: str, timeout: float = 60) -> str:
        """All that is shown up to a match of the pattern, without it."""
        end = time.monotonic() + timeout
        while not (found := re.search(pattern, self.text)):
            left = end - time.monotonic()
            assert left > 0 and select.select([self.fd], [], [], left)[0], f"no {pattern!r} in {self.text!r}"
            try:
                data = os.read(self.fd, 1 << 16)
            except OSError:  # Linux's way to say that the other side has gone
                data = b""
            assert data, f"it ended, with no {pattern!r} in {self.text!r}"
            self.text = CONTROL_CODE.sub("", self.text + self.decoder.decode(data).replace("\r", ""))
        before, self.text = self.text[: found.start()], self.text[found.end() :]
        return before

    def send(self, keys: str) -> None:
        os.write(self.fd, keys.encode())

    def say(self, line: str) -> str:
        """What is shown for a line, up to the next prompt."""
        self.send(line + "\r")
        self.until(re.escape(line) + "\n")
        return self.until(r"(?m)^> ")

    def ctrl_c(self) -> None:
        """Ctrl-C at the prompt, once readline waits for a key: one that comes before is noticed with the next key."""
        asleep = 0
        while asleep < 10:
            time.sleep(0.05)
            state = Path(f"/proc/{self.pid}/stat").read_text().rsplit(") ")[-1][0]
            asleep = asleep + 1 if state == "S" else 0
        self.send("\x03")

    def ended(self) -> int:
        """The exit code, once it has ended."""
        with pytest.raises(AssertionError, match="it ended"):
            self.until("(?!)")  # what matches nothing
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def close(self) -> None:
        os.close(self.fd)
        try:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        except (ChildProcessError, ProcessLookupError):
            pass  # it has ended, and was waited for


def environment_of(folder: Path) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "MINIGPT_", "XDG_", "INPUTRC"))}
    return kept | {"HOME": str(folder), "TERM": "xterm", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer: Tokenizer) -> Path:
    """A folder with three models that were never trained.

    `brief` says at each position a word of that position, and end-of-text at every twelfth, so its answers show how
    long the prompt was; `endless` says words without end; `none` is `brief` without a template.
    """
    folder = tmp_path_factory.mktemp("terminal")
    words = [id for id in range(tokenizer.vocab_size - 1) if re.fullmatch(r" [a-z]{4,}", tokenizer.decode([id]))]
    for name, context, period in (("brief", 256, 12), ("endless", 8192, 9999)):
        torch.manual_seed(0)
        model = GPT(GPTConfig(tokenizer.vocab_size, n_positions=context, n_embd=128, n_layer=0, n_head=1)).eval()
        script = [words[i % len(words)] if (i + 1) % period else tokenizer.eot_id for i in range(context)]
        with torch.no_grad():
            model.wte.weight.normal_()
            model.wpe.weight.copy_(1000 * model.wte.weight[script])
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name, context)
        get_template("hugchat").save_pretrained(folder / name)
    return folder


@pytest.fixture
def judge(folder) -> Chat:
    """The same chat without a terminal."""
    model = GPT.from_pretrained(folder / "brief")
    return Chat(model, Tokenizer.tiny(), get_template("hugchat"), max_new_tokens=256)


@pytest.fixture(scope="module")
def one(folder):
    terminal = Pty(folder, "--model_name_or_path", "brief")
    banner = terminal.until(r"(?m)^> ")
    assert banner == "brief: template hugchat; an empty line ends, /help lists the commands\n"
    yield terminal
    terminal.close()


@pytest.fixture
def start(folder):
    """Starts a chat that a test has for itself."""
    started: list[Pty] = []

    def start(*arguments: object, **environment: str) -> Pty:
        started.append(Pty(folder, "--model_name_or_path", *arguments, **environment))
        started[-1].until("(?m)^> ")
        return started[-1]

    yield start
    for terminal in started:
        terminal.close()


@pytest.fixture
def terminal(one) -> Pty:
    """A chat at its beginning."""
    one.say('/system ""')
    one.say("/clear")
    one.say("/params max_new_tokens=256 temperature=0 top_k=0 top_p=1 repetition_penalty=1 seed=none")
    return one


def answer(judge: Chat, question: str) -> str:
    return "".join(judge.ask(question)) + "\n"


# ---- each command does what /help says


def test_help_lists_exactly_the_commands(terminal):
    lines = terminal.say("/help").splitlines()
    usages = [re.split(r"  +", line)[0] for line in lines if line.startswith(("/", "<"))]
    assert [usage.split()[0] for usage in usages] == PROMISED
    assert usages == [command.usage for command in COMMANDS.values()]
    assert len(lines) == len(usages) + 2
    for sign in ('"""', "Ctrl-C", "Ctrl-D", "empty line", "A blank before /"):
        assert any(sign in line for line in lines[-2:])


def test_an_answer(terminal, judge):
    for question in ("Hello.", "日本語 😀?", "Once more"):
        assert terminal.say(question) == answer(judge, question)


@pytest.mark.parametrize("command", ["/clear", "<clear>"])
def test_clear(terminal, judge, command):
    fresh = answer(judge, "Hello.")
    assert terminal.say("Hello.") == fresh
    assert terminal.say("Hello.") == answer(judge, "Hello.") != fresh
    assert terminal.say(command) == "(the conversation is forgotten)\n"
    assert terminal.say("Hello.") == fresh
    terminal.say("/system Be brief.")
    assert terminal.say(command) == "(the conversation is forgotten; the system text stays)\n"
    assert terminal.say("/system") == "(system text: Be brief.)\n"


def test_system(terminal, judge):
    assert terminal.say("/system") == "(no system text)\n"
    assert terminal.say("Hello.") == answer(judge, "Hello.")
    judge.system = "Be brief, be kind."
    assert terminal.say("/system Be brief, be kind.") == "(system text: Be brief, be kind.)\n"
    assert terminal.say("And now?") == answer(judge, "And now?")
    assert terminal.say(f"/system {'word ' * 200}").startswith("error: ")
    assert terminal.say("/system") == "(system text: Be brief, be kind.)\n"
    judge.system = None
    assert terminal.say('/system ""') == "(no system text)\n"
    assert terminal.say("And then?") == answer(judge, "And then?")


def test_undo(terminal, judge):
    first, second = answer(judge, "Hello."), answer(judge, "And?")
    assert terminal.say("Hello.") + terminal.say("A mistake") != first + second
    assert terminal.say("/undo") == "(undone: A mistake)\n"
    assert terminal.say("And?") == second
    terminal.say("/undo")
    terminal.say("/undo")
    assert terminal.say("/undo") == "error: nothing has been asked yet\n"
    assert terminal.say("Hello.") == first


def test_retry(terminal, judge):
    first = answer(judge, "Hello.")
    assert terminal.say("/retry") == "error: nothing has been asked yet\n"
    terminal.say("Hello.")
    stays = "(at temperature 0 an answer stays the same; /params temperature 0.8 is livelier)\n"
    assert terminal.say("/retry") == stays + first
    terminal.say("/params temperature 40 seed 3 max_new_tokens 8 top_k 50")
    judge.sampling = {"max_new_tokens": 8, "temperature": 40.0, "seed": 3, "top_k": 50}
    drawn = "".join(judge.ask("Hello.", replace=True)), "".join(judge.retry()), "".join(judge.retry())
    assert len(set(drawn)) == 3
    terminal.say("/undo")
    assert [terminal.say(line) for line in ("Hello.", "/retry", "/retry")] == [f"{text}\n" for text in drawn]


def test_edit(terminal, judge):
    """With the last message in the line, to be changed there, or with the new text after it."""
    assert terminal.say("/edit") == "error: nothing has been asked yet\n"
    terminal.say("Hello, wrld")
    terminal.send("/edit\r")
    terminal.until("> Hello, wrld$")
    terminal.send("\x1b[D" * 3 + "o\r")  # three times left
    terminal.until("\n")
    assert terminal.until("(?m)^> ") == answer(judge, "Hello, world")
    judge.undo()
    assert terminal.say("/edit Hello again, and more") == answer(judge, "Hello again, and more")
    terminal.send("/edit\r")
    terminal.until("> Hello again, and more$")
    terminal.send("\x15\r")  # nothing is left of it
    assert terminal.until("(?m)^> ").endswith("\n(nothing is changed)\n")
    assert terminal.say("Why?") == answer(judge, "Why?")


def test_save_and_load(terminal, judge, folder):
    assert terminal.say("/save") == "error: /save needs FILE after it\n"
    assert terminal.say("/save talk") == "error: nothing has been said yet\n"
    judge.system = "Be brief."
    terminal.say("/system Be brief.")
    for question in ("Hello.", "日本語 😀?"):
        assert terminal.say(question) == answer(judge, question)
    assert terminal.say("/save talk") == f"({folder}/talk.json: 2 turns, system text saved)\n"
    [saved] = read_records(folder / "talk.json")
    assert saved.messages == judge.messages
    terminal.say("/clear")
    assert terminal.say("/load talk.json") == "(talk.json: 2 turns, system text)\n"
    assert terminal.say("Why?") == answer(judge, "Why?")
    assert terminal.say("/save talk.json") == f"({folder}/talk.json: 3 turns, system text saved)\n"  # its own
    (folder / "other.json").write_text(json.dumps([{"instruction": "Hi", "output": "Ho"}] * 2))
    refused = f"error: {folder}/other.json: is there already (give another name)\n"
    assert terminal.say("/save other.json") == refused
    assert terminal.say("/load other.json") == "(other.json: 1 turn, the first conversation of the file)\n"
    assert terminal.say("/save other.json") == refused
    assert terminal.say("/load q") == "error: q: no such file or folder\n"
    assert terminal.say("/system") == "(no system text)\n"
    judge.messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    assert terminal.say("Why?") == answer(judge, "Why?")


def test_params(terminal, judge):
    shown = dict(line.split(maxsplit=1) for line in terminal.say("/params").splitlines())
    assert shown == {
        "max_new_tokens": "256 (here 128, half of the context)",
        **{"temperature": "0.0", "top_k": "0", "top_p": "1.0", "repetition_penalty": "1.0", "seed": "unset"},
    }
    assert list(shown) == list(SamplingArguments.__dataclass_fields__)
    shown = dict(line.split() for line in terminal.say("/params max_new_tokens=3 top_p 0.5").splitlines())
    assert (shown["max_new_tokens"], shown["top_p"], shown["temperature"]) == ("3", "0.5", "0.0")
    judge.sampling["max_new_tokens"] = 3
    assert terminal.say("Hello.") == answer(judge, "Hello.")
    for line, message in {
        "temperature": "/params wants a name and a value, such as /params temperature 0.8",
        "temperature -1": "temperature must be at least 0, got -1.0",
        "temperature nan": "temperature must be at least 0, got nan",
        "top_p 0": "top_p must be above 0 and at most 1, got 0.0",
        "top_k 1.5": "top_k: expected a whole number, got '1.5'",
        "top_k none": "top_k: expected a whole number, got nothing",
        "seed -3": "seed must be at least 0 and below 2^63, got -3",
        "repetition_penalty 0": "repetition_penalty must be above 0, got 0.0",
        "max_new_tokens 0": "max_new_tokens must be at least 1, got 0",
        "temprature 1": "no setting temprature (did you mean temperature?)",
        "max_new_tokens=7 x=1": "no setting x (max_new_tokens, temperature, top_k, top_p, repetition_penalty, seed)",
    }.items():
        assert terminal.say(f"/params {line}") == f"error: {message}\n"
    assert "max_new_tokens      3\n" in terminal.say("/params")  # nothing of a wrong line is taken


def test_stats(start, judge):
    """In a chat of its own, because it counts all answers."""
    terminal = start("brief", "--max_new_tokens", 100)
    assert terminal.say("/stats") == "error: nothing has been asked yet\n"
    judge.sampling["max_new_tokens"] = 100
    for question in ("Hello.", "And now?", "And then?" * 3):
        assert terminal.say(question) == answer(judge, question)
    counts = re.fullmatch(
        r"last answer  (\d+) tokens in \d\.\d\d s \(\d+\.\d tokens/s\), the first after \d\.\d\d s\n"
        r"answers      3: (\d+) tokens in \d\.\d\d s \(\d+\.\d tokens/s\)\n"
        r"context      (\d+) of 256 tokens used, 100 kept for each answer\n"
        r"left out     (\d+) old turns, 0 tokens of a message\n",
        terminal.say("/stats"),
    )
    last = judge.answers[-1]
    expected = [last.new_tokens, sum(a.new_tokens for a in judge.answers), last.prompt_tokens + last.new_tokens, 0]
    assert list(map(int, counts.groups())) == expected
    terminal.send("/exit\r")
    assert terminal.ended() == 0


def test_model_name_or_path(terminal, judge, folder):
    """Another model goes on with the conversation, with its own template; a wrong name changes nothing."""
    terminal.say("/params max_new_tokens 5")
    judge.sampling["max_new_tokens"] = 5
    assert terminal.say("Hello.") == answer(judge, "Hello.")
    assert terminal.say("<model_name_or_path=./nowhere>").startswith("error: ./nowhere: no such folder")
    assert terminal.say("<model_name_or_path=>") == "error: <model_name_or_path= needs NAME after it\n"
    assert terminal.say("And?") == answer(judge, "And?")
    assert terminal.say("<model_name_or_path=endless>") == "(endless: template hugchat)\n"
    judge.model = GPT.from_pretrained(folder / "endless")
    assert terminal.say("Why?") == answer(judge, "Why?")
    assert terminal.say("<model_name_or_path=brief>") == "(brief: template hugchat)\n"


# ---- how it feels


def test_unknown_commands_name_the_nearest(terminal, judge):
    hint = "A message that begins with / is sent with a blank before it.)\n"
    assert terminal.say("/hlep") == f"error: no command /hlep (did you mean /help? {hint}"
    assert terminal.say("/frobnicate it") == f"error: no command /frobnicate (/help lists them {hint}"
    assert terminal.say("/undo twice") == "error: /undo takes nothing after it, got 'twice'\n"
    for question in (" /hlep", "/etc/hosts is a file", "<b>", "<model>"):
        assert terminal.say(question) == answer(judge, question)


def test_old_turns_that_leave_are_told(terminal, judge):
    told = 0
    for turn in range(12):
        shown = terminal.say(f"Question {turn}, and some words more")
        expected = answer(judge, f"Question {turn}, and some words more")
        dropped = judge.answers[-1].turns_dropped
        if dropped > told:
            expected = f"(old turns no longer fit into the context: {dropped} left out)\n{expected}"
        assert shown == expected
        told = dropped
    assert told > 3
    shown = terminal.say("word " * 400 + "end")
    expected = answer(judge, "word " * 400 + "end")
    assert f"(too long for the context: the first {judge.answers[-1].tokens_cut} tokens of it are cut)\n" in shown
    assert shown.endswith(expected)


def test_a_message_of_several_lines(terminal, judge):
    terminal.send('"""def f():\r')
    terminal.until(r"(?m)^\.\.\. ")
    terminal.send("\r/help\r")
    terminal.until(r"(?m)^\.\.\. .*\n\.\.\. ")
    terminal.send('end"""\r')
    terminal.until('end"""\n')
    assert terminal.until("(?m)^> ") == answer(judge, "def f():\n\n/help\nend")
    assert terminal.say('"""/help"""') == answer(judge, "/help")


def test_history(start, folder):
    """The arrow keys bring back what was typed, in the next chat too; it lies where nobody else may read it."""
    terminal = start("brief")
    shown = terminal.say("Hello there")
    terminal.say("/clear")
    terminal.send("\x1b[A\x1b[A")
    terminal.until("Hello there$")
    terminal.send("\r")
    terminal.until("\n")
    assert terminal.until("(?m)^> ") == shown
    terminal.send("\x04")
    assert terminal.ended() == 0
    [path] = folder.glob(".local/state/minigpt/*")
    assert path.read_text().split("\n")[-4:] == ["Hello there", "/clear", "Hello there", ""]
    assert path.stat().st_mode & 0o077 == 0

    again = start("brief")
    again.send("\x1b[A")
    again.until("Hello there$")
    again.send("\x15\r")  # an empty line ends
    assert again.ended() == 0


def test_ctrl_c_stops_an_answer_and_not_the_chat(start, folder):
    """Where the history cannot be written, too."""
    terminal = start("endless", "--max_new_tokens", 4096, XDG_STATE_HOME="/dev/null/no")
    terminal.send("Hello.\r")
    terminal.until("Hello.\n[a-z]+ [a-z]+ ")
    terminal.send("\x03")
    terminal.until(r"\n\(stopped\)\n> ")
    assert "1 turn saved" in terminal.say("/save stopped.json")
    said = json.loads((folder / "stopped.json").read_text())["messages"][1]["content"]
    assert 3 <= len(said.split()) < 4096
    terminal.send("not sent")
    terminal.ctrl_c()
    terminal.until(r"\n\(Ctrl-C again, or Ctrl-D, leaves\)\n> ")
    terminal.say("/params max_new_tokens 3")  # a line in between: it is the first time again
    terminal.ctrl_c()
    terminal.until(r"\n\(Ctrl-C again, or Ctrl-D, leaves\)\n> ")
    terminal.ctrl_c()
    assert terminal.ended() == 0


# ---- as a filter


@pytest.fixture
def pipe(folder):
    def pipe(stdin: str | bytes, *arguments: object, code: int = 0, **settings) -> tuple[str, str]:
        command = [sys.executable, ROOT / "chat.py", "--model_name_or_path", "brief", *map(str, arguments)]
        stdin = stdin.encode() if isinstance(stdin, str) else stdin
        settings |= {"input": stdin, "capture_output": True, "cwd": folder, "env": environment_of(folder)}
        done = subprocess.run(command, timeout=120, **settings)
        assert done.returncode == code, done.stderr
        return done.stdout.decode(), done.stderr.decode()

    return pipe


def test_a_script_gets_the_answers_alone(pipe, judge):
    expected = answer(judge, "Hello.") + answer(judge, "two\n\nlines\n") + answer(judge, "broken \ufffd byte")
    lines = ["Hello.", "/stats", "/save piped.json", '"""', "two", "", "lines", "", '"""', "/params seed 1"]
    out, err = pipe("\n".join([*lines, ""]).encode() + b"broken \xff byte\r\n\nnever read\n")
    assert out == expected
    assert err.startswith("brief: template hugchat; an empty line ends\nlast answer  ")
    assert "piped.json: 1 turn saved)\n" in err
    assert "\x1b" not in out + err


def test_a_line_that_fails_shows_in_the_exit_code(pipe, judge):
    out, err = pipe('/load q\n/edit\nHello.\n/edit\n"""never closed\n', code=1)
    assert out == answer(judge, "Hello.")
    assert err.splitlines()[1:] == [
        "error: q: no such file or folder",
        "error: nothing has been asked yet",
        "error: /edit has no line editing here: give the new text after it",
        'error: the input ended inside a block, which """ ends',
    ]


def test_a_base_model_continues_text(pipe, judge):
    judge.template = get_template("none")
    expected = [answer(judge, "Once upon"), answer(judge, "And then")]
    assert expected[0].startswith(" ")
    assert pipe("Once upon\nAnd then\n", "--template", "none")[0] == "".join(expected)


def test_one_prompt(pipe, judge):
    assert pipe("never read", "--prompt", "Hello.") == (answer(judge, "Hello."), "")
    judge.clear()
    assert pipe("", "--prompt", "Hello.", preexec_fn=lambda: os.close(0)) == (answer(judge, "Hello."), "")


def test_a_system_text_too_long_is_one_error(pipe):
    out, err = pipe("", "--system", "word " * 300, "--prompt", "Hi", code=1)
    assert out == ""
    assert re.fullmatch(r"error: \d+ tokens of system text and template leave no room for a message: 128 fit .*\n", err)
