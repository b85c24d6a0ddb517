"""The thread that owns the model: requests join its batch, tokens go back as they come.

One thread runs the `Decoder`, so that nobody else touches its rows. The others leave their wishes in an inbox under a
lock, which the thread empties between two steps.
"""

import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from minigpt.data.tokenizer import Tokenizer
from minigpt.distributed import is_out_of_memory
from minigpt.inference.decoder import Decoder
from minigpt.inference.sampling import Sampling
from minigpt.model.base import CausalLM


class Token(NamedTuple):
    """What a row got. `reason` says why it ends with it, as in `Decoder.step`."""

    row: int
    id: int
    reason: str | None


class QueueFull(Exception):
    """As many rows wait as may; later there is room."""


class WorkerEnded(Exception):
    """No answers come any more: the worker failed, or was told to stop."""


Deliver = Callable[[Token | WorkerEnded], None]


@dataclass(eq=False)
class Job:
    """The rows of one request, and where their tokens go."""

    rows: Sequence[tuple[Sequence[int], Sampling]]
    deliver: Deliver
    keys: dict[int, int] = field(default_factory=dict)
    """The decoder's key of each row that is not done -> its number. Empty until the worker takes the job up."""


class Worker:
    """Decodes for whoever asks, until `end`.

    Args:
        model: in eval mode.
        max_rows: rows that run together.
        max_queue: rows that may wait for a place.
    """

    def __init__(self, model: CausalLM, tokenizer: Tokenizer, *, max_rows: int, max_queue: int):
        self._decoder = Decoder(model, max_rows=max_rows, tokenizer=tokenizer)
        self.max_rows, self.capacity = max_rows, max_rows + max_queue
        self.ended: WorkerEnded | None = None
        self.rows = 0  # accepted and not yet done: under way, or waiting
        self._changed = threading.Condition()
        self._inbox: deque[tuple[Job, bool]] = deque()  # (job, whether it comes or leaves)
        self._owners: dict[int, Job] = {}  # by the decoder's key
        self._thread = threading.Thread(target=self._run, name="decoder", daemon=True)
        self._thread.start()

    def submit(self, rows: Sequence[tuple[Sequence[int], Sampling]], deliver: Deliver) -> Job:
        """Rows that join the batch together with those of others.

        Args:
            rows: prompt ids and settings that `Decoder.add` takes.
            deliver: is called in the worker's thread for every token, or once with what ended the worker. It must not
                raise or wait.

        Raises:
            QueueFull: there is no room for them now.
            WorkerEnded: nobody would answer.
        """
        job = Job(rows, deliver)
        with self._changed:
            if self.ended:
                raise self.ended
            if self.rows + len(rows) > self.capacity:
                raise QueueFull(f"{self.rows} answers are under way or waiting, {self.capacity} may; try again later")
            self.rows += len(rows)
            self._inbox.append((job, True))
            self._changed.notify()
        return job

    def cancel(self, job: Job) -> None:
        """Ends the rows of a job before their time. Those done already are passed over."""
        with self._changed:
            self._inbox.append((job, False))
            self._changed.notify()

    def end(self, why: str) -> None:
        """Ends every row after the step under way, and then the thread."""
        with self._changed:
            self.ended = self.ended or WorkerEnded(why)
            self._changed.notify()

    def join(self) -> None:
        """Waits for the thread to end."""
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._read_inbox():
                for key, id, reason in self._decoder.step():
                    job = self._owners[key]
                    row = job.keys[key]
                    if reason:
                        self._forget(key)
                    job.deliver(Token(row, id, reason))
        except Exception as error:
            message = " ".join(str(error).split())
            advice = f" (a --max_batch_size below {self.max_rows} takes less)" if is_out_of_memory(error) else ""
            print(f"error: the worker ended: {type(error).__name__}: {message}{advice}", file=sys.stderr)
            self.ended = WorkerEnded("the model failed, and the server must be started anew")
        with self._changed:
            assert self.ended
            self.rows = 0
            jobs = {*self._owners.values(), *(job for job, _ in self._inbox)}
        for job in jobs:
            job.deliver(self.ended)

    def _read_inbox(self) -> bool:
        """Waits until there is something to do; False is the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._inbox or self._owners or self.ended)
            while self._inbox and not self.ended:
                job, comes = self._inbox[0]
                if comes:
                    for row, (prompt, sampling) in enumerate(job.rows):
                        key = self._decoder.add(prompt, sampling)
                        self._owners[key], job.keys[key] = job, row
                else:
                    for key in list(job.keys):
                        self._forget(key)
                self._inbox.popleft()
            return not self.ended

    def _forget(self, key: int) -> None:
        self._decoder.remove(key)
        del self._owners.pop(key).keys[key]
        with self._changed:
            self.rows -= 1
