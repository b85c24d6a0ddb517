"""Runs chat.py in a pseudo-terminal: sends keys and reads what is shown."""

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
    """chat.py in its own terminal, which is so wide that no line wraps."""

    def __init__(self, folder: Path, *arguments: object, **environment: str):
        command = [sys.executable, str(ROOT / "chat.py"), *map(str, arguments)]
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.chdir(folder)
            os.execve(sys.executable, command, environment_of(folder) | environment)
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 4000, 0, 0))
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.text = ""  # read and not returned yet

    def until(self, pattern: str, timeout: float = 60) -> str:
        """Waits for a match of the pattern, and returns the text before it."""
        end = time.monotonic() + timeout
        while not (match := re.search(pattern, self.text)):
            remaining = end - time.monotonic()
            assert remaining > 0 and select.select([self.fd], [], [], remaining)[0], f"no {pattern!r} in {self.text!r}"
            try:
                data = os.read(self.fd, 1 << 16)
            except OSError:  # on Linux: the process has closed the terminal
                data = b""
            assert data, f"the process ended, with no {pattern!r} in {self.text!r}"
            self.text = CONTROL_CODE.sub("", self.text + self.decoder.decode(data).replace("\r", ""))
        before, self.text = self.text[: match.start()], self.text[match.end() :]
        return before

    def send(self, keys: str) -> None:
        os.write(self.fd, keys.encode())

    def enter(self, line: str) -> str:
        """Types a line, and returns what is shown up to the next prompt."""
        self.send(line + "\r")
        self.until(re.escape(line) + "\n")
        return self.until(r"(?m)^> ")

    def ctrl_c(self) -> None:
        """Sends Ctrl-C once readline waits for a key: an earlier one would take effect only at the next key."""
        asleep = 0
        while asleep < 10:
            time.sleep(0.05)
            state = Path(f"/proc/{self.pid}/stat").read_text().rsplit(") ")[-1][0]
            asleep = asleep + 1 if state == "S" else 0
        self.send("\x03")

    def wait(self) -> int:
        """Waits for the process to end, and returns its exit code."""
        with pytest.raises(AssertionError, match="the process ended"):
            self.until("(?!)")  # matches nothing
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def close(self) -> None:
        os.close(self.fd)
        try:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        except (ChildProcessError, ProcessLookupError):
            pass  # already ended and waited for


def environment_of(folder: Path) -> dict[str, str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "MINIGPT_", "XDG_", "INPUTRC"))}
    return environment | {"HOME": str(folder), "TERM": "xterm", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def answer(chat: Chat, question: str) -> str:
    """The expected output for a question."""
    return "".join(chat.ask(question)) + "\n"
