"""Curation by meaning: what `unique` keeps; what a model is asked back, and what is left of it after a kill."""

import numpy as np
import pytest
import torch

from minigpt.data.tokenizer import Tokenizer
from minigpt.model.gpt2 import GPT, GPTConfig
from minigpt.selfinstruct.curation.semantic import backwards, consistent, unique
from minigpt.selfinstruct.generators import Completion, LocalGenerator
from minigpt.selfinstruct.request import TaskFormat
from minigpt.selfinstruct.tasks import Task

from .curated import letters, lines, task, write

# ---- unique


def test_unique_keeps_records_whole_and_says_why_the_others_went(tmp_path, capsys):
    records = [
        task("Name a bird.", most_similar_instructions={"Nenne einen Vögel.": 0.5}, request_idx=3, avg=0.25),
        task("Sum up zebras."),
        task("A bird: name!", "Wren."),
        task("Name a bird, a drab one."),
    ]
    path = write(tmp_path / "tasks.jsonl", records)
    before = path.read_bytes()
    assert unique(str(path), letters, threshold=0.9) == (2, 2, {"similar": 2})
    assert path.read_bytes() == before
    assert lines(tmp_path / "tasks.unique.jsonl") == records[:2]
    assert "Vögel" in (tmp_path / "tasks.unique.jsonl").read_text(encoding="utf-8")
    vectors = letters([record["instruction"] for record in records])
    assert lines(tmp_path / "tasks.unique.dropped.jsonl") == [
        {
            "source": f"{path}:{place + 1}",
            "instruction": records[place]["instruction"],
            "reason": "similar",
            "nearest": "Name a bird.",
            "nearest_source": f"{path}:1",
            "score": pytest.approx(float(vectors[0] @ vectors[place]), abs=1e-6),
        }
        for place in (2, 3)
    ]
    assert capsys.readouterr().out == (
        f"{tmp_path}/tasks.unique.jsonl: 2 of 4 records kept; why not the others: "
        f"{tmp_path}/tasks.unique.dropped.jsonl\n"
        f"  similar                 2  {path}:3, {path}:4\n"
    )
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "tasks.jsonl",
        "tasks.unique.dropped.jsonl",
        "tasks.unique.jsonl",
    ]


def test_unique_drops_at_the_threshold_and_keeps_below(tmp_path):
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


class Teller:
    """A generator that tells by the output what the instruction was, as it learned it by heart."""

    def __init__(self, told: dict[str, str], context: int = 1000, stop_after: int | None = None):
        self.told, self.context, self.stop_after = told, context, stop_after
        self.prompts: list[str] = []

    def count(self, text: str) -> int:
        return len(text.split())

    def complete(self, prompts, how, on_arrival=None):
        if self.stop_after is not None and len(self.prompts) >= self.stop_after:
            raise KeyboardInterrupt
        assert {seed for _, seed in prompts} == {42}
        assert (how.settings.temperature, how.settings.num_return_sequences, how.stop) == (0, 1, ("\n###",))
        self.prompts += [text for text, _ in prompts]
        outputs = [text.rpartition("Output:\n")[2].rpartition("\n")[0] for text, _ in prompts]
        found = [[Completion(self.told[output], True)] if output in self.told else [] for output in outputs]
        for place, completions in enumerate(found):
            if on_arrival:  # as a server's generator does; what has arrived is also returned
                on_arrival(place, completions)
        return found


def ask(path, generator, **changes):
    settings = {"model": "teller", "seed_tasks": SEEDS, "task_format": FORMAT, "num_shots": 2, "batch_size": 2}
    return consistent(str(path), generator, letters, **{**settings, **changes})


def test_the_prompt_of_the_docstring():
    asked = Task("What is the capital of France?", "", "Paris.")
    text = backwards(SEEDS[:1], asked, FORMAT)
    shown = backwards.__doc__.partition("\n\n")[2].rpartition("\n\n")[0]
    assert text.splitlines() == [line.removeprefix("        ") for line in shown.splitlines()]
    assert text.endswith("\n2. Instruction:")


def test_the_prompt_with_other_words_and_an_instruction_of_several_lines():
    text = backwards([SEEDS[2]], Task("", "x\ny", "z"), TaskFormat("iio", "Request", "Given", "Answer"))
    assert text.partition("###\n")[2] == (
        "1. Given:\ncat\n1. Answer:\nchat\n1. Request: Translate into French.\n"
        "###\n2. Given:\nx\ny\n2. Answer:\nz\n2. Request:"
    )


def test_consistent_keeps_what_the_model_can_tell(tmp_path, capsys):
    records = [
        task("Name a river.", "The Rhine.", id=1),
        task("Name a mountain.", "Eiger."),
        task("Sum up zebras.", "Striped."),
        task("Tell a joke.", "No."),
        task("Count to ten thousand.", "One two three four five six " * 20),
        task("Refuse.", "A server passes over what is against its rules."),
    ]
    told = {
        "The Rhine.": "  Name a river!\n3. Output: more",
        "Eiger.": "7. Instruction:\nA mountain: name!",  # as chat models do
        "Striped.": " Why is it so cold?",
        "No.": "\n \n",
    }
    path = write(tmp_path / "tasks.jsonl", records)
    curated = ask(path, Teller(told, context=160), threshold=0.9)
    assert curated == (2, 4, {"inconsistent": 1, "no_answer": 2, "too_long": 1})
    assert lines(tmp_path / "tasks.consistent.jsonl") == records[:2]
    first, *others = lines(tmp_path / "tasks.consistent.dropped.jsonl")
    cosine = float(np.prod(letters(["Sum up zebras.", "Why is it so cold?"]), axis=0).sum())
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
    assert "kept at a threshold of 0.3: 2, 0.5: 2, 0.7: 2, 0.9: 2\n" in capsys.readouterr().out


def test_fewer_shots_rather_than_an_overflow_and_never_its_own_answer(tmp_path):
    """ArmelRandy's first output_instruction.py drew shots from the very tasks it asked for, answer included."""
    path = write(tmp_path / "tasks.jsonl", [task(seed.instruction, seed.output, input=seed.input) for seed in SEEDS])
    shown: dict[int, set[int]] = {}
    for context in range(48, 140, 4):
        (tmp_path / "tasks.regenerated.jsonl").unlink(missing_ok=True)
        generator = Teller({}, context)
        ask(path, generator, num_shots=3, max_new_tokens=20)
        for prompt in generator.prompts:
            assert generator.count(prompt) <= context - 20
            others, _, own = prompt.rpartition("###\n")
            [entry] = [seed for seed in SEEDS if f"Output:\n{seed.output}\n" in own]
            assert f"Output:\n{entry.output}\n" not in others
            shown.setdefault(context, set()).add(others.count("Output:"))
    assert min(shown) > 48 and shown[136] == {3} and {1, 2} in shown.values()
    assert [max(counts) for counts in shown.values()] == sorted(max(counts) for counts in shown.values())


TOLD = {f"Output {i}, {'very ' * (i % 4)}long.": f"Make output {'abcdefgh'[i % 8] * i}." for i in range(12)}


def make_tasks(folder):
    folder.mkdir(parents=True)
    return write(folder / "tasks.jsonl", [task(f"Make output {i}.", output) for i, output in enumerate(TOLD)])


def results(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_killed_run_goes_on_where_it_was(tmp_path, monkeypatch):
    """Whenever it is killed, also in the middle of a line; what the model said already is not asked for again."""
    make_tasks(tmp_path / "whole")
    everything = Teller(TOLD)
    monkeypatch.chdir(tmp_path / "whole")
    ask("tasks.jsonl", everything, batch_size=5)
    expected = results(tmp_path / "whole")
    assert len(everything.prompts) == len(lines(tmp_path / "whole" / "tasks.regenerated.jsonl")) == 12
    for stop_after, torn in (0, 0), (1, 0), (5, 1), (10, 40), (11, 1):
        folder = tmp_path / f"killed-{stop_after}"
        make_tasks(folder)
        monkeypatch.chdir(folder)
        before, after = Teller(TOLD, stop_after=stop_after), Teller(TOLD)
        if stop_after <= 10:
            with pytest.raises(KeyboardInterrupt):
                ask("tasks.jsonl", before, batch_size=5)
            assert "tasks.consistent.jsonl" not in results(folder)
        else:
            ask("tasks.jsonl", before, batch_size=5)
        file = folder / "tasks.regenerated.jsonl"
        file.write_bytes(file.read_bytes()[: -torn or None])
        ask("tasks.jsonl", after, batch_size=5)
        assert results(folder) == expected
        assert before.prompts[: len(before.prompts) - (torn > 0)] + after.prompts == everything.prompts


def test_what_a_server_answered_is_kept_when_it_fails(tmp_path, monkeypatch):
    """Of a batch some answers arrive before the error; they were paid for."""

    class Failing(Teller):
        def complete(self, prompts, how, on_arrival=None):
            found = super().complete(prompts, how)
            for place in (2, 0, 1):
                on_arrival(place, found[place])
            raise OSError("the server is gone")

    make_tasks(tmp_path / "a")
    make_tasks(tmp_path / "b")
    monkeypatch.chdir(tmp_path / "a")
    with pytest.raises(OSError, match="the server is gone"):
        ask("tasks.jsonl", Failing(TOLD), batch_size=5)
    generator = Teller(TOLD)
    ask("tasks.jsonl", generator, batch_size=5)
    assert len(generator.prompts) == 9
    monkeypatch.chdir(tmp_path / "b")
    ask("tasks.jsonl", Teller(TOLD))
    for name in ("tasks.consistent.jsonl", "tasks.consistent.dropped.jsonl"):
        assert results(tmp_path / "a")[name] == results(tmp_path / "b")[name]


def test_only_what_changed_is_asked_again(tmp_path, capsys):
    path = make_tasks(tmp_path / "a")
    kept = ask(path, Teller(TOLD), threshold=0.5).kept
    again = Teller(TOLD)
    assert ask(path, again, threshold=0.99).kept < kept
    assert again.prompts == []
    file = tmp_path / "a" / "tasks.regenerated.jsonl"
    assert f"{file}: 12 of 12 answers are there already (delete the file to ask anew)" in capsys.readouterr().out
    other_model, other_shots, other_task = Teller(TOLD), Teller(TOLD), Teller({**TOLD, "New.": "Say new."})
    ask(path, other_model, model="another")
    ask(path, other_shots, num_shots=1)
    write(path, [*lines(path), task("Say new.", "New.")])
    ask(path, other_task)
    assert [len(teller.prompts) for teller in (other_model, other_shots, other_task)] == [12, 12, 1]
    file.write_text('{"key": 3}\n')
    with pytest.raises(ValueError, match=rf"^{file}:1: not an answer \(delete the file to ask anew\)$"):
        ask(path, Teller(TOLD))


def test_a_local_model_asked_in_parts_says_the_same(tmp_path, monkeypatch):
    tokenizer = Tokenizer.tiny()
    torch.manual_seed(0)
    model = GPT(GPTConfig(tokenizer.vocab_size, n_positions=256, n_embd=32, n_layer=2, n_head=2, initializer_range=0.5))
    generator = LocalGenerator(model.eval(), tokenizer)
    for name in ("whole", "parts"):
        make_tasks(tmp_path / name)
    monkeypatch.chdir(tmp_path / "whole")
    ask("tasks.jsonl", generator, max_new_tokens=8, batch_size=4, num_shots=1)
    monkeypatch.chdir(tmp_path / "parts")
    complete, calls = generator.complete, []

    def once(*arguments):
        if calls:
            raise KeyboardInterrupt
        calls.append(arguments)
        return complete(*arguments)

    generator.complete = once
    with pytest.raises(KeyboardInterrupt):
        ask("tasks.jsonl", generator, max_new_tokens=8, batch_size=4, num_shots=1)
    generator.complete = complete
    ask("tasks.jsonl", generator, max_new_tokens=8, batch_size=4, num_shots=1)
    assert results(tmp_path / "parts") == results(tmp_path / "whole")
    said = [row["completion"] for row in lines(tmp_path / "parts" / "tasks.regenerated.jsonl")]
    assert len(said) == 12 and len(set(said)) > 1
