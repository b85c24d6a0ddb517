"""chat.py in a pseudo-terminal: what is typed, and what is shown."""

import codecs
import fcntl
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
import time
from pathlib import Path

import pytest

from minigpt.inference.chat import Chat

ROOT = Path(__file__).parents[2]
CONTROL_CODE = re.compile(r"\x1b\[[?0-9;]*[A-Za-z]|\x1b[=>]|\a")


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

    def print0(self, line: str) -> str:
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


def answer(chat: Chat, question: str) -> str:
    """What is shown for a question."""
    return "".join(chat.ask(question)) + "\n"
