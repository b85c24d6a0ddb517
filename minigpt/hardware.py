"""What this machine computes fast: which precision, with how many threads.

A figure of one machine says nothing about another: bf16 doubles the speed where the processor has instructions for it
and takes a hundred times as long where it is emulated (any x86 CPU without AVX512-BF16 or AMX). Flags of the CPU do not
tell either, for oneDNN can be held back. So nothing here is a table of processors: a small product is timed.
"""

import os
import time
from functools import cache
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

# How OpenMP's threads wait: the standard's name, which LLVM's library reads too; GNU's, which torch brings on Linux.
# 1,000 rounds are a few microseconds: two threads that are done at nearly the same time need not go to sleep.
WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}
TIMING_SECONDS = 0.1  # for each kind of product
EMULATED = 1.5  # times as long as fp32; a little above 1, bf16 may still pay, because it halves the bytes
BUSY = 0.8  # of the time of all threads: below it, half of them are faster by more than noise


def set_thread_waiting() -> None:
    """Makes OpenMP's threads sleep while they wait for one another, unless the user chose; before torch is imported.

    By default they spin: a step of two threads takes many times as long once another process computes on one of the
    cores (`benchmarks/busy.py`). Entry points call this. A library must not change its host's process.
    """
    if not any(name in os.environ for name in (*WAITING, "KMP_BLOCKTIME")):
        os.environ.update(WAITING)


def product_seconds(dtype: "torch.dtype", device: str = "cpu", rows: int = 256, width: int = 512) -> float:
    """Mean seconds of a (rows,width) x (width,width) product, over about `TIMING_SECONDS`."""
    import torch

    device_type = torch.device(device).type
    x = torch.ones(rows, width, dtype=dtype, device=device)
    weight = torch.ones(width, width, dtype=dtype, device=device)

    def run() -> float:
        start = time.perf_counter()
        x @ weight
        if device_type != "cpu":
            getattr(torch, device_type).synchronize()
        return time.perf_counter() - start

    with torch.no_grad():
        run()  # the first one prepares the kernel
        seconds = [run()]
        while sum(seconds) < TIMING_SECONDS:
            seconds.append(run())
    return sum(seconds) / len(seconds)


@cache
def bf16_seconds_ratio(device: str = "cpu") -> float:
    """How many times as long a product takes in bf16 as in fp32, on this machine and now."""
    import torch

    fp32 = product_seconds(torch.float32, device)
    return product_seconds(torch.bfloat16, device) / fp32


def fastest_precision(device: str = "cpu") -> Literal["bf16", "fp32"]:
    """bf16 if a product takes no longer in it than in fp32, on this machine and now."""
    return "bf16" if bf16_seconds_ratio(device) <= 1 else "fp32"


def bf16_warning(device: str = "cpu") -> str | None:
    """A line that says how much slower bf16 is than fp32 here, if it is."""
    ratio = bf16_seconds_ratio(device)
    if ratio < EMULATED:
        return None
    return f"bf16 is emulated here: a product takes {ratio:.0f} times as long as in fp32"


def threads_warning(device: str = "cpu") -> str | None:
    """A line that says how many threads compute, if fewer than the cores do, or if fewer would be faster now.

    The latter is so while another process uses the cores; two products are timed to see it.
    """
    import torch

    if device != "cpu":
        return None
    threads, cores = torch.get_num_threads(), available_cores()
    if threads < cores:
        return f"threads: {threads}, with {cores} cores (OMP_NUM_THREADS={threads})"
    half = threads // 2
    if half == 0:
        return None
    try:
        seconds = product_seconds(torch.float32, rows=704)
        torch.set_num_threads(half)
        fewer_seconds = product_seconds(torch.float32, rows=704)
    finally:
        torch.set_num_threads(threads)
    if fewer_seconds > BUSY * seconds:
        return None
    return (
        f"threads: {threads}, and {half} would be faster while another process uses the cores (OMP_NUM_THREADS={half})"
    )


def available_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
