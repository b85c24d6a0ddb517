"""Choosing precision and threads, with faked timings."""

import ast
import os
import subprocess
import sys

import pytest
import torch

from minigpt import hardware

SECONDS = {torch.float32: 0.002, torch.bfloat16: 0.3}


@pytest.fixture
def seconds(monkeypatch):
    """Fake seconds per product, by dtype or by number of threads; tests modify it."""
    table = dict(SECONDS)
    monkeypatch.setattr(
        hardware, "product_seconds", lambda dtype, *_, **__: table.get(torch.get_num_threads(), table[dtype])
    )
    hardware.bf16_seconds_ratio.cache_clear()
    yield table
    hardware.bf16_seconds_ratio.cache_clear()


def test_product_seconds_grows_with_the_rows():
    small, large = (hardware.product_seconds(torch.float32, "cpu", rows, width=256) for rows in (1, 1024))
    assert 0 < small < large


def test_bf16_warning_gives_the_slowdown(seconds):
    assert hardware.bf16_warning() == "bf16 is emulated here: a product takes 150 times as long as in fp32"
    hardware.bf16_seconds_ratio.cache_clear()
    seconds[torch.bfloat16] = 0.001
    assert hardware.bf16_warning() is None


def test_gpu_times_a_product_large_enough_to_outlast_its_launch(monkeypatch):
    """256 x 512 x 512 takes a GPU a few microseconds in either precision, so noise would decide."""
    shapes = []
    monkeypatch.setattr(hardware, "product_seconds", lambda dtype, device, *shape: shapes.append(shape) or 1.0)
    hardware.bf16_seconds_ratio.__wrapped__("cuda:0")
    hardware.bf16_seconds_ratio.__wrapped__("cpu")
    assert shapes == [hardware.GPU_PRODUCT] * 2 + [hardware.CPU_PRODUCT] * 2


@pytest.mark.parametrize(
    ("threads", "limited", "cores", "halved", "message"),
    [
        (1, True, 2, None, "threads: 1 in each process (OMP_NUM_THREADS=1), on 2 cores"),
        (1, False, 2, None, None),  # hyper-threading: torch starts one thread per physical core
        (1, True, 1, None, None),
        (4, False, 4, 0.003, None),  # an idle machine
        (
            *(4, False, 4, 0.001),
            "threads: 4, and 2 would be faster while another process uses the cores (OMP_NUM_THREADS=2)",
        ),
    ],
)
def test_threads_warning(monkeypatch, seconds, threads, limited, cores, halved, message):
    monkeypatch.setattr(hardware, "available_cores", lambda: cores)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if limited:
        monkeypatch.setenv("OMP_NUM_THREADS", str(threads))
    before = torch.get_num_threads()
    if halved is not None:
        seconds[threads // 2] = halved
    torch.set_num_threads(threads)
    try:
        assert hardware.threads_warning("cpu") == message
        assert torch.get_num_threads() == threads
        assert hardware.threads_warning("cuda:0") is None
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "5000"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
        ({"GOMP_SPINCOUNT": "9"}, {"GOMP_SPINCOUNT": "9"}),
    ],
    ids=["unset", "user sets OMP_WAIT_POLICY", "user sets GOMP_SPINCOUNT"],
)
def test_set_thread_waiting_changes_the_environment_and_an_import_does_not(given, expected):
    """Spinning for a thread that has no core of its own makes a step take eight times as long."""
    environment = {name: value for name, value in os.environ.items() if name not in hardware.WAITING} | given
    script = "import os, minigpt, {}; print({{n: v for n, v in os.environ.items() if n in h.WAITING}})"
    for imported, variables in (
        ("minigpt.hardware as h", given),
        ("minigpt.hardware as h; h.set_thread_waiting()", expected),
    ):
        done = subprocess.run(
            [sys.executable, "-c", script.format(imported)], env=environment, check=True, capture_output=True, text=True
        )
        assert ast.literal_eval(done.stdout) == variables
