"""Rank, world size and device of this process; process group, reductions, barriers; output on rank 0 only.

torchrun and deepspeed start one process per GPU and set RANK, LOCAL_RANK and WORLD_SIZE; without them, as under plain
python, the world size is 1.
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import Store
    from tqdm import tqdm


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    return rank() == 0


def print0(text: str = "") -> None:
    """Prints a line on rank 0 only, and flushes it. A closed pipe (`| head`) does not end the program."""
    if is_main():
        try:
            print(text, flush=True)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def pick_device(name: str | None = None) -> str:
    """The device of this name for this rank (cuda -> cuda:LOCAL_RANK); None picks cuda, else mps, else cpu.

    Raises `ValueError` if PyTorch cannot use it.
    """
    import torch

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        torch.empty(0, device=name)
    except (AssertionError, RuntimeError) as error:  # built without CUDA; no such device
        raise ValueError(f"--device {name}: this PyTorch has no such device here (cuda, cpu or mps)") from error
    return name


def start_process_group(device_type: str) -> None:
    """Initializes the process group if it is not yet: gloo for CPU tensors (counters), NCCL for CUDA tensors."""
    import torch
    from torch import distributed

    if distributed.is_initialized():
        return
    if device_type == "mps" and world_size() > 1:
        raise ValueError(f"{world_size()} processes were started, and mps is one device: use --device cpu")
    backend = "gloo"
    if device_type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "cpu:gloo,cuda:nccl"
    store = distributed.HashStore() if world_size() == 1 else _rendezvous()
    distributed.init_process_group(backend, store=store, rank=rank(), world_size=world_size())


def _rendezvous() -> "Store":
    """Waits for all ranks, and returns their store. One node may tokenize for hours what another has in its cache."""
    from torch import distributed

    timeout = timedelta(days=2)  # PyTorch's default is 30 minutes, NCCL's 10
    store, *_ = next(distributed.rendezvous("env://", timeout=timeout))
    group = (store.add("minigpt/here", 1) - 1) // world_size()  # 0; 1 for the next process group after close(), ...
    while store.add("minigpt/here", 0) < (group + 1) * world_size():
        time.sleep(0.1)
    store.set_timeout(timedelta(minutes=30))
    return distributed.PrefixStore(f"minigpt/group/{group}", store)


def sum_over_ranks(*values: float) -> list[float]:
    """All-reduce: each value summed over all ranks, which must all call it. In float64, so integers stay exact."""
    if world_size() == 1:
        return list(values)
    import torch
    from torch import distributed

    sums = torch.tensor(values, dtype=torch.float64)
    distributed.all_reduce(sums)
    return sums.tolist()


class OtherRankFailed(RuntimeError):
    """This rank stops because another rank failed; that rank reports the error."""


class OutOfMemory(RuntimeError):
    """The device has too little memory; the message says which settings need less."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is PyTorch's `OutOfMemoryError`, or the RuntimeError that CPU, MPS, cuBLAS or NCCL raise instead."""
    phrases = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in phrases)


@contextmanager
def explained_if_out_of_memory(advice: str) -> Iterator[None]:
    """Turns PyTorch's out-of-memory errors into an `OutOfMemory` whose message is `advice`."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, OutOfMemory) or not is_out_of_memory(error):
            raise
        raise OutOfMemory(f"out of memory: {advice}") from error


def fails_alone(device_type: str) -> bool:
    """Whether this rank is exiting with an error on a GPU while others may still run; if so, skip destroying the group.

    Call it while the exception is being handled. Destroying NCCL's communicators waits for all ranks
    (`ncclCommDestroy`), and those wait for this rank in a collective: a deadlock. If this process just exits, its
    launcher kills the others. With gloo, the closed connection raises an error in the other ranks.
    """
    return device_type == "cuda" and world_size() > 1 and isinstance(sys.exc_info()[1], Exception)


@contextmanager
def all_or_none() -> Iterator[None]:
    """Barrier after the block: if one rank raises, all raise, so that none waits forever. Every rank must enter it."""
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    failed = int(sum_over_ranks(error is not None)[0])
    if error is not None:
        raise error
    if failed:
        raise OtherRankFailed(f"rank {rank()} stops, because {failed} of {world_size()} ranks failed")


def progress_bar(total: int | None, unit: str, description: str, unit_scale: bool = False, initial: int = 0) -> "tqdm":
    """A tqdm bar on standard error: on rank 0, and only if that is a terminal."""
    from tqdm import tqdm

    return tqdm(
        total=total,
        initial=initial,
        unit=unit,
        unit_scale=unit_scale,
        desc=description,
        disable=not (is_main() and sys.stderr.isatty()),
        dynamic_ncols=True,
        leave=False,
    )


def clock(seconds: float) -> str:
    """A duration as `H:MM:SS`, such as `1:02:03`."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
