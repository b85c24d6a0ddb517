"""Curation against plain double loops, and what it leaves behind when it is killed."""

import errno
import gzip
import json
import random
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer

from minigpt.data.tokenizer import Tokenizer
from minigpt.model.gpt2 import GPT, GPTConfig
from minigpt.selfinstruct.curation import backwards, consistent, lint, read_entries, unique
from minigpt.selfinstruct.embed import Embedder, nearest_kept
from minigpt.selfinstruct.generators import Completion, GeneratorArguments, How, LocalGenerator
from minigpt.selfinstruct.request import TaskFormat
from minigpt.selfinstruct.tasks import Task

FORMAT = TaskFormat()
SEEDS = [
    Task("Add.", "1 2", "3"),
    Task("Name a bird.", "", "A wren."),
    Task("Translate\n into French.", "cat", "chat"),
    Task("Write a haiku\nabout rain.", "", "Grey roofs\nlisten."),
]


def letters(texts) -> np.ndarray:
    """How often each letter stands in a text, as a unit vector: near where the letters are the same."""
    counts = np.array([[text.lower().count(chr(97 + i)) for i in range(26)] for text in texts], np.float32)
    counts = counts.reshape(-1, 26)
    return counts / np.linalg.norm(counts, axis=1, keepdims=True)


def task(instruction: str, output: str = "So.", **more) -> dict:
    return {"instruction": instruction, "input": "", "output": output, **more}


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ---- vectors


def test_the_example_of_the_docstring():
    """ArmelRandy's unique_post_processing.py compares with what was dropped too: there the third goes as well."""
    vectors = np.array([[1, 0], [0.8, 0.6], [0, 1]], np.float32)
    nearest, cosines = nearest_kept(vectors, 0.5)
    assert nearest.tolist() == [-1, 0, 0]
    assert cosines.tolist() == [-np.inf, np.float32(0.8), 0.0]
    assert nearest_kept(vectors, 0.8)[0].tolist() == [-1, 0, 0]  # at the threshold is too near
    assert nearest_kept(vectors, 0.81)[0].tolist() == [-1, 0, 1]


def test_of_equally_near_ones_the_first_counts():
    vectors = np.array([[1, 0], [0, 1], [0.5**0.5, 0.5**0.5]], np.float32)
    assert nearest_kept(vectors, 0.9)[0].tolist() == [-1, 0, 0]


@pytest.mark.parametrize("threshold", [0.3, 0.6, 0.9, 1.0])
def test_blocks_give_what_a_double_loop_gives(threshold):
    vectors = np.random.default_rng(1).normal(size=(1100, 6))  # 4 blocks and a bit; by 0.3 few are kept, by 1 all
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    kept, expected = [], []
    for place, vector in enumerate(vectors):
        near = max(((float(vector @ vectors[other]), -other) for other in kept), default=(-np.inf, 1))
        expected.append((-near[1], near[0]))
        if near[0] < threshold:
            kept.append(place)
    assert min(abs(cosine - threshold) for _, cosine in expected[1:]) > 1e-6  # fp32 takes the same decisions
    nearest, cosines = nearest_kept(vectors.astype(np.float32), threshold)
    assert nearest.tolist() == [place for place, _ in expected]
    np.testing.assert_allclose(cosines, [cosine for _, cosine in expected], atol=1e-6)


def test_the_full_matrix_is_never_there():
    vectors = np.eye(4, dtype=np.float32)[np.arange(8000) % 4]
    distinct = np.random.default_rng(0).normal(size=(8000, 64)).astype(np.float32)
    distinct /= np.linalg.norm(distinct, axis=1, keepdims=True)
    tracemalloc.start()
    assert (nearest_kept(vectors, 0.5)[1] < 0.5).sum() == 4
    assert (nearest_kept(distinct, 0.9)[1] < 0.9).all()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6  # 8000 x 8000 in fp32 are 256 MB


# ---- files


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


def test_a_full_disk_leaves_the_old_results(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", [task("One."), task("One."), task("Two.")])
    lint(str(path))
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    write_bytes = Path.write_bytes

    def full(self, text, **_):
        write_bytes(self, text.encode()[:10])
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match=rf"^{tmp_path}: cannot be written to \(No space left on device\); --output_dir"):
        lint(str(path), threshold=0.1)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_half_of_a_surrogate_pair_in_an_extra_key_stays(tmp_path):
    """Cut in the middle of an emoji: JSON holds it as \\ud83d, UTF-8 cannot, and the whole run was lost to it."""
    path = write(tmp_path / "a.jsonl", [task("Smile. ☺", note="cut \ud83d here")])
    assert lint(str(path)).kept == 1
    assert lines(tmp_path / "a.lint.jsonl") == lines(path)


RECORDS = {
    "alpaca": (task("Name it.", "Paris.", input="France"), ("Name it.", "France", ("Paris.",))),
    "no input": (task("Name it.", "Paris.", input="<noinput>"), ("Name it.", "", ("Paris.",))),
    "pair": ({"prompt": "Hi.", "completion": "Hello.", "id": 7}, ("Hi.", "", ("Hello.",))),
    "chat": (
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Name it.", "input": "France"},
                {"role": "assistant", "content": "Paris."},
                {"role": "user", "content": "And of Spain?"},
                {"role": "assistant", "content": "Madrid."},
            ],
            "instances": "of something else",
        },
        ("Name it.\nAnd of Spain?", "France", ("Paris.", "Madrid.")),
    ),
    "seed task": (
        {
            "id": "seed_1",
            "instruction": "Name it.",
            "instances": [{"input": "France", "output": "Paris."}, {"input": "Spain", "output": "Madrid."}],
        },
        ("Name it.", "France\nSpain", ("Paris.", "Madrid.")),
    ),
    "turns in a text": ({"text": "Human: Hi.\nHugChat: Hello."}, ("Hi.", "", ("Hello.",))),
}


def test_any_format_comes_through_as_it_was(tmp_path):
    """Records of several conversations (seed tasks) must not shift those behind them."""
    records = [record for record, _ in RECORDS.values()] * 2
    path = write(tmp_path / "mixed.jsonl", records)
    entries, base = read_entries(path)
    assert base == tmp_path / "mixed"
    assert [entry[2:] for entry in entries] == [said for _, said in RECORDS.values()] * 2
    assert [entry.source for entry in entries] == [f"{path}:{line + 1}" for line in range(len(records))]
    unique(str(path), lambda texts: np.eye(len(texts), dtype=np.float32))
    assert lines(tmp_path / "mixed.unique.jsonl") == records


def test_a_dataset_on_one_line_and_a_packed_array(tmp_path):
    pairs = [{"input": "Hi.", "output": "Hello."}, {"input": "Bye.", "output": "So long."}]
    path = tmp_path / "lmflow.json"
    path.write_text(json.dumps({"type": "text2text", "instances": pairs}))
    assert [entry.record for entry in read_entries(path)[0]] == pairs
    packed = tmp_path / "alpaca.v1.json.gz"
    packed.write_bytes(gzip.compress(json.dumps(pairs, indent=1).encode("utf-8-sig")))
    entries, base = read_entries(packed, str(tmp_path / "out"))
    assert [entry.record for entry in entries] == pairs
    assert base == tmp_path / "out" / "alpaca.v1"


def test_what_cannot_be_curated_is_refused_in_one_line(tmp_path):
    path = write(tmp_path / "a.jsonl", [task("Hi."), {"text": "Once upon a time."}])
    with pytest.raises(ValueError, match=rf"^{path}:2: plain text, expected a question and its answer$"):
        lint(str(path))
    (tmp_path / "b.jsonl").write_text('{"instruction": "Hi."}\n')
    with pytest.raises(ValueError, match=r'b.jsonl:1: "output" is missing'):
        lint(str(tmp_path / "b.jsonl"))
    with pytest.raises(ValueError, match=rf"^{tmp_path}: 2 files; curation takes one at a time$"):
        lint(str(tmp_path))
    for threshold in (0, 1.5):
        with pytest.raises(ValueError, match=rf"^threshold must be above 0 and at most 1, got {threshold}$"):
            unique(str(tmp_path / "b.jsonl"), letters, threshold=threshold)
        with pytest.raises(ValueError, match=rf"^threshold must be above 0 and at most 1, got {threshold}$"):
            lint(str(write(tmp_path / "c.jsonl", [task("Hi.")])), threshold=threshold)


def test_a_file_of_the_hub_needs_a_place_for_the_results():
    """Beside it would be in the hub's cache. Refused before anything is fetched."""
    with pytest.raises(ValueError, match=r"^hf://datasets/owner/tasks/a.jsonl: lies on the hub; --output_dir says"):
        lint("hf://datasets/owner/tasks/a.jsonl")


# ---- consistency


class Teller:
    """A generator that tells by the output what the instruction was, as it learned it by heart."""

    def __init__(self, told: dict[str, str], context: int = 1000, stop_after: int | None = None):
        self.told, self.context, self.stop_after = told, context, stop_after
        self.how = How(GeneratorArguments(max_length=512, temperature=0.7, num_return_sequences=3))
        self.prompts: list[str] = []

    def count(self, text: str) -> int:
        return len(text.split())

    def complete(self, prompts, seeds, on_arrival, how):
        if self.stop_after is not None and len(self.prompts) >= self.stop_after:
            raise KeyboardInterrupt
        assert set(seeds) == {42} and len(seeds) == len(prompts)
        assert (how.settings.temperature, how.settings.num_return_sequences, how.stop) == (0, 1, ("\n###",))
        self.prompts += prompts
        outputs = [prompt.rpartition("Output:\n")[2].rpartition("\n")[0] for prompt in prompts]
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
        def complete(self, prompts, seeds, on_arrival, how):
            found = super().complete(prompts, seeds, None, how)
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
    generator = LocalGenerator(model.eval(), tokenizer, How(GeneratorArguments(request_batch_size=4)))
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


# ---- lint


def found_by_lint(path, **settings) -> Counter:
    lint(str(path), **settings)
    file = path.with_name(f"{path.stem}.lint.dropped.jsonl")
    return Counter((int(row["source"].rpartition(":")[2]), row["reason"]) for row in lines(file))


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
    assert found_by_lint(path, eval_data=[tmp_path / "test.jsonl"]) == Counter(
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
    assert lines(tmp_path / "tasks.lint.jsonl") == [records[i - 1] for i in (1, 5, 9, 12, 13, 15)]
    why = {(row["source"], row["reason"]): row for row in lines(tmp_path / "tasks.lint.dropped.jsonl")}
    gram = why[f"{path}:8", "evaluation"]
    assert (gram["nearest"], gram["nearest_source"], gram["score"]) == (LONG, f"{tmp_path}/test.jsonl:2", None)
    assert why[f"{path}:7", "evaluation"]["nearest_source"] == f"{tmp_path}/test.jsonl:1"
    near = why[f"{path}:14", "near_duplicate"]
    assert (near["nearest"], near["nearest_source"]) == (records[12]["instruction"], f"{path}:13")
    assert (
        near["score"] == RougeScorer(["rougeL"]).score(near["nearest"], near["instruction"])["rougeL"].fmeasure == 0.9
    )
    assert capsys.readouterr().out == (
        f"{tmp_path}/tasks.lint.jsonl: 6 of 16 records kept; why not the others: {tmp_path}/tasks.lint.dropped.jsonl\n"
        f"  empty_output            2  {path}:2, {path}:16\n"
        f"  link                    3  {path}:3, {path}:4, {path}:16\n"
        f"  input_is_output         1  {path}:6\n"
        f"  evaluation              3  {path}:7, {path}:8, {path}:10\n"
        f"  repeated                1  {path}:11\n"
        f"  near_duplicate          1  {path}:14\n"
        f"  shortest output        2 characters: {path}:2\n"
        f"  longest output       90 characters: {path}:8\n"
    )


def test_what_goes_itself_takes_nothing_with_it(tmp_path):
    """The first of two alike has no answer: the second stays."""
    path = write(tmp_path / "a.jsonl", [task("Say hi.", ""), task("Say hi.", "Hi."), task("Say hi.", "Ho.")])
    assert found_by_lint(path) == {(1, "empty_output"): 1, (3, "repeated"): 1}


def test_one_empty_answer_of_several_is_one(tmp_path):
    instances = [{"input": "a", "output": "A."}, {"input": "b", "output": ""}]
    path = write(tmp_path / "a.jsonl", [{"instruction": "Say it.", "instances": instances}])
    assert found_by_lint(path) == {(1, "empty_output"): 1}


def test_neighbours_in_any_script(tmp_path):
    """rouge_score's own tokens are a-z and 0-9: by them no two Chinese questions have anything in common."""
    path = write(tmp_path / "a.jsonl", [task("请写一首关于猫的短诗。"), task("请写一首关于狗的短诗!")])
    assert found_by_lint(path) == {(2, "near_duplicate"): 1}


@pytest.mark.parametrize("seed", range(4))
def test_lint_gives_what_plain_loops_give(tmp_path, seed):
    """Short texts over few words, so that everything occurs: repeats, neighbours, runs of 13 words."""
    random_ = random.Random(seed)

    def text(low, high):
        return " ".join(random_.choices(("aa", "bb", "cc"), k=random_.randint(low, high)))

    def record(longest):
        return task(text(0, 9), text(0, longest), input=random_.choice(["", text(1, 3)]))

    records = [record(20) for _ in range(150)]
    exam = [record(16) for _ in range(8)] + [task(text(5, 9), row["output"] + " cc") for row in records[:20]]
    path, test_path = write(tmp_path / "a.jsonl", records), write(tmp_path / "exam.jsonl", exam)

    def question(row):
        return " ".join(f"{row['instruction']} {row['input']}".split())

    def has_run(row, other):
        for mine in (question(row).split(), row["output"].split()):
            for theirs in (question(other).split(), other["output"].split()):
                for i in range(len(mine) - 12):
                    if any(mine[i : i + 13] == theirs[j : j + 13] for j in range(len(theirs) - 12)):
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
        if any(question(row) == question(other) or has_run(row, other) for other in exam):
            reasons.append("evaluation")
        if not reasons:
            if any((row["instruction"], row["input"]) == (k["instruction"], k["input"]) for k in kept):
                reasons.append("repeated")
            elif any(scorer.score(question(k), question(row))["rougeL"].fmeasure >= 0.8 for k in kept):
                reasons.append("near_duplicate")
            else:
                kept.append(row)
        expected.update((line, reason) for reason in reasons)
    assert found_by_lint(path, eval_data=str(test_path), threshold=0.8) == expected
    assert lines(tmp_path / "a.lint.jsonl") == kept
    assert {reason for _, reason in expected} >= {"empty_output", "evaluation", "repeated", "near_duplicate"}


# ---- embeddings


@pytest.fixture(scope="module")
def bert(tmp_path_factory, sentence_transformers):
    """A tiny random BERT, as transformers writes it."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
    (folder / "vocab.txt").write_text("\n".join([*words, *(f"##{letter}" for letter in words[5:])]))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=57,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        initializer_range=0.5,
    )
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sentence_transformers():
    return pytest.importorskip(
        "sentence_transformers",
        reason="sentence-transformers is not installed: pip install -c constraints.txt -e '.[curation]'",
    )


TEXTS = [
    "Name a bird.",
    "Sum",
    "a much longer sentence that is about nothing at all",
    "name a bird",
    "Add two numbers.",
]


def test_embeddings_are_mean_hidden_states_whatever_the_batch(bert, sentence_transformers, tmp_path):
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = AutoModel.from_pretrained(bert).eval(), AutoTokenizer.from_pretrained(bert)
    expected = []
    for text in TEXTS:  # one by one: no padding
        with torch.no_grad():
            mean = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
        expected.append((mean / mean.norm()).numpy())
    vectors = Embedder(bert, device="cpu", batch_size=2)(TEXTS)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    sentence_transformers.SentenceTransformer(str(bert), device="cpu").save(str(tmp_path / "saved"))
    np.testing.assert_allclose(Embedder(str(tmp_path / "saved"), device="cpu")(TEXTS), expected, atol=1e-5)
    assert Embedder(bert, device="cpu")([]).shape == (0, 0)


def test_an_exported_gpt2_can_embed_too(sentence_transformers, tmp_path):
    """Its tokenizer has no padding token, without which transformers takes no batch."""
    tokenizer = Tokenizer.tiny()
    torch.manual_seed(0)
    eot = {"bos_token_id": tokenizer.eot_id, "eos_token_id": tokenizer.eot_id}
    model = GPT(GPTConfig(tokenizer.vocab_size, 64, 32, 2, 2, initializer_range=0.5, **eot)).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    hidden = []
    model.ln_f.register_forward_hook(lambda module, inputs, output: hidden.append(output[0].mean(0)))
    with torch.no_grad():
        for text in TEXTS:
            model(torch.tensor([tokenizer.encode(text)]))
    expected = [(mean / mean.norm()).numpy() for mean in hidden]
    np.testing.assert_allclose(Embedder(tmp_path, device="cpu")(TEXTS), expected, atol=1e-5)


def test_unique_by_a_real_model(bert, sentence_transformers, tmp_path):
    embed = Embedder(bert, device="cpu")
    records = [task(text) for text in [*TEXTS, *TEXTS]]
    path = write(tmp_path / "a.jsonl", records)
    threshold = float((embed(TEXTS) @ embed(TEXTS).T - 2 * np.eye(5)).max()) + 1e-4
    assert threshold < 0.999 and embed(TEXTS[:1]) @ embed(TEXTS[:1]).T > threshold
    assert unique(str(path), embed, threshold=threshold) == (5, 5, {"similar": 5})
    assert lines(tmp_path / "a.unique.jsonl") == records[:5]


def test_without_the_package_the_extra_is_named(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ValueError, match=rf"^{tmp_path}: embeddings need sentence-transformers \(pip"):
        Embedder(tmp_path)


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"^{tmp_path}: neither modules.json nor config.json, so this is not"):
        Embedder(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere/to/be: no such folder"):
        Embedder("nowhere/to/be")


def test_a_damaged_model_is_one_line(bert, sentence_transformers, tmp_path):
    (tmp_path / "config.json").write_bytes((bert / "config.json").read_bytes())
    with pytest.raises(ValueError, match=rf"^{tmp_path}: sentence-transformers cannot read it \("):
        Embedder(tmp_path, device="cpu")
