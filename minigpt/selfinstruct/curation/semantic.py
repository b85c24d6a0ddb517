"""Semantic curation by sentence embeddings, the post-processing of github.com/ArmelRandy/Self-instruct.

`unique` drops semantic duplicates. `consistent` drops a task if a model, given the output, cannot reconstruct its
instruction. The output files are described in curate.py.
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
from minigpt.selfinstruct.curation.curate import Curated, Drop, Entry, read_entries, to_json_line, write_results
from minigpt.selfinstruct.curation.embed import nearest_kept
from minigpt.selfinstruct.generators import (
    Completion,
    Generator,
    GeneratorArguments,
    SamplingParams,
    SeededPrompt,
    fit_shots,
)
from minigpt.selfinstruct.request import TaskFormat
from minigpt.selfinstruct.tasks import Task

Embed = Callable[[Sequence[str]], np.ndarray]
_HEADER = "Tasks written backwards: first what came out, then the instruction that asked for it.\n\n"


def unique(path: str, embed: Embed, *, threshold: float = 0.5, output_dir: str | None = None) -> Curated:
    """Keeps the instructions whose cosine with every earlier kept one is below the threshold.

    Args:
        embed: maps N texts to unit vectors, (N,C) float32, such as an `Embedder`.
        threshold: cosine, above 0 and at most 1.
        output_dir: folder for the two output files; None: the folder of the instruction file.
    """
    _check_threshold(threshold)
    entries, base = read_entries(path, output_dir)
    nearest, cosines = nearest_kept(embed([entry.instruction for entry in entries]), threshold)
    drops = [
        Drop(index, "similar", entries[other].instruction, entries[other].source, float(cosine))
        for index, (other, cosine) in enumerate(zip(nearest, cosines, strict=True))
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
    """Keeps the tasks whose instruction a model can reconstruct from the output and, if present, the input.

    The cosine of the original and the reconstructed instruction must reach the threshold. Completions are appended to
    `tasks.regenerated.jsonl` as they are generated, so that a killed run resumes from there and a run with another
    threshold generates nothing.

    Args:
        generator: decodes greedily.
        embed: maps N texts to unit vectors, (N,C) float32, such as an `Embedder`.
        model: the generator's name; saved completions of another model are not reused.
        seed_tasks: the pool of shots; all tasks get the same shots, except that a task is never its own shot.
        task_format: the trigger words.
        num_shots: fewer are used if the context is too short.
        max_new_tokens: limit for the instruction.
        threshold: cosine, above 0 and at most 1.
        batch_size: tasks per batch; batches are formed from prompts of similar length.
        output_dir: folder for the output files; None: the folder of the instruction file.
    """
    _check_threshold(threshold)
    entries, base = read_entries(path, output_dir)
    shots = random.Random(seed).sample(seed_tasks, len(seed_tasks))
    prompts: dict[int, str] = {}  # index of the entry -> prompt
    for index, entry in enumerate(entries):
        others = [shot for shot in shots if shot.instruction != entry.instruction][:num_shots]
        task = Task(entry.instruction, entry.input, entry.output)
        render = partial(reconstruction_prompt, task=task, task_format=task_format)
        if fitted := fit_shots(generator, render, others, max_new_tokens):
            prompts[index] = fitted[1]
    greedy = GeneratorArguments(max_length=max_new_tokens, request_batch_size=batch_size, temperature=0.0)
    entry_of_prompt = {prompt: entries[index] for index, prompt in prompts.items()}
    completions = _generate(base, generator, SamplingParams(greedy, ("\n###",)), model, entry_of_prompt, seed)
    parsed = {index: _parse_instruction(completions[prompt], task_format) for index, prompt in prompts.items()}
    reconstructed = {index: instruction for index, instruction in parsed.items() if instruction}
    vectors = embed([entries[index].instruction for index in reconstructed] + list(reconstructed.values()))
    cosines = (vectors[: len(reconstructed)] * vectors[len(reconstructed) :]).sum(-1)  # (2N,C) -> (N,)
    scores = dict(zip(reconstructed, cosines, strict=True))
    drops = []
    for index in range(len(entries)):
        if index not in prompts:
            drops.append(Drop(index, "too_long"))
        elif index not in reconstructed:
            drops.append(Drop(index, "no_answer"))
        elif not scores[index] >= threshold:
            drops.append(Drop(index, "inconsistent", reconstructed[index], score=float(scores[index])))
    curated = write_results(base, "consistent", entries, drops, ("inconsistent", "no_answer", "too_long"))
    print0(
        "  records kept at other thresholds: "
        + ", ".join(f"{t}: {int((cosines >= t).sum()):,}" for t in (0.3, 0.5, 0.7, 0.9))
    )
    return curated


def reconstruction_prompt(shots: Sequence[Task], task: Task, task_format: TaskFormat) -> str:
    """The prompt for reconstructing a task's instruction. For the shot ("Add.", "1 2", "3") and the output "Paris.":

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

    Instructions of shots are put on one line, and so the model answers with one line.
    """
    text = _HEADER
    for number, shot in enumerate([*shots, task], 1):
        context = f"{number}. {task_format.input}:\n{shot.input}\n" if shot.input else ""
        text += f"###\n{context}{number}. {task_format.output}:\n{shot.output}\n{number}. {task_format.instruction}:"
        if number <= len(shots):
            text += f" {' '.join(shot.instruction.split())}\n"
    return text


def _parse_instruction(completion: str, task_format: TaskFormat) -> str:
    """The instruction in a completion; chat models repeat `2. Instruction:` before it."""
    text = re.sub(rf"\A[\W\d]*{re.escape(task_format.instruction)}\s*:", "", completion)
    return text.strip().partition("\n")[0].rstrip()


def _generate(
    base: Path, generator: Generator, params: SamplingParams, model: str, prompts: dict[str, Entry], seed: int
) -> dict[str, str]:
    """Prompt -> completion, from the file if present.

    Batches are formed from all prompts, those in the file included, so that a resumed run has the same batches.
    """
    file = base.with_name(f"{base.name}.regenerated.jsonl")
    settings_key = f"{model}, {params.settings.max_length} tokens"
    keys = {prompt: hashlib.sha256(f"{settings_key}\n{prompt}".encode()).hexdigest() for prompt in prompts}
    cache = _read_completions(file)
    if hits := sum(key in cache for key in keys.values()):
        print0(f"{file}: reusing {hits:,} of {len(keys):,} completions (delete the file to regenerate them)")
    texts = list(prompts)

    def save(batch: list[SeededPrompt], index: int, completions: list[Completion]) -> None:
        prompt = batch[index].text
        if keys[prompt] not in cache:
            cache[keys[prompt]] = text = completions[0].text if completions else ""  # empty: rejected by the server
            entry = {"source": prompts[prompt].source, "instruction": prompts[prompt].instruction}
            out.write(to_json_line({**entry, "completion": text, "key": keys[prompt]}))
            out.flush()

    base.parent.mkdir(parents=True, exist_ok=True)
    bar = progress_bar(len(texts), "task", "regenerating")
    with writing_to(base.parent, "--output_dir"), file.open("a", encoding="utf-8") as out, bar:
        for indices in shard([generator.count(prompt) for prompt in texts], params.settings.request_batch_size):
            batch = [SeededPrompt(texts[index], seed) for index in indices if keys[texts[index]] not in cache]
            results = generator.complete(batch, params, partial(save, batch)) if batch else []
            for index, completions in enumerate(results):
                save(batch, index, completions)
            bar.update(len(indices))
    return {prompt: cache[key] for prompt, key in keys.items()}


def _read_completions(file: Path) -> dict[str, str]:
    """Key -> completion. Truncates an incomplete last line, which a kill leaves, from the file."""
    if not file.exists():
        return {}
    content = file.read_bytes()
    complete = content[: content.rfind(b"\n") + 1]
    if len(complete) < len(content):
        os.truncate(file, len(complete))
    completions = {}
    for number, line in enumerate(complete.splitlines(), 1):
        try:
            values = json.loads(line)
            completions[values["key"]] = values["completion"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{file}:{number}: not a saved completion (delete the file to regenerate all)") from None
    return completions


def _check_threshold(threshold: float) -> None:
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must be above 0 and at most 1, got {threshold}")
