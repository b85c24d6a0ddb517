"""Batch folders for the report's tests, as bootstrap leaves them."""

import json
import random
from collections import Counter
from pathlib import Path

from minigpt.selfinstruct.filters import NAMES

EVIL = [
    ("Write a page with </script><script>document.title = 'broken'</script>.", "<img src=x onerror=\"fail('input')\">"),
    ('Explain <!-- comments --> & <b>bold</b> &amp; "quotes" in it.', "</textarea></td></table><svg onload=fail(1)>"),
    ("Translate the words \u2028 and \ud800 into Latin.", "\ud83d"),  # a line separator, and half of an emoji twice
    ("Schreibe ein Gedicht über 雪 und ☃.", "مرحبا"),
]


def task(instruction, verdict="kept", score=0.25, text="", output="Done.", nearest=None):
    columns = {"instruction": instruction, "input": text, "output": output}
    return {**columns, "verdict": verdict, "score": score, "nearest": nearest}


def some_tasks(count, seed=0):
    """Tasks of many lengths, three in four kept."""
    draw = random.Random(seed)
    things = ("poem", "story", "letter", "recipe", "joke", "plan")
    for number in range(count):
        verb = draw.choice(("Write", "Write", "Write", "Describe", "Invent", "Explain"))
        instruction = f"{verb} a {draw.choice(things)} about {'very ' * draw.randrange(9)}old things, number {number}."
        made = task(instruction, score=round(draw.random() * 0.6, 4), output="word " * draw.randrange(1, 300))
        made["input"] = "An input." * draw.randrange(2)
        if number % 4 == 3:
            name = draw.choice(NAMES)
            made |= {"verdict": name, "score": None}
            if name == "novelty":
                made |= {"score": 0.7 + 0.3 * draw.random(), "nearest": "Write a poem about rain."}
        yield made


def make_run(folder: Path, tasks, seeds=("Write a poem about rain.", "Name a river."), ended="target") -> Path:
    """A batch folder as bootstrap leaves it: three tasks a request, the nearest one the kept task before, or a seed."""
    folder.mkdir(exist_ok=True)
    tasks, kept, requests, pool = list(tasks), [], [], list(seeds)
    for start in range(0, len(tasks), 3):
        found = tasks[start : start + 3]
        for one in found:
            if one["verdict"] == "kept":
                near = {text: one["score"] * (1 - rank / 10) for rank, text in enumerate(pool[:-11:-1])}
                pool.append(one["instruction"])
                columns = {key: one[key] for key in ("instruction", "input", "output")}
                more = {"avg_similarity_score": 0.1, "request_idx": len(requests)}
                kept.append({**columns, "most_similar_instructions": near, **more})
        completions = [{"text": "...", "finished": True}]
        requests.append(
            {
                "request_idx": len(requests),
                "seed": 1,
                "shots": [],
                "prompt": "",
                "completions": completions,
                "tasks": found,
            }
        )
    counts = Counter(one["verdict"] for one in tasks)
    statistics = {
        **{"requests": len(requests), "completions": len(requests), "tasks": len(tasks), "kept": counts["kept"]},
        "acceptance_rate": counts["kept"] / max(1, len(tasks)),
        "rejected": {name: counts[name] for name in NAMES},
        "ended": ended,
    }
    write_lines(folder / "machine_generated_instructions.jsonl", kept)
    write_lines(folder / "requests.jsonl", requests)
    instances = [{"input": "", "output": "x"}]
    write_lines(folder / "seed_tasks.jsonl", [{"instruction": seed, "instances": instances} for seed in seeds])
    (folder / "statistics.json").write_text(json.dumps(statistics))
    return folder


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def kept_of(folder):
    return [json.loads(line) for line in (folder / "machine_generated_instructions.jsonl").read_text().splitlines()]
