"""Curation by meaning: what is said twice, and what a model cannot tell from its answer.

The post-processing of github.com/ArmelRandy/Self-instruct: `unique` drops a task that means what one kept before means,
`consistent` one whose instruction a model that is shown its output cannot tell. What they write, curation.py says.
"""

import hashlib
import json
import os
import random
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from minigpt.data.order import shard
from minigpt.distributed import print0, progress_bar
from minigpt.files import writing_to
from minigpt.selfinstruct.curation.curate import Curated, Drop, Entry, as_line, read_entries, write_results
from minigpt.selfinstruct.curation.embed import nearest_kept
from minigpt.selfinstruct.generators import Completion, Generator, GeneratorArguments, How, Prompt, fit_shots
from minigpt.selfinstruct.request import TaskFormat
from minigpt.selfinstruct.tasks import Task

Embed = Callable[[Sequence[str]], np.ndarray]
_BACKWARDS = "Tasks written backwards: first what came out, then the instruction that asked for it.\n\n"


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
    return write_results(base, "unique", entries, drops, ("similar",))


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

    The two instructions' cosine must reach the threshold. What the model says is appended to `tasks.regenerated.jsonl`
    as it comes: a run that was killed goes on from there, and one with another threshold asks nothing.

    Args:
        generator: asked greedily.
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
    curated = write_results(base, "consistent", entries, drops, ("inconsistent", "no_answer", "too_long"))
    print0("  kept at a threshold of " + ", ".join(f"{t}: {int((cosines >= t).sum()):,}" for t in (0.3, 0.5, 0.7, 0.9)))
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
    asked_with = f"{model}, {how.settings.max_length} tokens"
    keys = {prompt: hashlib.sha256(f"{asked_with}\n{prompt}".encode()).hexdigest() for prompt in prompts}
    known = _read_answers(file)
    if done := sum(key in known for key in keys.values()):
        print0(f"{file}: {done:,} of {len(keys):,} answers are there already (delete the file to ask anew)")
    asked = list(prompts)

    def keep(batch: list[Prompt], place: int, completions: list[Completion]) -> None:
        prompt = batch[place].text
        if keys[prompt] not in known:
            known[keys[prompt]] = text = completions[0].text if completions else ""  # a server refused it
            names = {"source": prompts[prompt].source, "instruction": prompts[prompt].instruction}
            out.write(as_line({**names, "completion": text, "key": keys[prompt]}))
            out.flush()

    base.parent.mkdir(parents=True, exist_ok=True)
    bar = progress_bar(len(asked), "task", "asking back")
    with writing_to(base.parent, "--output_dir"), file.open("a", encoding="utf-8") as out, bar:
        for places in shard([generator.count(prompt) for prompt in asked], how.settings.request_batch_size):
            batch = [Prompt(asked[place], seed) for place in places if keys[asked[place]] not in known]
            found = generator.complete(batch, how, partial(keep, batch)) if batch else []
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


def _check_threshold(threshold: float) -> None:
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must be above 0 and at most 1, got {threshold}")
