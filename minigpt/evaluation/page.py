"""Predictions as an HTML page: questions, references, and the answers of one or two models side by side.

The page is a single file without external resources: it opens from disk and can be sent by mail.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from minigpt.files import read_json, whole_file, writing_to

PREDICTIONS, SCORES, PAGE = "predictions.jsonl", "scores.json", "predictions.html"

Line = dict[str, Any]


class PredictionRun(NamedTuple):
    """The files that `sft.py --predict` writes into a folder."""

    name: str
    """The name of the model."""
    folder: Path
    predictions: list[Line]
    """The lines of predictions.jsonl."""
    scores: dict[str, Any]
    """The content of scores.json."""


def read_predictions(folder: Path) -> PredictionRun:
    """Reads the predictions and scores in a folder.

    Raises:
        FileNotFoundError: the folder has none.
        ValueError: a file is not what `sft.py --predict` writes; names the file and the line.
    """
    file = folder / PREDICTIONS
    if not file.is_file() or not (folder / SCORES).is_file():
        raise FileNotFoundError(f"{folder}: no {PREDICTIONS} and {SCORES}, which sft.py --predict writes")
    scores = read_json(folder / SCORES)
    names = ("answers", "exact_match", "rouge_l", "stop_rate")
    if missing := [name for name in names if not _is_number(scores, name)]:
        raise ValueError(f"{folder / SCORES}: {missing[0]} is missing; run --predict again with --overwrite_output_dir")
    predictions = []
    for number, line in enumerate(file.read_text(encoding="utf-8").removesuffix("\n").split("\n"), 1):
        try:
            prediction = json.loads(line)
            texts = [prediction["reference"], prediction["prediction"], *(m["content"] for m in prediction["prompt"])]
            if not (all(isinstance(text, str) for text in texts) and _is_number(prediction, "rouge_l")):
                raise TypeError
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{file}:{number}: not a prediction; run --predict again with --overwrite_output_dir"
            ) from error
        predictions.append(prediction)
    return PredictionRun(str(scores.get("model", folder.name)), folder, predictions, scores)


def write_predictions(run: PredictionRun, source: str, others: Sequence[PredictionRun] = ()) -> None:
    """Writes predictions.jsonl, scores.json and the page, which also shows the answers of `others`."""
    lines = [json.dumps(line, ensure_ascii=False) + "\n" for line in run.predictions]
    contents = {PREDICTIONS: "".join(lines), SCORES: json.dumps(run.scores, ensure_ascii=False) + "\n"}
    with writing_to(run.folder, "--output_dir"):
        for name, content in contents.items():
            with whole_file(run.folder / name) as temporary:
                temporary.write_text(content, encoding="utf-8")
        write_page(run.folder / PAGE, source, [run, *others])


def check_questions(run: PredictionRun, questions: Sequence[tuple[list[Line], str]], source: str) -> None:
    """Raises an error if a run answered other questions than these (prompt, reference) pairs.

    Raises:
        ValueError: names the first line that differs.
    """
    file = run.folder / PREDICTIONS
    for number, (prediction, question) in enumerate(zip(run.predictions, questions), 1):
        if (prediction["prompt"], prediction["reference"]) != question:
            raise ValueError(f"{file}:{number}: not the question that {source} has there")
    if len(run.predictions) != len(questions):
        raise ValueError(f"{file}: has {len(run.predictions):,} answers, but {source} has {len(questions):,} questions")


def write_page(file: Path, source: str, runs: Sequence[PredictionRun]) -> None:
    """Writes the page of one or two runs on the same questions. Filters and ordering use the first run.

    Args:
        source: the file that the questions were read from.
    """
    answer_fields = ("prediction", "stopped", "exact_match", "rouge_l", "mark")
    rows = [
        {
            "prompt": lines[0]["prompt"],
            "reference": lines[0]["reference"],
            "answers": [{name: line[name] for name in answer_fields if name in line} for line in lines],
        }
        for lines in zip(*(run.predictions for run in runs), strict=True)
    ]
    models = [{"name": run.name, "folder": str(run.folder), "scores": run.scores} for run in runs]
    content = json.dumps({"source": source, "runs": models, "rows": rows}, ensure_ascii=False)
    # "<" is escaped, because "</script>" in an answer would end the data and turn what follows into markup.
    page = (
        Path(__file__).with_name(PAGE).read_text(encoding="utf-8").replace("{{data}}", content.replace("<", "\\u003c"))
    )
    with whole_file(file) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _is_number(line: Line, name: str) -> bool:
    return isinstance(line.get(name), int | float)
