"""chat.py in a pseudo-terminal, as a person uses it."""

import json
import re

import pytest
import torch

from minigpt.data.read.records import read_records
from minigpt.distributed import OutOfMemory
from minigpt.inference.terminal import COMMANDS, Terminal
from minigpt.model.gpt2 import GPT
from minigpt.settings.groups import SamplingArguments

from .pseudo_terminal import Pty, answer

PROMISED = [
    *("/help", "/clear", "/system", "/undo", "/retry", "/edit", "/save", "/load", "/params", "/stats", "/exit"),
    *("<clear>", "<model_name_or_path=NAME>"),
]


@pytest.fixture(scope="module")
def one(talkers):
    terminal = Pty(talkers, "--model_name_or_path", "brief")
    banner = terminal.until(r"(?m)^> ")
    assert banner == "brief: template hugchat; an empty line ends, /help lists the commands\n"
    yield terminal
    terminal.close()


@pytest.fixture
def start(talkers):
    """Starts a chat that a test has for itself."""
    started: list[Pty] = []

    def start(*arguments: object, **environment: str) -> Pty:
        started.append(Pty(talkers, "--model_name_or_path", *arguments, **environment))
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


# ---- each command does what /help says


def test_help_lists_exactly_the_commands(terminal):
    lines = terminal.say("/help").splitlines()
    usages = [re.split(r"  +", line)[0] for line in lines if line.startswith(("/", "<"))]
    assert [usage.split()[0] for usage in usages] == PROMISED
    assert usages == [command.usage for command in COMMANDS.values()]
    assert len(lines) == len(usages) + 2
    for sign in ('"""', "Ctrl-C", "Ctrl-D", "empty line", "A blank before /"):
        assert any(sign in line for line in lines[-2:])


def test_an_answer(terminal, twin):
    for question in ("Hello.", "日本語 😀?", "Once more"):
        assert terminal.say(question) == answer(twin, question)


def test_out_of_memory_names_the_flags_and_forgets_the_question(twin):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    hook = twin.model.register_forward_pre_hook(fail)
    chat = Terminal(twin, SamplingArguments(), fail)
    with pytest.raises(OutOfMemory, match=r"^out of memory: a smaller --max_new_tokens \(now 256\) or a shorter conv"):
        chat.show(twin.ask("Hello."))
    hook.remove()
    assert twin.messages == []
    chat.show(twin.ask("Hello."))


@pytest.mark.parametrize("command", ["/clear", "<clear>"])
def test_clear(terminal, twin, command):
    fresh = answer(twin, "Hello.")
    assert terminal.say("Hello.") == fresh
    assert terminal.say("Hello.") == answer(twin, "Hello.") != fresh
    assert terminal.say(command) == "(the conversation is forgotten)\n"
    assert terminal.say("Hello.") == fresh
    terminal.say("/system Be brief.")
    assert terminal.say(command) == "(the conversation is forgotten; the system text stays)\n"
    assert terminal.say("/system") == "(system text: Be brief.)\n"


def test_system(terminal, twin):
    assert terminal.say("/system") == "(no system text)\n"
    assert terminal.say("Hello.") == answer(twin, "Hello.")
    twin.system = "Be brief, be kind."
    assert terminal.say("/system Be brief, be kind.") == "(system text: Be brief, be kind.)\n"
    assert terminal.say("And now?") == answer(twin, "And now?")
    assert terminal.say(f"/system {'word ' * 200}").startswith("error: ")
    assert terminal.say("/system") == "(system text: Be brief, be kind.)\n"
    twin.system = None
    assert terminal.say('/system ""') == "(no system text)\n"
    assert terminal.say("And then?") == answer(twin, "And then?")


def test_undo(terminal, twin):
    first, second = answer(twin, "Hello."), answer(twin, "And?")
    assert terminal.say("Hello.") + terminal.say("A mistake") != first + second
    assert terminal.say("/undo") == "(undone: A mistake)\n"
    assert terminal.say("And?") == second
    terminal.say("/undo")
    terminal.say("/undo")
    assert terminal.say("/undo") == "error: nothing has been asked yet\n"
    assert terminal.say("Hello.") == first


def test_retry(terminal, twin):
    first = answer(twin, "Hello.")
    assert terminal.say("/retry") == "error: nothing has been asked yet\n"
    terminal.say("Hello.")
    stays = "(at temperature 0 an answer stays the same; /params temperature 0.8 is livelier)\n"
    assert terminal.say("/retry") == stays + first
    terminal.say("/params temperature 40 seed 3 max_new_tokens 8 top_k 50")
    twin.sampling = {"max_new_tokens": 8, "temperature": 40.0, "seed": 3, "top_k": 50}
    drawn = "".join(twin.ask("Hello.", replace=True)), "".join(twin.retry()), "".join(twin.retry())
    assert len(set(drawn)) == 3
    terminal.say("/undo")
    assert [terminal.say(line) for line in ("Hello.", "/retry", "/retry")] == [f"{text}\n" for text in drawn]


def test_edit(terminal, twin):
    """With the last message in the line, to be changed there, or with the new text after it."""
    assert terminal.say("/edit") == "error: nothing has been asked yet\n"
    terminal.say("Hello, wrld")
    terminal.send("/edit\r")
    terminal.until("> Hello, wrld$")
    terminal.send("\x1b[D" * 3 + "o\r")  # three times left
    terminal.until("\n")
    assert terminal.until("(?m)^> ") == answer(twin, "Hello, world")
    twin.undo()
    assert terminal.say("/edit Hello again, and more") == answer(twin, "Hello again, and more")
    terminal.send("/edit\r")
    terminal.until("> Hello again, and more$")
    terminal.send("\x15\r")  # nothing is left of it
    assert terminal.until("(?m)^> ").endswith("\n(nothing is changed)\n")
    assert terminal.say("Why?") == answer(twin, "Why?")


def test_save_and_load(terminal, twin, talkers):
    assert terminal.say("/save") == "error: /save needs FILE after it\n"
    assert terminal.say("/save talk") == "error: nothing has been said yet\n"
    twin.system = "Be brief."
    terminal.say("/system Be brief.")
    for question in ("Hello.", "日本語 😀?"):
        assert terminal.say(question) == answer(twin, question)
    assert terminal.say("/save talk") == f"({talkers}/talk.json: 2 turns, system text saved)\n"
    [saved] = read_records(talkers / "talk.json")
    assert saved.messages == twin.messages
    terminal.say("/clear")
    assert terminal.say("/load talk.json") == "(talk.json: 2 turns, system text)\n"
    assert terminal.say("Why?") == answer(twin, "Why?")
    assert terminal.say("/save talk.json") == f"({talkers}/talk.json: 3 turns, system text saved)\n"  # its own
    (talkers / "other.json").write_text(json.dumps([{"instruction": "Hi", "output": "Ho"}] * 2))
    refused = f"error: {talkers}/other.json: is there already (give another name)\n"
    assert terminal.say("/save other.json") == refused
    assert terminal.say("/load other.json") == "(other.json: 1 turn, the first conversation of the file)\n"
    assert terminal.say("/save other.json") == refused
    assert terminal.say("/load q") == "error: q: no such file or folder\n"
    assert terminal.say("/system") == "(no system text)\n"
    twin.messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    assert terminal.say("Why?") == answer(twin, "Why?")


def test_only_a_saved_chat_is_written_over(terminal, talkers):
    """A file of one conversation, of Alpaca's say, was taken for a chat, and /save wrote its own format over it."""
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    for name, content in {
        "alpaca": {"instruction": "Hi", "output": "Ho"},
        "more": {"messages": messages, "id": 7},
        "array": [{"messages": messages}],
        "asked": {"messages": [*messages, messages[0]]},
        "saved": {"messages": messages},
    }.items():
        file = talkers / f"{name}.json"
        file.write_text(json.dumps(content))
        assert terminal.say(f"/load {file}") == f"({file}: 1 turn)\n"
        said = (
            f"({file}: 1 turn saved)\n" if name == "saved" else f"error: {file}: is there already (give another name)\n"
        )
        assert terminal.say(f"/save {file}") == said
        assert json.loads(file.read_text()) == content


def test_params(terminal, twin):
    shown = dict(line.split(maxsplit=1) for line in terminal.say("/params").splitlines())
    assert shown == {
        "max_new_tokens": "256 (here 128, half of the context)",
        **{"temperature": "0.0", "top_k": "0", "top_p": "1.0", "repetition_penalty": "1.0", "seed": "unset"},
    }
    assert list(shown) == list(SamplingArguments.__dataclass_fields__)
    shown = dict(line.split() for line in terminal.say("/params max_new_tokens=3 top_p 0.5").splitlines())
    assert (shown["max_new_tokens"], shown["top_p"], shown["temperature"]) == ("3", "0.5", "0.0")
    twin.sampling["max_new_tokens"] = 3
    assert terminal.say("Hello.") == answer(twin, "Hello.")
    for line, message in {
        "temperature": "/params wants a name and a value, such as /params temperature 0.8",
        "temperature -1": "temperature must be at least 0 and finite, got -1.0",
        "temperature nan": "temperature must be at least 0 and finite, got nan",
        "top_p 0": "top_p must be above 0 and at most 1, got 0.0",
        "top_k 1.5": "top_k: expected a whole number, got '1.5'",
        "top_k none": "top_k: expected a whole number, got nothing",
        "seed -3": "seed must be at least 0 and below 2^63, got -3",
        "repetition_penalty 0": "repetition_penalty must be above 0 and finite, got 0.0",
        "max_new_tokens 0": "max_new_tokens must be at least 1, got 0",
        "temprature 1": "no setting temprature (did you mean temperature?)",
        "max_new_tokens=7 x=1": "no setting x (max_new_tokens, temperature, top_k, top_p, repetition_penalty, seed)",
    }.items():
        assert terminal.say(f"/params {line}") == f"error: {message}\n"
    assert "max_new_tokens      3\n" in terminal.say("/params")  # nothing of a wrong line is taken


def test_stats(start, twin):
    """In a chat of its own, because it counts all answers."""
    terminal = start("brief", "--max_new_tokens", 100)
    assert terminal.say("/stats") == "error: nothing has been asked yet\n"
    twin.sampling["max_new_tokens"] = 100
    for question in ("Hello.", "And now?", "And then?" * 3):
        assert terminal.say(question) == answer(twin, question)
    counts = re.fullmatch(
        r"last answer  (\d+) tokens in \d\.\d\d s \(\d+\.\d tokens/s\), the first after \d\.\d\d s\n"
        r"answers      3: (\d+) tokens in \d\.\d\d s \(\d+\.\d tokens/s\)\n"
        r"context      (\d+) of 256 tokens used, 100 kept for each answer\n"
        r"left out     (\d+) old turns, 0 tokens of a message\n",
        terminal.say("/stats"),
    )
    last = twin.answers[-1]
    expected = [last.new_tokens, sum(a.new_tokens for a in twin.answers), last.prompt_tokens + last.new_tokens, 0]
    assert list(map(int, counts.groups())) == expected
    terminal.send("/exit\r")
    assert terminal.ended() == 0


def test_model_name_or_path(terminal, twin, talkers):
    """Another model goes on with the conversation, with its own template; a wrong name changes nothing."""
    terminal.say("/params max_new_tokens 5")
    twin.sampling["max_new_tokens"] = 5
    assert terminal.say("Hello.") == answer(twin, "Hello.")
    assert terminal.say("<model_name_or_path=./nowhere>").startswith("error: ./nowhere: no such folder")
    assert terminal.say("<model_name_or_path=>") == "error: <model_name_or_path= needs NAME after it\n"
    assert terminal.say("And?") == answer(twin, "And?")
    assert terminal.say("<model_name_or_path=endless>") == "(endless: template hugchat)\n"
    twin.model = GPT.from_pretrained(talkers / "endless")
    assert terminal.say("Why?") == answer(twin, "Why?")
    assert terminal.say("<model_name_or_path=brief>") == "(brief: template hugchat)\n"


# ---- how it feels


def test_unknown_commands_name_the_nearest(terminal, twin):
    hint = "A message that begins with / is sent with a blank before it.)\n"
    assert terminal.say("/hlep") == f"error: no command /hlep (did you mean /help? {hint}"
    assert terminal.say("/frobnicate it") == f"error: no command /frobnicate (/help lists them {hint}"
    assert terminal.say("/undo twice") == "error: /undo takes nothing after it, got 'twice'\n"
    for question in (" /hlep", "/etc/hosts is a file", "<b>", "<model>"):
        assert terminal.say(question) == answer(twin, question)


def test_old_turns_that_leave_are_told(terminal, twin):
    told = 0
    for turn in range(12):
        shown = terminal.say(f"Question {turn}, and some words more")
        expected = answer(twin, f"Question {turn}, and some words more")
        dropped = twin.answers[-1].turns_dropped
        if dropped > told:
            expected = f"(old turns no longer fit into the context: {dropped} left out)\n{expected}"
        assert shown == expected
        told = dropped
    assert told > 3
    shown = terminal.say("word " * 400 + "end")
    expected = answer(twin, "word " * 400 + "end")
    assert f"(too long for the context: the first {twin.answers[-1].tokens_cut} tokens of it are cut)\n" in shown
    assert shown.endswith(expected)


def test_a_message_of_several_lines(terminal, twin):
    terminal.send('"""def f():\r')
    terminal.until(r"(?m)^\.\.\. ")
    terminal.send("\r/help\r")
    terminal.until(r"(?m)^\.\.\. .*\n\.\.\. ")
    terminal.send('end"""\r')
    terminal.until('end"""\n')
    assert terminal.until("(?m)^> ") == answer(twin, "def f():\n\n/help\nend")
    assert terminal.say('"""/help"""') == answer(twin, "/help")


def test_history(start, talkers):
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
    [path] = talkers.glob(".local/state/minigpt/*")
    assert path.read_text().split("\n")[-4:] == ["Hello there", "/clear", "Hello there", ""]
    assert path.stat().st_mode & 0o077 == 0

    again = start("brief")
    again.send("\x1b[A")
    again.until("Hello there$")
    again.send("\x15\r")  # an empty line ends
    assert again.ended() == 0


def test_ctrl_c_stops_an_answer_and_not_the_chat(start, talkers):
    """Where the history cannot be written, too."""
    terminal = start("endless", "--max_new_tokens", 4096, XDG_STATE_HOME="/dev/null/no")
    terminal.send("Hello.\r")
    terminal.until("Hello.\n[a-z]+ [a-z]+ ")
    terminal.send("\x03")
    terminal.until(r"\n\(stopped\)\n> ")
    assert "1 turn saved" in terminal.say("/save stopped.json")
    said = json.loads((talkers / "stopped.json").read_text())["messages"][1]["content"]
    assert 3 <= len(said.split()) < 4096
    terminal.send("not sent")
    terminal.ctrl_c()
    terminal.until(r"\n\(Ctrl-C again, or Ctrl-D, leaves\)\n> ")
    terminal.say("/params max_new_tokens 3")  # a line in between: it is the first time again
    terminal.ctrl_c()
    terminal.until(r"\n\(Ctrl-C again, or Ctrl-D, leaves\)\n> ")
    terminal.ctrl_c()
    assert terminal.ended() == 0
