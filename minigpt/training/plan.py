"""What a run takes, before it runs: steps, memory of each GPU, disk. Arithmetic only; nothing is allocated.

Weights, gradients and optimizer, and how ZeRO divides them, are counted as in Rajbhandari et al. 2019 (ZeRO,
arXiv:1910.02054). Activations are counted tensor by tensor, as autograd keeps them for `minigpt/model/gpt2.py`.

Shapes: N = B * T tokens of a micro-batch, C = n_embd, nh heads, V = vocab_size. All amounts are bytes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from minigpt.model.base import ModelConfig
from minigpt.model.families import model_from_config
from minigpt.model.head import CHUNK_ELEMENTS, CHUNK_ROWS
from minigpt.model.weights import SkipInit
from minigpt.settings.groups import TrainConfig
from minigpt.training.engines.deepspeed_config import deepspeed_config
from minigpt.training.engines.state import checkpoint_bytes

Precision = Literal["fp32", "autocast", "bf16", "fp16"]  # autocast: fp32 weights, bf16 arithmetic; then 16-bit weights
Lengths = Sequence[int] | np.ndarray
LEVELS = ("ZeRO 0: nothing", "1: + optimizer", "2: + gradients", "3: + parameters")  # what each stage divides

BUCKET_SIZE = 5e8  # DeepSpeed's default, in elements


@dataclass(frozen=True)
class Memory:
    """What one GPU holds at its fullest: backward of a later micro-batch, the earlier ones' gradients still there."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float = 0
    buffers: float = 0

    @property
    def total(self) -> float:
        return self.parameters + self.gradients + self.optimizer + self.activations + self.buffers


@dataclass(frozen=True)
class Plan:
    """What a run comes to."""

    parameters: int
    examples: int
    steps: int
    epochs: float
    tokens: int
    """Read in the whole run, padding not counted."""
    longest: int
    """Positions of the longest example, to which its micro-batch is padded."""
    window: str
    """How an optimizer step's examples come together."""
    precision: str
    stage: int
    memory: list[Memory]
    """Of each GPU, under ZeRO stages 0, 1, 2 and 3."""
    offloaded: float
    """Optimizer state and weights that each process keeps in the host's memory instead."""
    checkpoint: int
    checkpoints: int
    """How many checkpoints lie on the disk at the end."""
    export: int

    def table(self) -> str:
        """The plan as text; `<` marks the stage that the configuration uses."""
        columns = ("parameters", "gradients", "optimizer", "activations", "buffers", "total")
        rows = [
            ("model", f"{self.parameters:,} parameters, {self.precision}"),
            ("steps", f"{self.steps:,} ({self.epochs:.2f} epochs of {self.examples:,} examples)"),
            ("a step", f"{self.window}, {self.tokens / self.steps:,.0f} tokens on average"),
            ("tokens", f"{self.tokens:,}; the longest example has {self.longest:,}"),
            ("", ""),
            ("GiB per GPU", "".join(f"{column:>12}" for column in columns)),
        ]
        for stage, (level, memory) in enumerate(zip(LEVELS, self.memory)):
            amounts = "".join(f"{getattr(memory, column) / 2**30:12.2f}" for column in columns)
            rows.append((level, amounts + " <" * (stage == self.stage)))
        if self.offloaded:
            rows.append(("host memory", f"{self.offloaded / 2**30:.2f} GiB for each GPU, where ZeRO offloads to it"))
        disk = self.checkpoints * self.checkpoint
        rows += [
            ("", ""),
            ("a checkpoint", f"{self.checkpoint / 2**30:.2f} GiB; {self.checkpoints:,} of them {disk / 2**30:.2f} GiB"),
            ("while saving", f"{self.checkpoint / 2**30:.2f} GiB more: the oldest goes when the newest is complete"),
            ("export", f"{self.export / 2**30:.2f} GiB, and as much for export-best"),
        ]
        return "\n".join(f"{name:16} {value}".rstrip() for name, value in rows)


def plan(
    config: TrainConfig,
    model_config: ModelConfig,
    lengths: Lengths,
    replay_lengths: Lengths = (),
    replay_ratio: float = 0.0,
    *,
    deepspeed: Mapping[str, Any] | None = None,
) -> Plan:
    """The plan of a run on `config.plan` GPUs.

    Args:
        model_config: its dropout counts.
        lengths: ids of each training example, as a store's `lengths`; the model looks at one position less.
        replay_lengths, replay_ratio: of `replay_data`, as `train` takes them.
        deepspeed: what DeepSpeed is given, all values filled in; None is what the flags ask for.

    Raises:
        ValueError: there is nothing to train on.
    """
    if len(lengths) == 0:
        raise ValueError("the training data is empty: give more of it, or hold out less (--validation_split)")
    gpus = config.plan or 1
    if deepspeed is None and (config.deepspeed or config.fp16):
        deepspeed = deepspeed_config(config, model_config.width, gpus, "cuda")
    positions, replayed = np.asarray(lengths) - 1, np.asarray(replay_lengths, dtype=np.int64) - 1
    batch, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
    window_size = batch * accumulation * gpus
    steps_per_epoch = math.ceil(len(positions) / window_size)
    steps = config.max_steps or config.num_train_epochs * steps_per_epoch
    tokens = int(positions.sum()) * steps / steps_per_epoch
    longest = int(max(positions.max(), replayed.max(initial=0)))
    window = f"{batch} examples x {accumulation} accumulated x {gpus} GPUs = {window_size}"
    if len(replayed) and replay_ratio > 0:
        count = max(1, round(window_size * replay_ratio))
        tokens += steps * count * replayed.mean()
        window += f" + {count} replayed"

    n_parameters = count_parameters(model_config)
    zero = deepspeed["zero_optimization"] if deepspeed else {"reduce_bucket_size": 1e8}  # as in configs/deepspeed
    zero_precision: Precision = "fp16" if config.fp16 else "bf16" if config.bf16 else "fp32"
    plain_precision: Precision = "autocast" if config.bf16 else zero_precision  # ZeRO 0 in fp16: for comparison only
    types = (deepspeed or {}).get("data_types", {})
    fp32_sums = zero_precision != "fp32" and types.get("grad_accum_dtype", "fp32") == "fp32"
    memory, offloaded = [], 0.0
    stage = int(zero.get("stage", 0))
    for level in range(4):
        precision = plain_precision if level == 0 else zero_precision
        states = model_states(n_parameters, gpus, level, precision, fp32_sums)
        parameters, gradients, optimizer = states.parameters, states.gradients, states.optimizer
        kept = 0.0
        if level >= 1 and _on_host(zero, "offload_optimizer"):
            kept, optimizer = kept + optimizer, 0.0
        if level == 3 and _on_host(zero, "offload_param"):
            kept, parameters = kept + parameters, 0.0
        if level == stage:
            offloaded = kept
        activations = activation_bytes(model_config, batch, longest, precision, config.gradient_checkpointing)
        buffers = _buffers(zero, n_parameters, gpus, level, precision, fp32_sums)
        memory.append(Memory(parameters, gradients, optimizer, activations, buffers))

    saved = math.ceil(steps / config.save_steps) if config.save_steps else 1  # one: when interrupted
    return Plan(
        parameters=n_parameters,
        examples=len(positions),
        steps=steps,
        epochs=steps / steps_per_epoch,
        tokens=round(tokens),
        longest=longest,
        window=window,
        precision=zero_precision,
        stage=stage,
        memory=memory,
        offloaded=offloaded,
        checkpoint=checkpoint_bytes(n_parameters, stage if deepspeed else None, zero_precision),
        checkpoints=min(saved, config.save_total_limit or saved),
        export=4 * n_parameters,
    )


def count_parameters(config: ModelConfig) -> int:
    """All of them, a tied head once: counted on the meta device, without memory."""
    with torch.device("meta"), SkipInit():
        return model_from_config(config).num_parameters()


def model_states(n_parameters: float, gpus: int, stage: int, precision: Precision, fp32_sums: bool = False) -> Memory:
    """Weights, gradients and optimizer of each GPU.

    Adam keeps two fp32 moments. DeepSpeed also keeps a master copy of the weights in fp32, beside weights and
    gradients of 2 bytes in half precision.

    The example of the ZeRO paper's figure 1: 7.5e9 parameters in fp16 on 64 GPUs.

    >>> [f"{model_states(7.5e9, 64, stage, 'fp16').total / 1e9:.1f} GB" for stage in range(4)]
    ['120.0 GB', '31.4 GB', '16.6 GB', '1.9 GB']

    Args:
        fp32_sums: half-precision gradients are summed in fp32 (`grad_accum_dtype`), as they are here by default.
    """
    weight = 2 if precision in ("bf16", "fp16") else 4
    master = 4 if stage > 0 or weight == 2 else 0
    gradient = 4 if fp32_sums and stage > 0 else weight
    if fp32_sums and stage == 1 and precision == "bf16":
        gradient += 2  # DeepSpeed's BF16_Optimizer, which serves this stage alone, keeps both
    return Memory(
        parameters=weight * n_parameters / (gpus if stage == 3 else 1),
        gradients=gradient * n_parameters / (gpus if stage >= 2 else 1),
        optimizer=(master + 8) * n_parameters / (gpus if stage >= 1 else 1),
    )


def activation_bytes(
    config: Any, batch_size: int, length: int, precision: Precision, gradient_checkpointing: bool = False
) -> int:
    """The most that a forward and backward pass holds beside weights and gradients, every target supervised.

    All layers' tensors, and then the larger of the head's work and the first step of backward. With
    `gradient_checkpointing` a layer keeps its input only, and one layer at a time is whole.
    """
    tokens = batch_size * length
    inner = config.n_inner or 4 * config.n_embd
    width = 4 if precision == "fp32" else 2
    layers = saved_bytes(config, batch_size, length, precision, gradient_checkpointing)
    backward = tokens * (2 * inner + config.n_embd) * width  # gradients around the GELU, and the residual stream's
    if gradient_checkpointing:
        backward += tokens * _layer_bytes(config, precision)
    return layers + max(backward, _head_work(config, tokens, precision))


def saved_bytes(
    config: Any, batch_size: int, length: int, precision: Precision, gradient_checkpointing: bool = False
) -> int:
    """What autograd keeps of the layers between forward and backward; the head's own is not counted here.

    The attention is `scaled_dot_product_attention` by a fused kernel, which keeps no (T,T) scores, and dropout's
    masks are a byte an element: so it is on CUDA. Elsewhere, dropout inside the attention costs the scores as well.
    """
    C, inner = config.n_embd, config.n_inner or 4 * config.n_embd
    residual = 4 if precision in ("fp32", "autocast") else 2  # under autocast, the residual stream stays fp32
    layer = residual * C if gradient_checkpointing else _layer_bytes(config, precision)
    embedding = 8 + (C if config.embd_pdrop else 0)  # the ids, and the mask of dropout
    final_norm = residual * C + 2 * 4
    casts = 0
    if precision == "autocast":  # copies of the matrices, which live until autocast ends
        casts = config.n_layer * 2 * (4 * C * C + 2 * C * inner)
    return batch_size * length * (embedding + config.n_layer * layer + final_norm) + casts


def _layer_bytes(config: Any, precision: Precision) -> int:
    """Of one token in one Block. In fp32 and without dropout this is about 64 C, under autocast 36 C."""
    C, inner = config.n_embd, config.n_inner or 4 * config.n_embd
    width, residual = 4 if precision == "fp32" else 2, 4 if precision in ("fp32", "autocast") else 2
    norms = 2 * (residual * C + 2 * 4)  # each its input, and mean and 1/std in fp32
    attention = width * (C + 3 * C + C) + 4 * config.n_head  # input, q k v, output; the log-sum-exp of each row
    mlp = width * (C + inner + inner)  # input, GELU's input, its output
    masks = 2 * C if config.resid_pdrop else 0
    return norms + attention + mlp + masks


def _head_work(config: Any, tokens: int, precision: Precision) -> int:
    """The most that `linear_cross_entropy` holds: a chunk of logits in forward, or two gradients in backward."""
    C, matrix = config.n_embd, config.vocab_size * config.n_embd
    logits = min(tokens, CHUNK_ROWS, max(1, CHUNK_ELEMENTS // config.vocab_size)) * config.vocab_size
    half = precision != "fp32"
    # hidden states before and after the choice of supervised ones, their gradient, and autocast's copy
    hidden = (12 if precision in ("fp32", "autocast") else 6) * tokens * C
    # the head's gradient in fp32, and logits with what logsumexp makes of them; in half precision, later, logits,
    # their gradient and a chunk's part of the head's
    forward = hidden + 4 * matrix + (max(8 * logits, 6 * logits + 2 * matrix) if half else 8 * logits)
    if precision == "autocast":
        forward += 2 * matrix  # its copy of the head
    backward = (4 + 4) * (matrix + tokens * C) + (2 * (matrix + tokens * C) if half else 0)  # kept, scaled, cast
    return max(forward, backward)


def _on_host(zero: Mapping[str, Any], name: str) -> bool:
    return ((zero.get(name) or {}).get("device") or "none") != "none"


def _buffers(
    zero: Mapping[str, Any], n_parameters: int, gpus: int, stage: int, precision: Precision, fp32_sums: bool
) -> float:
    """What DeepSpeed needs besides: buckets of gradients on their way, copies of them, weights gathered for use."""
    if stage == 0:
        return 0
    if stage == 1 and precision == "bf16" and fp32_sums:  # BF16_Optimizer reduces copies in fp32 and in bf16
        return (4 + 2) * min(n_parameters, BUCKET_SIZE)
    width = 4 if precision == "fp32" else 2
    travelling = 4 if precision == "fp32" else 2 + 4  # a half-precision bucket, and its fp32 copy for the other ranks
    bucket = float(zero.get("reduce_bucket_size", BUCKET_SIZE))
    if stage == 3:
        live = min(n_parameters, float(zero.get("stage3_max_live_parameters", 1e9)))
        prefetch = min(n_parameters, float(zero.get("stage3_prefetch_bucket_size", 5e7)))
        return travelling * bucket + width * (live + prefetch)
    bucket *= (4 if stage == 1 and fp32_sums else travelling) * (2 if zero.get("overlap_comm") else 1)
    if stage == 2 and not fp32_sums:  # beside the sum: what a micro-batch adds to it, and a flat copy
        bucket += 2 * width * n_parameters / gpus
    return bucket
