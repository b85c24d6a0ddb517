"""The worker thread, which runs the model: continuous batching of the rows of all requests.

Only this thread touches the `Decoder`. Other threads put jobs and cancellations into an inbox under a lock, and the
worker empties the inbox between two steps.
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
    """A new token of a row. `reason` is why the row ends with it, as in `Decoder.step`."""

    row: int
    id: int
    reason: str | None


class QueueFull(Exception):
    """The queue has no space for the rows of a request; the client may try again later."""


class WorkerEnded(Exception):
    """The worker thread has failed or was told to stop, so no more tokens are generated."""


Deliver = Callable[[Token | WorkerEnded], None]


@dataclass(eq=False)
class Job:
    """The rows of one request, and the callback for their tokens."""

    rows: Sequence[tuple[Sequence[int], Sampling]]
    deliver: Deliver
    keys: dict[int, int] = field(default_factory=dict)
    """Decoder key -> row index, for each row that has not ended. Empty until the worker adds the rows."""


class Worker:
    """Runs the decoder in a thread until `end` is called.

    Args:
        model: in eval mode.
        max_rows: the number of rows in a batch.
        max_queue: the number of rows that may wait for the batch.
    """

    def __init__(self, model: CausalLM, tokenizer: Tokenizer, *, max_rows: int, max_queue: int):
        self._decoder = Decoder(model, max_rows=max_rows, tokenizer=tokenizer)
        self.max_rows, self.capacity = max_rows, max_rows + max_queue
        self.ended: WorkerEnded | None = None
        self.rows = 0  # rows accepted and not ended yet: running or waiting
        self._changed = threading.Condition()
        self._inbox: deque[tuple[Job, bool]] = deque()  # (job, True to add it or False to cancel it)
        self._owners: dict[int, Job] = {}  # decoder key -> the job of the row
        self._thread = threading.Thread(target=self._run, name="decoder", daemon=True)
        self._thread.start()

    def submit(self, rows: Sequence[tuple[Sequence[int], Sampling]], deliver: Deliver) -> Job:
        """Queues the rows of a request, which are decoded in one batch with those of other requests.

        Args:
            rows: prompt ids and settings for `Decoder.add`.
            deliver: called in the worker thread for every token, and once with the `WorkerEnded` if the worker ends.
                It must neither raise nor block.

        Raises:
            QueueFull: the queue has no space for the rows.
            WorkerEnded: the worker has ended.
        """
        job = Job(rows, deliver)
        with self._changed:
            if self.ended:
                raise self.ended
            if self.rows + len(rows) > self.capacity:
                raise QueueFull(
                    f"{self.rows} answers are running or waiting, the limit is {self.capacity}; try again later"
                )
            self.rows += len(rows)
            self._inbox.append((job, True))
            self._changed.notify()
        return job

    def cancel(self, job: Job) -> None:
        """Frees the rows of a job before they end. Rows that have ended are ignored."""
        with self._changed:
            self._inbox.append((job, False))
            self._changed.notify()

    def end(self, why: str) -> None:
        """Ends the thread, and all rows with it, after the current step."""
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
                        self._free(key)
                    job.deliver(Token(row, id, reason))
        except Exception as error:
            message = " ".join(str(error).split())
            advice = f" (a --max_batch_size below {self.max_rows} needs less)" if is_out_of_memory(error) else ""
            print(f"error: the worker ended: {type(error).__name__}: {message}{advice}", file=sys.stderr)
            self.ended = WorkerEnded("the model failed; the server must be restarted")
        with self._changed:
            assert self.ended
            self.rows = 0
            jobs = {*self._owners.values(), *(job for job, _ in self._inbox)}
        for job in jobs:
            job.deliver(self.ended)

    def _read_inbox(self) -> bool:
        """Waits for work, then adds and cancels jobs; returns False if the worker has to end."""
        with self._changed:
            self._changed.wait_for(lambda: self._inbox or self._owners or self.ended)
            while self._inbox and not self.ended:
                job, is_new = self._inbox[0]
                if is_new:
                    for row, (prompt, sampling) in enumerate(job.rows):
                        key = self._decoder.add(prompt, sampling)
                        self._owners[key], job.keys[key] = job, row
                else:
                    for key in list(job.keys):
                        self._free(key)
                self._inbox.popleft()
            return not self.ended

    def _free(self, key: int) -> None:
        self._decoder.remove(key)
        del self._owners.pop(key).keys[key]
        with self._changed:
            self.rows -= 1
