"""Run folders for the tests of the report, in the format of a bootstrap."""

import json
import random
from collections import Counter
from pathlib import Path

from minigpt.selfinstruct.filters import NAMES

HOSTILE_TASKS = [
    ("Write a page with </script><script>document.title = 'broken'</script>.", "<img src=x onerror=\"fail('input')\">"),
    ('Explain <!-- comments --> & <b>bold</b> &amp; "quotes" in it.', "</textarea></td></table><svg onload=fail(1)>"),
    ("Translate the words \u2028 and \ud800 into Latin.", "\ud83d"),  # a line separator, and lone surrogates
    ("Schreibe ein Gedicht über 雪 und ☃.", "مرحبا"),
]


def task(instruction, verdict="kept", score=0.25, text="", output="Done.", nearest=None):
    columns = {"instruction": instruction, "input": text, "output": output}
    return {**columns, "verdict": verdict, "score": score, "nearest": nearest}


def some_tasks(count, seed=0):
    """Tasks of many lengths, three in four kept."""
    draw = random.Random(seed)
    nouns = ("poem", "story", "letter", "recipe", "joke", "plan")
    for number in range(count):
        verb = draw.choice(("Write", "Write", "Write", "Describe", "Invent", "Explain"))
        instruction = f"{verb} a {draw.choice(nouns)} about {'very ' * draw.randrange(9)}old things, number {number}."
        values = task(instruction, score=round(draw.random() * 0.6, 4), output="word " * draw.randrange(1, 300))
        values["input"] = "An input." * draw.randrange(2)
        if number % 4 == 3:
            name = draw.choice(NAMES)
            values |= {"verdict": name, "score": None}
            if name == "novelty":
                values |= {"score": 0.7 + 0.3 * draw.random(), "nearest": "Write a poem about rain."}
        yield values


def make_run(folder: Path, tasks, seeds=("Write a poem about rain.", "Name a river."), ended="target") -> Path:
    """Three tasks per request; the nearest neighbour is the previous kept task, or a seed task."""
    folder.mkdir(exist_ok=True)
    tasks, kept, requests, pool = list(tasks), [], [], list(seeds)
    for start in range(0, len(tasks), 3):
        request_tasks = tasks[start : start + 3]
        for values in request_tasks:
            if values["verdict"] == "kept":
                neighbours = {text: values["score"] * (1 - rank / 10) for rank, text in enumerate(pool[:-11:-1])}
                pool.append(values["instruction"])
                columns = {key: values[key] for key in ("instruction", "input", "output")}
                more = {"avg_similarity_score": 0.1, "request_idx": len(requests)}
                kept.append({**columns, "most_similar_instructions": neighbours, **more})
        completions = [{"text": "...", "finished": True}]
        requests.append(
            {
                "request_idx": len(requests),
                "seed": 1,
                "shots": [],
                "prompt": "",
                "completions": completions,
                "tasks": request_tasks,
            }
        )
    counts = Counter(values["verdict"] for values in tasks)
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


def read_kept(folder):
    return [json.loads(line) for line in (folder / "machine_generated_instructions.jsonl").read_text().splitlines()]
