"""examples/demo.py: what it promises at its start. The demonstration itself is `make demo`."""

import importlib.util
import re
import time

import pytest
import torch

from .workplace import ROOT


class FakeEngine:
    """Computes nothing: bf16 is slow on a CPU that emulates it."""

    def __call__(self, batch):
        time.sleep(0.1)
        return 1.0, 1

    def backward(self, loss, last): ...

    def step(self, lr): ...


@pytest.fixture
def demo(monkeypatch):
    spec = importlib.util.spec_from_file_location("demo", ROOT / "examples" / "demo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, "demo", module)  # where its dataclasses look for their module
    spec.loader.exec_module(module)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(module, "pick_device", lambda: "cpu")
    monkeypatch.setattr(module, "fastest_precision", lambda device: "fp32")
    return module


def test_it_says_how_long_it_takes_here(demo, capsys, monkeypatch):
    monkeypatch.setattr(demo, "LONG", 1e9)
    demo.announce()
    said = re.fullmatch(
        r"About (\d+):(\d\d):(\d\d) on this machine, in fp32 on (\d+) of \d+ cores: a step takes ([\d,]+) ms.\n",
        capsys.readouterr().out,
    )
    assert said is not None
    hours, minutes, seconds, threads, milliseconds = (int(text.replace(",", "")) for text in said.groups())
    assert threads == torch.get_num_threads()
    assert 3600 * hours + 60 * minutes + seconds == pytest.approx(
        demo.STEPS_WORTH * milliseconds / 1000, rel=0.1, abs=2
    )


def test_a_long_one_says_why_and_what_helps(demo, capsys, monkeypatch):
    monkeypatch.setattr(demo, "LONG", 0)
    monkeypatch.setattr(demo.os, "getloadavg", lambda: (7.25, 0.0, 0.0))
    monkeypatch.setattr(demo, "available_cores", lambda: 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    demo.announce()
    assert capsys.readouterr().out.splitlines()[1:] == [
        "It takes long because",
        "  other processes use the cores (load 7.2): end them",
        "  one thread computes: OMP_NUM_THREADS=4 uses all cores",
        "  this CPU has no fast bf16: one with AVX512-BF16 or AMX takes half the time",
    ]


def test_a_long_one_without_a_known_reason(demo, capsys, monkeypatch):
    """Quiet, all threads, bf16: the list of reasons was empty."""
    monkeypatch.setattr(demo, "LONG", 0)
    monkeypatch.setattr(demo.os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    monkeypatch.setattr(demo, "available_cores", lambda: 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(demo, "fastest_precision", lambda device: "bf16")
    monkeypatch.setattr("minigpt.make_engine", lambda model, config: FakeEngine())
    demo.announce()
    assert capsys.readouterr().out.splitlines()[1:] == ["It takes long because", "  these cores are slow"]
