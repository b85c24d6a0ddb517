"""The demonstration: what it promises, its recipes begin to train, and what it says of its model's tasks.

The rest of it is `make demo`.
"""

import importlib.util
import json
import math
import re
import sys
import time

import demo_tasks
import facts
import pytest
import torch
import yaml

from minigpt.training.objectives import Loss

from ...workplace import ROOT, Workplace

DEMO = ROOT / "examples" / "demo" / "demo.py"


class FakeEngine:
    """Computes nothing: bf16 is slow on a CPU that emulates it."""

    def __call__(self, batch):
        time.sleep(0.1)
        return Loss(1.0, {})

    def backward(self, loss, last): ...

    def step(self, lr): ...


@pytest.fixture
def demo(monkeypatch):
    spec = importlib.util.spec_from_file_location("demo", DEMO)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "demo", module)  # where its dataclasses look for their module
    spec.loader.exec_module(module)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(module, "pick_device", lambda: "cpu")
    monkeypatch.setattr(module, "fastest_precision", lambda device: "fp32")
    return module


def test_its_recipes_train_on_this_cpu(tmp_path):
    """A few steps of each, on a few lines, in the precision and with the kernels that the demonstration takes."""
    work = Workplace(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    short = ("--max_steps", 8, "--warmup_steps", 0, "--per_device_train_batch_size", 2, "--eval_samples", 0)
    pretraining = ("--config", "configs/demo_train.yaml", "--data", "corpus.txt", "--output_dir", "pretrained")
    work.good("train.py", *pretraining, *short[:6], "--sample_tokens", 0)
    tuning = ("--config", "configs/demo_sft.yaml", "--data", "train.json", "--output_dir", "tuned")
    replay = ("--model_name_or_path", "pretrained/export", "--replay_data", "corpus.txt", "--template", "alpaca-short")
    work.good("sft.py", *tuning, *replay, *short)
    assert work.losses("pretrained")[0] == pytest.approx(math.log(4096), rel=0.05)
    for run in ("pretrained", "tuned"):
        losses = work.losses(run)
        assert len(losses) == 8
        assert min(losses[-3:]) < losses[0]


def test_only_tasks_that_stand_nowhere_count_as_new(demo, tmp_path, capsys):
    """A model that recites its corpus must not pass for one that writes tasks, and a new task need not be right."""
    facts.build(tmp_path, 1)
    demo_tasks.build(tmp_path, 1)
    split = facts.split_facts(1)
    lists, seeds = demo_tasks.task_lists(split, 1), demo_tasks.seed_tasks(split, 1)
    china = next(fact for fact in split.held_out if fact.key == "China")
    row = json.loads((tmp_path / "instructions.json").read_text("utf-8"))[0]
    recited = [lists[0][0], lists[0][-1], seeds[0]]
    written = [
        {"instruction": row["instruction"], "output": row["output"]},
        *({"instruction": task.instruction, "output": task.output} for task in recited),
        {"instruction": "Find the capital of China.", "output": china.statement},
        {"instruction": "Look up the capital of China.", "output": "The capital of China is Lima."},
        {"instruction": "Look up the sum of 1 and 1.", "output": "The sum of 1 and 1 is 2."},
    ]
    assert demo.show_new_tasks(written, tmp_path) == 3
    said = capsys.readouterr().out
    assert "3 of the 7 kept tasks stand in nothing" in said
    assert "2 of these are rightly asked and answered, 1 about a fact that nobody had asked for" in said
    assert "Find the capital of China.\n    The capital of China is Beijing.  (right)" in said
    assert "The capital of China is Lima.  (wrong)" in said


def test_it_says_how_long_it_takes_here(demo, capsys, monkeypatch):
    monkeypatch.setattr(demo, "LONG", 1e9)
    demo.announce()
    said = re.fullmatch(
        r"About (\d+):(\d\d):(\d\d) on this machine, in fp32 on (\d+) of \d+ cores: a step takes ([\d,]+) ms.\n",
        capsys.readouterr().out,
    )
    assert said is not None
    max_steps = yaml.safe_load((ROOT / "configs" / "demo_train.yaml").read_text(encoding="utf-8"))["max_steps"]
    hours, minutes, seconds, threads, milliseconds = (int(text.replace(",", "")) for text in said.groups())
    assert threads == torch.get_num_threads()
    assert 3600 * hours + 60 * minutes + seconds == pytest.approx(
        (max_steps + demo.OTHER_STEPS) * milliseconds / 1000, rel=0.1, abs=2
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
