"""Several ranks on this machine, as processes forked from the test: real process groups, real engines."""

import multiprocessing
import os
import pickle
import signal
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any


def on_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
    """Runs `function(*args)` on every rank of a new world, and returns what each returned.

    Raises AssertionError with the traceback of the first rank that failed, or that took longer than `timeout` seconds.
    """
    from minigpt.training.deepspeed_engine import import_deepspeed

    import_deepspeed("cpu")  # once here, not once a rank
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with TemporaryDirectory() as folder:
        ranks = []
        for rank in range(world_size):
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            process = multiprocessing.get_context("fork").Process(
                target=_run, args=(environment, Path(folder) / str(rank), function, args)
            )
            process.start()
            ranks.append(process)
        deadline = time.monotonic() + timeout
        try:
            for process in ranks:
                process.join(max(0.0, deadline - time.monotonic()))
            results = []
            for rank, process in enumerate(ranks):
                path = Path(folder) / str(rank)
                if not path.exists():
                    how = "hangs" if process.is_alive() else f"died with exit code {process.exitcode}"
                    raise AssertionError(f"rank {rank} of {world_size} {how}")
                ok, value = pickle.loads(path.read_bytes())
                assert ok, f"rank {rank} of {world_size}:\n{value}"
                results.append(value)
            return results
        finally:
            for process in ranks:
                if process.is_alive():
                    os.kill(process.pid, signal.SIGKILL)
                process.join()


def _run(environment: dict[str, str], path: Path, function: Callable[..., Any], args: tuple) -> None:
    os.environ.update(environment)
    try:
        result = pickle.dumps((True, function(*args)))
    except BaseException:
        result = pickle.dumps((False, traceback.format_exc()))
    path.with_suffix(".part").write_bytes(result)
    path.with_suffix(".part").rename(path)
    os._exit(0)  # no atexit handlers of the test's process
