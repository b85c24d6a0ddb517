"""The settings that scripts share. A script's dataclass inherits the groups that it reads.

The docstring under a field is its help text; `minigpt.settings.command_line` turns them into
flags, YAML and `--help`.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Literal

LOOPBACK = ("127.0.0.1", "::1", "localhost")  # names under which a machine reaches itself, and nobody else it


@dataclass
class ModelArguments:
    """Which model."""

    model_name_or_path: str | None = None
    """Folder or hub id, such as openai-community/gpt2."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    tokenizer_name: str | None = None
    """Folder, hub id or .tiktoken file, or tiny for the small vocabulary that comes along. Unset: the model's own."""
    device: str | None = None
    """cuda, cpu or mps. Unset: the best there is."""


@dataclass
class DataArguments:
    """Which data."""

    data: list[str] = field(default_factory=list)
    """Files, folders, globs or hf://datasets/OWNER/NAME/FILE, in any of the known formats."""
    validation_data: list[str] = field(default_factory=list)
    """Data to evaluate on. Unset: a part of data, see validation_split."""
    validation_split: float = 0.05
    """The part of data that is held out where there is no validation_data; 0 holds out none."""
    skip_bad_records: int = 0
    """Bad records to pass over, and count, before giving up."""
    cache_dir: str | None = None
    """Where tokenized data is kept. Unset: ~/.cache/minigpt, or what MINIGPT_CACHE names."""

    def __post_init__(self) -> None:
        check_range(self, "at least 0 and below 1", lambda x: 0 <= x < 1, "validation_split")
        check_range(self, "at least 0", lambda x: x >= 0, "skip_bad_records")


@dataclass
class PromptArguments:
    """How a conversation becomes text."""

    template: str | None = None
    """alpaca, alpaca-short, hugchat, input-output, io, iio, none, or a folder that holds a prompt_template.json.
    Unset: the model folder's own, else alpaca; to tune a model of raw text, whose own is none, alpaca too."""
    trigger_instruction: str | None = None
    """Another word for an instruction than the template's own."""
    trigger_input: str | None = None
    """Another word for an input than the template's own."""
    trigger_output: str | None = None
    """Another word for an output than the template's own."""
    trigger_human: str | None = None
    """Another word for the user's turn than the template's own."""
    trigger_assistant: str | None = None
    """Another word for the assistant's turn than the template's own."""

    @property
    def triggers(self) -> dict[str, str | None]:
        """The changed trigger words, as `get_template` takes them."""
        names = ("instruction", "input", "output", "human", "assistant")
        return {name: getattr(self, f"trigger_{name}") for name in names}


@dataclass
class SamplingArguments:
    """How answers are drawn."""

    max_new_tokens: int = 256
    """Longest answer in tokens; never more than half of the model's context."""
    temperature: float = 0.0
    """0 takes the likeliest token each time; more is livelier."""
    top_k: int = 0
    """Draw from the k likeliest tokens only; 0 is all."""
    top_p: float = 1.0
    """Draw from the fewest likeliest tokens that together reach this probability."""
    repetition_penalty: float = 1.0
    """Above 1: tokens that were there before become less likely."""
    seed: int | None = None
    """Fixes the draws."""

    def __post_init__(self) -> None:
        check_range(self, "at least 1", lambda x: x >= 1, "max_new_tokens")
        check_range(self, "at least 0 and finite", lambda x: 0 <= x < math.inf, "temperature")
        check_range(self, "at least 0", lambda x: x >= 0, "top_k")
        check_range(self, "above 0 and at most 1", lambda x: 0 < x <= 1, "top_p")
        check_range(self, "above 0 and finite", lambda x: 0 < x < math.inf, "repetition_penalty")
        check_range(self, "at least 0 and below 2^63", lambda x: 0 <= x < 2**63, "seed")


@dataclass
class QuantizeArguments:
    """Lighter weights to answer with."""

    quantize: Literal["int8", "fp16"] | None = None
    """Round the weights to answer faster on a CPU. fp16: the same answers except at near ties. int8: rounded further,
    and the fastest for one conversation. Unset: as they are."""


@dataclass
class ServeArguments:
    """A server instead of the terminal: OpenAI's API, and a page to chat (needs the extra serve)."""

    serve: bool = False
    """Serve until Ctrl-C or SIGTERM. The settings of sampling are for requests that give none."""
    host: str = "127.0.0.1"
    """Address to listen on. Any but the loopback interface's needs api_key."""
    port: int = 8000
    """Port to listen on; 0 is any that is free."""
    api_key: str | None = None
    """What clients have to send as their key. Unset: MINIGPT_API_KEY of the environment, where other users cannot read
    it; without either there is none."""
    max_batch_size: int = 8
    """Answers that run together; the cache for so many is kept."""
    max_queue: int = 64
    """Answers that may wait for a place; further requests are sent away with status 429."""

    def __post_init__(self) -> None:
        check_range(self, "at least 1", lambda x: x >= 1, "max_batch_size")
        check_range(self, "at least 0", lambda x: x >= 0, "max_queue")
        check_range(self, "between 0 and 65535", lambda x: 0 <= x < 65536, "port")
        if self.serve:
            self.api_key = self.api_key or os.environ.get("MINIGPT_API_KEY")
            if self.host not in LOOPBACK and not self.api_key:
                raise ValueError(f"--host {self.host} lets other machines in: it needs --api_key or MINIGPT_API_KEY")
            if self.api_key and not (self.api_key.isascii() and self.api_key.isprintable()):
                raise ValueError("--api_key must be of printable ASCII characters, because it travels in a header")
        elif given := [own.name for own in fields(ServeArguments) if getattr(self, own.name) != own.default]:
            raise ValueError(f"--{given[0]} goes with --serve")


@dataclass
class PredictArguments:
    """Answers: samples at each evaluation, or those to a whole dataset, and no training."""

    eval_samples: int = 2
    """Sample answers to show at each evaluation."""
    max_new_tokens: int = 128
    """Longest answer in tokens; never more than half of the model's context."""
    predict: str | None = None
    """Answer this dataset; predictions.jsonl, scores.json and a page to look at, predictions.html, go to output_dir."""
    compare_with: str | None = None
    """Folder of the same questions' predictions, which the page shows beside these."""
    judge_api_base: str | None = None
    """Have the answers marked from 0 to 100 by a model behind OpenAI's API, such as http://127.0.0.1:8000/v1. Its key
    is read from OPENAI_API_KEY."""
    judge_model: str | None = None
    """That model's name there."""

    def __post_init__(self) -> None:
        if bool(self.judge_api_base) != bool(self.judge_model):
            raise ValueError("--judge_api_base and --judge_model say where the judge is and who: give both")
        if (self.compare_with or self.judge_model) and not self.predict:
            raise ValueError("--compare_with and --judge_model go with --predict")
        check_range(self, "at least 0", lambda x: x >= 0, "eval_samples")
        check_range(self, "at least 1", lambda x: x >= 1, "max_new_tokens")


@dataclass
class TrainConfig:
    """What the loop and the optimizer read."""

    ALTERNATIVES = ("precision", "bf16", "fp16")  # a flag for one of them replaces all three in a YAML file

    output_dir: str | None = None
    """Folder the run is written to. Unset: runs/SCRIPT."""
    overwrite_output_dir: bool = False
    """Write into an output_dir that holds a run already; that run is lost."""
    resume: str | None = None
    """latest: go on from the newest checkpoint in output_dir. auto: the same, or start where there is none.
    A path: go on from that checkpoint."""
    save_steps: int | None = None
    """Write a checkpoint every so many steps, and after the last. Unset: only when interrupted."""
    save_total_limit: int | None = None
    """Keep this many checkpoints, the newest; the best weights are in export-best anyway. Unset: all."""
    plan: int | None = None
    """Print what the run takes on this many GPUs (steps, tokens, memory, disk); then stop."""
    learning_rate: float = 5e-5
    """Peak learning rate of AdamW, reached after the warmup."""
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warmup."""
    min_lr_ratio: float = 0.0
    """Where it ends, as a fraction of learning_rate."""
    warmup_steps: int = 0
    """Steps over which the learning rate first rises."""
    num_train_epochs: int = 1
    """Passes over the training data."""
    max_steps: int | None = None
    """Optimizer steps to run; overrides num_train_epochs."""
    per_device_train_batch_size: int = 8
    """Examples of one forward and backward pass, on each device."""
    gradient_accumulation_steps: int = 1
    """Such passes before each optimizer step."""
    group_by_length: bool = True
    """Put examples of similar length into one step: less padding."""
    weight_decay: float = 0.1
    """Decay of the weight matrices; biases and layer norms have none."""
    adam_beta1: float = 0.9
    """AdamW's decay of the mean gradient."""
    adam_beta2: float = 0.95
    """AdamW's decay of the mean squared gradient."""
    adam_epsilon: float = 1e-8
    """AdamW's guard against division by zero."""
    max_grad_norm: float = 1.0
    """The gradient is scaled down to this norm where it is longer; inf never does."""
    dropout: float | None = None
    """Dropout everywhere in the model. Unset: as its config.json says."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] | None = None
    """auto: bf16 if this machine computes it at least as fast as fp32 (a product is timed), else fp32; a resumed run
    keeps its own. Unset: as bf16 and fp16 say, else fp32."""
    bf16: bool = False
    """Compute in bfloat16; weights and optimizer stay fp32."""
    fp16: bool = False
    """Compute in float16 with a dynamic loss scale, through DeepSpeed; weights and optimizer stay fp32."""
    deepspeed: str | None = None
    """DeepSpeed JSON file, such as configs/deepspeed/zero2_bf16.json; "auto" and missing values follow the flags."""
    gradient_checkpointing: bool = False
    """Keep only each layer's input, and compute the rest again in backward: less memory, a third more time."""
    eval_steps: int | None = None
    """Evaluate every so many steps. Unset: ten times a run."""
    per_device_eval_batch_size: int = 8
    """Examples of one forward pass in an evaluation, on each device."""
    logging_steps: int = 10
    """Print a line every so many steps where standard error is not a terminal, which shows a bar instead;
    metrics.jsonl has every step."""
    report_to: list[Literal["none", "tensorboard", "wandb"]] = field(default_factory=list)
    """Send every step's numbers there, too. TensorBoard's files lie in output_dir/tensorboard."""
    seed: int = 42
    """Fixes initialisation, dropout, the validation split and the order of the data."""

    def __post_init__(self) -> None:
        if self.fp16 and self.bf16:
            raise ValueError("--fp16 and --bf16 are two ways to compute: give one")
        if self.precision is not None and (self.fp16 or self.bf16):
            flag = "--fp16" if self.fp16 else "--bf16"
            raise ValueError(f"--precision {self.precision} and {flag} both say how to compute: give one")
        if self.precision not in (None, "auto"):  # from here on, bf16 and fp16 tell
            self.fp16, self.bf16, self.precision = self.precision == "fp16", self.precision == "bf16", None
        if self.resume and self.overwrite_output_dir:
            raise ValueError("--resume goes on with a run, --overwrite_output_dir ends it: give one")
        check_range(
            self,
            "at least 1",
            lambda x: x >= 1,
            *("num_train_epochs", "max_steps", "per_device_train_batch_size", "per_device_eval_batch_size"),
            *("gradient_accumulation_steps", "eval_steps", "logging_steps", "save_steps", "save_total_limit", "plan"),
        )
        check_range(self, "above 0 and finite", lambda x: 0 < x < math.inf, "learning_rate", "adam_epsilon")
        check_range(self, "above 0", lambda x: x > 0, "max_grad_norm")
        check_range(self, "at least 0", lambda x: x >= 0, "weight_decay", "warmup_steps")
        check_range(self, "at least 0 and below 2^63", lambda x: 0 <= x < 2**63, "seed")
        check_range(self, "at least 0 and below 1", lambda x: 0 <= x < 1, "adam_beta1", "adam_beta2", "dropout")
        check_range(self, "between 0 and 1", lambda x: 0 <= x <= 1, "min_lr_ratio")

    @property
    def config_changes(self) -> dict[str, Any]:
        """The fields of the model's config.json that these settings change."""
        return {} if self.dropout is None else dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), self.dropout)


def check_range(config: Any, wanted: str, holds: Callable[[Any], bool], *names: str) -> None:
    """Raises a ValueError that names the flag where a field that is set does not hold."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not holds(value):  # this way round, NaN is refused too
            raise ValueError(f"--{name} must be {wanted}, got {value}")


def require(config: Any, name: str, what: str) -> Any:
    """The value of a flag without a default; a ValueError that says what it needs where it is unset."""
    value = getattr(config, name)
    if not value:
        raise ValueError(f"--{name} is needed: {what}")
    return value
