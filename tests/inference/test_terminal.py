"""chat.py in a pseudo-terminal, used interactively."""

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

DOCUMENTED_COMMANDS = [
    *("/help", "/clear", "/system", "/undo", "/retry", "/edit", "/save", "/load", "/params", "/stats", "/exit"),
    *("<clear>", "<model_name_or_path=NAME>"),
]


@pytest.fixture(scope="module")
def shared_terminal(untrained_models):
    terminal = Pty(untrained_models, "--model_name_or_path", "brief")
    banner = terminal.until(r"(?m)^> ")
    assert banner == "brief: template hugchat; an empty line ends, /help lists the commands\n"
    yield terminal
    terminal.close()


@pytest.fixture
def start(untrained_models):
    """Starts a chat for one test."""
    terminals: list[Pty] = []

    def start(*arguments: object, **environment: str) -> Pty:
        terminals.append(Pty(untrained_models, "--model_name_or_path", *arguments, **environment))
        terminals[-1].until("(?m)^> ")
        return terminals[-1]

    yield start
    for terminal in terminals:
        terminal.close()


@pytest.fixture
def terminal(shared_terminal) -> Pty:
    """The shared chat, reset to an empty conversation and default settings."""
    shared_terminal.enter('/system ""')
    shared_terminal.enter("/clear")
    shared_terminal.enter("/params max_new_tokens=256 temperature=0 top_k=0 top_p=1 repetition_penalty=1 seed=none")
    return shared_terminal


# ---- each command does what /help says


def test_help_lists_all_commands(terminal):
    lines = terminal.enter("/help").splitlines()
    usages = [re.split(r"  +", line)[0] for line in lines if line.startswith(("/", "<"))]
    assert [usage.split()[0] for usage in usages] == DOCUMENTED_COMMANDS
    assert usages == [command.usage for command in COMMANDS.values()]
    assert len(lines) == len(usages) + 2
    for phrase in ('"""', "Ctrl-C", "Ctrl-D", "empty line", "A space before /"):
        assert any(phrase in line for line in lines[-2:])


def test_an_answer(terminal, twin):
    for question in ("Hello.", "日本語 😀?", "Once more"):
        assert terminal.enter(question) == answer(twin, question)


def test_out_of_memory_names_the_flags_and_removes_the_question(twin):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    hook = twin.model.register_forward_pre_hook(fail)
    chat = Terminal(twin, SamplingArguments(), fail)
    with pytest.raises(OutOfMemory, match=r"^out of memory: a smaller --max_new_tokens \(now 256\), a shorter conv"):
        chat.show(twin.ask("Hello."))
    hook.remove()
    assert twin.messages == []
    chat.show(twin.ask("Hello."))


@pytest.mark.parametrize("command", ["/clear", "<clear>"])
def test_clear(terminal, twin, command):
    fresh = answer(twin, "Hello.")
    assert terminal.enter("Hello.") == fresh
    assert terminal.enter("Hello.") == answer(twin, "Hello.") != fresh
    assert terminal.enter(command) == "(conversation cleared)\n"
    assert terminal.enter("Hello.") == fresh
    terminal.enter("/system Be brief.")
    assert terminal.enter(command) == "(conversation cleared; the system text is kept)\n"
    assert terminal.enter("/system") == "(system text: Be brief.)\n"


def test_system(terminal, twin):
    assert terminal.enter("/system") == "(no system text)\n"
    assert terminal.enter("Hello.") == answer(twin, "Hello.")
    twin.system = "Be brief, be kind."
    assert terminal.enter("/system Be brief, be kind.") == "(system text: Be brief, be kind.)\n"
    assert terminal.enter("And now?") == answer(twin, "And now?")
    assert terminal.enter(f"/system {'word ' * 200}").startswith("error: ")
    assert terminal.enter("/system") == "(system text: Be brief, be kind.)\n"
    twin.system = None
    assert terminal.enter('/system ""') == "(no system text)\n"
    assert terminal.enter("And then?") == answer(twin, "And then?")


def test_undo(terminal, twin):
    first, second = answer(twin, "Hello."), answer(twin, "And?")
    assert terminal.enter("Hello.") + terminal.enter("A mistake") != first + second
    assert terminal.enter("/undo") == "(undone: A mistake)\n"
    assert terminal.enter("And?") == second
    terminal.enter("/undo")
    terminal.enter("/undo")
    assert terminal.enter("/undo") == "error: no question has been asked yet\n"
    assert terminal.enter("Hello.") == first


def test_retry(terminal, twin):
    first = answer(twin, "Hello.")
    assert terminal.enter("/retry") == "error: no question has been asked yet\n"
    terminal.enter("Hello.")
    hint = "(at temperature 0 the answer stays the same; /params temperature 0.8 turns on sampling)\n"
    assert terminal.enter("/retry") == hint + first
    terminal.enter("/params temperature 40 seed 3 max_new_tokens 8 top_k 50")
    twin.sampling = {"max_new_tokens": 8, "temperature": 40.0, "seed": 3, "top_k": 50}
    samples = "".join(twin.ask("Hello.", replace=True)), "".join(twin.retry()), "".join(twin.retry())
    assert len(set(samples)) == 3
    terminal.enter("/undo")
    assert [terminal.enter(line) for line in ("Hello.", "/retry", "/retry")] == [f"{text}\n" for text in samples]


def test_edit(terminal, twin):
    """/edit opens the last message for editing; /edit TEXT replaces it."""
    assert terminal.enter("/edit") == "error: no question has been asked yet\n"
    terminal.enter("Hello, wrld")
    terminal.send("/edit\r")
    terminal.until("> Hello, wrld$")
    terminal.send("\x1b[D" * 3 + "o\r")  # cursor left, three times
    terminal.until("\n")
    assert terminal.until("(?m)^> ") == answer(twin, "Hello, world")
    twin.undo()
    assert terminal.enter("/edit Hello again, and more") == answer(twin, "Hello again, and more")
    terminal.send("/edit\r")
    terminal.until("> Hello again, and more$")
    terminal.send("\x15\r")  # Ctrl-U deletes the line
    assert terminal.until("(?m)^> ").endswith("\n(nothing was changed)\n")
    assert terminal.enter("Why?") == answer(twin, "Why?")


def test_save_and_load(terminal, twin, untrained_models):
    assert terminal.enter("/save") == "error: /save needs an argument: /save FILE\n"
    assert terminal.enter("/save talk") == "error: there is no conversation to save yet\n"
    twin.system = "Be brief."
    terminal.enter("/system Be brief.")
    for question in ("Hello.", "日本語 😀?"):
        assert terminal.enter(question) == answer(twin, question)
    assert terminal.enter("/save talk") == f"({untrained_models}/talk.json: 2 turns, system text saved)\n"
    [saved] = read_records(untrained_models / "talk.json")
    assert saved.messages == twin.messages
    terminal.enter("/clear")
    assert terminal.enter("/load talk.json") == "(talk.json: 2 turns, system text)\n"
    assert terminal.enter("Why?") == answer(twin, "Why?")
    saved_again = terminal.enter("/save talk.json")  # /save may overwrite its own file
    assert saved_again == f"({untrained_models}/talk.json: 3 turns, system text saved)\n"
    (untrained_models / "other.json").write_text(json.dumps([{"instruction": "Hi", "output": "Ho"}] * 2))
    refusal = f"error: {untrained_models}/other.json: already exists (give another name)\n"
    assert terminal.enter("/save other.json") == refusal
    assert terminal.enter("/load other.json") == "(other.json: 1 turn, the first conversation in the file)\n"
    assert terminal.enter("/save other.json") == refusal
    assert terminal.enter("/load q") == "error: q: no such file or folder\n"
    assert terminal.enter("/system") == "(no system text)\n"
    twin.messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    assert terminal.enter("Why?") == answer(twin, "Why?")


def test_save_overwrites_only_saved_chats(terminal, untrained_models):
    """Regression: a data file with one conversation, say Alpaca's, was taken for a saved chat and overwritten."""
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    for name, content in {
        "alpaca": {"instruction": "Hi", "output": "Ho"},
        "more": {"messages": messages, "id": 7},
        "array": [{"messages": messages}],
        "asked": {"messages": [*messages, messages[0]]},
        "saved": {"messages": messages},
    }.items():
        file = untrained_models / f"{name}.json"
        file.write_text(json.dumps(content))
        assert terminal.enter(f"/load {file}") == f"({file}: 1 turn)\n"
        expected = (
            f"({file}: 1 turn saved)\n" if name == "saved" else f"error: {file}: already exists (give another name)\n"
        )
        assert terminal.enter(f"/save {file}") == expected
        assert json.loads(file.read_text()) == content


def test_params(terminal, twin):
    shown = dict(line.split(maxsplit=1) for line in terminal.enter("/params").splitlines())
    assert shown == {
        "max_new_tokens": "256 (here 128, half of the context)",
        **{"temperature": "0.0", "top_k": "0", "top_p": "1.0", "repetition_penalty": "1.0", "seed": "unset"},
    }
    assert list(shown) == list(SamplingArguments.__dataclass_fields__)
    shown = dict(line.split() for line in terminal.enter("/params max_new_tokens=3 top_p 0.5").splitlines())
    assert (shown["max_new_tokens"], shown["top_p"], shown["temperature"]) == ("3", "0.5", "0.0")
    twin.sampling["max_new_tokens"] = 3
    assert terminal.enter("Hello.") == answer(twin, "Hello.")
    for line, message in {
        "temperature": "/params needs names and values, such as /params temperature 0.8",
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
        assert terminal.enter(f"/params {line}") == f"error: {message}\n"
    assert "max_new_tokens      3\n" in terminal.enter("/params")  # an invalid line changes nothing


def test_stats(start, twin):
    """In a separate chat, because /stats counts all answers."""
    terminal = start("brief", "--max_new_tokens", 100)
    assert terminal.enter("/stats") == "error: no question has been asked yet\n"
    twin.sampling["max_new_tokens"] = 100
    for question in ("Hello.", "And now?", "And then?" * 3):
        assert terminal.enter(question) == answer(twin, question)
    counts = re.fullmatch(
        r"last answer  (\d+) tokens in \d\.\d\d s \(\d+\.\d tokens/s\), first token after \d\.\d\d s\n"
        r"answers      3: (\d+) tokens in \d\.\d\d s \(\d+\.\d tokens/s\)\n"
        r"context      (\d+) of 256 tokens used, 100 reserved for each answer\n"
        r"left out     (\d+) old turns, 0 tokens of a message\n",
        terminal.enter("/stats"),
    )
    last = twin.answers[-1]
    expected = [last.new_tokens, sum(a.new_tokens for a in twin.answers), last.prompt_tokens + last.new_tokens, 0]
    assert list(map(int, counts.groups())) == expected
    terminal.send("/exit\r")
    assert terminal.wait() == 0


def test_model_name_or_path(terminal, twin, untrained_models):
    """Another model continues the conversation with its own template; a wrong name changes nothing."""
    terminal.enter("/params max_new_tokens 5")
    twin.sampling["max_new_tokens"] = 5
    assert terminal.enter("Hello.") == answer(twin, "Hello.")
    assert terminal.enter("<model_name_or_path=./nowhere>").startswith("error: ./nowhere: no such folder")
    assert (
        terminal.enter("<model_name_or_path=>")
        == "error: <model_name_or_path= needs an argument: <model_name_or_path=NAME>\n"
    )
    assert terminal.enter("And?") == answer(twin, "And?")
    assert terminal.enter("<model_name_or_path=endless>") == "(endless: template hugchat)\n"
    twin.model = GPT.from_pretrained(untrained_models / "endless")
    assert terminal.enter("Why?") == answer(twin, "Why?")
    assert terminal.enter("<model_name_or_path=brief>") == "(brief: template hugchat)\n"


# ---- interaction


def test_unknown_commands_suggest_the_nearest(terminal, twin):
    hint = "To send a message that begins with /, put a space before it.)\n"
    assert terminal.enter("/hlep") == f"error: no command /hlep (did you mean /help? {hint}"
    assert terminal.enter("/frobnicate it") == f"error: no command /frobnicate (/help lists the commands. {hint}"
    assert terminal.enter("/undo twice") == "error: /undo takes no argument, got 'twice'\n"
    for question in (" /hlep", "/etc/hosts is a file", "<b>", "<model>"):
        assert terminal.enter(question) == answer(twin, question)


def test_dropped_turns_are_reported(terminal, twin):
    reported = 0
    for turn in range(12):
        shown = terminal.enter(f"Question {turn}, and some words more")
        expected = answer(twin, f"Question {turn}, and some words more")
        dropped = twin.answers[-1].turns_dropped
        if dropped > reported:
            expected = f"(old turns no longer fit into the context: {dropped} left out)\n{expected}"
        assert shown == expected
        reported = dropped
    assert reported > 3
    shown = terminal.enter("word " * 400 + "end")
    expected = answer(twin, "word " * 400 + "end")
    assert (
        f"(the message is too long for the context: its first {twin.answers[-1].tokens_cut} tokens were cut)\n" in shown
    )
    assert shown.endswith(expected)


def test_a_message_of_several_lines(terminal, twin):
    terminal.send('"""def f():\r')
    terminal.until(r"(?m)^\.\.\. ")
    terminal.send("\r/help\r")
    terminal.until(r"(?m)^\.\.\. .*\n\.\.\. ")
    terminal.send('end"""\r')
    terminal.until('end"""\n')
    assert terminal.until("(?m)^> ") == answer(twin, "def f():\n\n/help\nend")
    assert terminal.enter('"""/help"""') == answer(twin, "/help")


def test_history(start, untrained_models):
    """The arrow keys recall typed lines, also in the next chat; only the user may read the history file."""
    terminal = start("brief")
    shown = terminal.enter("Hello there")
    terminal.enter("/clear")
    terminal.send("\x1b[A\x1b[A")
    terminal.until("Hello there$")
    terminal.send("\r")
    terminal.until("\n")
    assert terminal.until("(?m)^> ") == shown
    terminal.send("\x04")
    assert terminal.wait() == 0
    [path] = untrained_models.glob(".local/state/minigpt/*")
    assert path.read_text().split("\n")[-4:] == ["Hello there", "/clear", "Hello there", ""]
    assert path.stat().st_mode & 0o077 == 0

    again = start("brief")
    again.send("\x1b[A")
    again.until("Hello there$")
    again.send("\x15\r")  # an empty line exits
    assert again.wait() == 0


def test_ctrl_c_stops_the_answer_but_not_the_chat(start, untrained_models):
    """Here with a history file that cannot be written."""
    terminal = start("endless", "--max_new_tokens", 4096, XDG_STATE_HOME="/dev/null/no")
    terminal.send("Hello.\r")
    terminal.until("Hello.\n[a-z]+ [a-z]+ ")
    terminal.send("\x03")
    terminal.until(r"\n\(stopped\)\n> ")
    assert "1 turn saved" in terminal.enter("/save stopped.json")
    answered = json.loads((untrained_models / "stopped.json").read_text())["messages"][1]["content"]
    assert 3 <= len(answered.split()) < 4096
    terminal.send("not sent")
    terminal.ctrl_c()
    terminal.until(r"\n\(press Ctrl-C again, or Ctrl-D, to exit\)\n> ")
    terminal.enter("/params max_new_tokens 3")  # another line resets the count of Ctrl-C
    terminal.ctrl_c()
    terminal.until(r"\n\(press Ctrl-C again, or Ctrl-D, to exit\)\n> ")
    terminal.ctrl_c()
    assert terminal.wait() == 0
