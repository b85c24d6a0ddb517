"""Answers side by side: one page of questions, references and what one or two models said.

The page is one file without anything from elsewhere: it opens from a disk, and travels by mail.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from minigpt.files import read_json, whole_file, writing_to

PREDICTIONS, SCORES, PAGE = "predictions.jsonl", "scores.json", "predictions.html"

Line = dict[str, Any]


class Run(NamedTuple):
    """What `sft.py --predict` writes into a folder."""

    name: str
    """Of the model."""
    folder: Path
    predictions: list[Line]
    """The lines of predictions.jsonl."""
    scores: dict[str, Any]
    """scores.json."""


def read_run(folder: Path) -> Run:
    """The answers and scores in a folder.

    Raises:
        FileNotFoundError: there are none.
        ValueError: a file is not what `sft.py --predict` writes, named with its line.
    """
    file = folder / PREDICTIONS
    if not file.is_file() or not (folder / SCORES).is_file():
        raise FileNotFoundError(f"{folder}: no {PREDICTIONS} and {SCORES}, which sft.py --predict writes")
    scores = read_json(folder / SCORES)
    if wrong := [name for name in ("answers", "exact_match", "rouge_l", "stop_rate") if not _is_number(scores, name)]:
        raise ValueError(f"{folder / SCORES}: {wrong[0]} is missing; answer the questions anew")
    predictions = []
    for number, line in enumerate(file.read_text(encoding="utf-8").removesuffix("\n").split("\n"), 1):
        try:
            prediction = json.loads(line)
            texts = [prediction["reference"], prediction["prediction"], *(m["content"] for m in prediction["prompt"])]
            if not (all(isinstance(text, str) for text in texts) and _is_number(prediction, "rouge_l")):
                raise TypeError
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file}:{number}: no prediction; answer the questions anew") from error
        predictions.append(prediction)
    return Run(str(scores.get("model", folder.name)), folder, predictions, scores)


def write_run(run: Run, source: str, others: Sequence[Run] = ()) -> None:
    """Writes a run's three files, the page with the others' answers beside its own."""
    lines = [json.dumps(line, ensure_ascii=False) + "\n" for line in run.predictions]
    contents = {PREDICTIONS: "".join(lines), SCORES: json.dumps(run.scores, ensure_ascii=False) + "\n"}
    with writing_to(run.folder, "--output_dir"):
        for name, content in contents.items():
            with whole_file(run.folder / name) as temporary:
                temporary.write_text(content, encoding="utf-8")
        write_page(run.folder / PAGE, source, [run, *others])


def check_questions(run: Run, questions: Sequence[tuple[list[Line], str]], source: str) -> None:
    """Refuses a run that answered other questions than these prompts and references.

    Raises:
        ValueError: names the first line that differs.
    """
    file = run.folder / PREDICTIONS
    for number, (prediction, question) in enumerate(zip(run.predictions, questions), 1):
        if (prediction["prompt"], prediction["reference"]) != question:
            raise ValueError(f"{file}:{number}: the answer to another question than {source} asks there")
    if len(run.predictions) != len(questions):
        raise ValueError(f"{file}: answers {len(run.predictions):,} questions; {source} has {len(questions):,}")


def write_page(file: Path, source: str, runs: Sequence[Run]) -> None:
    """Writes the page of one or two runs on the same questions; the first is the one that is filtered and ordered by.

    Args:
        source: what the questions come from.
    """
    answer_of = ("prediction", "stopped", "exact_match", "rouge_l", "mark")
    rows = [
        {
            "prompt": own[0]["prompt"],
            "reference": own[0]["reference"],
            "answers": [{name: line[name] for name in answer_of if name in line} for line in own],
        }
        for own in zip(*(run.predictions for run in runs), strict=True)
    ]
    models = [{"name": run.name, "folder": str(run.folder), "scores": run.scores} for run in runs]
    content = json.dumps({"source": source, "runs": models, "rows": rows}, ensure_ascii=False)
    # A "<" begins no tag, or "</script>" in an answer would end the data and become part of the page.
    page = (
        Path(__file__).with_name(PAGE).read_text(encoding="utf-8").replace("{{data}}", content.replace("<", "\\u003c"))
    )
    with whole_file(file) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _is_number(line: Line, name: str) -> bool:
    return isinstance(line.get(name), int | float)
