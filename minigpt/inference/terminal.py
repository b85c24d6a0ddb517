"""The terminal around a chat: reads lines, obeys commands, prints answers as they come.

Answers go to standard output and all else to standard error, so that a script may pipe questions in and answers out.
"""

import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_type_hints

from minigpt.distributed import explained_if_out_of_memory
from minigpt.settings.command_line import convert, debugging, in_one_line
from minigpt.settings.groups import SamplingArguments

if TYPE_CHECKING:  # they bring torch, and --help need not wait for it
    from minigpt.inference.chat import Chat

BLOCK = '"""'
_CONTROL = {code: None for code in [*range(32), *range(127, 160)] if chr(code) not in "\n\t"}


class Terminal:
    """A chat in a terminal; or, where standard input or output is none, a filter of lines."""

    def __init__(self, chat: "Chat", sampling: SamplingArguments, load_model: Callable[[str], tuple]):
        """`load_model(name)` returns another model with its tokenizer and template."""
        self.chat, self.sampling, self.load_model = chat, sampling, load_model
        self.interactive = sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()
        self.failed = False  # whether a line could not be carried out
        self._open = True
        self._dropped = 0  # turns left out, when last said
        self._own_files: set[Path] = set()  # which /save may write again
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # it may lack a character

    def run(self) -> None:
        """Reads and answers, until an empty line or the end of input."""
        if sys.stdin is None:  # closed by whoever started us
            return
        sys.stdin.reconfigure(errors="replace", newline=None)  # type: ignore[union-attr]  # broken bytes, CRLF
        interrupted = False
        with _history(self.interactive):
            while self._open:
                try:
                    line = self._read_line("> ")
                    interrupted = False
                    self._carry_out(line)
                except EOFError:
                    self._open = False
                    if self.interactive:
                        print()
                except KeyboardInterrupt:
                    if not self.interactive:
                        raise
                    print()
                    self._open = not interrupted
                    interrupted = True
                    if self._open:
                        note("Ctrl-C again, or Ctrl-D, leaves")

    def _carry_out(self, line: str) -> None:
        try:
            if line.startswith(BLOCK):
                self.show(self.chat.ask(self._read_block(line)))
            elif line.strip():
                self.obey(line)
            else:
                self._open = False
        except (EOFError, BrokenPipeError):  # nobody asks any more, or nobody reads
            raise
        except Exception as error:
            self.failed = True
            eprint(traceback.format_exc().rstrip() if debugging() else f"error: {in_one_line(error)}")

    def obey(self, line: str) -> None:
        """Carries out a command, or asks."""
        command = re.fullmatch(r"(/[a-z]+)(?:\s+(.*?))?\s*", line, re.DOTALL | re.IGNORECASE)
        command = command or re.fullmatch(r"\s*(<clear>|<model_name_or_path=)(?:(.*)>)?\s*", line)
        if not command:
            self.show(self.chat.ask(line))
            return
        name, argument = command[1].lower(), (command[2] or "").strip()
        if name not in COMMANDS:
            near = get_close_matches(name, COMMANDS, n=1)
            hint = f"did you mean {near[0]}?" if near else "/help lists them"
            raise ValueError(f"no command {name} ({hint} A message that begins with / is sent with a blank before it.)")
        wanted = COMMANDS[name].argument
        if argument and not wanted:
            raise ValueError(f"{name} takes nothing after it, got {argument!r}")
        if wanted and not wanted.startswith("[") and not argument:
            raise ValueError(f"{name} needs {wanted.rstrip('>')} after it")
        COMMANDS[name].run(self, argument)

    def show(self, pieces: Iterator[str]) -> None:
        """Prints an answer as it comes. Ctrl-C stops it."""
        answer = self.chat.answers[-1]
        if answer.turns_dropped > self._dropped:
            note(f"old turns no longer fit into the context: {answer.turns_dropped} left out")
        self._dropped = answer.turns_dropped
        if answer.tokens_cut:
            note(f"too long for the context: the first {answer.tokens_cut} tokens of it are cut")
        shown = False
        limit = f"--max_new_tokens (now {self.sampling.max_new_tokens})"
        advice = f"a smaller {limit} or a shorter conversation (/clear) takes less, as does a smaller model"
        try:
            with explained_if_out_of_memory(advice), closing(pieces):  # type: ignore[type-var]
                for piece in pieces:
                    print(piece.translate(_CONTROL) if self.interactive else piece, end="", flush=True)
                    shown = True
        except KeyboardInterrupt:
            if not self.interactive:
                raise
            print()
            note("stopped" if shown else "stopped; the question is forgotten")
            return
        except Exception:
            print(end="\n" if shown else "")
            raise
        print()
        if not shown:
            note("an empty answer: the model ended it at once")

    def _read_line(self, prompt: str, prefill: str = "") -> str:
        if not self.interactive:
            return input()
        if prefill:
            _readline().set_startup_hook(lambda: _readline().insert_text(prefill))
        try:
            return input(prompt)
        finally:
            if prefill:
                _readline().set_startup_hook(None)

    def _read_block(self, line: str) -> str:
        text = line.removeprefix(BLOCK)
        try:
            while not text.rstrip().endswith(BLOCK):
                text += "\n" + self._read_line("... ")
        except EOFError:
            raise ValueError(f"the input ended inside a block, which {BLOCK} ends") from None
        return text.rstrip().removesuffix(BLOCK).removeprefix("\n").removesuffix("\n")

    # ---- the commands

    def help(self, _: str) -> None:
        width = max(len(command.usage) for command in COMMANDS.values())
        for command in COMMANDS.values():
            eprint(f"{command.usage:{width}}  {command.help}")
        eprint(f"{BLOCK} begins a message of several lines, and {BLOCK} ends it. A blank before / makes it a message.")
        eprint("Ctrl-C stops an answer, and leaves when pressed twice at the prompt; so do Ctrl-D and an empty line.")

    def clear(self, _: str) -> None:
        self.chat.clear()
        self._dropped = 0
        note("the conversation is forgotten" + ("; the system text stays" if self.chat.system else ""))

    def system(self, text: str) -> None:
        if text:
            self.chat.system = None if text == '""' else text
        note(f"system text: {self.chat.system}" if self.chat.system else "no system text")

    def undo(self, _: str) -> None:
        note(f"undone: {_shortened(self.chat.undo()['content'])}")

    def retry(self, _: str) -> None:
        pieces = self.chat.retry()
        if self.sampling.temperature == 0:
            note("at temperature 0 an answer stays the same; /params temperature 0.8 is livelier")
        self.show(pieces)

    def edit(self, text: str) -> None:
        question = self.chat.last_question
        if not text:
            if not (self.interactive and _readline()):
                raise ValueError("/edit has no line editing here: give the new text after it")
            text = self._read_line("> ", question["content"])
        if text.strip():
            self.show(self.chat.ask(text, question.get("input"), replace=True))
        else:
            note("nothing is changed")

    def save(self, name: str) -> None:
        from minigpt.inference.chat import save_messages

        path = Path(name).expanduser().absolute()
        path = path if path.suffix else path.with_suffix(".json")
        save_messages(self.chat.messages, path, overwrite=path in self._own_files)
        self._own_files.add(path)
        note(f"{path}: {_turns(self.chat)} saved")

    def load(self, name: str) -> None:
        from minigpt.inference.chat import load_messages

        messages, more = load_messages(name)
        self.chat.load(messages)
        self._dropped = 0
        path = Path(name).expanduser().absolute()
        if not more and _is_saved(path, messages):
            self._own_files.add(path)
        note(f"{name}: {_turns(self.chat)}{', the first conversation of the file' if more else ''}")

    def params(self, text: str) -> None:
        words = text.replace("=", " ").split()
        if len(words) % 2:
            raise ValueError("/params wants a name and a value, such as /params temperature 0.8")
        hints, changes = get_type_hints(SamplingArguments), {}
        for name, value in zip(words[::2], words[1::2], strict=True):
            if name not in hints:
                near = get_close_matches(name, hints, n=1)
                raise ValueError(f"no setting {name} ({f'did you mean {near[0]}?' if near else ', '.join(hints)})")
            unset = value.lower() in ("none", "unset")
            try:
                changes[name] = convert(None if unset else value, hints[name])
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        try:
            self.sampling = replace(self.sampling, **changes)
        except ValueError as error:
            raise ValueError(str(error).removeprefix("--")) from None
        self.chat.sampling = asdict(self.sampling)
        for name, value in asdict(self.sampling).items():
            limited = name == "max_new_tokens" and value > self.chat.room
            limit = f" (here {self.chat.room}, half of the context)" if limited else ""
            eprint(f"{name:18}  {'unset' if value is None else value}{limit}")

    def stats(self, _: str) -> None:
        answers, context = self.chat.answers, self.chat.model.config.context
        if not answers:
            raise ValueError("nothing has been asked yet")
        last = answers[-1]
        tokens, seconds = sum(answer.new_tokens for answer in answers), sum(answer.seconds for answer in answers)
        eprint(f"last answer  {_speed(last.new_tokens, last.seconds)}, the first after {last.first_token_s:.2f} s")
        eprint(f"answers      {len(answers):,}: {_speed(tokens, seconds)}")
        used = last.prompt_tokens + last.new_tokens
        eprint(f"context      {used:,} of {context:,} tokens used, {self.chat.room:,} kept for each answer")
        eprint(f"left out     {last.turns_dropped:,} old turns, {last.tokens_cut:,} tokens of a message")

    def exit(self, _: str) -> None:
        self._open = False

    def model(self, name: str) -> None:
        chat = self.chat
        before = chat.model, chat.tokenizer, chat.template
        try:
            chat.model, chat.tokenizer, chat.template = self.load_model(name)
            chat.load(chat.messages)
        except BaseException:
            chat.model, chat.tokenizer, chat.template = before
            raise
        note(f"{name}: template {chat.template.name}")


class Command(NamedTuple):
    """What may be typed, in brackets what may be left out; and what it does."""

    name: str
    argument: str
    help: str
    run: Callable[[Terminal, str], None]

    @property
    def usage(self) -> str:
        return f"{self.name}{'' if self.name.endswith('=') else ' '}{self.argument}".rstrip()


COMMANDS = {
    command.name: command
    for command in (
        Command("/help", "", "list the commands", Terminal.help),
        Command("/clear", "", "forget the conversation; the system text stays", Terminal.clear),
        Command("/system", "[TEXT]", 'show the system text, or give another; "" removes it', Terminal.system),
        Command("/undo", "", "take back the last question and its answer", Terminal.undo),
        Command("/retry", "", "answer the last question anew, with other draws", Terminal.retry),
        Command("/edit", "[TEXT]", "change the last question, and answer it anew", Terminal.edit),
        Command("/save", "FILE", "write the conversation as JSON, which /load and sft.py --data read", Terminal.save),
        Command("/load", "FILE", "go on from a conversation in a file", Terminal.load),
        Command("/params", "[NAME VALUE]", "show how answers are drawn, or change it", Terminal.params),
        Command("/stats", "", "show tokens, speed, and how much of the context is used", Terminal.stats),
        Command("/exit", "", "leave", Terminal.exit),
        Command("<clear>", "", "the same as /clear", Terminal.clear),
        Command("<model_name_or_path=", "NAME>", "go on with another model", Terminal.model),
    )
}


def note(text: str) -> None:
    """Says what happened, beside the conversation."""
    eprint(f"({text})")


def eprint(text: str) -> None:
    print(text, file=sys.stderr)


def _turns(chat: "Chat") -> str:
    turns = len(chat.messages) // 2
    return f"{turns} turn{'s' * (turns != 1)}{', system text' if chat.system else ''}"


def _is_saved(path: Path, messages: list) -> bool:
    """Whether a file is what /save makes of these messages: any other is data, and no chat to be written over."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) == {"messages": messages}
    except (OSError, ValueError):  # a pattern of names, or an address of the hub; another format
        return False


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 60 else f"{text[:60]} ..."


def _speed(tokens: int, seconds: float) -> str:
    return f"{tokens:,} tokens in {seconds:.2f} s ({tokens / seconds if seconds else 0:.1f} tokens/s)"


def _readline() -> Any:
    """The standard library's line editing, where Python was built with it.

    It is imported for a terminal only, because some versions write control codes to standard output at once.
    """
    try:
        import readline
    except ImportError:
        return None
    return readline


@contextmanager
def _history(wanted: bool) -> Iterator[None]:
    """The lines typed, kept from chat to chat where they can be."""
    readline = _readline() if wanted else None
    if readline is None:
        yield
        return
    path = Path(os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state"), "minigpt", "chat_history")
    with suppress(OSError):
        readline.read_history_file(path)
    readline.set_history_length(1000)
    try:
        yield
    finally:
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(path)
