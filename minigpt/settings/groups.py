"""The settings that scripts share. A script's dataclass inherits the groups that it reads.

The docstring under a field is its help text; `minigpt.settings.command_line` turns them into
flags, YAML and `--help`.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Literal

LOOPBACK = ("127.0.0.1", "::1", "localhost")  # addresses that only this machine can reach


@dataclass
class ModelArguments:
    """Which model."""

    model_name_or_path: str | None = None
    """Folder or hub id, such as openai-community/gpt2."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    tokenizer_name: str | None = None
    """Folder, hub id or .tiktoken file, or tiny for the small bundled vocabulary. Unset: the model's own."""
    device: str | None = None
    """cuda, cpu or mps. Unset: the fastest available."""


@dataclass
class DataArguments:
    """Which data."""

    data: list[str] = field(default_factory=list)
    """Files, folders, globs or hf://datasets/OWNER/NAME/FILE, in any of the known formats."""
    validation_data: list[str] = field(default_factory=list)
    """Data to evaluate on. Unset: a fraction of data, see validation_split."""
    validation_split: float = 0.05
    """Fraction of data held out for validation if there is no validation_data; 0 holds out none."""
    skip_bad_records: int = 0
    """Skip and count up to this many invalid records; one more is an error."""
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
    """Replaces the template's trigger word for an instruction."""
    trigger_input: str | None = None
    """Replaces the template's trigger word for an input."""
    trigger_output: str | None = None
    """Replaces the template's trigger word for an output."""
    trigger_human: str | None = None
    """Replaces the template's trigger word for a user turn."""
    trigger_assistant: str | None = None
    """Replaces the template's trigger word for an assistant turn."""

    @property
    def triggers(self) -> dict[str, str | None]:
        """The changed trigger words, as `get_template` takes them."""
        names = ("instruction", "input", "output", "human", "assistant")
        return {name: getattr(self, f"trigger_{name}") for name in names}


@dataclass
class SamplingArguments:
    """How answers are sampled."""

    max_new_tokens: int = 256
    """Maximum answer length in tokens, at most half of the model's context."""
    temperature: float = 0.0
    """0 is greedy decoding; higher values are more random."""
    top_k: int = 0
    """Sample from the k most likely tokens only; 0 means all."""
    top_p: float = 1.0
    """Nucleus sampling: sample from the most likely tokens that together have this probability."""
    repetition_penalty: float = 1.0
    """Above 1: tokens that already occurred become less likely."""
    seed: int | None = None
    """Random seed. Unset: different answers each time."""

    def __post_init__(self) -> None:
        check_range(self, "at least 1", lambda x: x >= 1, "max_new_tokens")
        check_range(self, "at least 0 and finite", lambda x: 0 <= x < math.inf, "temperature")
        check_range(self, "at least 0", lambda x: x >= 0, "top_k")
        check_range(self, "above 0 and at most 1", lambda x: 0 < x <= 1, "top_p")
        check_range(self, "above 0 and finite", lambda x: 0 < x < math.inf, "repetition_penalty")
        check_range(self, "at least 0 and below 2^63", lambda x: 0 <= x < 2**63, "seed")


@dataclass
class QuantizeArguments:
    """Quantized weights for inference."""

    quantize: Literal["int8", "fp16"] | None = None
    """Quantize the weights for faster inference on a CPU. fp16: the same answers except at near ties. int8: less
    precise, and the fastest for one conversation. Unset: not quantized."""


@dataclass
class ServeArguments:
    """Serve OpenAI's API and a chat page instead of the terminal (needs the extra serve)."""

    serve: bool = False
    """Serve until Ctrl-C or SIGTERM. The sampling settings are the defaults of requests."""
    host: str = "127.0.0.1"
    """Address to listen on. Any other than loopback needs api_key."""
    port: int = 8000
    """Port to listen on; 0 picks a free one."""
    api_key: str | None = None
    """API key that clients must send. Unset: the environment variable MINIGPT_API_KEY, which other users cannot read;
    without either no key is needed."""
    max_batch_size: int = 8
    """Requests generated in one batch; the KV cache is allocated for this many."""
    max_queue: int = 64
    """Requests that may wait in the queue; further ones get status 429."""

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
    """Sample answers during training, or predictions on a dataset."""

    eval_samples: int = 2
    """Sample answers to print at each evaluation."""
    max_new_tokens: int = 128
    """Maximum answer length in tokens, at most half of the model's context."""
    predict: str | None = None
    """Answer this dataset instead of training; predictions.jsonl, scores.json and predictions.html go to output_dir."""
    compare_with: str | None = None
    """Folder with predictions on the same dataset; predictions.html shows both side by side."""
    judge_api_base: str | None = None
    """OpenAI-compatible server, such as http://127.0.0.1:8000/v1, whose model scores the answers from 0 to 100. The key
    is read from OPENAI_API_KEY."""
    judge_model: str | None = None
    """Name of the judge model on that server."""

    def __post_init__(self) -> None:
        if bool(self.judge_api_base) != bool(self.judge_model):
            raise ValueError("--judge_api_base and --judge_model say where the judge is and who: give both")
        if (self.compare_with or self.judge_model) and not self.predict:
            raise ValueError("--compare_with and --judge_model go with --predict")
        check_range(self, "at least 0", lambda x: x >= 0, "eval_samples")
        check_range(self, "at least 1", lambda x: x >= 1, "max_new_tokens")


@dataclass
class TrainConfig:
    """Training loop and optimizer."""

    ALTERNATIVES = ("precision", "bf16", "fp16")  # a flag for one of them replaces all three in a YAML file

    output_dir: str | None = None
    """Run folder. Unset: runs/SCRIPT."""
    overwrite_output_dir: bool = False
    """Overwrite a run in output_dir; the old run is deleted."""
    resume: str | None = None
    """latest: resume from the newest checkpoint in output_dir. auto: the same, or start a new run if there is none.
    A path: resume from that checkpoint."""
    save_steps: int | None = None
    """Write a checkpoint every so many steps and after the last. Unset: only when interrupted."""
    save_total_limit: int | None = None
    """Keep only this many newest checkpoints; the best weights are in export-best in any case. Unset: all."""
    plan: int | None = None
    """Print an estimate for this many GPUs (steps, tokens, memory, disk) and exit."""
    learning_rate: float = 5e-5
    """Peak learning rate of AdamW, reached after the warmup."""
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning rate schedule after the warmup."""
    min_lr_ratio: float = 0.0
    """Final learning rate, as a fraction of learning_rate."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly from 0."""
    num_train_epochs: int = 1
    """Passes over the training data."""
    max_steps: int | None = None
    """Number of optimizer steps; overrides num_train_epochs."""
    per_device_train_batch_size: int = 8
    """Micro-batch size: examples per forward and backward pass on each device."""
    gradient_accumulation_steps: int = 1
    """Micro-batches per optimizer step."""
    group_by_length: bool = True
    """Batch examples of similar length: less padding."""
    weight_decay: float = 0.1
    """Weight decay of matrices; biases and layer norms have none."""
    adam_beta1: float = 0.9
    """AdamW's beta1."""
    adam_beta2: float = 0.95
    """AdamW's beta2."""
    adam_epsilon: float = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: float = 1.0
    """Gradient clipping norm; inf disables clipping."""
    dropout: float | None = None
    """Dropout probability everywhere in the model. Unset: from its config.json."""
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
    """Recompute activations in backward instead of storing them: less memory, a third more time."""
    eval_steps: int | None = None
    """Evaluate every so many steps. Unset: ten times per run."""
    per_device_eval_batch_size: int = 8
    """Examples per forward pass in evaluation, on each device."""
    logging_steps: int = 10
    """Print a line every so many steps if standard error is not a terminal (a terminal shows a progress bar);
    metrics.jsonl has every step."""
    report_to: list[Literal["none", "tensorboard", "wandb"]] = field(default_factory=list)
    """Also log every step to these trackers. TensorBoard files are in output_dir/tensorboard."""
    seed: int = 42
    """Random seed of initialisation, dropout, validation split and data order."""

    def __post_init__(self) -> None:
        if self.fp16 and self.bf16:
            raise ValueError("--fp16 and --bf16 are two ways to compute: give one")
        if self.precision is not None and (self.fp16 or self.bf16):
            flag = "--fp16" if self.fp16 else "--bf16"
            raise ValueError(f"--precision {self.precision} and {flag} both say how to compute: give one")
        if self.precision not in (None, "auto"):  # from here on, bf16 and fp16 tell
            self.fp16, self.bf16, self.precision = self.precision == "fp16", self.precision == "bf16", None
        if self.resume and self.overwrite_output_dir:
            raise ValueError("--resume continues a run, --overwrite_output_dir deletes it: give one")
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
    """Raises `ValueError` naming the flag if a field that is set violates the condition."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not holds(value):  # this way round, NaN is refused too
            raise ValueError(f"--{name} must be {wanted}, got {value}")


def require(config: Any, name: str, what: str) -> Any:
    """The value of a required flag; raises `ValueError` saying what it should be if it is unset."""
    value = getattr(config, name)
    if not value:
        raise ValueError(f"--{name} is needed: {what}")
    return value
