"""Semantic curation: `unique`, `consistent`, and resuming after a kill."""

import numpy as np
import pytest
import torch

from minigpt.data.tokenizer import Tokenizer
from minigpt.model.gpt2 import GPT, GPTConfig
from minigpt.selfinstruct.curation.semantic import consistent, reconstruction_prompt, unique
from minigpt.selfinstruct.generators import Completion, LocalGenerator
from minigpt.selfinstruct.request import TaskFormat
from minigpt.selfinstruct.tasks import Task

from .instruction_files import embed_letters, read_lines, task, write

# ---- unique


def test_unique_writes_kept_records_unchanged_and_reasons_for_the_others(tmp_path, capsys):
    records = [
        task("Name a bird.", most_similar_instructions={"Nenne einen Vögel.": 0.5}, request_idx=3, avg=0.25),
        task("Sum up zebras."),
        task("A bird: name!", "Wren."),
        task("Name a bird, a drab one."),
    ]
    path = write(tmp_path / "tasks.jsonl", records)
    before = path.read_bytes()
    assert unique(str(path), embed_letters, threshold=0.9) == (2, 2, {"similar": 2})
    assert path.read_bytes() == before
    assert read_lines(tmp_path / "tasks.unique.jsonl") == records[:2]
    assert "Vögel" in (tmp_path / "tasks.unique.jsonl").read_text(encoding="utf-8")
    vectors = embed_letters([record["instruction"] for record in records])
    assert read_lines(tmp_path / "tasks.unique.dropped.jsonl") == [
        {
            "source": f"{path}:{index + 1}",
            "instruction": records[index]["instruction"],
            "reason": "similar",
            "nearest": "Name a bird.",
            "nearest_source": f"{path}:1",
            "score": pytest.approx(float(vectors[0] @ vectors[index]), abs=1e-6),
        }
        for index in (2, 3)
    ]
    assert capsys.readouterr().out == (
        f"{tmp_path}/tasks.unique.jsonl: 2 of 4 records kept; dropped records and reasons: "
        f"{tmp_path}/tasks.unique.dropped.jsonl\n"
        f"  similar                 2  {path}:3, {path}:4\n"
    )
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "tasks.jsonl",
        "tasks.unique.dropped.jsonl",
        "tasks.unique.jsonl",
    ]


def test_unique_drops_at_the_threshold(tmp_path):
    path = str(write(tmp_path / "a.jsonl", [task("One."), task("Two."), task("Three.")]))
    vectors = np.array([[1, 0], [0.8, 0.6], [0, 1]], np.float32)
    kept = [unique(path, lambda texts: vectors, threshold=threshold).kept for threshold in (0.5, 0.6, 0.8, 0.81)]
    assert kept == [2, 2, 2, 3]


# ---- consistent

FORMAT = TaskFormat()
SEEDS = [
    Task("Add.", "1 2", "3"),
    Task("Name a bird.", "", "A wren."),
    Task("Translate\n into French.", "cat", "chat"),
    Task("Write a haiku\nabout rain.", "", "Grey roofs\nlisten."),
]


class FakeReconstructor:
    """A generator that looks up the instruction by the output in a dictionary."""

    def __init__(self, completions: dict[str, str], context: int = 1000, stop_after: int | None = None):
        self.completions, self.context, self.stop_after = completions, context, stop_after
        self.prompts: list[str] = []

    def count(self, text: str) -> int:
        return len(text.split())

    def complete(self, prompts, params, on_completion=None):
        if self.stop_after is not None and len(self.prompts) >= self.stop_after:
            raise KeyboardInterrupt
        assert {seed for _, seed in prompts} == {42}
        assert (params.settings.temperature, params.settings.num_return_sequences, params.stop) == (0, 1, ("\n###",))
        self.prompts += [text for text, _ in prompts]
        outputs = [text.rpartition("Output:\n")[2].rpartition("\n")[0] for text, _ in prompts]
        results = [
            [Completion(self.completions[output], True)] if output in self.completions else [] for output in outputs
        ]
        for index, completions in enumerate(results):
            if on_completion:  # like ApiGenerator; the completions are also returned
                on_completion(index, completions)
        return results


def run_consistent(path, generator, **changes):
    settings = {"model": "fake", "seed_tasks": SEEDS, "task_format": FORMAT, "num_shots": 2, "batch_size": 2}
    return consistent(str(path), generator, embed_letters, **{**settings, **changes})


def test_the_docstring_prompt():
    prompt_task = Task("What is the capital of France?", "", "Paris.")
    text = reconstruction_prompt(SEEDS[:1], prompt_task, FORMAT)
    documented = reconstruction_prompt.__doc__.partition("\n\n")[2].rpartition("\n\n")[0]
    assert text.splitlines() == [line.removeprefix("        ") for line in documented.splitlines()]
    assert text.endswith("\n2. Instruction:")


def test_the_prompt_with_custom_trigger_words_and_a_multi_line_instruction():
    text = reconstruction_prompt([SEEDS[2]], Task("", "x\ny", "z"), TaskFormat("iio", "Request", "Given", "Answer"))
    assert text.partition("###\n")[2] == (
        "1. Given:\ncat\n1. Answer:\nchat\n1. Request: Translate into French.\n"
        "###\n2. Given:\nx\ny\n2. Answer:\nz\n2. Request:"
    )


def test_consistent_keeps_tasks_that_the_model_can_reconstruct(tmp_path, capsys):
    records = [
        task("Name a river.", "The Rhine.", id=1),
        task("Name a mountain.", "Eiger."),
        task("Sum up zebras.", "Striped."),
        task("Tell a joke.", "No."),
        task("Count to ten thousand.", "One two three four five six " * 20),
        task("Refuse.", "A server rejects prompts against its rules."),
    ]
    completions = {
        "The Rhine.": "  Name a river!\n3. Output: more",
        "Eiger.": "7. Instruction:\nA mountain: name!",  # as chat models do
        "Striped.": " Why is it so cold?",
        "No.": "\n \n",
    }
    path = write(tmp_path / "tasks.jsonl", records)
    curated = run_consistent(path, FakeReconstructor(completions, context=160), threshold=0.9)
    assert curated == (2, 4, {"inconsistent": 1, "no_answer": 2, "too_long": 1})
    assert read_lines(tmp_path / "tasks.consistent.jsonl") == records[:2]
    first, *others = read_lines(tmp_path / "tasks.consistent.dropped.jsonl")
    cosine = float(np.prod(embed_letters(["Sum up zebras.", "Why is it so cold?"]), axis=0).sum())
    assert first == {
        "source": f"{path}:3",
        "instruction": "Sum up zebras.",
        "reason": "inconsistent",
        "nearest": "Why is it so cold?",
        "nearest_source": None,
        "score": pytest.approx(cosine, abs=1e-6),
    }
    assert [(row["source"], row["reason"]) for row in others] == [
        (f"{path}:4", "no_answer"),
        (f"{path}:5", "too_long"),
        (f"{path}:6", "no_answer"),
    ]
    assert 0.2 < cosine < 0.3
    assert "records kept at other thresholds: 0.3: 2, 0.5: 2, 0.7: 2, 0.9: 2\n" in capsys.readouterr().out


def test_shots_fit_the_context_and_never_include_the_task_itself(tmp_path):
    """ArmelRandy's first output_instruction.py sampled shots from the tasks to reconstruct, answer included."""
    path = write(tmp_path / "tasks.jsonl", [task(seed.instruction, seed.output, input=seed.input) for seed in SEEDS])
    shown: dict[int, set[int]] = {}
    for context in range(48, 140, 4):
        (tmp_path / "tasks.regenerated.jsonl").unlink(missing_ok=True)
        generator = FakeReconstructor({}, context)
        run_consistent(path, generator, num_shots=3, max_new_tokens=20)
        for prompt in generator.prompts:
            assert generator.count(prompt) <= context - 20
            others, _, own = prompt.rpartition("###\n")
            [entry] = [seed for seed in SEEDS if f"Output:\n{seed.output}\n" in own]
            assert f"Output:\n{entry.output}\n" not in others
            shown.setdefault(context, set()).add(others.count("Output:"))
    assert min(shown) > 48 and shown[136] == {3} and {1, 2} in shown.values()
    assert [max(counts) for counts in shown.values()] == sorted(max(counts) for counts in shown.values())


INSTRUCTIONS = {f"Output {i}, {'very ' * (i % 4)}long.": f"Make output {'abcdefgh'[i % 8] * i}." for i in range(12)}


def make_tasks(folder):
    folder.mkdir(parents=True)
    return write(folder / "tasks.jsonl", [task(f"Make output {i}.", output) for i, output in enumerate(INSTRUCTIONS)])


def results(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_killed_run_is_resumed(tmp_path, monkeypatch):
    """Killed at any time, even within a line; saved completions are not generated again."""
    make_tasks(tmp_path / "uninterrupted")
    uninterrupted = FakeReconstructor(INSTRUCTIONS)
    monkeypatch.chdir(tmp_path / "uninterrupted")
    run_consistent("tasks.jsonl", uninterrupted, batch_size=5)
    expected = results(tmp_path / "uninterrupted")
    assert len(uninterrupted.prompts) == len(read_lines(tmp_path / "uninterrupted" / "tasks.regenerated.jsonl")) == 12
    for stop_after, torn in (0, 0), (1, 0), (5, 1), (10, 40), (11, 1):
        folder = tmp_path / f"killed-{stop_after}"
        make_tasks(folder)
        monkeypatch.chdir(folder)
        before, after = FakeReconstructor(INSTRUCTIONS, stop_after=stop_after), FakeReconstructor(INSTRUCTIONS)
        if stop_after <= 10:
            with pytest.raises(KeyboardInterrupt):
                run_consistent("tasks.jsonl", before, batch_size=5)
            assert "tasks.consistent.jsonl" not in results(folder)
        else:
            run_consistent("tasks.jsonl", before, batch_size=5)
        file = folder / "tasks.regenerated.jsonl"
        file.write_bytes(file.read_bytes()[: -torn or None])
        run_consistent("tasks.jsonl", after, batch_size=5)
        assert results(folder) == expected
        assert before.prompts[: len(before.prompts) - (torn > 0)] + after.prompts == uninterrupted.prompts


def test_completions_received_before_a_server_error_are_saved(tmp_path, monkeypatch):
    """The error occurs within a batch, after three of its five completions."""

    class FailingServer(FakeReconstructor):
        def complete(self, prompts, params, on_completion=None):
            results = super().complete(prompts, params)
            for index in (2, 0, 1):
                on_completion(index, results[index])
            raise OSError("connection lost")

    make_tasks(tmp_path / "a")
    make_tasks(tmp_path / "b")
    monkeypatch.chdir(tmp_path / "a")
    with pytest.raises(OSError, match="connection lost"):
        run_consistent("tasks.jsonl", FailingServer(INSTRUCTIONS), batch_size=5)
    generator = FakeReconstructor(INSTRUCTIONS)
    run_consistent("tasks.jsonl", generator, batch_size=5)
    assert len(generator.prompts) == 9
    monkeypatch.chdir(tmp_path / "b")
    run_consistent("tasks.jsonl", FakeReconstructor(INSTRUCTIONS))
    for name in ("tasks.consistent.jsonl", "tasks.consistent.dropped.jsonl"):
        assert results(tmp_path / "a")[name] == results(tmp_path / "b")[name]


def test_completions_are_regenerated_only_if_their_prompt_or_model_changed(tmp_path, capsys):
    path = make_tasks(tmp_path / "a")
    kept = run_consistent(path, FakeReconstructor(INSTRUCTIONS), threshold=0.5).kept
    rerun = FakeReconstructor(INSTRUCTIONS)
    assert run_consistent(path, rerun, threshold=0.99).kept < kept
    assert rerun.prompts == []
    file = tmp_path / "a" / "tasks.regenerated.jsonl"
    assert f"{file}: reusing 12 of 12 completions (delete the file to regenerate them)" in capsys.readouterr().out
    other_model, other_shots, other_task = (
        FakeReconstructor(INSTRUCTIONS),
        FakeReconstructor(INSTRUCTIONS),
        FakeReconstructor({**INSTRUCTIONS, "New.": "Say new."}),
    )
    run_consistent(path, other_model, model="another")
    run_consistent(path, other_shots, num_shots=1)
    write(path, [*read_lines(path), task("Say new.", "New.")])
    run_consistent(path, other_task)
    assert [len(generator.prompts) for generator in (other_model, other_shots, other_task)] == [12, 12, 1]
    file.write_text('{"key": 3}\n')
    with pytest.raises(ValueError, match=rf"^{file}:1: not a saved completion \(delete the file to regenerate all\)$"):
        run_consistent(path, FakeReconstructor(INSTRUCTIONS))


def test_a_resumed_run_of_a_local_model_equals_an_uninterrupted_one(tmp_path, monkeypatch):
    tokenizer = Tokenizer.tiny()
    torch.manual_seed(0)
    model = GPT(GPTConfig(tokenizer.vocab_size, n_positions=256, n_embd=32, n_layer=2, n_head=2, initializer_range=0.5))
    generator = LocalGenerator(model.eval(), tokenizer)
    for name in ("uninterrupted", "resumed"):
        make_tasks(tmp_path / name)
    monkeypatch.chdir(tmp_path / "uninterrupted")
    run_consistent("tasks.jsonl", generator, max_new_tokens=8, batch_size=4, num_shots=1)
    monkeypatch.chdir(tmp_path / "resumed")
    complete, calls = generator.complete, []

    def interrupt_second_call(*arguments):
        if calls:
            raise KeyboardInterrupt
        calls.append(arguments)
        return complete(*arguments)

    generator.complete = interrupt_second_call
    with pytest.raises(KeyboardInterrupt):
        run_consistent("tasks.jsonl", generator, max_new_tokens=8, batch_size=4, num_shots=1)
    generator.complete = complete
    run_consistent("tasks.jsonl", generator, max_new_tokens=8, batch_size=4, num_shots=1)
    assert results(tmp_path / "resumed") == results(tmp_path / "uninterrupted")
    completions = [row["completion"] for row in read_lines(tmp_path / "resumed" / "tasks.regenerated.jsonl")]
    assert len(completions) == 12 and len(set(completions)) > 1
