"""Pretraining on raw text: continue from a pretrained model, or train from scratch.

    python train.py --model_name_or_path openai-community/gpt2 --data the-verdict.txt
    python train.py --config_name gpt2 --tokenizer_name openai-community/gpt2 --data corpus/

See minigpt/data/splits.py (reading data and the validation split), minigpt/data/store.py (text as blocks of tokens) and
minigpt/training/loop.py (the training step).
"""

from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from minigpt.distributed import pick_device, print0
from minigpt.settings.command_line import run
from minigpt.settings.groups import DataArguments, ModelArguments, TrainConfig, check_range, require


@dataclass
class PretrainConfig(ModelArguments, DataArguments, TrainConfig):
    """Train a GPT-2 on raw text, from a pretrained model or from scratch."""

    config_name: str | None = None
    """Train from scratch with this architecture: gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder or hub id with a
    config.json. The tokenizer is GPT-2's unless tokenizer_name is set."""
    block_size: int | None = None
    """Block size: tokens per training sequence. Unset: the model's context."""
    stride: int | None = None
    """Tokens from the start of one block to the start of the next. Unset: block_size, so blocks do not overlap."""
    sample_tokens: int = 40
    """Length in tokens of the sample text shown at each evaluation; 0 shows none."""

    def __post_init__(self) -> None:
        for part in (DataArguments, TrainConfig):
            part.__post_init__(self)
        if bool(self.model_name_or_path) == bool(self.config_name):
            raise ValueError(
                "give either --model_name_or_path, to continue from a model, or --config_name, to start anew"
            )
        check_range(self, "at least 1", lambda x: x >= 1, "block_size", "stride")
        check_range(self, "at least 0", lambda x: x >= 0, "sample_tokens")


def main(config: PretrainConfig) -> None:
    require(config, "data", "a text file, a folder, a glob or hf://datasets/OWNER/NAME/FILE")
    # Imported here, so that --help and argument errors do not wait for torch.
    import torch

    from minigpt.data.prompts import get_template
    from minigpt.data.splits import split_text
    from minigpt.data.tokenizer import GPT2, Tokenizer
    from minigpt.evaluation.predict import show_text
    from minigpt.inference.model_folder import ModelFolder
    from minigpt.model.families import load_config, model_from_config
    from minigpt.model.gpt2 import GPTConfig
    from minigpt.training.engines.torch_engine import check_engine, make_engine
    from minigpt.training.loop import train
    from minigpt.training.out_of_memory import explain_out_of_memory
    from minigpt.training.plan import plan
    from minigpt.training.precision import fit_to_machine
    from minigpt.training.run.checkpoint import export, find_checkpoint
    from minigpt.training.run.folder import run_folder

    # ---- tokenizer and model config
    name = config.model_name_or_path
    if not name:  # report an unknown shape before looking for the tokenizer
        shape = config.config_name or ""
        if "/" in shape or Path(shape).is_dir():
            model_config = load_config(shape, config.revision, **config.config_changes)
        else:
            model_config = GPTConfig.preset(shape, **config.config_changes)
        tokenizer = Tokenizer.from_pretrained(config.tokenizer_name or GPT2)
        ends = {"bos_token_id": tokenizer.eot_id, "eos_token_id": tokenizer.eot_id}
        model_config = replace(model_config, vocab_size=tokenizer.vocab_size, **ends)
    else:
        source = ModelFolder.of(config, **config.config_changes)
        tokenizer, model_config = source.tokenizer, source.config
    block_size = config.block_size or model_config.context
    model_config.check_length("--block_size", block_size)

    device = pick_device(config.device)
    with run_folder(config, "runs/train") as folder:
        check_engine(config, model_config, device)

        # ---- data
        train_data, eval_data = split_text(config, tokenizer, block_size, config.stride)
        fit_to_machine(config, device, find_checkpoint(folder, config.resume))
        if config.plan:
            print0(plan(config, model_config, train_data.lengths).table())
            return

        # ---- model and training
        torch.manual_seed(config.seed)
        model = source.load_model(device) if name else model_from_config(model_config).to(device)
        print0(f"{name or config.config_name}: {model.num_parameters():,} parameters; {len(train_data):,} blocks")
        learnt = f"Trained on the text of {', '.join(Path(p).name for p in config.data)}."
        with (
            explain_out_of_memory(config, model_config, device, train_data.lengths),
            closing(make_engine(model, config)) as engine,
        ):
            result = train(
                config,
                engine,
                train_data,
                eval_data,
                on_eval=lambda module, step: show_text(module, tokenizer, eval_data, config.sample_tokens, config.seed),
                export=lambda weights, to: export(to, model, tokenizer, get_template("none"), weights, learnt),
            )
        print0(result.table(folder))


if __name__ == "__main__":
    run(main, PretrainConfig)
