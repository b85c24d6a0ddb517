"""The terminal interface of a chat: reads lines, runs commands, prints answers while they are generated.

Answers go to standard output and everything else to standard error, so a script can pipe questions in and answers out.
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

if TYPE_CHECKING:  # importing it loads torch, which --help does not need
    from minigpt.inference.chat import Chat

BLOCK = '"""'  # delimits a message of several lines
_CONTROL = {code: None for code in [*range(32), *range(127, 160)] if chr(code) not in "\n\t"}  # removed from answers


class Terminal:
    """A chat in a terminal, or a filter (question lines in, answers out) if stdin or stdout is not a terminal."""

    def __init__(self, chat: "Chat", sampling: SamplingArguments, load_model: Callable[[str], tuple]):
        """`load_model(name)` returns (model, tokenizer, template) for `<model_name_or_path=NAME>`."""
        self.chat, self.sampling, self.load_model = chat, sampling, load_model
        self.interactive = sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()
        self.failed = False  # whether any line raised an error
        self._open = True
        self._dropped = 0  # the number of dropped turns that was last reported
        self._own_files: set[Path] = set()  # files that /save may overwrite
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # its encoding may lack a character

    def run(self) -> None:
        """Reads and answers lines until an empty line or the end of input."""
        if sys.stdin is None:  # the parent process closed it
            return
        sys.stdin.reconfigure(errors="replace", newline=None)  # type: ignore[union-attr]  # invalid UTF-8, CRLF
        interrupted = False
        with _history(self.interactive):
            while self._open:
                try:
                    line = self._read_line("> ")
                    interrupted = False
                    self._process(line)
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
                        eprint("(press Ctrl-C again, or Ctrl-D, to exit)")

    def _process(self, line: str) -> None:
        try:
            if line.startswith(BLOCK):
                self.show(self.chat.ask(self._read_block(line)))
            elif line.strip():
                self.run_command_or_ask(line)
            else:
                self._open = False
        except (EOFError, BrokenPipeError):  # end of input, or the reader of stdout has exited
            raise
        except Exception as error:
            self.failed = True
            eprint(traceback.format_exc().rstrip() if debugging() else f"error: {in_one_line(error)}")

    def run_command_or_ask(self, line: str) -> None:
        """Runs the line as a command if it looks like one, else sends it to the model."""
        command = re.fullmatch(r"(/[a-z]+)(?:\s+(.*?))?\s*", line, re.DOTALL | re.IGNORECASE)
        command = command or re.fullmatch(r"\s*(<clear>|<model_name_or_path=)(?:(.*)>)?\s*", line)
        if not command:
            self.show(self.chat.ask(line))
            return
        name, argument = command[1].lower(), (command[2] or "").strip()
        if name not in COMMANDS:
            near = get_close_matches(name, COMMANDS, n=1)
            hint = f"did you mean {near[0]}?" if near else "/help lists the commands."
            raise ValueError(f"no command {name} ({hint} To send a message that begins with /, put a space before it.)")
        parameter = COMMANDS[name].argument
        if argument and not parameter:
            raise ValueError(f"{name} takes no argument, got {argument!r}")
        if parameter and not parameter.startswith("[") and not argument:
            raise ValueError(f"{name} needs an argument: {COMMANDS[name].usage}")
        COMMANDS[name].run(self, argument)

    def show(self, pieces: Iterator[str]) -> None:
        """Prints an answer while it is generated. Ctrl-C stops it."""
        stats = self.chat.answers[-1]
        if stats.turns_dropped > self._dropped:
            eprint(f"(old turns no longer fit into the context: {stats.turns_dropped} left out)")
        self._dropped = stats.turns_dropped
        if stats.tokens_cut:
            eprint(f"(the message is too long for the context: its first {stats.tokens_cut} tokens were cut)")
        printed = False
        limit = f"--max_new_tokens (now {self.sampling.max_new_tokens})"
        advice = f"a smaller {limit}, a shorter conversation (/clear) or a smaller model needs less memory"
        try:
            with explained_if_out_of_memory(advice), closing(pieces):  # type: ignore[type-var]
                for piece in pieces:
                    print(piece.translate(_CONTROL) if self.interactive else piece, end="", flush=True)
                    printed = True
        except KeyboardInterrupt:
            if not self.interactive:
                raise
            print()
            eprint("(stopped)" if printed else "(stopped; the question is removed from the conversation)")
            return
        except Exception:
            print(end="\n" if printed else "")
            raise
        print()
        if not printed:
            eprint("(empty answer: the model ended it at once)")

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
            raise ValueError(f"the input ended inside a block; close it with {BLOCK}") from None
        return text.rstrip().removesuffix(BLOCK).removeprefix("\n").removesuffix("\n")

    # ---- the commands

    def help(self, _: str) -> None:
        width = max(len(command.usage) for command in COMMANDS.values())
        for command in COMMANDS.values():
            eprint(f"{command.usage:{width}}  {command.help}")
        eprint(f"{BLOCK} begins a message of several lines, and {BLOCK} ends it. A space before / makes it a message.")
        eprint("Ctrl-C stops an answer. Ctrl-C twice at the prompt, Ctrl-D or an empty line exits.")

    def clear(self, _: str) -> None:
        self.chat.clear()
        self._dropped = 0
        eprint("(conversation cleared" + ("; the system text is kept)" if self.chat.system else ")"))

    def system(self, text: str) -> None:
        if text:
            self.chat.system = None if text == '""' else text
        eprint(f"(system text: {self.chat.system})" if self.chat.system else "(no system text)")

    def undo(self, _: str) -> None:
        eprint(f"(undone: {_shortened(self.chat.undo()['content'])})")

    def retry(self, _: str) -> None:
        pieces = self.chat.retry()
        if self.sampling.temperature == 0:
            eprint("(at temperature 0 the answer stays the same; /params temperature 0.8 turns on sampling)")
        self.show(pieces)

    def edit(self, text: str) -> None:
        question = self.chat.last_question
        if not text:
            if not (self.interactive and _readline()):
                raise ValueError("/edit has no line editing here: write the new text after it")
            text = self._read_line("> ", question["content"])
        if text.strip():
            self.show(self.chat.ask(text, question.get("input"), replace=True))
        else:
            eprint("(nothing was changed)")

    def save(self, name: str) -> None:
        from minigpt.inference.chat import save_messages

        path = Path(name).expanduser().absolute()
        path = path if path.suffix else path.with_suffix(".json")
        save_messages(self.chat.messages, path, overwrite=path in self._own_files)
        self._own_files.add(path)
        eprint(f"({path}: {_count_turns(self.chat)} saved)")

    def load(self, name: str) -> None:
        from minigpt.inference.chat import load_messages

        messages, has_more = load_messages(name)
        self.chat.load(messages)
        self._dropped = 0
        path = Path(name).expanduser().absolute()
        if not has_more and _is_saved_chat(path, messages):
            self._own_files.add(path)
        eprint(f"({name}: {_count_turns(self.chat)}{', the first conversation in the file' if has_more else ''})")

    def params(self, text: str) -> None:
        words = text.replace("=", " ").split()
        if len(words) % 2:
            raise ValueError("/params needs names and values, such as /params temperature 0.8")
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
            limited = name == "max_new_tokens" and value > self.chat.max_answer_tokens
            limit = f" (here {self.chat.max_answer_tokens}, half of the context)" if limited else ""
            eprint(f"{name:18}  {'unset' if value is None else value}{limit}")

    def stats(self, _: str) -> None:
        answers, context = self.chat.answers, self.chat.model.config.context
        if not answers:
            raise ValueError("no question has been asked yet")
        last = answers[-1]
        tokens, seconds = sum(answer.new_tokens for answer in answers), sum(answer.seconds for answer in answers)
        eprint(f"last answer  {_speed(last.new_tokens, last.seconds)}, first token after {last.first_token_s:.2f} s")
        eprint(f"answers      {len(answers):,}: {_speed(tokens, seconds)}")
        used = last.prompt_tokens + last.new_tokens
        reserved = self.chat.max_answer_tokens
        eprint(f"context      {used:,} of {context:,} tokens used, {reserved:,} reserved for each answer")
        eprint(f"left out     {last.turns_dropped:,} old turns, {last.tokens_cut:,} tokens of a message")

    def exit(self, _: str) -> None:
        self._open = False

    def model(self, name: str) -> None:
        chat = self.chat
        previous = chat.model, chat.tokenizer, chat.template
        try:
            chat.model, chat.tokenizer, chat.template = self.load_model(name)
            chat.load(chat.messages)
        except BaseException:
            chat.model, chat.tokenizer, chat.template = previous
            raise
        eprint(f"({name}: template {chat.template.name})")


class Command(NamedTuple):
    """A command: its name, its argument (in brackets if optional), its line in /help, and the method that runs it."""

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
        Command("/clear", "", "clear the conversation; the system text is kept", Terminal.clear),
        Command("/system", "[TEXT]", 'show the system text, or set it; "" removes it', Terminal.system),
        Command("/undo", "", "remove the last question and its answer", Terminal.undo),
        Command("/retry", "", "answer the last question again, with other random draws", Terminal.retry),
        Command("/edit", "[TEXT]", "change the last question, and answer it again", Terminal.edit),
        Command("/save", "FILE", "write the conversation as JSON, which /load and sft.py --data read", Terminal.save),
        Command("/load", "FILE", "continue a conversation from a file", Terminal.load),
        Command("/params", "[NAME VALUE]", "show the sampling settings, or change them", Terminal.params),
        Command("/stats", "", "show tokens, speed, and how much of the context is used", Terminal.stats),
        Command("/exit", "", "exit", Terminal.exit),
        Command("<clear>", "", "same as /clear", Terminal.clear),
        Command("<model_name_or_path=", "NAME>", "continue with another model", Terminal.model),
    )
}


def eprint(text: str) -> None:
    print(text, file=sys.stderr)


def _count_turns(chat: "Chat") -> str:
    turns = len(chat.messages) // 2
    return f"{turns} turn{'s' * (turns != 1)}{', system text' if chat.system else ''}"


def _is_saved_chat(path: Path, messages: list) -> bool:
    """Whether /save would write exactly this file; any other file is data, which /save must not overwrite."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) == {"messages": messages}
    except (OSError, ValueError):  # a glob, a hub address, or another format
        return False


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 60 else f"{text[:60]} ..."


def _speed(tokens: int, seconds: float) -> str:
    return f"{tokens:,} tokens in {seconds:.2f} s ({tokens / seconds if seconds else 0:.1f} tokens/s)"


def _readline() -> Any:
    """The standard library's line editing, or None if Python was built without it.

    It is imported for a terminal only, because some versions write control codes to standard output on import.
    """
    try:
        import readline
    except ImportError:
        return None
    return readline


@contextmanager
def _history(enabled: bool) -> Iterator[None]:
    """Keeps the typed lines across chats, if the history file can be read and written."""
    readline = _readline() if enabled else None
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
