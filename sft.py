"""Supervised fine-tuning (SFT): train a GPT-2 on instructions or conversations.

    python sft.py --model_name_or_path openai-community/gpt2 --data instruction-data.json

See minigpt/data/prompts.py (prompt templates), minigpt/data/splits.py (reading data and the validation split),
minigpt/data/collate.py (the shift and the loss mask) and minigpt/training/loop.py (the training step).
"""

import math
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from minigpt.distributed import is_main, pick_device, print0
from minigpt.settings.command_line import run
from minigpt.settings.groups import (
    DataArguments,
    ModelArguments,
    PredictArguments,
    PromptArguments,
    QuantizeArguments,
    TrainConfig,
    check_range,
    require,
)


@dataclass
class SFTConfig(ModelArguments, DataArguments, PromptArguments, PredictArguments, QuantizeArguments, TrainConfig):
    """Instruction-tune a GPT-2."""

    max_seq_length: int | None = None
    """Maximum length of an example in tokens; longer ones are truncated. Unset: the model's context."""
    train_on_prompt: bool = False
    """Compute the loss on the whole text instead of the answers only."""
    replay_data: list[str] = field(default_factory=list)
    """Raw text of earlier training, mixed into every step to prevent forgetting."""
    replay_ratio: float = 0.25
    """Blocks of replay_data per example in a step; at least one per step."""
    inspect: int = 0
    """Print this many examples as the model will see them and the statistics of data, then exit."""
    eval_only: bool = False
    """Compute the loss on data, then exit."""

    def __post_init__(self) -> None:
        for part in (DataArguments, PredictArguments, TrainConfig):
            part.__post_init__(self)
        if self.quantize and (self.bf16 or not self.predict):
            raise ValueError("--quantize needs --predict, and excludes --bf16")
        if self.predict and self.fp16:
            raise ValueError(
                "--fp16 is for training; --predict runs in --precision fp32, bf16 or auto, or with --quantize fp16"
            )
        check_range(self, "at least 1", lambda x: x >= 1, "max_seq_length")
        check_range(self, "at least 0", lambda x: x >= 0, "replay_ratio", "inspect")


def main(config: SFTConfig) -> None:
    name = require(config, "model_name_or_path", "a folder or a hub id, such as openai-community/gpt2")
    # Imported here, so that --help and argument errors do not wait for torch.
    from minigpt.data.encode import Encoding
    from minigpt.data.preview import show_examples
    from minigpt.data.splits import read_conversations, read_text, split_conversations
    from minigpt.data.store import TokenBlocks
    from minigpt.evaluation.judge import Judge
    from minigpt.evaluation.predict import predict_file, show_answers
    from minigpt.inference.model_folder import ModelFolder
    from minigpt.inference.packed import lighten
    from minigpt.training.engines.torch_engine import check_engine, make_engine
    from minigpt.training.loop import evaluate, train
    from minigpt.training.out_of_memory import explain_out_of_memory
    from minigpt.training.plan import plan
    from minigpt.training.precision import fit_to_machine
    from minigpt.training.run.checkpoint import export, find_checkpoint
    from minigpt.training.run.folder import run_folder
    from minigpt.training.run.result import perplexity

    # ---- tokenizer, model config and template
    source, device = ModelFolder.of(config, **config.config_changes), pick_device(config.device)
    tokenizer, model_config = source.tokenizer, source.config
    template = source.template(config, to_tune=not (config.predict or config.eval_only))
    max_seq_length = config.max_seq_length or model_config.context
    model_config.check_length("--max_seq_length", max_seq_length)
    max_new_tokens = min(config.max_new_tokens, model_config.context // 2)

    # ---- without training: predictions, a preview of the data, or the loss on it
    if config.predict:
        judge = Judge(config.judge_api_base or "", config.judge_model) if config.judge_model else None
        config.deepspeed = None  # a setting of training; it must not decide the precision of predictions
        if config.bf16 or config.precision:
            fit_to_machine(config, device)
        lighter = config.quantize or ("bf16" if config.bf16 else None)
        if is_main():  # rank 0 predicts alone
            predict_file(
                config.predict,
                Path(config.output_dir or "runs/sft"),
                lighten(source.load_model(device), lighter),
                tokenizer,
                template,
                name=(f"{name}@{config.revision}" if config.revision else name) + (f" in {lighter}" if lighter else ""),
                max_new_tokens=max_new_tokens,
                batch_size=config.per_device_eval_batch_size,
                skip_bad_records=config.skip_bad_records,
                overwrite=config.overwrite_output_dir,
                compare_with=config.compare_with,
                judge=judge,
            )
        return
    require(config, "data", "a file, a folder, a glob or hf://datasets/OWNER/NAME/FILE")
    encoding = Encoding(template, tokenizer, max_seq_length, config.train_on_prompt)
    if config.inspect:
        show_examples(config.data, config.inspect, *encoding)
        read_conversations(config, config.data, encoding)
        return
    if config.eval_only:
        data = read_conversations(config, config.data, encoding)
        fit_to_machine(config, device)
        with closing(make_engine(source.load_model(device), config)) as engine:
            loss = evaluate(engine, data, config.per_device_eval_batch_size)
        if not math.isfinite(loss):
            raise ValueError(f"{name}: the loss is {loss}: the weights are broken")
        print0(f"loss {loss:.4f}, perplexity {perplexity(loss)}")
        return

    with run_folder(config, "runs/sft") as folder:
        check_engine(config, model_config, device)

        # ---- data
        train_data, eval_data = split_conversations(config, encoding, config.seed)
        replay_data = None
        if config.replay_data:
            replay_data = TokenBlocks(read_text(config, config.replay_data, tokenizer), max_seq_length)
        fit_to_machine(config, device, find_checkpoint(folder, config.resume))
        lengths = (train_data.lengths, replay_data.lengths if replay_data else (), config.replay_ratio)
        if config.plan:
            print0(plan(config, model_config, *lengths).table())
            return

        # ---- model and training
        model = source.load_model(device)
        print0(f"{name}: {model.num_parameters():,} parameters; template {template.name}")
        learnt = f"Instruction-tuned on {', '.join(Path(p).name for p in config.data)}."
        with (
            explain_out_of_memory(config, model_config, device, *lengths),
            closing(make_engine(model, config)) as engine,
        ):
            result = train(
                config,
                engine,
                train_data,
                eval_data,
                on_eval=lambda module, step: show_answers(
                    module, step, tokenizer, eval_data, config.eval_samples, max_new_tokens
                ),
                export=lambda weights, to: export(to, model, tokenizer, template, weights, learnt),
                replay_data=replay_data,
                replay_ratio=config.replay_ratio,
            )
        print0(result.table(folder))


if __name__ == "__main__":
    run(main, SFTConfig)
