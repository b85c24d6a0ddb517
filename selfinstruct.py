"""Self-instruct: generate instruction data with a model or a server, starting from a few human-written seed tasks.

    python selfinstruct.py --model_name_or_path openai-community/gpt2 --batch_dir runs/tasks
    python sft.py --model_name_or_path openai-community/gpt2 --data runs/tasks/machine_generated_instructions.jsonl

See minigpt/selfinstruct/bootstrap.py (the rounds), minigpt/selfinstruct/request.py (prompts and parsing) and
minigpt/selfinstruct/filters.py (the filters); minigpt/selfinstruct/curation/curate.py for --curate.
"""

import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from minigpt.distributed import is_main, pick_device, print0, world_size
from minigpt.selfinstruct.bootstrap import Bootstrap, RunArguments, table, why_ended
from minigpt.selfinstruct.curation.curate import CurationArguments
from minigpt.selfinstruct.endpoint import ApiGenerator, EndpointArguments
from minigpt.selfinstruct.generators import Generator, LocalGenerator, Ranks
from minigpt.selfinstruct.run_files import TASKS, open_batch_dir
from minigpt.selfinstruct.tasks import SEED_TASKS, read_seed_tasks
from minigpt.settings.command_line import run
from minigpt.settings.groups import ModelArguments, QuantizeArguments, require


@dataclass
class SelfInstructConfig(RunArguments, CurationArguments, ModelArguments, QuantizeArguments, EndpointArguments):
    """Generate instruction data with a model or a server."""

    def __post_init__(self) -> None:
        for part in (RunArguments, CurationArguments, EndpointArguments):
            part.__post_init__(self)
        if self.api_base and self.model_name_or_path:
            raise ValueError("--model_name_or_path and --api_base are alternatives: give one")
        if self.api_base and self.quantize:
            raise ValueError("--quantize needs --model_name_or_path: it does not apply to a server")


def main(config: SelfInstructConfig) -> None:
    if config.curate in (None, "consistent") and not config.api_base:
        require(config, "model_name_or_path", "a folder or a hub id, or --api_base with --api_model for a server")
    if world_size() > 1 and (config.curate or config.api_base):
        raise ValueError(f"--{'curate' if config.curate else 'api_base'} needs one process alone: start it with python")
    if config.curate:
        curate(config)
    elif is_main():
        bootstrap(config)
    else:  # the other ranks have no state to save, and rank 0 prints
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        Ranks(load_model(config)).help()


def bootstrap(config: SelfInstructConfig) -> None:
    """Runs on rank 0, which samples prompts, filters and writes; the other ranks only generate."""
    from minigpt.selfinstruct.report.write import write_report

    folder, seed_tasks = Path(config.batch_dir), read_seed_tasks(config.seed_tasks_path or SEED_TASKS)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C; finished rounds are already on disk
    try:
        with open_batch_dir(folder, config, seed_tasks) as files:
            generator = make_generator(config)
            statistics = Bootstrap(files, config, seed_tasks, generator).run()
            print0(table(statistics))
            print0(f"{'report':16} {write_report(folder, config.filters())}")
            if isinstance(generator, Ranks):
                generator.close()
    except KeyboardInterrupt:
        print(
            f"\n{folder}: interrupted; every finished round is saved; run the same command to resume", file=sys.stderr
        )
        sys.exit(75)
    if statistics.kept:
        model = config.model_name_or_path or "openai-community/gpt2"
        print0(f"{'next':16} python sft.py --model_name_or_path {model} --data {folder / TASKS}")
    if statistics.ended != "target":
        raise ValueError(why_ended(statistics, config))


def make_generator(config: SelfInstructConfig) -> Generator:
    """A client of the server, or the local model, on all ranks if there are several."""
    from minigpt.data.tokenizer import Tokenizer

    if config.api_base:
        return ApiGenerator(config, Tokenizer.from_pretrained(config.tokenizer_name) if config.tokenizer_name else None)
    return Ranks(load_model(config)) if world_size() > 1 else load_model(config)


def load_model(config: SelfInstructConfig) -> LocalGenerator:
    from minigpt.inference.model_folder import ModelFolder
    from minigpt.inference.packed import load_for_generation

    folder = ModelFolder.of(config)
    model, tokenizer = load_for_generation(folder, device=pick_device(config.device), quantize=config.quantize)
    return LocalGenerator(model, tokenizer)


def curate(config: SelfInstructConfig) -> None:
    """Writes the kept tasks, and the dropped ones with the reason, next to the data file."""
    path, to = config.data or str(Path(config.batch_dir) / TASKS), config.output_dir
    if config.curate == "lint":
        from minigpt.selfinstruct.curation.lint import lint

        lint(path, eval_data=config.eval_data, threshold=config.curate_threshold or 0.7, output_dir=to)
        return
    from minigpt.selfinstruct.curation.embed import Embedder
    from minigpt.selfinstruct.curation.semantic import consistent, unique

    embed, threshold = Embedder(config.embedding_model, config.device), config.curate_threshold or 0.5
    if config.curate == "unique":
        unique(path, embed, threshold=threshold, output_dir=to)
        return
    consistent(
        path,
        make_generator(config),
        embed,
        model=str(config.api_model or config.model_name_or_path),
        seed_tasks=read_seed_tasks(config.seed_tasks_path or SEED_TASKS),
        task_format=config.task_format(),
        num_shots=config.num_prompt_instructions,
        threshold=threshold,
        batch_size=config.request_batch_size,
        seed=config.seed,
        output_dir=to,
    )


if __name__ == "__main__":
    run(main, SelfInstructConfig)
