"""Answers for a dataset and their scores, by a model that knows eight answers by heart."""

import json

import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer

from minigpt.api_client import ApiError
from minigpt.data.prompts import get_template
from minigpt.data.read.records import Conversation
from minigpt.evaluation import predict as predicting
from minigpt.evaluation.judge import Judge
from minigpt.evaluation.page import read_run
from minigpt.evaluation.predict import Scores, predict, predict_file, score
from minigpt.inference.packed import for_generation
from minigpt.model.gpt2 import GPT, GPTConfig

from ..inference.by_heart import ALPACA, CONVERSATIONS, MESSAGES, ROWS, TEMPLATE
from ..scripted_endpoint import serve
from .predictions_page import page_data


def answers(model, tokenizer, conversations=CONVERSATIONS, **settings):
    return predict(model, tokenizer, TEMPLATE, conversations, **{"max_new_tokens": 24, "batch_size": 3, **settings})


def test_a_model_that_learnt_its_answers_gives_them_all_and_stops(learnt, tokenizer):
    predictions = answers(learnt, tokenizer)
    assert [p.prediction for p in predictions] == [row[2] for row in ROWS]  # in the order of the data
    assert [p.prompt for p in predictions] == [messages[:-1] for messages in MESSAGES]
    assert all(p.stopped and p.exact_match and p.rouge_l == 1.0 for p in predictions)
    assert score(predictions) == Scores(answers=8, exact_match=1.0, rouge_l=1.0, stop_rate=1.0)


@pytest.mark.parametrize("batch_size", [1, 8, 100])
def test_the_batch_size_changes_nothing(learnt, tokenizer, batch_size):
    assert answers(learnt, tokenizer, batch_size=batch_size) == answers(learnt, tokenizer)


def test_rouge_l_of_partly_right_answers(learnt, tokenizer):
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
    found = answers(learnt, tokenizer, conversations)
    judge = RougeScorer(["rougeL"], use_stemmer=False)
    expected = [
        judge.score(reference, row[2])["rougeL"].fmeasure for reference, row in zip(references, ROWS, strict=True)
    ]
    assert [p.rouge_l for p in found] == expected
    assert found[0].rouge_l == pytest.approx(5 / 6)  # five of six words in order, on both sides
    assert [p.exact_match for p in found] == [False] * 4 + [True] + [False] * 3  # blanks around it do not count
    assert found[4].reference == "down"
    assert score(found) == Scores(8, 1 / 8, sum(expected) / 8, 1.0)


def test_an_answer_that_is_cut_has_not_stopped(learnt, tokenizer):
    predictions = answers(learnt, tokenizer, max_new_tokens=3)
    assert [p.stopped for p in predictions] == [len(tokenizer.encode(row[2])) < 3 for row in ROWS]
    assert 0 < score(predictions).stop_rate < 1


def test_the_batch_stays_full(learnt, tokenizer):
    """Each answer waited for the longest of its batch; now the next question takes its place."""
    calls = []
    hook = learnt.register_forward_hook(lambda _, args, output: calls.append(len(args[0])))
    answers(learnt, tokenizer, CONVERSATIONS * 4, batch_size=4)
    hook.remove()
    tokens = [len(tokenizer.encode(row[2])) for row in ROWS]
    assert max(tokens) > 3 * min(tokens)
    assert sum(calls) == sum(tokens + 1 for tokens in tokens) * 4  # each row is read once for each of its tokens
    fed = [size for size in calls if size == 4]
    assert len(fed) > 0.6 * sum(tokens + 1 for tokens in tokens)  # and nearly always beside three others


def test_the_bar_counts_answers_as_they_end(learnt, tokenizer, monkeypatch):
    class Bar:
        def __init__(self, total, unit, description):
            self.total, self.moved = total, []

        def __enter__(self):
            return self

        def __exit__(self, *_):
            bars.append(self)

        def update(self, n):
            self.moved.append(n)

    bars = []
    monkeypatch.setattr(predicting, "progress_bar", Bar)
    answers(learnt, tokenizer, batch_size=8)
    assert [(bar.total, bar.moved) for bar in bars] == [(8, [1] * 8)]


def test_packed_weights_give_the_same_answers(learnt, tokenizer):
    """sft.py packs them: the logits differ in their last bits, the answers of a model that is sure do not."""
    assert answers(for_generation(learnt), tokenizer) == answers(learnt, tokenizer)


def test_a_prompt_without_room_is_cut_as_in_chat(learnt, tokenizer):
    long = [*MESSAGES[1] * 9, *MESSAGES[0]]  # more turns than the context holds
    [prediction] = answers(learnt, tokenizer, [Conversation(long)], max_new_tokens=40)
    assert prediction.prediction == ROWS[0][2]
    assert prediction.prompt == long[:-1]
    with pytest.raises(ValueError, match="leaves nothing of the model's context"):
        answers(learnt, tokenizer, max_new_tokens=64)


def test_what_cannot_be_asked_is_named_with_its_line(learnt, tokenizer):
    """A system text that fills the context stopped the answering of a whole dataset, and nobody knew which it was."""
    system = {"role": "system", "content": "Be brief and kind. " * 20}
    cases = [
        ([system, *MESSAGES[0]], r"tokens of system text and template leave no room for a message: 40 fit"),
        ([], "no question and answer"),
        (MESSAGES[0][:1], "no question and answer"),
        ([{"role": "text", "content": "Once"}], "no question and answer"),
        ([MESSAGES[0][1], MESSAGES[0][1]], "turn 1 has the role 'assistant'"),
    ]
    for messages, message in cases:
        for source, named in (("a.jsonl:7", "a.jsonl:7"), ("", "conversation 2")):
            with pytest.raises(ValueError, match=f"^{named}: .*{message}"):
                answers(learnt, tokenizer, [CONVERSATIONS[0], Conversation(messages, source)])
    with pytest.raises(ValueError, match="a.jsonl:7: the question is empty"):
        nothing = Conversation([{"role": "user", "content": ""}, MESSAGES[0][1]], "a.jsonl:7")
        predict(learnt, tokenizer, get_template("none"), [nothing], max_new_tokens=8, batch_size=1)
    assert answers(learnt, tokenizer, []) == []


# ---- files


@pytest.fixture
def write(learnt, tokenizer, tmp_path):
    def write(rows, folder="out", model=learnt, name="a/model", **settings):
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
    assert run == read_run(folder)
    assert (folder / "predictions.html").read_text().startswith("<!doctype html>")
    assert sorted(path.name for path in folder.iterdir()) == ["predictions.html", "predictions.jsonl", "scores.json"]
    assert capsys.readouterr().out.splitlines() == [
        f"{folder}/predictions.jsonl: 8 answers: exact match 100.0%, ROUGE-L 1.000, 100.0% stop by themselves",
        f"{folder}/predictions.html: to look at in a browser",
    ]


def test_predictions_are_not_written_over(write, tmp_path):
    write(ALPACA[:2])
    with pytest.raises(FileExistsError, match=r"predictions.jsonl: is there already; give another --output_dir, or"):
        write(ALPACA)
    assert len((tmp_path / "out" / "predictions.jsonl").read_text().splitlines()) == 2
    assert write(ALPACA, overwrite=True).scores["answers"] == 8
    assert len((tmp_path / "out" / "predictions.jsonl").read_text().splitlines()) == 8


def test_bad_records_are_passed_over_as_in_training(write):
    """`--skip_bad_records` was read in training alone."""
    with pytest.raises(ValueError, match=r'data.json:1: "output" is missing'):
        write([{"instruction": "Name it."}, *ALPACA])
    assert write([{"instruction": "Name it."}, *ALPACA], skip_bad_records=1).scores["answers"] == 8


def test_data_without_questions_is_refused_where_it_stands(write, tmp_path):
    with pytest.raises(ValueError, match=r"data.json:1: no question and answer, so nothing to compare with"):
        write([{"text": "Once upon a time."}])
    with pytest.raises(ValueError, match=r"data.json: no question in it"):
        write([{"instruction": "Name it."}], skip_bad_records=1)
    assert not (tmp_path / "out").exists()


# ---- beside another model's answers, and before a judge


@pytest.fixture(scope="module")
def other(tokenizer):
    """A model that has learnt nothing."""
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


def test_answers_that_are_there_are_compared_without_being_given_anew(write, other, tmp_path, capsys):
    write(ALPACA, folder="before", model=other, name="b/model")
    write(ALPACA)
    written = (tmp_path / "out" / "predictions.jsonl").read_bytes()
    assert len(page_data(tmp_path / "out" / "predictions.html")["runs"]) == 1
    capsys.readouterr()
    write(ALPACA, model=None, compare_with=str(tmp_path / "before"))  # nobody is asked
    assert len(page_data(tmp_path / "out" / "predictions.html")["runs"]) == 2
    assert (tmp_path / "out" / "predictions.jsonl").read_bytes() == written
    assert "stays as it is (--overwrite_output_dir answers anew)" in capsys.readouterr().out
    with pytest.raises(
        FileExistsError, match=r"the answers of a/model; give another --output_dir for those of c/model"
    ):
        write(ALPACA, name="c/model", compare_with=str(tmp_path / "before"))
    with pytest.raises(ValueError, match=r"out/predictions.jsonl:1: the answer to another question than"):
        write(ALPACA[1:], compare_with=str(tmp_path / "out"))


def test_other_questions_are_refused_before_anything_is_answered(write, tmp_path):
    write(ALPACA, folder="before")
    for rows, message in (
        (
            [*ALPACA[:2], {**ALPACA[2], "output": "mice"}, *ALPACA[3:]],
            r"jsonl:3: the answer to another question than .*data.json asks there",
        ),
        (ALPACA[:7], r"jsonl: answers 8 questions; .*data.json has 7"),
    ):
        with pytest.raises(ValueError, match=message):
            write(rows, model=None, compare_with=str(tmp_path / "before"))
    with pytest.raises(FileNotFoundError, match=r"none: no predictions.jsonl and scores.json, which sft.py --predict"):
        write(ALPACA, model=None, compare_with=str(tmp_path / "none"))
    assert not (tmp_path / "out").exists()


def test_answers_are_marked(write, tmp_path, capsys):
    """By a scripted judge: 90 for every answer but one, of which it says nothing of use."""
    with serve(lambda number, body: "of course!" if "Stockholm" in body["messages"][0]["content"] else "90") as server:
        run = write(ALPACA, judge=Judge(server.url, "j-1"))
        assert len(server.bodies) == 8
        written = run_files(tmp_path / "out")
        again = write(ALPACA, model=None, judge=Judge(server.url, "j-1"))  # neither model is asked again
        assert (again, len(server.bodies)) == (run, 8)
        assert run_files(tmp_path / "out") == written
    assert [line["mark"] for line in run.predictions] == [90, None, *[90] * 6]
    assert run.scores["judge"] == {"model": "j-1", "mean": 90.0, "unreadable": 1}
    assert run == read_run(tmp_path / "out")
    answers = [row["answers"][0] for row in page_data(tmp_path / "out" / "predictions.html")["rows"]]
    assert [answer["mark"] for answer in answers] == [90, None, *[90] * 6]
    assert "out/judgements.jsonl: j-1 marks: mean 90.0 of 100, 1 of 8 unreadable\n" in capsys.readouterr().out


def test_a_judge_leaves_both_models_on_the_page(write, other, tmp_path, capsys):
    """The third of the README's commands gives no --compare_with: the page that the second wrote had one model then."""
    write(ALPACA, folder="before", model=other, name="b/model")
    write(ALPACA, compare_with=str(tmp_path / "before"))
    assert read_run(tmp_path / "out").scores["compare_with"] == str(tmp_path / "before")

    def shown() -> list[str]:
        with serve(lambda number, body: "90") as server:
            write(ALPACA, model=None, judge=Judge(server.url, "j-1"))
        data = page_data(tmp_path / "out" / "predictions.html")
        assert {row["answers"][0]["mark"] for row in data["rows"]} == {90}
        return [run["name"] for run in data["runs"]]

    assert shown() == ["a/model", "b/model"]
    (tmp_path / "before").rename(tmp_path / "elsewhere")
    assert shown() == ["a/model"]
    assert f"{tmp_path}/before: is gone; the page shows a/model alone" in capsys.readouterr().out
    write(ALPACA, model=None, compare_with=str(tmp_path / "elsewhere"))
    assert shown() == ["a/model", "b/model"]
    assert "compare_with" not in write(ALPACA, overwrite=True).scores


def test_answers_outlive_a_judge_that_cannot_be_asked(write, tmp_path):
    with (
        serve(lambda number, body: 401) as server,
        pytest.raises(ApiError, match=r"HTTP 401.*the same command goes on"),
    ):
        write(ALPACA, judge=Judge(server.url, "j-1"))
    assert [line["prediction"] for line in read_run(tmp_path / "out").predictions] == [row[2] for row in ROWS]
    assert page_data(tmp_path / "out" / "predictions.html")["runs"][0]["scores"]["answers"] == 8


def run_files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}
