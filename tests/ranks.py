"""Several ranks on this machine, as processes forked from the test: real process groups, real engines."""

import gc
import json
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


def on_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 60) -> list[Any]:
    """Runs `function(*args)` on every rank of a new world, and returns what each returned.

    Raises AssertionError with the traceback of the first rank that failed, or that took longer than `timeout` seconds.
    """
    from minigpt.training.engines.deepspeed_engine import import_deepspeed

    import_deepspeed("cpu")  # once here, not once a rank; and what the first optimizer and the first engine import
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    import torch._dynamo  # noqa: F401

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


def few(cases: list[Any], quick: list[Any]) -> list[Any]:
    """All cases as pytest's parameters, those that are not `quick` for `make test-slow`."""
    import pytest

    assert all(case in cases for case in quick)
    slow = [
        pytest.param(*(c if isinstance(c, tuple) else (c,)), marks=pytest.mark.slow) for c in cases if c not in quick
    ]
    return [*quick, *slow]


def engine_of(kind: str, model: Any, **settings: Any) -> tuple[Any, Any]:
    """An engine and its configuration; `settings` are the configuration's, and `file` more of the DeepSpeed file.

    Args:
        kind: "torch", "torch bf16", "zero0", ..., "zero3", "zero1 bf16", "zero1 fp16", ...
    """
    from minigpt import TrainConfig, make_engine

    name, _, dtype = kind.partition(" ")
    file = settings.pop("file", {})
    if dtype:
        settings[dtype] = True
    if dtype == "fp16":  # what this CPU computes in fp16 is slow, and right
        from deepspeed.accelerator import get_accelerator

        get_accelerator().is_fp16_supported = lambda: True
    if name == "torch":
        config = TrainConfig(**settings)
        return make_engine(model, config), config
    zero = {"stage": int(name[-1]), **file.get("zero_optimization", {})}
    with TemporaryDirectory() as folder:
        path = Path(folder) / "deepspeed.json"
        path.write_text(json.dumps({**file, "zero_optimization": zero}))
        config = TrainConfig(**settings, deepspeed=str(path))
        return make_engine(model, config), config


def _run(environment: dict[str, str], path: Path, function: Callable[..., Any], args: tuple) -> None:
    os.environ.update(environment)
    gc.freeze()  # what the test's process holds is no garbage here; DeepSpeed looks for some at every turn
    try:
        result = pickle.dumps((True, function(*args)))
    except BaseException:
        result = pickle.dumps((False, traceback.format_exc()))
    path.with_suffix(".part").write_bytes(result)
    path.with_suffix(".part").rename(path)
    os._exit(0)  # no atexit handlers of the test's process
