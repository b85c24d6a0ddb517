"""What the demonstration says of the tasks that its model wrote; the rest of it is `make demo`."""

import importlib.util
import json
from pathlib import Path

from minigpt.assets import demo_tasks, facts

DEMO = Path(__file__).parents[1] / "examples" / "demo.py"


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
