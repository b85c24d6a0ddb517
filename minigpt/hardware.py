"""What this machine computes fast: which precision, with how many threads.

bf16 doubles the speed if the processor has instructions for it, and takes a hundred times as long if it is emulated
(any x86 CPU without AVX512-BF16 or AMX). The CPU's flags do not decide it, because oneDNN may be told not to use them.
So there is no table of processors here: a small product is timed.
"""

import os
import time
from functools import cache
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

# How OpenMP's threads wait: OMP_WAIT_POLICY is the standard's variable, GOMP_SPINCOUNT that of GNU's library, which
# torch's wheels for Linux contain. 5,000 rounds are about 0.1 ms: between two products of a training step or a token
# threads stay awake, but they do not hold a core that another process needs (figures: benchmarks/LOG.md).
WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "5000"}
TIMING_SECONDS = 0.1  # for each kind of product
CPU_PRODUCT = 256, 512  # rows, width
GPU_PRODUCT = 2048, 2048  # smaller ones take as long as their launch, in every precision
EMULATED = 1.5  # times as long as fp32; a little above 1, bf16 may still pay, because it halves the bytes
THREADS_PRODUCT = 704, 512  # a step of the demo has 704 rows
BUSY = 0.8  # of the time of all threads: below it, half of them are faster by more than noise


def set_thread_waiting() -> None:
    """Makes OpenMP's threads sleep while they wait for one another, unless the user chose; before torch is imported.

    By default they spin: a step of two threads takes many times as long once another process computes on one of the
    cores (`benchmarks/busy.py`). Scripts, examples and benchmarks call this; `import minigpt` does not, because a
    library must not change its host's process.
    """
    if not any(name in os.environ for name in (*WAITING, "KMP_BLOCKTIME")):
        os.environ.update(WAITING)


def product_seconds(dtype: "torch.dtype", device: str, rows: int, width: int) -> float:
    """Mean seconds of a (rows,width) x (width,width) product, over about `TIMING_SECONDS`."""
    import torch

    device_type = torch.device(device).type
    x = torch.ones(rows, width, dtype=dtype, device=device)
    weight = torch.ones(width, width, dtype=dtype, device=device)

    def multiply() -> None:
        x @ weight
        if device_type != "cpu":
            getattr(torch, device_type).synchronize()

    with torch.no_grad():
        multiply()  # the first one prepares the kernel
        count, seconds, start = 0, 0.0, time.perf_counter()
        while count == 0 or seconds < TIMING_SECONDS:
            multiply()
            count, seconds = count + 1, time.perf_counter() - start
    return seconds / count


@cache
def bf16_seconds_ratio(device: str = "cpu") -> float:
    """How many times as long a product takes in bf16 as in fp32, on this machine and now."""
    import torch

    rows, width = CPU_PRODUCT if torch.device(device).type == "cpu" else GPU_PRODUCT
    fp32 = product_seconds(torch.float32, device, rows, width)
    return product_seconds(torch.bfloat16, device, rows, width) / fp32


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
    """A line that says how many threads compute, if OMP_NUM_THREADS holds them below the cores (torchrun and DeepSpeed
    set it to 1), or if fewer would be faster now.

    The latter is so while another process uses the cores; two products are timed to see it.
    """
    import torch

    if device != "cpu":
        return None
    threads, cores = torch.get_num_threads(), available_cores()
    if threads < cores and "OMP_NUM_THREADS" in os.environ:  # else torch chose, such as one for each physical core
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
    """The cores that this process may use; of a core with two hardware threads, both count."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
