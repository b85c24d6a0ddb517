"""Ctrl-C, SIGTERM, and leaving in good order: the step is finished, saved, and every rank goes.

A cluster that wants its machines back sends SIGTERM, to one process or to all. What one rank heard, all act on.
"""

import contextlib
import os
import signal
import threading
from types import FrameType

from minigpt.distributed import sum_over_ranks, world_size

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: run it again


class Preempted(SystemExit):
    """The run was asked to end, and was saved. Leaves with exit code 75 where nobody catches it."""

    def __init__(self) -> None:
        super().__init__(EXIT_CODE)


class Preemption:
    """Listens for SIGTERM and Ctrl-C while its block runs; the second Ctrl-C ends the process at once.

    With `listen` False it does not, and both end the process as they always do: for a run that has nowhere to save.
    """

    def __init__(self, listen: bool = True) -> None:
        self.listen = listen
        self.heard: str | None = None
        """Name of the signal that this rank got."""

    def __enter__(self) -> "Preemption":
        self.previous = {}
        if self.listen and threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
            self.previous = {number: signal.signal(number, self._hear) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.heard = signal.Signals(number).name
        if number == signal.SIGINT:  # the second one is immediate, also where a rank waits for the others
            signal.signal(signal.SIGINT, signal.default_int_handler if world_size() == 1 else signal.SIG_DFL)
        with contextlib.suppress(OSError):  # and not print, which fails where it interrupts another print
            os.write(2, f"\n{self.heard}: the step will be finished and saved, then this run ends\n".encode())

    def requested(self) -> bool:
        """Whether any rank was asked to end. Every rank calls it."""
        return sum_over_ranks(self.heard is not None)[0] > 0

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
