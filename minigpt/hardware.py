"""Measures which precision and how many threads are fast on this machine.

bf16 doubles the speed if the processor has instructions for it, and takes a hundred times as long if it is emulated
(any x86 CPU without AVX512-BF16 or AMX). CPU flags are not enough to tell, because oneDNN can be configured not to use
these instructions. So a small matrix product is timed instead of looking the processor up in a table.
"""

import os
import time
from functools import cache
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

# How OpenMP's threads wait: OMP_WAIT_POLICY is standard OpenMP, GOMP_SPINCOUNT is GNU's libgomp, which torch's wheels
# for Linux bundle. Spinning 5,000 times takes about 0.1 ms: long enough to stay awake between two matrix products of a
# training step or token, short enough to free a core that another process needs (figures: benchmarks/LOG.md).
WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "5000"}
TIMING_SECONDS = 0.1  # for each timed product
CPU_PRODUCT = 256, 512  # rows, width
GPU_PRODUCT = 2048, 2048  # smaller ones measure only the kernel launch, the same in every precision
EMULATED = 1.5  # bf16/fp32 time from which to warn; bf16 a little slower may still pay off, because it halves the bytes
THREADS_PRODUCT = 704, 512  # a training step of the demo has 704 rows
BUSY = 0.8  # half the threads are faster by more than noise if they take less than this share of the time


def set_thread_waiting() -> None:
    """Makes waiting OpenMP threads sleep instead of spin, unless the user set a policy. Call it before importing torch.

    With spinning, the default, a step on two threads takes many times as long once another process uses one of the
    cores (`benchmarks/busy.py`). Scripts, examples and benchmarks call this; `import minigpt` does not, because a
    library must not change the environment of its host process.
    """
    if not any(name in os.environ for name in (*WAITING, "KMP_BLOCKTIME")):
        os.environ.update(WAITING)


def product_seconds(dtype: "torch.dtype", device: str, rows: int, width: int) -> float:
    """Mean seconds of a (rows,width) @ (width,width) product, timed for about `TIMING_SECONDS`."""
    import torch

    device_type = torch.device(device).type
    x = torch.ones(rows, width, dtype=dtype, device=device)
    weight = torch.ones(width, width, dtype=dtype, device=device)

    def multiply() -> None:
        x @ weight
        if device_type != "cpu":
            getattr(torch, device_type).synchronize()

    with torch.no_grad():
        multiply()  # warm-up: the first call loads the kernel
        count, seconds, start = 0, 0.0, time.perf_counter()
        while count == 0 or seconds < TIMING_SECONDS:
            multiply()
            count, seconds = count + 1, time.perf_counter() - start
    return seconds / count


@cache
def bf16_seconds_ratio(device: str = "cpu") -> float:
    """Time of a matrix product in bf16 divided by its time in fp32, measured once per process and device."""
    import torch

    rows, width = CPU_PRODUCT if torch.device(device).type == "cpu" else GPU_PRODUCT
    fp32 = product_seconds(torch.float32, device, rows, width)
    return product_seconds(torch.bfloat16, device, rows, width) / fp32


def fastest_precision(device: str = "cpu") -> Literal["bf16", "fp32"]:
    """bf16 if a matrix product is at least as fast in it as in fp32."""
    return "bf16" if bf16_seconds_ratio(device) <= 1 else "fp32"


def bf16_warning(device: str = "cpu") -> str | None:
    """A line that says how much slower bf16 is than fp32, or None if it is not emulated."""
    ratio = bf16_seconds_ratio(device)
    if ratio < EMULATED:
        return None
    return f"bf16 is emulated here: a product takes {ratio:.0f} times as long as in fp32"


def threads_warning(device: str = "cpu") -> str | None:
    """A line about the number of threads, or None if it is fine.

    There are two reasons to warn: OMP_NUM_THREADS is below the number of cores (torchrun and DeepSpeed set it to 1), or
    half the threads are faster at present, because another process uses the cores; that is measured by timing.
    """
    import torch

    if device != "cpu":
        return None
    threads, cores = torch.get_num_threads(), available_cores()
    if threads < cores and "OMP_NUM_THREADS" in os.environ:  # if unset, torch chose, such as one per physical core
        return f"threads: {threads} in each process (OMP_NUM_THREADS={threads}), on {cores} cores"
    half = threads // 2
    if half == 0:
        return None
    try:
        seconds = product_seconds(torch.float32, device, *THREADS_PRODUCT)
        torch.set_num_threads(half)
        fewer_seconds = product_seconds(torch.float32, device, *THREADS_PRODUCT)
    finally:
        torch.set_num_threads(threads)
    if fewer_seconds > BUSY * seconds:
        return None
    return (
        f"threads: {threads}, and {half} would be faster while another process uses the cores (OMP_NUM_THREADS={half})"
    )


def available_cores() -> int:
    """Number of logical cores that this process may use (its CPU affinity); hyper-threads count."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
