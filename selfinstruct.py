"""Self-instruct: a model, or a server, writes instruction data from a few tasks that people wrote.

    python selfinstruct.py --model_name_or_path openai-community/gpt2 --batch_dir runs/tasks
    python sft.py --model_name_or_path openai-community/gpt2 --data runs/tasks/machine_generated_instructions.jsonl

Read on in minigpt/selfinstruct/bootstrap.py (the rounds), minigpt/selfinstruct/request.py (what is asked and read) and
minigpt/selfinstruct/filters.py (what is dropped); minigpt/selfinstruct/curation.py for --curate.
"""

import signal
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from minigpt.arguments import ModelArguments, check_range, require
from minigpt.config import run
from minigpt.distributed import is_main, pick_device, say, world_size
from minigpt.selfinstruct.batch_dir import TASKS, open_batch_dir
from minigpt.selfinstruct.bootstrap import Bootstrap, BootstrapArguments, TaskArguments, list_of_tasks, table, why_ended
from minigpt.selfinstruct.endpoint import ApiGenerator, EndpointArguments
from minigpt.selfinstruct.filters import Filters
from minigpt.selfinstruct.generators import Generator, GeneratorArguments, How, LocalGenerator, Ranks
from minigpt.selfinstruct.request import TaskFormat
from minigpt.selfinstruct.tasks import SEED_TASKS, read_seed_tasks


@dataclass
class SelfInstructConfig(BootstrapArguments, TaskArguments, GeneratorArguments, ModelArguments, EndpointArguments):
    """Let a model write its own instruction data."""

    curate: Literal["unique", "consistent", "lint"] | None = None
    """Generate nothing, but choose among tasks: unique drops what means the same as one before; consistent, what the
    model cannot tell the instruction of from the output (both need the extra curation); lint, empty answers, links,
    repeats, and overlap with eval_data."""
    data: str | None = None
    """Instruction file to curate. Unset: the tasks in batch_dir."""
    eval_data: list[str] = field(default_factory=list)
    """Evaluation files that lint looks for in the data."""
    embedding_model: str = "sentence-transformers/all-MiniLM-L6-v2"
    """Folder or hub id of the sentence-transformers model that unique and consistent compare meanings with."""
    curate_threshold: float | None = None
    """Cosine from which two instructions mean the same (unset: 0.5); for lint, ROUGE-L (unset: 0.7)."""
    output_dir: str | None = None
    """Where curated files go. Unset: beside the data."""

    def __post_init__(self) -> None:
        for part in (BootstrapArguments, TaskArguments, GeneratorArguments, EndpointArguments):
            part.__post_init__(self)
        check_range(self, "above 0 and at most 1", lambda x: 0 < x <= 1, "curate_threshold")
        if not self.curate and (self.data or self.output_dir):
            raise ValueError("--data and --output_dir go with --curate; a run that generates is told --batch_dir")
        if self.eval_data and self.curate != "lint":
            raise ValueError("--eval_data goes with --curate lint")
        if self.api_base and self.model_name_or_path:
            raise ValueError("--model_name_or_path and --api_base are two places to ask: give one")


def main(config: SelfInstructConfig) -> None:
    settings = GeneratorArguments(**{own.name: getattr(config, own.name) for own in fields(GeneratorArguments)})
    words = (config.trigger_instruction, config.trigger_input, config.trigger_output)
    task_format = TaskFormat(config.format, *words)
    how = list_of_tasks(settings, config, task_format)
    if config.curate:
        curate(config, task_format, how)
        return
    if not config.api_base:
        require(config, "model_name_or_path", "a folder or a hub id, or --api_base with --api_model for a server")
    elif world_size() > 1:
        raise ValueError("--api_base needs one process alone, which asks --request_batch_size times at once")
    if not is_main():  # it holds nothing, and rank 0 tells what happens
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        generator = make_generator(config, how)
        assert isinstance(generator, Ranks)
        generator.help()
        return

    # ---- one process reads, judges and writes
    from minigpt.selfinstruct.novelty import NoveltyFilter, rouge_words, unicode_words
    from minigpt.selfinstruct.report import write_report

    folder = Path(config.batch_dir)
    seed_tasks = read_seed_tasks(config.seed_tasks_path or SEED_TASKS)
    filters = Filters(config.banned_words, config.keep_programming, config.language)
    novelty = NoveltyFilter(config.threshold, rouge_words if filters.is_english else unicode_words)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: nothing that is committed can be lost
    try:
        with open_batch_dir(folder, config, seed_tasks) as files:
            generator = make_generator(config, how)
            bootstrap = Bootstrap(
                files, config, seed_tasks, task_format, filters, novelty, generator, how, config.label_first
            )
            statistics = bootstrap.run()
            say(table(statistics))
            say(f"{'report':16} {write_report(folder)}")
            if not (folder / "report").is_dir():
                say(f"{'pictures':16} none: they need matplotlib (pip install -c constraints.txt -e '.[plot]')")
            if isinstance(generator, Ranks):
                generator.close()
    except KeyboardInterrupt:
        print(f"\n{folder}: interrupted; every finished round is kept, and the same command goes on", file=sys.stderr)
        sys.exit(75)
    if statistics.kept:
        model = config.model_name_or_path or "openai-community/gpt2"
        say(f"{'next':16} python sft.py --model_name_or_path {model} --data {folder / TASKS}")
    if statistics.ended != "target":
        raise ValueError(why_ended(statistics, config))


def make_generator(config: SelfInstructConfig, how: How) -> Generator:
    """The model, packed and on every rank; or the server."""
    from minigpt.data.tokenizer import Tokenizer

    if config.api_base:
        return ApiGenerator(
            config, how, Tokenizer.from_pretrained(config.tokenizer_name) if config.tokenizer_name else None
        )
    from minigpt.inference.fast import for_generation
    from minigpt.model.gpt2 import GPT

    name, revision = str(config.model_name_or_path), config.revision
    model = GPT.from_pretrained(name, revision=revision, device=pick_device(config.device))
    own = config.tokenizer_name is None
    tokenizer = Tokenizer.from_pretrained(config.tokenizer_name or name, revision if own else None)
    model.config.check_vocabulary(tokenizer.vocab_size)
    generator = LocalGenerator(for_generation(model), tokenizer, how)
    return Ranks(generator) if world_size() > 1 else generator


def curate(config: SelfInstructConfig, task_format: TaskFormat, how: How) -> None:
    """Writes the tasks that stay, and those that went with the reason, beside the file."""
    from minigpt.selfinstruct.curation import consistent, lint, unique
    from minigpt.selfinstruct.embed import Embedder

    if world_size() > 1:
        raise ValueError("--curate needs one process alone")
    path, folder = config.data or str(Path(config.batch_dir) / TASKS), config.output_dir
    if config.curate == "lint":
        lint(path, eval_data=config.eval_data, threshold=config.curate_threshold or 0.7, output_dir=folder)
        return
    if config.curate == "consistent" and not config.api_base:
        require(config, "model_name_or_path", "a folder or a hub id, or --api_base with --api_model for a server")
    embed, threshold = Embedder(config.embedding_model, config.device), config.curate_threshold or 0.5
    if config.curate == "unique":
        unique(path, embed, threshold=threshold, output_dir=folder)
        return
    consistent(
        path,
        make_generator(config, how),
        embed,
        model=str(config.api_model or config.model_name_or_path),
        seed_tasks=read_seed_tasks(config.seed_tasks_path or SEED_TASKS),
        task_format=task_format,
        num_shots=config.num_prompt_instructions,
        threshold=threshold,
        batch_size=config.request_batch_size,
        seed=config.seed,
        output_dir=folder,
    )


if __name__ == "__main__":
    run(main, SelfInstructConfig)
