"""The bootstrap: requests, kept tasks, and end conditions."""

import json
import random

import pytest

from minigpt.selfinstruct.bootstrap import BootstrapArguments, TaskArguments, table, why_ended
from minigpt.selfinstruct.filters import NAMES
from minigpt.selfinstruct.generators import Completion
from minigpt.selfinstruct.tasks import Task

from .fake_generators import Scripted, plausible
from .runs import SEEDS, TASKS, bootstrap, config_of, read_lines

# ---- output files


def test_the_files_are_as_documented(uninterrupted_run):
    assert sorted(path.name for path in uninterrupted_run.iterdir()) == [
        *(".lock", "config.yaml", TASKS, "requests.jsonl", "seed_tasks.jsonl", "statistics.json")
    ]
    statistics = json.loads((uninterrupted_run / "statistics.json").read_text())
    requests, kept = read_lines(uninterrupted_run, "requests.jsonl"), read_lines(uninterrupted_run, TASKS)
    assert list(statistics) == ["requests", "completions", "tasks", "kept", "rejected", "ended", "acceptance_rate"]
    assert list(statistics["rejected"]) == list(NAMES)
    verdicts = [task for request in requests for task in request["tasks"]]
    assert statistics["requests"] == statistics["completions"] == len(requests)
    assert statistics["tasks"] == len(verdicts) == statistics["kept"] + sum(statistics["rejected"].values())
    assert statistics["acceptance_rate"] == len(kept) / len(verdicts)
    assert statistics["ended"] == "target"
    for name in NAMES:
        assert statistics["rejected"][name] == sum(task["verdict"] == name for task in verdicts)
    assert {name for name, count in statistics["rejected"].items() if count} >= {"length", "programming", "banned_word"}

    for index, request in enumerate(requests):
        assert list(request) == ["request_idx", "seed", "shots", "prompt", "completions", "tasks"]
        assert request["request_idx"] == index
        assert request["completions"] == [plausible(request["prompt"], request["seed"])._asdict()]
    texts = ["instruction", "input", "output"]
    keys = [*texts, "most_similar_instructions", "avg_similarity_score", "request_idx"]
    assert all(list(line) == keys for line in kept)
    expected = [
        (r["request_idx"], *(t[x] for x in texts)) for r in requests for t in r["tasks"] if t["verdict"] == "kept"
    ]
    assert expected == [(line["request_idx"], *(line[text] for text in texts)) for line in kept]
    assert 100 <= len(kept) < 106  # all tasks of the last request are filtered
    # only the last request reached the target
    assert sum(line["request_idx"] < len(requests) - 1 for line in kept) < 100


def test_novelty_compares_with_seed_tasks_and_earlier_kept_tasks(uninterrupted_run):
    """Equal to rouge_score's pairwise scores; earlier tasks of the same request are included."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    pool = [task.instruction for task in SEEDS]
    for line in read_lines(uninterrupted_run, TASKS)[:12]:
        scores = {text: scorer.score(text, line["instruction"])["rougeL"].fmeasure for text in pool}
        best = sorted(scores.values(), reverse=True)[:10]
        assert list(line["most_similar_instructions"].values()) == pytest.approx(best, abs=1e-12)
        assert line["avg_similarity_score"] == pytest.approx(sum(scores.values()) / len(scores))
        assert best[0] < 0.7
        pool.append(line["instruction"])


def test_duplicates_within_one_completion_are_dropped(tmp_path):
    """The second of two equal tasks is not novel."""
    twice = " Name a thing that flies.\n{0}. Input:\n<noinput>\n{0}. Output:\nA bird.\n###\n"
    text = twice.format(9) + "10. Instruction:" + twice.format(10)
    statistics = bootstrap(
        tmp_path, Scripted(lambda prompt, seed: Completion(text, True)), num_instructions_to_generate=1
    )
    assert (statistics.requests, statistics.tasks, statistics.kept, statistics.rejected["novelty"]) == (1, 2, 1, 1)
    first, second = read_lines(tmp_path, "requests.jsonl")[0]["tasks"]
    assert first["nearest"] in {task.instruction for task in SEEDS}
    assert (second["score"], second["nearest"]) == (1.0, "Name a thing that flies.")


def test_shots(uninterrupted_run):
    """Eight seed tasks in the first round, then six plus two kept in earlier rounds; no duplicates, shuffled."""
    requests = read_lines(uninterrupted_run, "requests.jsonl")
    seeds = {task.instruction for task in SEEDS}
    kept_in = {line["instruction"]: line["request_idx"] // 8 for line in read_lines(uninterrupted_run, TASKS)}
    assert len(requests) > 32
    for request in requests:
        shots, round_number = request["shots"], request["request_idx"] // 8
        assert len(shots) == len(set(shots)) == 8
        synthetic = [shot for shot in shots if shot not in seeds]
        assert len(synthetic) == (2 if round_number else 0)
        assert all(kept_in[shot] < round_number for shot in synthetic)
        assert request["prompt"].endswith("\n###\n9. Instruction:")
    assert len({tuple(request["shots"]) for request in requests}) == len(requests)
    assert len({request["seed"] for request in requests}) == len(requests)


def test_prompts_leave_max_length_tokens_for_the_completion(tmp_path, capsys):
    """Shots are dropped to fit the context; a seed task too long on its own is reported and never used."""
    long = Task("Explain all of this at length.", "", "word " * 300)
    generator = Scripted(context=200)
    bootstrap(tmp_path, generator, [*SEEDS, long], max_length=100, num_instructions_to_generate=10)
    requests = read_lines(tmp_path, "requests.jsonl")
    assert all(len(request["prompt"].split()) + 100 <= 200 for request in requests)
    assert {len(request["shots"]) for request in requests} <= {3, 4, 5}
    assert not any("at length" in shot for request in requests for shot in request["shots"])
    assert capsys.readouterr().out.startswith("1 of 13 seed tasks are too long to be used as shots\n")


def test_no_seed_task_fits_the_context(tmp_path):
    with pytest.raises(ValueError) as error:
        bootstrap(tmp_path, Scripted(context=120), max_length=100)
    assert str(error.value) == (
        "--max_length 100 leaves 20 of the model's 120 tokens for the prompt, and none of the 12 seed tasks fits "
        "(use a smaller --max_length, or shorter tasks)"
    )
    bootstrap(tmp_path, max_length=99)  # no request was made, so settings may still change


@pytest.mark.parametrize("max_length", [120, 300])
def test_max_length_beyond_the_context(tmp_path, max_length):
    """The message used to mention -180 remaining tokens."""
    with pytest.raises(ValueError) as error:
        bootstrap(tmp_path, Scripted(context=120), max_length=max_length)
    assert str(error.value) == (
        f"--max_length {max_length} leaves no tokens for the prompt: the model's context is 120 tokens, for prompt and "
        "completion together (use a smaller --max_length)"
    )


def test_io_and_several_completions(tmp_path):
    statistics = bootstrap(tmp_path, format="io", num_return_sequences=3)
    assert statistics.completions == 3 * statistics.requests
    assert {line["input"] for line in read_lines(tmp_path, TASKS)} == {""}
    assert "Input:" not in read_lines(tmp_path, "requests.jsonl")[0]["prompt"]


# ---- budgets


def test_a_run_without_tasks_ends_at_its_budget(tmp_path):
    garbage = Scripted(lambda prompt, seed: Completion(random.Random(seed).randbytes(200).decode("latin-1"), False))
    statistics = bootstrap(tmp_path / "stall", garbage, max_stall=21)
    assert (statistics.ended, statistics.requests, statistics.kept) == ("max_stall", 21, 0)
    assert why_ended(statistics, config_of(tmp_path / "stall", max_stall=21)) == (
        f"{tmp_path}/stall: 0 of 100 tasks kept; --max_stall 21 consecutive requests without a kept task; "
        "no task found in 21 completions"
    )
    statistics = bootstrap(tmp_path / "requests", garbage, max_requests=13)
    assert (statistics.ended, statistics.requests) == ("max_requests", 13)
    assert len(garbage.prompts) == 24 + 13  # at most the rest of the current round


def test_a_repeating_model_ends_at_max_stall(tmp_path):
    """The model repeats one task: the novelty filter drops all but the first, and the message names it."""
    text = " Name the largest planet of all.\n9. Input:\n<noinput>\n9. Output:\nJupiter.\n###\n"
    statistics = bootstrap(tmp_path, Scripted(lambda prompt, seed: Completion(text, True)), max_stall=50)
    assert (statistics.kept, statistics.ended, statistics.requests, statistics.rejected["novelty"]) == (
        1,
        "max_stall",
        51,
        50,
    )
    assert why_ended(statistics, config_of(tmp_path, max_stall=50)).endswith(
        "1 of 100 tasks kept; --max_stall 50 consecutive requests without a kept task; "
        "of 51 tasks read, the filter novelty dropped most, 50"
    )
    assert table(statistics).splitlines() == [
        "requests         51, with 51 completions",
        "tasks read       51",
        "kept             1 (2.0%)",
        "dropped          50 (98.0%)",
        *(f"  {name:14} 0 (0.0%)" for name in NAMES[:-1]),
        "  novelty        50 (98.0%)",
    ]


def test_the_default_request_budget_is_proportional_to_the_target():
    assert BootstrapArguments(num_instructions_to_generate=5).request_budget == 100
    assert BootstrapArguments(num_instructions_to_generate=500).request_budget == 5000
    assert BootstrapArguments(num_instructions_to_generate=500, max_requests=3).request_budget == 3


# ---- --label_first


class Classifier(Scripted):
    """Classifies instructions about rivers as classification; generates a label and, unless about bridges, an input."""

    def complete(self, prompts, params, on_completion=None):
        if not prompts[0].text.endswith(("Classification:", "Output:")):
            return super().complete(prompts, params, on_completion)
        self.prompts += prompts
        results = []
        for prompt, _ in prompts:
            instruction = prompt.rpartition(" Instruction: ")[2].partition("\n")[0]
            number = prompt.rpartition("###\n")[2].partition(".")[0]
            if prompt.endswith("Output:"):
                text = f" Wet\n{number}. Input:\nthe river" if "bridge" not in instruction else " Wet"
            else:
                text = " Yes" if "river" in instruction else " No"
            results.append([Completion(text, True)])
        return results


def test_label_first(tmp_path, uninterrupted_run):
    generator = Classifier()
    bootstrap(tmp_path, generator, label_first=True)
    tasks, before = (
        read_lines(tmp_path, TASKS),
        {line["instruction"]: line for line in read_lines(uninterrupted_run, TASKS)},
    )
    assert len({task.instruction for task in SEEDS if task.is_classification}) >= 4
    rivers = [line for line in tasks if "river" in line["instruction"]]
    assert len(rivers) > 3
    for line in tasks:
        assert line["is_classification"] == ("river" in line["instruction"])
    labelled = [line for line in rivers if (line["input"], line["output"]) == ("the river", "Wet")]
    assert labelled == [line for line in rivers if "bridge" not in line["instruction"]]
    # other tasks, and those without a generated input, are unchanged
    first_round = [line for line in tasks if line["request_idx"] < 8 and line not in labelled]
    assert first_round
    for line in first_round:
        assert {**before[line["instruction"]], "is_classification": line["is_classification"]} == line
    prompts = [prompt for prompt, _ in generator.prompts if prompt.endswith("Output:")]
    assert len(prompts) == len(rivers)
    assert all(f"Instruction: {task.instruction}" not in prompt for prompt in prompts for task in SEEDS[1:3])


def test_label_first_needs_both_kinds_of_seed_tasks(tmp_path):
    with pytest.raises(ValueError, match='--label_first needs seed tasks with "is_classification": true'):
        bootstrap(tmp_path, seed_tasks=[task for task in SEEDS if not task.is_classification], label_first=True)
    with pytest.raises(ValueError, match="--label_first generates an input"):
        TaskArguments(label_first=True, format="io")
