"""The demonstration: its recipes begin to train, and what it says of the tasks that its model wrote.

The rest of it is `make demo`.
"""

import importlib.util
import json
import math

import pytest

from minigpt.assets import demo_tasks, facts

from .workplace import ROOT, Workplace

DEMO = ROOT / "examples" / "demo.py"


def test_its_recipes_train_on_this_cpu(tmp_path):
    """Two steps of each, on a few lines: the precision and the kernels are those that the demonstration would take."""
    work = Workplace(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    short = ("--max_steps", 2, "--warmup_steps", 0, "--per_device_train_batch_size", 2, "--eval_samples", 0)
    pretraining = ("--config", "configs/demo_train.yaml", "--data", "corpus.txt", "--output_dir", "pretrained")
    work.good("train.py", *pretraining, *short[:6], "--sample_tokens", 0)
    tuning = ("--config", "configs/demo_sft.yaml", "--data", "train.json", "--output_dir", "tuned")
    replay = ("--model_name_or_path", "pretrained/export", "--replay_data", "corpus.txt", "--template", "alpaca-short")
    work.good("sft.py", *tuning, *replay, *short)
    for run, chance in (("pretrained", math.log(4096)), ("tuned", None)):
        first, last = work.losses(run)
        assert first == pytest.approx(chance, rel=0.02) if chance else last < first


def test_only_tasks_that_stand_nowhere_count_as_new(tmp_path, capsys):
    """A model that recites its corpus must not pass for one that writes tasks, and a new task need not be right."""
    spec = importlib.util.spec_from_file_location("demo", DEMO)
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
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
