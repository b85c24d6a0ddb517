"""sft.py --predict from end to end: two models side by side, and a judge, each run in a process of its own."""

import json
import re

import pytest

from .evaluation.predictions_page import page_data
from .scripted_endpoint import serve
from .workplace import Workplace


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("work"))


def test_two_models_and_a_judge(work):
    held = ("--predict", "held.json", "--max_new_tokens", 8)
    before = ("sft.py", "--model_name_or_path", "model", "--template", "io", *held, "--output_dir", "before")
    assert work.good(*before).splitlines()[-1] == "before/predictions.html: open it in a browser"

    after = ("sft.py", "--model_name_or_path", "model", *held, "--output_dir", "after", "--compare_with", "before")
    with serve(lambda number, body: "Score: 40" if "windday" in body["messages"][0]["content"] else "60/100") as server:
        judge = ("--judge_api_base", server.url, "--judge_model", "j-1")
        environment = {"OPENAI_API_KEY": "sk-1", "NO_PROXY": "127.0.0.1"}
        out = work.good(*after, *judge, **environment)
        assert "after/judgements.jsonl: j-1 marks: mean 55.0 of 100\n" in out
        assert "already exists, and is kept" in work.good(*after, *judge, **environment)
    assert len(server.bodies) == 4  # an answer each, and none of them twice
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer sk-1"}
    scores = json.loads((work.folder / "after" / "scores.json").read_text())
    assert scores["judge"] == {"model": "j-1", "mean": 55.0, "unreadable": 0}
    data = page_data(work.folder / "after" / "predictions.html")
    assert [run["folder"] for run in data["runs"]] == ["after", "before"]
    assert [row["answers"][0]["mark"] for row in data["rows"]] == [40, 60, 60, 60]


def test_lighter_weights_have_a_name_of_their_own(work):
    """Answers in another precision are those of another model: they are not taken for the ones that are there."""
    held = ("sft.py", "--model_name_or_path", "model", "--predict", "held.json", "--max_new_tokens", 8)
    to = ("--output_dir", "int8")
    assert "int8/predictions.html" in work.good(*held, "--quantize", "int8", *to)
    assert json.loads((work.folder / "int8" / "scores.json").read_text())["model"] == "model in int8"
    compared = work(*held, *to, "--compare_with", "int8")
    assert (compared.code, compared.err) == (
        1,
        "error: int8/predictions.jsonl: has answers of model in int8; give another --output_dir for those of model\n",
    )


def test_a_deepspeed_file_does_not_say_how_to_answer(work):
    """Nothing but --precision auto chooses: once the file had taken its place, and answers came in fp32 anyway."""
    (work.folder / "ds.json").write_text('{"bf16": {"enabled": true}}')
    line = "--predict held.json --max_new_tokens 2 --precision auto --deepspeed ds.json --output_dir auto"
    out = work.good("sft.py", "--model_name_or_path", "model", *line.split())
    assert "ds.json" not in out
    assert re.search("^precision: (bf16|fp32), a product takes", out, re.MULTILINE)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--predict held.json --judge_model j", "--judge_api_base and --judge_model say where the judge is and who"),
        ("--data held.json --compare_with before", "--compare_with and --judge_model go with --predict"),
        ("--predict held.json --fp16", "--fp16 is for training; --predict runs in --precision fp32, bf16 or auto"),
        ("--predict held.json --precision fp16", "--fp16 is for training; --predict runs in --precision fp32"),
        ("--predict held.json --max_new_tokens 0", "--max_new_tokens must be at least 1, got 0"),
    ],
)
def test_flags_that_do_not_go_together(work, line, message):
    code, found = work.bad("sft.py", "--model_name_or_path", "model", *line.split())
    assert (code, found[: len(message)]) == (2, message)


def test_a_judge_without_an_address_is_refused_before_anything_is_answered(work):
    judge = ("--judge_api_base", "localhost:8000/v1", "--judge_model", "j")
    message = "'localhost:8000/v1' is not a server URL, such as http://127.0.0.1:8000/v1"
    found = work.bad("sft.py", "--model_name_or_path", "model", "--predict", "held.json", "--output_dir", "no", *judge)
    assert found == (1, message)
    assert not (work.folder / "no").exists()
