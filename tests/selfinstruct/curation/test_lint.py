"""Each check of lint, and all of them compared with double loops."""

import random
from collections import Counter

import pytest
from rouge_score.rouge_scorer import RougeScorer

from minigpt.selfinstruct.curation.lint import lint

from .instruction_files import read_lines, task, write


def lint_drops(path, **settings) -> Counter:
    lint(str(path), **settings)
    file = path.with_name(f"{path.stem}.lint.dropped.jsonl")
    return Counter((int(row["source"].rpartition(":")[2]), row["reason"]) for row in read_lines(file))


LONG = "one two three four five six seven eight nine ten eleven twelve thirteen"


def test_each_check(tmp_path, capsys):
    write(
        tmp_path / "test.jsonl",
        [
            task("What is 2 + 2?", "4"),
            task(f"Say: {LONG}!", "Yes."),
            {"text": "这是一个很长的句子，用来测试中文的重叠。"},
        ],
    )
    records = [
        task("Say hi.", "Hi."),
        task("Say nothing.", " \n"),
        task("Visit it.", "See HTTPS://example.org/x."),
        task("Visit it.", "Go.", input="www.example.org"),
        task("Explain http.", "A protocol; www means world wide web. Ending in http://"),
        task("Repeat.", "a  B", input="A b"),
        task("what  is 2 + 2?", "Four."),
        task("Go on.", f"Well, {LONG.replace(' ', ', ').upper()}."),
        task("Go on twice.", LONG.removeprefix("one ")),
        task("请继续。", "他说：这是一个很长的句子，用来测试！"),
        task("Say hi.", "Hello."),
        task("Say hi.", "Hello.", input="to Ann"),
        task("Please say hi to my dear old friend Ann now.", "Hello."),
        task("Please say hi to my dear old friend Tom now!", "Hello."),
        task("Visit it.", "I cannot."),
        task("See it all.", "  ", input="www.example.org", id=4),
    ]
    path = write(tmp_path / "tasks.jsonl", records)
    assert lint_drops(path, eval_data=[tmp_path / "test.jsonl"]) == Counter(
        {
            (2, "empty_output"): 1,
            (3, "link"): 1,
            (4, "link"): 1,
            (6, "input_is_output"): 1,
            (7, "evaluation"): 1,
            (8, "evaluation"): 1,
            (10, "evaluation"): 1,
            (11, "repeated"): 1,
            (14, "near_duplicate"): 1,
            (16, "empty_output"): 1,
            (16, "link"): 1,
        }
    )
    assert read_lines(tmp_path / "tasks.lint.jsonl") == [records[i - 1] for i in (1, 5, 9, 12, 13, 15)]
    drops = {(row["source"], row["reason"]): row for row in read_lines(tmp_path / "tasks.lint.dropped.jsonl")}
    ngram = drops[f"{path}:8", "evaluation"]
    assert (ngram["nearest"], ngram["nearest_source"], ngram["score"]) == (LONG, f"{tmp_path}/test.jsonl:2", None)
    assert drops[f"{path}:7", "evaluation"]["nearest_source"] == f"{tmp_path}/test.jsonl:1"
    near = drops[f"{path}:14", "near_duplicate"]
    assert (near["nearest"], near["nearest_source"]) == (records[12]["instruction"], f"{path}:13")
    assert (
        near["score"] == RougeScorer(["rougeL"]).score(near["nearest"], near["instruction"])["rougeL"].fmeasure == 0.9
    )
    assert capsys.readouterr().out == (
        f"{tmp_path}/tasks.lint.jsonl: 6 of 16 records kept; dropped records and reasons: "
        f"{tmp_path}/tasks.lint.dropped.jsonl\n"
        f"  empty_output            2  {path}:2, {path}:16\n"
        f"  link                    3  {path}:3, {path}:4, {path}:16\n"
        f"  input_is_output         1  {path}:6\n"
        f"  evaluation              3  {path}:7, {path}:8, {path}:10\n"
        f"  repeated                1  {path}:11\n"
        f"  near_duplicate          1  {path}:14\n"
        f"  shortest output        2 characters: {path}:2\n"
        f"  longest output       90 characters: {path}:8\n"
    )


def test_a_dropped_record_does_not_make_others_duplicates(tmp_path):
    """The first of two equal questions has no answer, so the second is kept."""
    path = write(tmp_path / "a.jsonl", [task("Say hi.", ""), task("Say hi.", "Hi."), task("Say hi.", "Ho.")])
    assert lint_drops(path) == {(1, "empty_output"): 1, (3, "repeated"): 1}


def test_a_record_with_one_empty_output_of_several_is_dropped_once(tmp_path):
    instances = [{"input": "a", "output": "A."}, {"input": "b", "output": ""}]
    path = write(tmp_path / "a.jsonl", [{"instruction": "Say it.", "instances": instances}])
    assert lint_drops(path) == {(1, "empty_output"): 1}


def test_near_duplicates_in_any_script(tmp_path):
    """With rouge_score's tokens, a-z and 0-9, Chinese questions have nothing in common."""
    path = write(tmp_path / "a.jsonl", [task("请写一首关于猫的短诗。"), task("请写一首关于狗的短诗!")])
    assert lint_drops(path) == {(2, "near_duplicate"): 1}


@pytest.mark.parametrize("seed", range(4))
def test_lint_equals_double_loops(tmp_path, seed):
    """Short texts over three words, so that duplicates, near duplicates and shared 13-grams all occur."""
    random_ = random.Random(seed)

    def text(low, high):
        return " ".join(random_.choices(("aa", "bb", "cc"), k=random_.randint(low, high)))

    def record(longest):
        return task(text(0, 9), text(0, longest), input=random_.choice(["", text(1, 3)]))

    records = [record(20) for _ in range(150)]
    evaluation = [record(16) for _ in range(8)] + [task(text(5, 9), row["output"] + " cc") for row in records[:20]]
    path, eval_path = write(tmp_path / "a.jsonl", records), write(tmp_path / "eval.jsonl", evaluation)

    def question(row):
        return " ".join(f"{row['instruction']} {row['input']}".split())

    def shares_ngram(row, other):
        for words in (question(row).split(), row["output"].split()):
            for other_words in (question(other).split(), other["output"].split()):
                for i in range(len(words) - 12):
                    if any(words[i : i + 13] == other_words[j : j + 13] for j in range(len(other_words) - 12)):
                        return True
        return False

    scorer = RougeScorer(["rougeL"])
    expected, kept = Counter(), []
    for line, row in enumerate(records, 1):
        reasons = []
        if row["output"] == "":
            reasons.append("empty_output")
        if row["input"] and row["input"] == row["output"]:
            reasons.append("input_is_output")
        if any(question(row) == question(other) or shares_ngram(row, other) for other in evaluation):
            reasons.append("evaluation")
        if not reasons:
            if any((row["instruction"], row["input"]) == (k["instruction"], k["input"]) for k in kept):
                reasons.append("repeated")
            elif any(scorer.score(question(k), question(row))["rougeL"].fmeasure >= 0.8 for k in kept):
                reasons.append("near_duplicate")
            else:
                kept.append(row)
        expected.update((line, reason) for reason in reasons)
    assert lint_drops(path, eval_data=str(eval_path), threshold=0.8) == expected
    assert read_lines(tmp_path / "a.lint.jsonl") == kept
    assert {reason for _, reason in expected} >= {"empty_output", "evaluation", "repeated", "near_duplicate"}
