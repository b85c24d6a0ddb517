"""Curation: which records of an instruction file are worth keeping.

`unique` and `consistent` are the post-processing of github.com/ArmelRandy/Self-instruct: a task goes when it means
what one kept before means, and when a model that is shown its output cannot tell its instruction. `lint` finds what
no model is needed for. Each reads a file in any format of `data.records`, leaves it alone, and writes beside it

- `NAME.MODE.jsonl`: the records that stay, in their order and with all their keys;
- `NAME.MODE.dropped.jsonl`: a line for each reason against each other record, `{"source", "instruction", "reason",
  "nearest", "nearest_source", "score"}`, where the nearest is the text that it is too near to, or not near enough.
"""

import hashlib
import json
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minigpt.data.order import deal
from minigpt.data.records import Conversation, read_records
from minigpt.data.streams import Paths, find_data_files, read_values
from minigpt.distributed import progress_bar, say
from minigpt.files import whole_file, writing_to
from minigpt.selfinstruct.embed import nearest_kept
from minigpt.selfinstruct.generators import Completion, Generator, GeneratorArguments, How, fit_shots
from minigpt.selfinstruct.novelty import NoveltyFilter, unicode_words
from minigpt.selfinstruct.request import TaskFormat
from minigpt.selfinstruct.tasks import Task

Embed = Callable[[Sequence[str]], np.ndarray]
GRAM = 13  # words in common that mean more than chance (Brown et al. 2020, arXiv:2005.14165, appendix C)
CHECKS = ("empty_output", "link", "input_is_output", "evaluation", "repeated", "near_duplicate")
SHOWN = 3  # places named for each reason
_LINK = re.compile(r"\b(?:https?://|www\.)\w", re.IGNORECASE)
_BACKWARDS = "Tasks written backwards: first what came out, then the instruction that asked for it.\n\n"


class Entry(NamedTuple):
    """A record and what it says. Of several turns, or instances, the texts are joined by line feeds."""

    source: str  # FILE:LINE
    record: dict[str, Any]
    instruction: str
    input: str
    outputs: tuple[str, ...]

    @property
    def output(self) -> str:
        return "\n".join(self.outputs)

    @property
    def question(self) -> str:
        """The instruction and the input: the same instruction may be put to many inputs."""
        return f"{self.instruction}\n{self.input}" if self.input else self.instruction


class Drop(NamedTuple):
    """Why a record does not stay."""

    place: int  # of the entry
    reason: str
    nearest: str | None = None
    nearest_source: str | None = None
    score: float | None = None


class Curated(NamedTuple):
    """What came of it."""

    kept: int
    dropped: int
    reasons: dict[str, int]  # how many records each speaks against; there may be several against one


def read_entries(path: str | Path, output_dir: str | None = None) -> tuple[list[Entry], Path]:
    """The questions and answers of one file, and the path that the names of the results begin with.

    `data/alpaca.json.gz` gives `data/alpaca`, and with the output_dir `out`, `out/alpaca`.

    Raises:
        ValueError: the path leads to several files, or to the hub without an output_dir; a record cannot be read, or
            is plain text.
    """
    if output_dir is None and str(path).startswith("hf://"):
        raise ValueError(f"{path}: lies on the hub; --output_dir says where the results go")
    file, *others = find_data_files(path)
    if others:
        raise ValueError(f"{path}: {1 + len(others)} files; curation takes one at a time")
    conversations = read_records(file)
    entries = []
    for line, record in read_values(file):
        several = isinstance(record, dict) and "messages" not in record and record.get("instances")
        found = list(islice(conversations, len(several) if several else 1))  # a bad record is an error here
        if found[0].messages[0]["role"] == "text":
            raise ValueError(f"{file}:{line}: plain text, expected a question and its answer")
        entries.append(_entry(record, found))
    return entries, Path(output_dir or file.parent) / Path(file.name.removesuffix(".gz")).stem


def _entry(record: dict[str, Any], conversations: Sequence[Conversation]) -> Entry:
    messages = [message for conversation in conversations for message in conversation.messages]
    questions = [message for message in messages if message["role"] in ("user", "text")]
    return Entry(
        source=conversations[0].source,
        record=record,
        instruction="\n".join(dict.fromkeys(question["content"] for question in questions)),
        input="\n".join(question["input"] for question in questions if "input" in question),
        outputs=tuple(message["content"] for message in messages if message["role"] == "assistant"),
    )


def unique(path: str, embed: Embed, *, threshold: float = 0.5, output_dir: str | None = None) -> Curated:
    """Keeps the instructions whose cosine with every one kept before is below the threshold.

    Args:
        embed: texts to unit vectors, (N,C) in float32, such as an `Embedder`.
        threshold: of the cosine, above 0 and at most 1.
        output_dir: where the two files go; None is beside the instruction file.
    """
    _check_threshold(threshold)
    entries, base = read_entries(path, output_dir)
    nearest, cosines = nearest_kept(embed([entry.instruction for entry in entries]), threshold)
    drops = [
        Drop(place, "similar", entries[other].instruction, entries[other].source, float(cosine))
        for place, (other, cosine) in enumerate(zip(nearest, cosines, strict=True))
        if cosine >= threshold
    ]
    return _write(base, "unique", entries, drops, ("similar",))


def consistent(
    path: str,
    generator: Generator,
    embed: Embed,
    *,
    model: str,
    seed_tasks: Sequence[Task],
    task_format: TaskFormat,
    num_shots: int = 8,
    max_new_tokens: int = 64,
    threshold: float = 0.5,
    batch_size: int = 8,
    seed: int = 42,
    output_dir: str | None = None,
) -> Curated:
    """Keeps the tasks whose instruction a model can tell from the output, and the input where there is one.

    The two instructions' cosine must reach the threshold. What the model says is appended to `NAME.regenerated.jsonl`
    as it comes: a run that was killed goes on from there, and one with another threshold asks nothing.

    Args:
        generator: asked greedily, whatever its own way is.
        embed: texts to unit vectors, (N,C) in float32, such as an `Embedder`.
        model: the generator's name; what another one said does not count.
        seed_tasks: where the shots are drawn from, the same for every task, but for the task itself.
        task_format: the trigger words.
        num_shots: fewer are shown where the context is too short for all.
        max_new_tokens: room for the instruction.
        threshold: of the cosine, above 0 and at most 1.
        batch_size: tasks asked together, alike in length.
        output_dir: where the files go; None is beside the instruction file.
    """
    _check_threshold(threshold)
    entries, base = read_entries(path, output_dir)
    shots = random.Random(seed).sample(seed_tasks, len(seed_tasks))
    prompts: dict[int, str] = {}
    for place, entry in enumerate(entries):
        others = [shot for shot in shots if shot.instruction != entry.instruction][:num_shots]
        asked = Task(entry.instruction, entry.input, entry.output)
        render = partial(backwards, asked=asked, task_format=task_format)
        if fitted := fit_shots(generator, render, others, max_new_tokens):
            prompts[place] = fitted[1]
    greedy = GeneratorArguments(max_length=max_new_tokens, request_batch_size=batch_size, temperature=0.0)
    asked_by = {prompt: entries[place] for place, prompt in prompts.items()}
    said = _ask(base, generator, How(greedy, ("\n###",)), model, asked_by, seed)
    told = {place: _told(said[prompt], task_format) for place, prompt in prompts.items()}
    answered = {place: instruction for place, instruction in told.items() if instruction}
    vectors = embed([entries[place].instruction for place in answered] + list(answered.values()))
    cosines = (vectors[: len(answered)] * vectors[len(answered) :]).sum(-1)  # (2N,C) -> (N,)
    scores = dict(zip(answered, cosines, strict=True))
    drops = []
    for place in range(len(entries)):
        if place not in prompts:
            drops.append(Drop(place, "too_long"))
        elif place not in answered:
            drops.append(Drop(place, "no_answer"))
        elif not scores[place] >= threshold:
            drops.append(Drop(place, "inconsistent", answered[place], score=float(scores[place])))
    curated = _write(base, "consistent", entries, drops, ("inconsistent", "no_answer", "too_long"))
    say("  kept at a threshold of " + ", ".join(f"{t}: {int((cosines >= t).sum()):,}" for t in (0.3, 0.5, 0.7, 0.9)))
    return curated


def backwards(shots: Sequence[Task], asked: Task, task_format: TaskFormat) -> str:
    """The prompt that asks for a task's instruction. With the shot ("Add.", "1 2", "3") and the output "Paris.":

        Tasks written backwards: first what came out, then the instruction that asked for it.

        ###
        1. Input:
        1 2
        1. Output:
        3
        1. Instruction: Add.
        ###
        2. Output:
        Paris.
        2. Instruction:

    An instruction takes one line, and so does the answer.
    """
    text = _BACKWARDS
    for number, task in enumerate([*shots, asked], 1):
        context = f"{number}. {task_format.input}:\n{task.input}\n" if task.input else ""
        text += f"###\n{context}{number}. {task_format.output}:\n{task.output}\n{number}. {task_format.instruction}:"
        if number <= len(shots):
            text += f" {' '.join(task.instruction.split())}\n"
    return text


def _told(completion: str, task_format: TaskFormat) -> str:
    """The instruction in a completion; chat models write `2. Instruction:` once more before it."""
    text = re.sub(rf"\A[\W\d]*{re.escape(task_format.instruction)}\s*:", "", completion)
    return text.strip().partition("\n")[0].rstrip()


def _ask(
    base: Path, generator: Generator, how: How, model: str, prompts: dict[str, Entry], seed: int
) -> dict[str, str]:
    """What the model says to each prompt, from the file as far as it is there.

    Batches are dealt before it is known what is there, so that a run that was killed goes on with the same ones.
    """
    file = base.with_name(f"{base.name}.regenerated.jsonl")
    asker = f"{model}, {how.settings.max_length} tokens"
    keys = {prompt: hashlib.sha256(f"{asker}\n{prompt}".encode()).hexdigest() for prompt in prompts}
    known = _read_answers(file)
    if done := sum(key in known for key in keys.values()):
        say(f"{file}: {done:,} of {len(keys):,} answers are there already (delete the file to ask anew)")
    asked = list(prompts)

    def keep(batch: list[str], place: int, completions: list[Completion]) -> None:
        prompt = batch[place]
        if keys[prompt] not in known:
            known[keys[prompt]] = text = completions[0].text if completions else ""  # a server refused it
            names = {"source": prompts[prompt].source, "instruction": prompts[prompt].instruction}
            out.write(_line({**names, "completion": text, "key": keys[prompt]}))
            out.flush()

    base.parent.mkdir(parents=True, exist_ok=True)
    bar = progress_bar(len(asked), "task", "asking back")
    with writing_to(base.parent, "--output_dir"), file.open("a", encoding="utf-8") as out, bar:
        for places in deal([generator.count(prompt) for prompt in asked], how.settings.request_batch_size):
            batch = [asked[place] for place in places if keys[asked[place]] not in known]
            found = generator.complete(batch, [seed] * len(batch), partial(keep, batch), how) if batch else []
            for place, completions in enumerate(found):
                keep(batch, place, completions)
            bar.update(len(places))
    return {prompt: known[key] for prompt, key in keys.items()}


def _read_answers(file: Path) -> dict[str, str]:
    """Key -> answer. Half a last line, which a kill leaves, is cut off the file."""
    if not file.exists():
        return {}
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(file, len(whole))
    answers = {}
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            values = json.loads(line)
            answers[values["key"]] = values["completion"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{file}:{number}: not an answer (delete the file to ask anew)") from None
    return answers


def lint(path: str, *, eval_data: Paths = (), threshold: float = 0.7, output_dir: str | None = None) -> Curated:
    """Keeps the records that no check speaks against.

    - empty_output: an answer of blanks.
    - link: http://, https:// or www. in the question or the answer.
    - input_is_output: the same, case and blanks aside.
    - evaluation: the question of an evaluation record, case and blanks aside, or 13 words in a row of its question or
      its answer.
    - repeated, near_duplicate: instruction and input equal those of a record kept before, or their ROUGE-L with one is
      at the threshold or above.

    Args:
        eval_data: what the model will be judged on: files, folders, globs, in any of the known formats.
        threshold: of the F-measure of ROUGE-L, above 0 and at most 1.
        output_dir: where the two files go; None is beside the instruction file.
    """
    entries, base = read_entries(path, output_dir)
    evaluation, pool = _Evaluation(eval_data), NoveltyFilter(threshold, unicode_words)
    kept: dict[str, str] = {}  # question -> where it stands
    drops: list[Drop] = []
    with progress_bar(len(entries), "task", "checking") as bar:
        for place, (source, _, _, context, outputs) in enumerate(entries):
            question, answer = entries[place].question, entries[place].output
            found = []
            if not all(output.strip() for output in outputs):
                found.append(Drop(place, "empty_output"))
            if _LINK.search(question) or _LINK.search(answer):
                found.append(Drop(place, "link"))
            if context and _plain(context) == _plain(answer):
                found.append(Drop(place, "input_is_output"))
            if shared := evaluation.shared(question, answer):
                found.append(Drop(place, "evaluation", *shared))
            if not found and question in kept:  # what goes for another fault stands for nothing
                found.append(Drop(place, "repeated", question, kept[question], 1.0))
            elif not found and pool.highest(question) >= threshold:
                nearest, score = next(iter(pool.check(question).neighbours.items()))
                found.append(Drop(place, "near_duplicate", nearest, kept[nearest], score))
            if not found:
                kept[question] = source
                pool.add(question)
            drops += found
            bar.update()
    curated = _write(base, "lint", entries, drops, CHECKS)
    by_length = sorted(entries, key=lambda entry: len(entry.output))
    for name, entry in ("shortest", by_length[0]), ("longest", by_length[-1]):
        say(f"  {name} output {len(entry.output):8,} characters: {entry.source}")
    return curated


class _Evaluation:
    """The questions of evaluation data, and its runs of 13 words."""

    def __init__(self, paths: Paths):
        self.questions: dict[str, str] = {}  # as _plain writes them -> where they stand
        self.grams: dict[str, str] = {}  # 13 words -> where they stand
        for conversation in read_records(paths):
            entry = _entry({}, [conversation])
            self.questions.setdefault(_plain(entry.question), entry.source)
            for gram in _grams(entry.question) + _grams(entry.output):
                self.grams.setdefault(gram, entry.source)

    def shared(self, question: str, answer: str) -> tuple[str, str] | None:
        """What a record shares with it, and where that stands."""
        if source := self.questions.get(_plain(question)):
            return question, source
        grams = _grams(question) + _grams(answer)
        return next(((gram, self.grams[gram]) for gram in grams if gram in self.grams), None)


def _grams(text: str) -> list[str]:
    words = unicode_words(text)
    return [" ".join(words[start : start + GRAM]) for start in range(len(words) - GRAM + 1)]


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _check_threshold(threshold: float) -> None:
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must be above 0 and at most 1, got {threshold}")


def _line(values: dict[str, Any]) -> str:
    return json.dumps(values, ensure_ascii=False, default=str) + "\n"  # str: a date of parquet


def _write(base: Path, mode: str, entries: Sequence[Entry], drops: Sequence[Drop], reasons: Sequence[str]) -> Curated:
    """Writes both files and says what came of it."""
    dropped = {drop.place for drop in drops}
    kept = [_line(entry.record) for place, entry in enumerate(entries) if place not in dropped]
    kept_file, dropped_file = (base.with_name(f"{base.name}.{name}.jsonl") for name in (mode, f"{mode}.dropped"))
    why = []
    for drop in drops:
        reason = drop._asdict()
        entry = entries[reason.pop("place")]
        why.append(_line({"source": entry.source, "instruction": entry.instruction, **reason}))
    with writing_to(base.parent, "--output_dir"):
        for file, lines in (kept_file, kept), (dropped_file, why):
            with whole_file(file) as temporary:
                # Half of a surrogate pair, which JSON can write and UTF-8 cannot, becomes JSON's \ud83d again.
                temporary.write_text("".join(lines), encoding="utf-8", errors="backslashreplace")
    say(f"{kept_file}: {len(kept):,} of {len(entries):,} records kept; why not the others: {dropped_file}")
    for name in reasons:
        places = [entries[drop.place].source for drop in drops if drop.reason == name]
        examples = ", ".join(places[:SHOWN]) + (", ..." if len(places) > SHOWN else "")
        say(f"  {name:16} {len(places):8,}  {examples}".rstrip())
    return Curated(len(kept), len(dropped), dict(Counter(drop.reason for drop in drops)))
