"""The bootstrap: what it asks, what it keeps, and what ends it."""

import json
import random

import pytest

from minigpt.selfinstruct.bootstrap import BootstrapArguments, TaskArguments, table, why_ended
from minigpt.selfinstruct.filters import NAMES
from minigpt.selfinstruct.generators import Completion
from minigpt.selfinstruct.tasks import Task

from .runs import SEEDS, TASKS, bootstrap, config_of, lines
from .writers import Scripted, plausible

# ---- what it writes


def test_the_files_are_as_documented(whole):
    assert sorted(path.name for path in whole.iterdir()) == [
        *(".lock", "config.yaml", TASKS, "requests.jsonl", "seed_tasks.jsonl", "statistics.json")
    ]
    statistics = json.loads((whole / "statistics.json").read_text())
    requests, kept = lines(whole, "requests.jsonl"), lines(whole, TASKS)
    assert list(statistics) == ["requests", "completions", "tasks", "kept", "rejected", "ended", "acceptance_rate"]
    assert list(statistics["rejected"]) == list(NAMES)
    judged = [task for request in requests for task in request["tasks"]]
    assert statistics["requests"] == statistics["completions"] == len(requests)
    assert statistics["tasks"] == len(judged) == statistics["kept"] + sum(statistics["rejected"].values())
    assert statistics["acceptance_rate"] == len(kept) / len(judged)
    assert statistics["ended"] == "target"
    for name in NAMES:
        assert statistics["rejected"][name] == sum(task["verdict"] == name for task in judged)
    assert {name for name, count in statistics["rejected"].items() if count} >= {"length", "programming", "banned_word"}

    for place, request in enumerate(requests):
        assert list(request) == ["request_idx", "seed", "shots", "prompt", "completions", "tasks"]
        assert request["request_idx"] == place
        assert request["completions"] == [plausible(request["prompt"], request["seed"])._asdict()]
    texts = ["instruction", "input", "output"]
    keys = [*texts, "most_similar_instructions", "avg_similarity_score", "request_idx"]
    assert all(list(line) == keys for line in kept)
    found = [(r["request_idx"], *(t[x] for x in texts)) for r in requests for t in r["tasks"] if t["verdict"] == "kept"]
    assert found == [(line["request_idx"], *(line[text] for text in texts)) for line in kept]
    assert 100 <= len(kept) < 106  # the last request is judged to its end
    assert sum(line["request_idx"] < len(requests) - 1 for line in kept) < 100  # and is the first to reach the target


def test_novelty_is_measured_against_seeds_and_everything_kept_before(whole):
    """As rouge_score says, which compares each pair; the same request's earlier tasks included."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    pool = [task.instruction for task in SEEDS]
    for line in lines(whole, TASKS)[:12]:
        scores = {text: scorer.score(text, line["instruction"])["rougeL"].fmeasure for text in pool}
        best = sorted(scores.values(), reverse=True)[:10]
        assert list(line["most_similar_instructions"].values()) == pytest.approx(best, abs=1e-12)
        assert line["avg_similarity_score"] == pytest.approx(sum(scores.values()) / len(scores))
        assert best[0] < 0.7
        pool.append(line["instruction"])


def test_a_task_of_the_same_request_counts(tmp_path):
    """Two alike in one completion: the second is not novel."""
    twice = " Name a thing that flies.\n{0}. Input:\n<noinput>\n{0}. Output:\nA bird.\n###\n"
    text = twice.format(9) + "10. Instruction:" + twice.format(10)
    found = bootstrap(tmp_path, Scripted(lambda prompt, seed: Completion(text, True)), num_instructions_to_generate=1)
    assert (found.requests, found.tasks, found.kept, found.rejected["novelty"]) == (1, 2, 1, 1)
    first, second = lines(tmp_path, "requests.jsonl")[0]["tasks"]
    assert first["nearest"] in {task.instruction for task in SEEDS}
    assert (second["score"], second["nearest"]) == (1.0, "Name a thing that flies.")


def test_shots(whole):
    """Eight seed tasks in the first round, then six and two of earlier rounds; never one twice, always shuffled."""
    requests = lines(whole, "requests.jsonl")
    seeds = {task.instruction for task in SEEDS}
    kept_in = {line["instruction"]: line["request_idx"] // 8 for line in lines(whole, TASKS)}
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


def test_prompts_leave_room_for_the_answer(tmp_path, capsys):
    """Fewer shots, rather than one token too many; a seed task that is too long alone is never shown, and said."""
    long = Task("Explain all of this at length.", "", "word " * 300)
    generator = Scripted(context=200)
    bootstrap(tmp_path, generator, [*SEEDS, long], max_length=100, num_instructions_to_generate=10)
    requests = lines(tmp_path, "requests.jsonl")
    assert all(len(request["prompt"].split()) + 100 <= 200 for request in requests)
    assert {len(request["shots"]) for request in requests} <= {3, 4, 5}
    assert not any("at length" in shot for request in requests for shot in request["shots"])
    assert capsys.readouterr().out.startswith("1 of 13 seed tasks are too long to be shown\n")


def test_no_room_for_a_single_shot(tmp_path):
    with pytest.raises(ValueError) as error:
        bootstrap(tmp_path, Scripted(context=120), max_length=100)
    assert str(error.value) == (
        "--max_length 100 leaves 20 of the model's 120 tokens for a request, and not one of 12 seed tasks fits "
        "(give a smaller --max_length, or shorter tasks)"
    )
    bootstrap(tmp_path, max_length=99)  # nothing was asked, so another setting may begin in its place


@pytest.mark.parametrize("max_length", [120, 300])
def test_a_completion_longer_than_the_context(tmp_path, max_length):
    """It spoke of -180 tokens that were left."""
    with pytest.raises(ValueError) as error:
        bootstrap(tmp_path, Scripted(context=120), max_length=max_length)
    assert str(error.value) == (
        f"--max_length {max_length} leaves no room for a request: the model's context is 120 tokens, for a request and "
        "its completion together (give a smaller --max_length)"
    )


def test_io_and_several_completions(tmp_path):
    found = bootstrap(tmp_path, format="io", num_return_sequences=3)
    assert found.completions == 3 * found.requests
    assert {line["input"] for line in lines(tmp_path, TASKS)} == {""}
    assert "Input:" not in lines(tmp_path, "requests.jsonl")[0]["prompt"]


# ---- budgets


def test_garbage_ends_within_its_budget(tmp_path):
    garbage = Scripted(lambda prompt, seed: Completion(random.Random(seed).randbytes(200).decode("latin-1"), False))
    found = bootstrap(tmp_path / "stall", garbage, max_stall=21)
    assert (found.ended, found.requests, found.kept) == ("max_stall", 21, 0)
    assert why_ended(found, config_of(tmp_path / "stall", max_stall=21)) == (
        f"{tmp_path}/stall: 0 of 100 tasks kept; --max_stall 21 requests in a row brought nothing new; "
        "no task could be read in 21 completions"
    )
    found = bootstrap(tmp_path / "requests", garbage, max_requests=13)
    assert (found.ended, found.requests) == ("max_requests", 13)
    assert len(garbage.asked) == 24 + 13  # no more than the round under way


def test_a_parrot_ends_with_the_histogram(tmp_path):
    """A model that repeats one task: novelty eats everything after the first, and the exit says so."""
    text = " Name the largest planet of all.\n9. Input:\n<noinput>\n9. Output:\nJupiter.\n###\n"
    found = bootstrap(tmp_path, Scripted(lambda prompt, seed: Completion(text, True)), max_stall=50)
    assert (found.kept, found.ended, found.requests, found.rejected["novelty"]) == (1, "max_stall", 51, 50)
    assert why_ended(found, config_of(tmp_path, max_stall=50)).endswith(
        "1 of 100 tasks kept; --max_stall 50 requests in a row brought nothing new; "
        "of 51 tasks read, the filter novelty dropped most, 50"
    )
    assert table(found).splitlines() == [
        "requests         51, with 51 completions",
        "tasks read       51",
        "kept             1 (2.0%)",
        "dropped          50 (98.0%)",
        *(f"  {name:14} 0 (0.0%)" for name in NAMES[:-1]),
        "  novelty        50 (98.0%)",
    ]


def test_the_budget_of_requests_follows_the_target():
    assert BootstrapArguments(num_instructions_to_generate=5).request_budget == 100
    assert BootstrapArguments(num_instructions_to_generate=500).request_budget == 5000
    assert BootstrapArguments(num_instructions_to_generate=500, max_requests=3).request_budget == 3


# ---- labels first


class Classifier(Scripted):
    """Says that what is about rivers is classification, and gives it a label and then an input."""

    def complete(self, prompts, how, on_arrival=None):
        if not prompts[0].text.endswith(("Classification:", "Output:")):
            return super().complete(prompts, how, on_arrival)
        self.asked += prompts
        found = []
        for prompt, _ in prompts:
            instruction = prompt.rpartition(" Instruction: ")[2].partition("\n")[0]
            number = prompt.rpartition("###\n")[2].partition(".")[0]
            if prompt.endswith("Output:"):
                text = f" Wet\n{number}. Input:\nthe river" if "bridge" not in instruction else " Wet"
            else:
                text = " Yes" if "river" in instruction else " No"
            found.append([Completion(text, True)])
        return found


def test_labels_first(tmp_path, whole):
    generator = Classifier()
    bootstrap(tmp_path, generator, label_first=True)
    found, before = lines(tmp_path, TASKS), {line["instruction"]: line for line in lines(whole, TASKS)}
    assert len({task.instruction for task in SEEDS if task.is_classification}) >= 4
    rivers = [line for line in found if "river" in line["instruction"]]
    assert len(rivers) > 3
    for line in found:
        assert line["is_classification"] == ("river" in line["instruction"])
    labelled = [line for line in rivers if (line["input"], line["output"]) == ("the river", "Wet")]
    assert labelled == [line for line in rivers if "bridge" not in line["instruction"]]
    # what is no classification, or got no input, is as it came
    first_round = [line for line in found if line["request_idx"] < 8 and line not in labelled]
    assert first_round
    for line in first_round:
        assert {**before[line["instruction"]], "is_classification": line["is_classification"]} == line
    prompts = [prompt for prompt, _ in generator.asked if prompt.endswith("Output:")]
    assert len(prompts) == len(rivers)
    assert all(f"Instruction: {task.instruction}" not in prompt for prompt in prompts for task in SEEDS[1:3])


def test_labels_need_both_kinds_of_seed_tasks(tmp_path):
    with pytest.raises(ValueError, match='--label_first needs seed tasks with "is_classification": true'):
        bootstrap(tmp_path, seed_tasks=[task for task in SEEDS if not task.is_classification], label_first=True)
    with pytest.raises(ValueError, match="--label_first gives a task another input"):
        TaskArguments(label_first=True, format="io")
