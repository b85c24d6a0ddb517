"""Predictions and scores, with a model that has memorized eight answers."""

import json

import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer

from minigpt.api_client import ApiError
from minigpt.data.prompts import get_template
from minigpt.data.read.records import Conversation
from minigpt.evaluation import predict as predicting
from minigpt.evaluation.judge import Judge
from minigpt.evaluation.page import read_predictions
from minigpt.evaluation.predict import Scores, predict, predict_file, score
from minigpt.inference.packed import for_generation
from minigpt.model.gpt2 import GPT, GPTConfig

from ..inference.memorized_data import ALPACA, CONVERSATIONS, MESSAGES, ROWS, TEMPLATE
from ..scripted_endpoint import serve
from .predictions_page import page_data


def answers(model, tokenizer, conversations=CONVERSATIONS, **settings):
    return predict(model, tokenizer, TEMPLATE, conversations, **{"max_new_tokens": 24, "batch_size": 3, **settings})


def test_a_memorized_dataset_is_answered_exactly(memorized, tokenizer):
    predictions = answers(memorized, tokenizer)
    assert [p.prediction for p in predictions] == [row[2] for row in ROWS]  # in the order of the data
    assert [p.prompt for p in predictions] == [messages[:-1] for messages in MESSAGES]
    assert all(p.stopped and p.exact_match and p.rouge_l == 1.0 for p in predictions)
    assert score(predictions) == Scores(answers=8, exact_match=1.0, rouge_l=1.0, stop_rate=1.0)


@pytest.mark.parametrize("batch_size", [1, 8, 100])
def test_the_batch_size_changes_nothing(memorized, tokenizer, batch_size):
    assert answers(memorized, tokenizer, batch_size=batch_size) == answers(memorized, tokenizer)


def test_rouge_l_of_partly_correct_answers(memorized, tokenizer):
    references = [
        "The capital of Sweden is Paris.",
        "Oslo.",
        "the plural is MICE",
        "colder",
        " \ndown\n",
        "5",
        "",
        "a t",
    ]
    conversations = [
        Conversation([messages[0], {"role": "assistant", "content": reference}])
        for messages, reference in zip(MESSAGES, references, strict=True)
    ]
    predictions = answers(memorized, tokenizer, conversations)
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    expected = [
        scorer.score(reference, row[2])["rougeL"].fmeasure for reference, row in zip(references, ROWS, strict=True)
    ]
    assert [p.rouge_l for p in predictions] == expected
    assert predictions[0].rouge_l == pytest.approx(5 / 6)  # five of six words in order, in both texts
    assert [p.exact_match for p in predictions] == [False] * 4 + [True] + [False] * 3  # whitespace around it is ignored
    assert predictions[4].reference == "down"
    assert score(predictions) == Scores(8, 1 / 8, sum(expected) / 8, 1.0)


def test_a_truncated_answer_has_not_stopped(memorized, tokenizer):
    predictions = answers(memorized, tokenizer, max_new_tokens=3)
    assert [p.stopped for p in predictions] == [len(tokenizer.encode(row[2])) < 3 for row in ROWS]
    assert 0 < score(predictions).stop_rate < 1


def test_the_batch_stays_full(memorized, tokenizer):
    """Regression: each answer waited for the longest of its batch; now the next question takes its place."""
    calls = []
    hook = memorized.register_forward_hook(lambda _, args, output: calls.append(len(args[0])))
    answers(memorized, tokenizer, CONVERSATIONS * 4, batch_size=4)
    hook.remove()
    tokens = [len(tokenizer.encode(row[2])) for row in ROWS]
    assert max(tokens) > 3 * min(tokens)
    assert sum(calls) == sum(tokens + 1 for tokens in tokens) * 4  # one row of a forward per generated token
    full = [size for size in calls if size == 4]
    assert len(full) > 0.6 * sum(tokens + 1 for tokens in tokens)  # mostly in full batches of four


def test_the_progress_bar_counts_finished_answers(memorized, tokenizer, monkeypatch):
    class Bar:
        def __init__(self, total, unit, description):
            self.total, self.updates = total, []

        def __enter__(self):
            return self

        def __exit__(self, *_):
            bars.append(self)

        def update(self, n):
            self.updates.append(n)

    bars = []
    monkeypatch.setattr(predicting, "progress_bar", Bar)
    answers(memorized, tokenizer, batch_size=8)
    assert [(bar.total, bar.updates) for bar in bars] == [(8, [1] * 8)]


def test_packed_weights_give_the_same_answers(memorized, tokenizer):
    """sft.py packs the weights: the logits differ in the last bits, the answers of a confident model do not."""
    assert answers(for_generation(memorized), tokenizer) == answers(memorized, tokenizer)


def test_a_prompt_that_is_too_long_is_truncated_as_in_chat(memorized, tokenizer):
    long = [*MESSAGES[1] * 9, *MESSAGES[0]]  # more turns than the context holds
    [prediction] = answers(memorized, tokenizer, [Conversation(long)], max_new_tokens=40)
    assert prediction.prediction == ROWS[0][2]
    assert prediction.prompt == long[:-1]
    with pytest.raises(ValueError, match="0 tokens are left for the prompt"):
        answers(memorized, tokenizer, max_new_tokens=64)


def test_errors_name_the_file_and_line(memorized, tokenizer):
    """Regression: a system text that fills the context ended the whole run without naming the record."""
    system = {"role": "system", "content": "Be brief and kind. " * 20}
    cases = [
        ([system, *MESSAGES[0]], r"tokens of system text and template leave none for a message: 40 fit"),
        ([], "does not end with a question"),
        (MESSAGES[0][:1], "does not end with a question"),
        ([{"role": "text", "content": "Once"}], "does not end with a question"),
        ([MESSAGES[0][1], MESSAGES[0][1]], "turn 1 has the role 'assistant'"),
    ]
    for messages, message in cases:
        for source, prefix in (("a.jsonl:7", "a.jsonl:7"), ("", "conversation 2")):
            with pytest.raises(ValueError, match=f"^{prefix}: .*{message}"):
                answers(memorized, tokenizer, [CONVERSATIONS[0], Conversation(messages, source)])
    with pytest.raises(ValueError, match="a.jsonl:7: the question is empty"):
        empty = Conversation([{"role": "user", "content": ""}, MESSAGES[0][1]], "a.jsonl:7")
        predict(memorized, tokenizer, get_template("none"), [empty], max_new_tokens=8, batch_size=1)
    assert answers(memorized, tokenizer, []) == []


# ---- files


@pytest.fixture
def write(memorized, tokenizer, tmp_path):
    def write(rows, folder="out", model=memorized, name="a/model", **settings):
        data = tmp_path / "data.json"
        data.write_text(json.dumps(rows), encoding="utf-8")
        return predict_file(
            *(str(data), tmp_path / folder, model, tokenizer, TEMPLATE),
            **{"name": name, "max_new_tokens": 24, "batch_size": 4, **settings},
        )

    return write


def test_files(write, tmp_path, capsys):
    run = write(ALPACA)
    folder = tmp_path / "out"
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert [line["prediction"] for line in lines] == [row[2] for row in ROWS]
    assert lines[3] == {
        "prompt": [{"role": "user", "content": "Opposite.", "input": "hot"}],
        "reference": "cold",
        "prediction": "cold",
        "stopped": True,
        "exact_match": True,
        "rouge_l": 1.0,
    }
    scores = {"answers": 8, "exact_match": 1.0, "rouge_l": 1.0, "stop_rate": 1.0}
    assert json.loads((folder / "scores.json").read_text()) == {
        **{"model": "a/model", "data": str(tmp_path / "data.json")},
        **scores,
    }
    assert run == read_predictions(folder)
    assert (folder / "predictions.html").read_text().startswith("<!doctype html>")
    assert sorted(path.name for path in folder.iterdir()) == ["predictions.html", "predictions.jsonl", "scores.json"]
    assert capsys.readouterr().out.splitlines() == [
        f"{folder}/predictions.jsonl: 8 answers: exact match 100.0%, ROUGE-L 1.000, 100.0% ended with end-of-text",
        f"{folder}/predictions.html: open it in a browser",
    ]


def test_predictions_are_not_overwritten(write, tmp_path):
    write(ALPACA[:2])
    with pytest.raises(FileExistsError, match=r"predictions.jsonl: already exists; give another --output_dir, or"):
        write(ALPACA)
    assert len((tmp_path / "out" / "predictions.jsonl").read_text().splitlines()) == 2
    assert write(ALPACA, overwrite=True).scores["answers"] == 8
    assert len((tmp_path / "out" / "predictions.jsonl").read_text().splitlines()) == 8


def test_skip_bad_records(write):
    """Regression: `--skip_bad_records` had an effect only in training."""
    with pytest.raises(ValueError, match=r'data.json:1: "output" is missing'):
        write([{"instruction": "Name it."}, *ALPACA])
    assert write([{"instruction": "Name it."}, *ALPACA], skip_bad_records=1).scores["answers"] == 8


def test_data_without_questions_is_refused(write, tmp_path):
    with pytest.raises(ValueError, match=r"data.json:1: does not end with a question and its answer"):
        write([{"text": "Once upon a time."}])
    with pytest.raises(ValueError, match=r"data.json: contains no question"):
        write([{"instruction": "Name it."}], skip_bad_records=1)
    assert not (tmp_path / "out").exists()


# ---- comparison with another model, and a judge


@pytest.fixture(scope="module")
def other(tokenizer):
    """An untrained model."""
    torch.manual_seed(1)
    return GPT(GPTConfig(tokenizer.vocab_size, n_positions=64, n_embd=32, n_layer=1, n_head=2)).eval()


def test_two_models_on_one_page(write, other, tmp_path):
    before = write(ALPACA, folder="before", model=other, name="b/model")
    write(ALPACA, compare_with=str(tmp_path / "before"))
    data = page_data(tmp_path / "out" / "predictions.html")
    assert [run["name"] for run in data["runs"]] == ["a/model", "b/model"]
    assert data["runs"][1]["scores"] == before.scores
    assert [row["answers"][0]["prediction"] for row in data["rows"]] == [row[2] for row in ROWS]
    assert [row["answers"][1]["prediction"] for row in data["rows"]] == [p["prediction"] for p in before.predictions]


def test_existing_answers_are_compared_without_generating_again(write, other, tmp_path, capsys):
    write(ALPACA, folder="before", model=other, name="b/model")
    write(ALPACA)
    written = (tmp_path / "out" / "predictions.jsonl").read_bytes()
    assert len(page_data(tmp_path / "out" / "predictions.html")["runs"]) == 1
    capsys.readouterr()
    write(ALPACA, model=None, compare_with=str(tmp_path / "before"))  # no model is run
    assert len(page_data(tmp_path / "out" / "predictions.html")["runs"]) == 2
    assert (tmp_path / "out" / "predictions.jsonl").read_bytes() == written
    assert "is kept (--overwrite_output_dir answers again)" in capsys.readouterr().out
    with pytest.raises(
        FileExistsError, match=r"has answers of a/model; give another --output_dir for those of c/model"
    ):
        write(ALPACA, name="c/model", compare_with=str(tmp_path / "before"))
    with pytest.raises(ValueError, match=r"out/predictions.jsonl:1: not the question that"):
        write(ALPACA[1:], compare_with=str(tmp_path / "out"))


def test_other_questions_are_refused_before_generating(write, tmp_path):
    write(ALPACA, folder="before")
    for rows, message in (
        (
            [*ALPACA[:2], {**ALPACA[2], "output": "mice"}, *ALPACA[3:]],
            r"jsonl:3: not the question that .*data.json has there",
        ),
        (ALPACA[:7], r"jsonl: has 8 answers, but .*data.json has 7 questions"),
    ):
        with pytest.raises(ValueError, match=message):
            write(rows, model=None, compare_with=str(tmp_path / "before"))
    with pytest.raises(FileNotFoundError, match=r"none: no predictions.jsonl and scores.json, which sft.py --predict"):
        write(ALPACA, model=None, compare_with=str(tmp_path / "none"))
    assert not (tmp_path / "out").exists()


def test_answers_are_marked(write, tmp_path, capsys):
    """A scripted judge gives 90 to every answer but one, to which its reply has no mark."""
    with serve(lambda number, body: "of course!" if "Stockholm" in body["messages"][0]["content"] else "90") as server:
        run = write(ALPACA, judge=Judge(server.url, "j-1"))
        assert len(server.bodies) == 8
        written = run_files(tmp_path / "out")
        again = write(ALPACA, model=None, judge=Judge(server.url, "j-1"))  # neither the model nor the judge runs again
        assert (again, len(server.bodies)) == (run, 8)
        assert run_files(tmp_path / "out") == written
    assert [line["mark"] for line in run.predictions] == [90, None, *[90] * 6]
    assert run.scores["judge"] == {"model": "j-1", "mean": 90.0, "unreadable": 1}
    assert run == read_predictions(tmp_path / "out")
    answers = [row["answers"][0] for row in page_data(tmp_path / "out" / "predictions.html")["rows"]]
    assert [answer["mark"] for answer in answers] == [90, None, *[90] * 6]
    assert "out/judgements.jsonl: j-1 marks: mean 90.0 of 100, 1 of 8 unreadable\n" in capsys.readouterr().out


def test_judging_keeps_both_models_on_the_page(write, other, tmp_path, capsys):
    """Regression: the README's third command has no --compare_with, and dropped the other model from the page."""
    write(ALPACA, folder="before", model=other, name="b/model")
    write(ALPACA, compare_with=str(tmp_path / "before"))
    assert read_predictions(tmp_path / "out").scores["compare_with"] == str(tmp_path / "before")

    def judge_and_read_names() -> list[str]:
        with serve(lambda number, body: "90") as server:
            write(ALPACA, model=None, judge=Judge(server.url, "j-1"))
        data = page_data(tmp_path / "out" / "predictions.html")
        assert {row["answers"][0]["mark"] for row in data["rows"]} == {90}
        return [run["name"] for run in data["runs"]]

    assert judge_and_read_names() == ["a/model", "b/model"]
    (tmp_path / "before").rename(tmp_path / "elsewhere")
    assert judge_and_read_names() == ["a/model"]
    assert f"{tmp_path}/before: no longer exists; the page shows only a/model" in capsys.readouterr().out
    write(ALPACA, model=None, compare_with=str(tmp_path / "elsewhere"))
    assert judge_and_read_names() == ["a/model", "b/model"]
    assert "compare_with" not in write(ALPACA, overwrite=True).scores


def test_answers_are_saved_even_if_the_judge_fails(write, tmp_path):
    with (
        serve(lambda number, body: 401) as server,
        pytest.raises(ApiError, match=r"HTTP 401.*run the same command to resume"),
    ):
        write(ALPACA, judge=Judge(server.url, "j-1"))
    assert [line["prediction"] for line in read_predictions(tmp_path / "out").predictions] == [row[2] for row in ROWS]
    assert page_data(tmp_path / "out" / "predictions.html")["runs"][0]["scores"]["answers"] == 8


def run_files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}
